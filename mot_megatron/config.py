"""The typed, immutable configuration: its keys with their types, defaults and meaning.

config_files.py reads it from TOML, rules.py checks keys against each other. A field's docstring
gives its unit and says whether it counts per rank or over all ranks. Unknown keys are errors: a
misspelt key must never train a different model silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from mot_megatron.errors import ConfigError

VOCABULARY_MULTIPLE = 128
"""A vocabulary taken from a corpus is rounded up to this, so that any usual TP size divides it."""

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the configuration file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Section):
    """What the run is called and where it writes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder under ``directory``; letters, digits, dot, dash, underscore."""
    directory: Path = Path("runs")
    """Folder of all runs, relative to the working directory."""
    seed: NonNegativeInt = 1234
    """Seeds the initial weights and the order of the data."""


class DataConfig(Section):
    """Which corpus, in sequences of which length."""

    corpus: Path
    """Folder that holds corpus.toml."""
    seq_length: PositiveInt = 4096
    """Tokens per packed sequence; no document may be longer."""
    packing: Literal["sequence", "budget"] = "sequence"
    """sequence: fill each sequence as far as possible. budget: every micro-batch of a rank also has
    a fixed number of tokens of each tower, its share of the corpus, so that shapes are static; what
    documents leave is filled up. Evaluation is always packed by sequence."""


class ModalityConfig(Section):
    """How one modality of the corpus is modeled."""

    tower: str = Field(min_length=1)
    """The set of untied weights its tokens use; modalities that name the same tower share it."""
    loss_weight: NonNegativeFloat = 1.0
    """Weight of its labels in the mean over the tokens of the global batch."""


class ExpertsConfig(Section):
    """A tower's feed-forward network as a mixture of experts, each of the plain one's width."""

    num_moe_experts: PositiveInt
    """E, feed-forward networks of every layer."""
    routing: Literal["expert_choice", "topk"] = "expert_choice"
    """expert_choice: experts choose among the tower's tokens of a micro-batch, so no auxiliary loss
    is needed, but a token's experts depend on later tokens. topk: tokens choose experts."""
    capacity_factor: PositiveFloat | None = None
    """Expert choice: mean number of experts per token, c; absent: 1. Top-k: experts drop what
    exceeds this many times an equal share; absent: nothing is dropped."""
    topk: PositiveInt | None = None
    """Top-k: experts per token; absent: 1. Expert choice: must be absent."""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """What turns router logits into the weight of an expert's output. Top-k with sigmoid and k
    above 1: the weights of a token's experts are scaled to sum to 1, as in megatron."""
    aux_loss_coefficient: NonNegativeFloat = 0.0
    """Top-k: coefficient of the load-balancing loss, a mean over the tower's tokens."""
    z_loss_coefficient: NonNegativeFloat = 0.0
    """Coefficient of the mean square of the router's log-partition."""
    causal_router: bool = False
    """Expert choice: train beside the model a router that predicts the experts' choices from the
    token alone, for generation and honest evaluation; the model itself trains as without it."""

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token runs through, when nothing is dropped."""
        if self.routing == "topk":
            return float(self.topk or 1)
        return self.capacity_factor or 1.0

    @property
    def sees_the_future(self) -> bool:
        """Whether, as trained, the experts of a token depend on later tokens."""
        return self.routing == "expert_choice" or self.capacity_factor is not None

    @property
    def can_be_causal(self) -> bool:
        """Whether tokens can be routed without later ones."""
        return self.routing == "topk" or self.causal_router


class TowerConfig(Section):
    """What one tower has that the others need not have."""

    experts: ExpertsConfig | None = None
    """A mixture of experts as its feed-forward network; absent: a plain one."""


class UntiedConfig(Section):
    """Which components have one set of weights per tower; the others are shared by all towers."""

    feed_forward: bool = True
    """Feed-forward network."""
    qkv: bool = True
    """Query, key and value projections."""
    output_projection: bool = True
    """Attention output projection."""
    norms: bool = True
    """The two norms of every layer."""
    qk_norm: bool = True
    """Norms of queries and keys."""
    final_norm: bool = True
    """Norm before the output head."""


class ModelConfig(Section):
    """Shape of the transformer; the dense baseline is the same with a single tower."""

    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key-value heads (grouped-query attention); absent: as many as query heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of SwiGLU; absent: 256 * ceil((8 * hidden_size / 3) / 256), the paper's rule."""
    vocab_size: PositiveInt | None = None
    """Rows of embedding and head; absent: the corpus's, rounded up to a multiple of 128."""
    norm_placement: Literal["post", "pre"] = "post"
    """post: h + norm(f(h)), the paper's; pre: h + f(norm(h)), LLaMA's."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    qk_norm: bool = True
    """RMSNorm over the head dimension of queries and keys, before RoPE."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    untie_embeddings_and_output_weights: bool = True
    """A head of its own; false: the head is the embedding's transpose."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of every initial matrix; norms begin at one."""
    z_loss_coefficient: NonNegativeFloat = 1e-5
    """Coefficient of log(Z)^2, Z the softmax's denominator: keeps the logits from drifting."""
    attention_backend: Literal["auto", "sdpa", "flex"] = "auto"
    """Kernel of the global attention; auto: flex on CUDA, sdpa elsewhere."""
    modalities: dict[str, ModalityConfig] = Field(min_length=1)
    """Every modality of the corpus, by its name there."""
    towers: dict[str, TowerConfig] = {}
    """Settings of single towers, by the names that ``modalities`` use."""
    untied: UntiedConfig = UntiedConfig()
    """Which components are untied."""

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Distinct towers in order of first mention."""
        return tuple(dict.fromkeys(modality.tower for modality in self.modalities.values()))

    @property
    def num_towers(self) -> int:
        """K."""
        return len(self.tower_names)

    @property
    def towers_of_modalities(self) -> tuple[int, ...]:
        """Tower index of every modality, in the order of ``modalities``."""
        names = self.tower_names
        return tuple(names.index(modality.tower) for modality in self.modalities.values())

    @property
    def experts_of_towers(self) -> tuple[ExpertsConfig | None, ...]:
        """The mixture of every tower, K of them; None for a plain feed-forward network."""
        plain = TowerConfig()
        return tuple(self.towers.get(name, plain).experts for name in self.tower_names)

    @property
    def has_experts(self) -> bool:
        """Whether any tower is a mixture of experts."""
        return any(self.experts_of_towers)

    @property
    def sees_the_future(self) -> bool:
        """Whether, as trained, a token's experts depend on later tokens."""
        return any(experts and experts.sees_the_future for experts in self.experts_of_towers)

    @property
    def can_be_causal(self) -> bool:
        """Whether every tower can route tokens without later ones."""
        return all(experts is None or experts.can_be_causal for experts in self.experts_of_towers)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Loss weight of every modality, in the order of ``modalities``."""
        return tuple(modality.loss_weight for modality in self.modalities.values())

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads, ``num_attention_heads`` without grouped-query attention."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """Width of SwiGLU: ``ffn_hidden_size`` or the paper's rule."""
        return self.ffn_hidden_size or 256 * -(-8 * self.hidden_size // (3 * 256))

    @property
    def num_vocabulary_rows(self) -> int:
        """``vocab_size`` of a resolved configuration."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is absent and no corpus was given to take it from")
        return self.vocab_size


class ParallelConfig(Section):
    """How the model and its optimizer are laid over the ranks; what is left is data parallel."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every matrix."""
    sequence_parallel: bool = False
    """Split the residual stream over the tensor-parallel ranks too; needs a TP size above 1."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that each hold some of the layers."""
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None = None
    """Pieces of the model per stage, for the interleaved schedule; absent: one, plain 1F1B."""
    pipeline_layers: tuple[PositiveInt, ...] | None = None
    """Layers of every piece in the model's order; absent: equally many."""
    modality_parallel_size: PositiveInt = 1
    """Neighbors inside data parallel that hold the towers together and exchange q, k and v."""
    placement: Literal["auto"] | tuple[dict[str, PositiveFloat], ...] = "auto"
    """Per rank of a modality group, the share of each tower's tokens: {text = 1.0, image = 0.5}."""
    attention_exchange: Literal["sequence", "heads"] = "sequence"
    """A rank of a modality group attends for its sequences, or for the group's in some heads."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks, of those that hold a tower, over which its experts are spread."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO over data parallel: 1 optimizer states, 2 + gradients, 3 + weights."""
    offload: Literal["none", "optimizer"] = "none"
    """Where optimizer states live: "optimizer" keeps and updates them in host memory."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1.5e-5
    """Learning rate at the end of the decay."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Steps of linear rise from 0 to ``lr``; absent: a fiftieth of training.train_steps."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from ``lr`` to ``min_lr``."""
    lr_decay_steps: PositiveInt | None = None
    """Step at which ``min_lr`` is reached; absent: training.train_steps."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norm weights have none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""


class TrainingConfig(Section):
    """How long, in which batches and in which precision."""

    train_steps: PositiveInt
    """Optimizer steps of the whole run."""
    micro_batch_size: PositiveInt = 1
    """Sequences per data-parallel rank in one pass; with attention_exchange = "heads" per group."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step over all ranks; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations; the optimizer keeps fp32 weights either way."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to compute again in backward: none, the attention core, or whole layers."""


class CheckpointConfig(Section):
    """When training state is saved; the last step always is."""

    interval_steps: PositiveInt = 1000
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""


class EvaluationConfig(Section):
    """Held-out loss per modality; the last step always evaluates."""

    interval_steps: PositiveInt = 500
    """Steps between evaluations."""
    max_sequences: PositiveInt | None = None
    """Packed sequences of the validation split to use; absent: all. The last step uses all."""


class LoggingConfig(Section):
    """Console and TensorBoard."""

    interval_steps: PositiveInt = 10
    """Steps between console lines and scalars."""
    sample_interval_steps: PositiveInt | None = None
    """Steps between generated samples in TensorBoard; absent: only after the last step."""
    peak_flops: PositiveFloat | None = None
    """FLOP/s of one device for MFU; absent: the data sheet's, or a measured matmul on a CPU."""


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

    @property
    def run_directory(self) -> Path:
        """Folder that everything of this run is written to."""
        return self.run.directory / self.run.name

    @property
    def num_warmup_steps(self) -> int:
        """``optimizer.lr_warmup_steps``, or its default for this length of training."""
        if self.optimizer.lr_warmup_steps is not None:
            return self.optimizer.lr_warmup_steps
        return self.training.train_steps // 50

    def resolved_for(self, modality_names: Sequence[str], corpus_vocab_size: int) -> Config:
        """Take from a corpus what the file left open, and put its modalities in its order.

        Raises:
            ConfigError: the modalities are not the corpus's, or the vocabulary is too small.
        """
        model = self.model
        if set(model.modalities) != set(modality_names):
            raise ConfigError(
                f"model.modalities has {', '.join(sorted(model.modalities))}; {self.data.corpus}"
                f" has, and needs, {', '.join(modality_names)}"
            )
        rounded = -(-corpus_vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        vocab_size = model.vocab_size or rounded
        if vocab_size < corpus_vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size} is smaller than the {corpus_vocab_size} tokens"
                f" of {self.data.corpus}; allowed: at least that many"
            )
        modalities = {name: model.modalities[name] for name in modality_names}
        resolved = model.model_copy(update={"modalities": modalities, "vocab_size": vocab_size})
        return self.model_copy(update={"model": resolved})

    def to_toml(self) -> str:
        """The configuration as a file that ``load_config`` reads back to an equal one."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def sequences_per_pass(self, data_parallel_size: int) -> int:
        """Sequences of one micro-batch over all ranks.

        Every data-parallel rank brings ``micro_batch_size`` of them; where a modality group splits
        attention by heads, the group does, so that a sequence may exceed what one rank can hold.
        """
        if self.parallel.attention_exchange == "heads":
            data_parallel_size //= self.parallel.modality_parallel_size
        return self.training.micro_batch_size * data_parallel_size

    @property
    def pool_sequences(self) -> int:
        """Sequences of whose tokens a tower's experts choose at once.

        Those of one micro-batch of a rank, or of a modality group's ranks, whose tokens a tower
        shares if it lies on one of them.
        """
        return self.sequences_per_pass(self.parallel.modality_parallel_size)

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.training.global_batch_size // self.sequences_per_pass(data_parallel_size)
