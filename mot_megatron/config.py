"""The typed, immutable configuration: every key with its type, default and meaning.

config_files.py reads it from TOML; rules.py checks keys against each other. Each field's docstring
is its entry in the configuration reference. Unknown keys are errors, because a misspelled key would
otherwise silently train a different model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field

from mot_megatron.config_model import VOCABULARY_MULTIPLE, ModalityConfig, ModelConfig
from mot_megatron.config_section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
)
from mot_megatron.errors import ConfigError


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

    layouts: dict[PositiveInt, dict[str, Any]] = Field(default={})
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
