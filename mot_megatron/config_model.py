"""The ``[model]`` table of the configuration: architecture, towers, modalities and objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from mot_megatron.config_section import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from mot_megatron.errors import ConfigError

VOCABULARY_MULTIPLE = 128
"""A corpus vocabulary is rounded up to a multiple of this, so common TP sizes divide it."""


@dataclass(frozen=True)
class LossUnit:
    """The unit in which losses of an objective are reported."""

    name: str
    """As it follows a number."""
    factor: float
    """Reported value of a loss of 1 as the objective computes it."""


BITS_PER_TOKEN = LossUnit("bits per token", 1 / math.log(2))
"""Cross entropy is computed in nats."""


def common_unit(units: Iterable[LossUnit]) -> LossUnit | None:
    """Return the unit if all are the same, otherwise None."""
    different = set(units)
    return different.pop() if len(different) == 1 else None


SQUARED_ERROR = LossUnit("squared error", 1.0)
"""Mean over the numbers of a vector."""


class ObjectiveConfig(Section):
    """What a modality is trained to predict."""

    kind: Literal["next_token", "flow_matching", "diffusion"] = "next_token"
    """next_token: the id of the next position. The others are for modalities whose positions are
    vectors, which attend to all of their image. flow_matching: the velocity from data to noise on a
    straight line; diffusion: the noise, with the cosine schedule of 1000 steps."""
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """How flow_matching draws the time, the share of noise, of each image."""
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of images that see nothing but themselves, so that samples can be guided."""
    context_noise_limit: float = Field(default=1.0, gt=0, le=1)
    """Largest time of an image that other content follows in its document, which needs to see
    it."""


class ModalityConfig(Section):
    """Tower, objective and loss weight of one modality of the corpus."""

    tower: str = Field(min_length=1)
    """Tower (set of untied weights) for this modality's tokens; modalities may share a tower."""
    loss_weight: NonNegativeFloat = 1.0
    """Weight of this modality's labels in the loss, a weighted mean over all labels of the global
    batch. 0: its labels do not count. At least one modality needs a weight above 0. A vector to
    predict counts as a label."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the modality is trained to predict."""
    width: PositiveInt | None = None
    """Numbers of a vector, of a modality whose positions are vectors; absent: as in the corpus."""

    @property
    def loss_unit(self) -> LossUnit:
        """Unit of this modality's losses."""
        return BITS_PER_TOKEN if self.objective.kind == "next_token" else SQUARED_ERROR


class ExpertsConfig(Section):
    """A mixture of experts in place of a tower's feed-forward networks.

    Every expert has the width of a plain feed-forward network, ``model.ffn_hidden_size``.
    """

    num_moe_experts: PositiveInt
    """Number of experts per layer, E, over all ranks."""
    routing: Literal["expert_choice", "topk"] = "expert_choice"
    """Which side chooses. expert_choice: every expert takes the same number of the tower's tokens
    in a micro-batch, so load is balanced without an auxiliary loss, but a token's experts depend on
    later tokens. topk: every token takes its ``topk`` highest-scoring experts."""
    capacity_factor: PositiveFloat | None = None
    """With expert choice, the average number of experts per token; absent: 1. With top-k, the
    capacity of an expert as a multiple of an equal share of the assignments; an expert at capacity
    drops the tokens with the smallest weights; absent: unlimited, no token is dropped."""
    topk: PositiveInt | None = None
    """Experts per token with top-k routing; absent: 1. Not allowed with expert choice."""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """Function from router logits to the weights of the experts' outputs, by which experts also
    rank tokens under expert choice. With top-k, sigmoid and ``topk`` above 1, a token's weights are
    normalized to sum to 1, as in megatron-core."""
    aux_loss_coefficient: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss, added once per layer; top-k only. It is the Switch
    Transformer's loss of the tower's tokens in each sequence, averaged over the global batch with
    the number of these tokens as weight. 0: no such loss."""
    z_loss_coefficient: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss, the squared logsumexp of a token's router logits: a mean
    over the tower's tokens in the global batch, added once per layer. 0: no such loss."""
    causal_router: bool = False
    """Also train a router that predicts the experts' choices from each token alone; expert choice
    only. Generation requires it, and evaluation then also reports the loss without access to later
    tokens. It does not change how the model itself trains."""

    @property
    def experts_per_token(self) -> float:
        """Average number of experts per token, if none is dropped."""
        if self.routing == "topk":
            return float(self.topk or 1)
        return self.capacity_factor or 1.0

    @property
    def sees_the_future(self) -> bool:
        """Whether a token's experts depend on later tokens during training."""
        return self.routing == "expert_choice" or self.capacity_factor is not None

    @property
    def can_be_causal(self) -> bool:
        """Whether tokens can be routed without access to later tokens."""
        return self.routing == "topk" or self.causal_router


class TowerConfig(Section):
    """Settings of a single tower."""

    experts: ExpertsConfig | None = None
    """Mixture of experts in every layer of this tower; absent: plain feed-forward networks."""
    frozen: bool = False
    """Keep the weights that belong to this tower alone as they are: they have no gradients and no
    optimizer state. Embedding, output head and components that ``model.untied`` shares are trained
    nevertheless. A run may freeze a tower when it resumes; it cannot unfreeze one."""
    lr_mult: PositiveFloat = 1.0
    """Factor on the learning rate of the schedule for the weights that belong to this tower alone,
    and so on their weight decay too."""


class UntiedConfig(Section):
    """Which components are untied: one set of weights per tower, or one shared by all towers."""

    feed_forward: bool = True
    """Whether each tower has its own feed-forward networks; false: all towers share them."""
    qkv: bool = True
    """Whether each tower has its own q, k and v projections; false: all towers share them."""
    output_projection: bool = True
    """Whether each tower has its own attention output projections; false: all towers share them."""
    norms: bool = True
    """Whether each tower has its own pair of norms per layer; false: all towers share them."""
    qk_norm: bool = True
    """Whether each tower has its own norms of queries and keys; false: all towers share them."""
    final_norm: bool = True
    """Whether each tower has its own norm before the output head; false: all towers share it."""


class ModelConfig(Section):
    """Architecture of the transformer; with a single tower it is a dense model."""

    num_layers: PositiveInt
    """Number of transformer layers, over all pipeline stages."""
    hidden_size: PositiveInt
    """Width of the residual stream, a multiple of twice the number of attention heads."""
    num_attention_heads: PositiveInt
    """Number of query heads, over all tensor-parallel ranks."""
    num_query_groups: PositiveInt | None = None
    """Number of key-value heads (grouped-query attention), a divisor of the number of query heads;
    absent: one per query head."""
    ffn_hidden_size: PositiveInt | None = None
    """Inner width of the SwiGLU feed-forward network, or of each expert; absent: the paper's rule,
    8/3 of ``hidden_size`` rounded up to a multiple of 256."""
    vocab_size: PositiveInt | None = None
    """Number of rows of the embedding and of the output head, at least the vocabulary size of the
    corpus; absent: that size rounded up to a multiple of 128."""
    norm_placement: Literal["post", "pre"] = "post"
    """Position of a layer's norms. post: h + norm(f(h)), as in the paper; pre: h + f(norm(h)), as
    in LLaMA."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    qk_norm: bool = True
    """Apply RMSNorm over the head dimension of queries and keys, before RoPE."""
    add_qkv_bias: bool = False
    """Add a bias to the q, k and v projections, as Qwen2 does. Biases start at zero."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary position embedding (RoPE)."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output head has its own weights; false: it reuses those of the embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal distribution that every matrix is initialized from; norm
    weights start at one."""
    z_loss_coefficient: NonNegativeFloat = 1e-5
    """Coefficient of the output z-loss, which keeps logits from drifting: log(Z)^2 per label, with
    Z the denominator of the output softmax, averaged as the cross entropy is. 0: no z-loss."""
    attention_backend: Literal["auto", "sdpa", "flex"] = "auto"
    """Kernel of the global self-attention. flex: FlexAttention, CUDA only; sdpa: PyTorch's scaled
    dot-product attention, one call per document; auto: flex on CUDA, sdpa elsewhere."""
    layer_backend: Literal["auto", "torch", "triton", "compile"] = "torch"
    """Implementation of a layer's elementwise operations: norms, RoPE, SwiGLU, residual additions
    and the copies around attention. torch: PyTorch's operators, one after the other; triton: fused
    kernels, CUDA only; compile: torch.compile of the same operations; auto: triton on CUDA, torch
    elsewhere. The kernels have not run on a GPU yet, so they are not the default."""
    modalities: dict[str, ModalityConfig] = Field(min_length=1)
    """One table per modality of the corpus, by its name in the corpus; all of them are required."""
    towers: dict[str, TowerConfig] = Field(default={})
    """Settings of individual towers, by the tower names used in ``model.modalities``."""
    untied: UntiedConfig = UntiedConfig()
    """Which components have one set of weights per tower; default: all but embedding and head."""

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Names of the towers, in order of first mention in ``modalities``."""
        return tuple(dict.fromkeys(modality.tower for modality in self.modalities.values()))

    @property
    def num_towers(self) -> int:
        """Number of towers, K."""
        return len(self.tower_names)

    @property
    def towers_of_modalities(self) -> tuple[int, ...]:
        """Tower index per modality, in the order of ``modalities``."""
        names = self.tower_names
        return tuple(names.index(modality.tower) for modality in self.modalities.values())

    @property
    def experts_of_towers(self) -> tuple[ExpertsConfig | None, ...]:
        """Experts per tower, K entries; None for a tower with plain feed-forward networks."""
        plain = TowerConfig()
        return tuple(self.towers.get(name, plain).experts for name in self.tower_names)

    @property
    def frozen_towers(self) -> tuple[bool, ...]:
        """Whether each of the K towers is frozen."""
        plain = TowerConfig()
        return tuple(self.towers.get(name, plain).frozen for name in self.tower_names)

    @property
    def lr_mults(self) -> tuple[float, ...]:
        """Factor on the learning rate of each of the K towers."""
        plain = TowerConfig()
        return tuple(self.towers.get(name, plain).lr_mult for name in self.tower_names)

    @property
    def balanced_towers(self) -> tuple[int, ...]:
        """Indices of the towers whose experts a loss balances."""
        return tuple(
            tower
            for tower, experts in enumerate(self.experts_of_towers)
            if experts is not None and experts.aux_loss_coefficient > 0
        )

    @property
    def has_experts(self) -> bool:
        """Whether any tower has experts."""
        return any(self.experts_of_towers)

    @property
    def sees_the_future(self) -> bool:
        """Whether in any tower a token's experts depend on later tokens during training."""
        return any(experts and experts.sees_the_future for experts in self.experts_of_towers)

    @property
    def can_be_causal(self) -> bool:
        """Whether every tower can route tokens without access to later tokens."""
        return all(experts is None or experts.can_be_causal for experts in self.experts_of_towers)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Loss weight per modality, in the order of ``modalities``."""
        return tuple(modality.loss_weight for modality in self.modalities.values())

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality of vectors, by name.

        Raises:
            ConfigError: The configuration is not resolved and does not set one.
        """
        found = {}
        for name, modality in self.modalities.items():
            if modality.objective.kind == "next_token":
                continue
            if modality.width is None:
                raise ConfigError(
                    f"model.modalities.{name}.width is absent, and no corpus was given to derive"
                    " it from"
                )
            found[name] = modality.width
        return found

    @property
    def token_modalities(self) -> tuple[int, ...]:
        """Indices of the modalities of tokens."""
        kinds = [modality.objective.kind for modality in self.modalities.values()]
        return tuple(index for index, kind in enumerate(kinds) if kind == "next_token")

    @property
    def loss_units(self) -> dict[str, LossUnit]:
        """Unit of the losses per modality, by name."""
        return {name: modality.loss_unit for name, modality in self.modalities.items()}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads: ``num_query_groups``, or one per query head."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """Inner width of SwiGLU: ``ffn_hidden_size``, or the paper's rule."""
        return self.ffn_hidden_size or 256 * -(-8 * self.hidden_size // (3 * 256))

    @property
    def num_vocabulary_rows(self) -> int:
        """``vocab_size`` of a resolved configuration.

        Raises:
            ConfigError: The configuration is not resolved and does not set it.
        """
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is absent, and no corpus was given to derive it from"
            )
        return self.vocab_size
