"""The typed, immutable configuration: every key with its type, default and meaning.

config_files.py reads it from TOML; rules.py checks keys against each other. Each field's docstring
is its entry in the configuration reference. Unknown keys are errors, because a misspelled key would
otherwise silently train a different model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mot_megatron.errors import ConfigError
from mot_megatron.files import expand_path

VOCABULARY_MULTIPLE = 128
"""A corpus vocabulary is rounded up to a multiple of this, so common TP sizes divide it."""

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UserPath = Annotated[Path, AfterValidator(expand_path)]
"""A path in which a leading ~ is expanded and variables are refused."""


class Section(BaseModel):
    """A table of the configuration file. It is immutable and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Section):
    """Name, output folder and seed of the run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder under ``run.directory``. Starts with a letter or digit,
    followed by letters, digits, dots, dashes and underscores."""
    directory: UserPath = Path("runs")
    """Parent folder of all runs, absolute or relative to the working directory."""
    seed: NonNegativeInt = 1234
    """Seed of the initial weights and of the order of the training data, the same on all ranks."""
    initialize_from: UserPath | None = None
    """Begin with the weights of this model instead of random ones: the folder of a run, of its
    checkpoints or of one checkpoint, in any layout. Optimizer, learning rate and position in the
    data begin anew. The corpus may be another one with the same modalities, special tokens and
    codebooks. Once the run has a checkpoint of its own, it continues from that."""


class SourceConfig(Section):
    """One corpus of a blend; all of them have the same vocabulary."""

    corpus: UserPath
    """Folder of the prepared corpus, which contains corpus.toml."""
    weight: PositiveFloat
    """The source's share of the training tokens, relative to the other sources' weights."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of the source in logs; absent: the name of its folder."""

    @property
    def label(self) -> str:
        """``name``, or its default, the name of the folder."""
        return self.name or self.corpus.name


class DataConfig(Section):
    """The training data and how its documents are packed into sequences."""

    corpus: UserPath | None = None
    """Folder of the prepared corpus, which contains corpus.toml; absent: ``sources`` are given."""
    sources: tuple[SourceConfig, ...] = ()
    """Several corpora in place of ``corpus``, blended by weight."""
    seq_length: PositiveInt = 4096
    """Length of a packed sequence in tokens."""
    long_documents: Literal["refuse", "split", "truncate"] = "refuse"
    """What to do with documents that are longer than ``seq_length``, in training and evaluation.
    refuse: such a document is an error. split: cut it into several documents, between its segments
    if possible, and never inside of a picture. truncate: read only the first of these."""
    packing: Literal["sequence", "budget"] = "sequence"
    """How training documents are packed. sequence: fill each sequence as far as possible. budget:
    also give every micro-batch the same number of tokens of each tower, in proportion to the
    tower's share of the corpus, so that shapes are static; the remaining positions are padded.
    Evaluation always packs by sequence."""
    prefetch: bool | None = None
    """Prepare the micro-batches of the next step in a thread while the present step runs, on a GPU
    in pinned memory. Absent: on a GPU. On a CPU, the thread takes its time from the step."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of all corpora."""
        return tuple(source.corpus for source in self.sources) or (self.corpus or Path(),)

    @property
    def places(self) -> str:
        """The folders of all corpora, for messages."""
        return ", ".join(map(str, self.folders))


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
    towers: dict[str, TowerConfig] = {}
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


class ParallelConfig(Section):
    """The layout: sizes of the parallel axes, placement of towers, and ZeRO.

    The number of data-parallel ranks, those that share gradients of common weights, is the world
    size divided by the tensor- and pipeline-parallel sizes; it includes the modality groups.
    """

    tensor_model_parallel_size: PositiveInt = 1
    """Tensor parallelism: number of ranks over which every matrix is split."""
    sequence_parallel: bool = False
    """Also split the residual stream over the tensor-parallel ranks; needs
    tensor_model_parallel_size of 2 or more. Required for tensor parallelism with experts."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline parallelism: number of stages, each of which holds part of the layers."""
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None = None
    """Number of model pieces per pipeline stage, for megatron-core's interleaved schedule; absent:
    one piece per stage, the plain 1F1B schedule."""
    pipeline_layers: tuple[PositiveInt, ...] | None = None
    """Number of layers of each piece, in model order: one entry per pipeline stage, or per stage
    and piece if interleaved, with sum model.num_layers; absent: the same number for all pieces."""
    modality_parallel_size: PositiveInt = 1
    """Modality parallelism: number of ranks in a modality group. They are consecutive data-parallel
    ranks, hold the towers between them and exchange q, k, v and the attention output. 1: every rank
    holds all towers."""
    placement: Literal["auto"] | tuple[dict[str, PositiveFloat], ...] = "auto"
    """Which rank of a modality group holds which towers: one table per rank, from tower name to the
    share of the tower's tokens it processes, as in {text = 1.0, image = 0.5}; each tower's shares
    sum to 1. auto: as few copies of towers as possible, then the most balanced FLOPs."""
    attention_exchange: Literal["sequence", "heads"] = "sequence"
    """What each rank of a modality group attends for. sequence: its own sequences, with all heads;
    heads: all sequences of the group, with its share of the heads, so that a sequence may be longer
    than one rank could store."""
    expert_model_parallel_size: PositiveInt = 1
    """Expert parallelism: number of ranks over which the experts of a tower are split, taken from
    the data-parallel ranks that hold the tower. 1: each of those ranks holds all its experts."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed ZeRO shards over the data-parallel ranks. 0: nothing; 1: optimizer state; 2:
    also gradients; 3: also weights. 0 needs fp32; pipeline parallelism allows 1 only, modality and
    expert parallelism 1 and 2."""
    offload: Literal["none", "optimizer"] = "none"
    """What to move to host memory. none: nothing; optimizer: the optimizer state, including the
    fp32 weights, which the CPU then updates; needs zero_stage 1 or more."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: NonNegativeFloat = 1.5e-5
    """Learning rate at the end of the decay and after it; unused with the constant style."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of linear warm-up from 0 to ``lr``; 0: no warm-up; absent: 2% of
    training.train_steps, rounded down."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from ``lr`` to ``min_lr``; constant: stay at ``lr`` after warm-up."""
    lr_decay_steps: PositiveInt | None = None
    """Optimizer step at which the decay reaches ``min_lr``, counted from the start of training, the
    warm-up included; absent: training.train_steps."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of all matrices, the embedding included; norm weights and biases have
    none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the running mean of the gradient (first moment)."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the running mean of the squared gradient (second moment)."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment in the denominator of the update."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip gradients to this L2 norm, taken over all parameters and ranks; 0: no clipping."""


class TrainingConfig(Section):
    """Length of the run, batch sizes, precision and recomputation."""

    train_steps: PositiveInt
    """Number of optimizer steps of the whole run, including steps before a resume."""
    micro_batch_size: PositiveInt = 1
    """Sequences per data-parallel rank in one forward and backward pass; with
    parallel.attention_exchange = "heads", sequences per modality group."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step over all ranks, a multiple of the sequences that all ranks
    process in one pass; gradients are accumulated over several passes if needed."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; the optimizer keeps fp32 weights in both cases."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What to recompute in backward instead of storing its activations. none: nothing; selective:
    the attention core; full: whole layers."""
    on_spike: Literal["stop", "skip", "rollback"] | None = None
    """What to do about a step whose loss or gradient norm is not finite, or more than six standard
    deviations above the mean of the last 128 steps. No update is made, and the batch's documents
    are written to `spikes.jsonl`. stop: end with an error. skip: go on with the next step; end
    after ten in a row. rollback: go back to the newest checkpoint and go on behind the batch;
    absent: end with an error if a loss or norm is not finite, and look for nothing else."""
    max_rollbacks: PositiveInt = 3
    """Most rollbacks of the whole run, after which the next spike ends it."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step of which traces are written to the run's folder, for TensorBoard's
    profiler plugin and Perfetto, with a table of operators; absent: none. Where the time of the
    next step went is printed. All these steps are slower."""
    profile_ranks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Ranks that write traces."""


class CheckpointConfig(Section):
    """When to save checkpoints; one is always saved after the last step."""

    interval_steps: PositiveInt = 1000
    """Optimizer steps between checkpoints; one is always saved after the last step."""
    keep: PositiveInt = 2
    """Number of most recent complete checkpoints to keep; older ones are deleted."""
    keep_every_steps: NonNegativeInt = 0
    """Checkpoints of multiples of this step are never deleted, in addition to the most recent; a
    multiple of interval_steps. 0: none."""
    asynchronous: bool | None = None
    """Write checkpoints while training goes on; training stops only to copy the state to host
    memory. Absent: on CPUs, where this was tested, but not on GPUs."""


class EvaluationConfig(Section):
    """When and on how much of the validation split to evaluate."""

    interval_steps: PositiveInt = 500
    """Optimizer steps between evaluations of the held-out loss; there is always one after the last
    step."""
    max_sequences: PositiveInt | None = None
    """Number of packed sequences of the validation split to evaluate, over all ranks; absent: all.
    The evaluation after the last step uses ``final_max_sequences`` instead."""
    final_max_sequences: PositiveInt | None = None
    """Number of packed sequences of the validation split to evaluate after the last step, over all
    ranks; absent: all."""
    per_source: bool = False
    """Also evaluate every source of a blend alone, on as many sequences; needs ``data.sources``."""


class LoggingConfig(Section):
    """Console and TensorBoard."""

    interval_steps: PositiveInt = 10
    """Optimizer steps between console lines and TensorBoard scalars, which average over them."""
    sample_interval_steps: PositiveInt | None = None
    """Optimizer steps between generated samples in TensorBoard; absent: only after the last step.
    Not allowed with pipeline or modality parallelism, where training generates no samples."""
    peak_flops: PositiveFloat | None = None
    """Peak FLOP/s of one device, the reference for MFU; absent: NVIDIA's data sheet for known GPUs,
    or the measured speed of a matrix multiplication on other devices."""


class ScalingConfig(Section):
    """Settings of scaling benchmarks; training ignores them."""

    layouts: dict[PositiveInt, dict[str, Any]] = {}
    """By number of ranks, tables of the configuration that replace its values there, as in
    `64 = { parallel = { modality_parallel_size = 2 } }`."""


class Config(Section):
    """The whole configuration file."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    scaling: ScalingConfig = ScalingConfig()

    @property
    def run_directory(self) -> Path:
        """Folder for all output of the run."""
        return self.run.directory / self.run.name

    @property
    def num_warmup_steps(self) -> int:
        """``optimizer.lr_warmup_steps``, or its default, 2% of ``training.train_steps``."""
        if self.optimizer.lr_warmup_steps is not None:
            return self.optimizer.lr_warmup_steps
        return self.training.train_steps // 50

    def resolved_for(
        self,
        modality_names: Sequence[str],
        corpus_vocab_size: int,
        widths: Mapping[str, int] = MappingProxyType({}),
    ) -> Config:
        """Return a copy completed from a corpus: vocabulary size, widths, modalities in its order.

        Raises:
            ConfigError: The modalities are not those of the corpus, ``model.vocab_size`` is too
                small for it, or an objective does not fit the content of its modality.
        """
        model = self.model
        if set(model.modalities) != set(modality_names):
            raise ConfigError(
                f"model.modalities has {', '.join(sorted(model.modalities))}; needed for"
                f" {self.data.places}: {', '.join(modality_names)}"
            )
        rounded = -(-corpus_vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        vocab_size = model.vocab_size or rounded
        if vocab_size < corpus_vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size} is smaller than the {corpus_vocab_size} tokens"
                f" of {self.data.places}; allowed: at least that many"
            )
        modalities = {
            name: _with_width(name, model.modalities[name], widths.get(name))
            for name in modality_names
        }
        resolved = model.model_copy(update={"modalities": modalities, "vocab_size": vocab_size})
        return self.model_copy(update={"model": resolved})

    def to_toml(self) -> str:
        """Return TOML text from which ``load_config`` reads an equal configuration."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def sequences_per_pass(self, data_parallel_size: int) -> int:
        """Return the number of sequences in one micro-batch over all ranks.

        Every data-parallel rank contributes ``micro_batch_size`` sequences; with
        ``attention_exchange = "heads"`` every modality group does, so that a sequence may be longer
        than one rank could store.
        """
        if self.parallel.attention_exchange == "heads":
            data_parallel_size //= self.parallel.modality_parallel_size
        return self.training.micro_batch_size * data_parallel_size

    @property
    def pool_sequences(self) -> int:
        """Sequences pooled in one routing decision.

        These are the sequences of one micro-batch of a rank, or of all ranks of a modality group: a
        tower that only one of them holds routes the tokens of all of them together.
        """
        return self.sequences_per_pass(self.parallel.modality_parallel_size)

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Return the number of micro-batches per rank and optimizer step."""
        return self.training.global_batch_size // self.sequences_per_pass(data_parallel_size)


def _with_width(name: str, modality: ModalityConfig, width: int | None) -> ModalityConfig:
    """Return a modality with the width of the corpus, if its objective fits."""
    kind, content = modality.objective.kind, "tokens" if width is None else "vectors"
    if (kind == "next_token") != (width is None):
        raise ConfigError(
            f"model.modalities.{name}.objective.kind = {kind!r} is not for {content}, of which"
            f" {name} consists in the corpus"
        )
    if modality.width not in (None, width):
        raise ConfigError(
            f"model.modalities.{name}.width = {modality.width}; the corpus has {width}"
        )
    return modality.model_copy(update={"width": width})
