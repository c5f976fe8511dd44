"""The training session: model, optimizer and data, built from a configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from mot_megatron.config import Config
from mot_megatron.data.corpus import HELD_OUT_SPLIT, TRAIN_SPLIT, Corpus
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader, evaluation_batches
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.data.prefetch import PrefetchedLoader
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.optim.schedule import LearningRateSchedule
from mot_megatron.optim.settings import OptimizerSettings
from mot_megatron.optim.zero import ZeroEngine
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from mot_megatron.parallel.placement import Placement
from mot_megatron.planning.placing import (
    check_placed,
    flops_of_towers,
    place_towers,
    tokens_of_towers,
)
from mot_megatron.train.pipeline import Pipeline


class MicroBatchSource(Protocol):
    """Where a training step takes its micro-batches from."""

    def next_micro_batch(self) -> MicroBatch:
        """Return this rank's next micro-batch, on the host."""
        ...


@dataclass(frozen=True)
class Trainer:
    """What one rank needs for training steps."""

    config: Config
    """Resolved configuration, which determines the model completely."""
    groups: ProcessGroups
    engine: ZeroEngine
    loader: MicroBatchSource
    pipeline: Pipeline | None
    """Pipeline schedule; None without pipeline parallelism."""
    progress_report: ProgressReport
    """Current phase of this rank, by which other ranks report where it failed or hung."""

    @property
    def model(self) -> MixtureOfTransformers:
        """The model inside the engine."""
        assert isinstance(self.engine.model, MixtureOfTransformers)
        return self.engine.model


@dataclass(frozen=True)
class Session(Trainer):
    """One rank's part of a run."""

    corpus: Corpus
    loader: PackedLoader
    schedule: LearningRateSchedule

    @property
    def model_is_split(self) -> bool:
        """Whether a data-parallel rank holds only some of the layers or towers."""
        return self.groups.pipeline_size > 1 or self.groups.modality_size > 1

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank prints and writes logs."""
        return self.groups.rank == 0

    def held_out_batches(
        self, whole: bool = False, corpus: Corpus | None = None
    ) -> Iterator[MicroBatch]:
        """Return this rank's share of the validation split.

        Args:
            whole: Use the whole split unless evaluation.final_max_sequences limits it, even if
                evaluation.max_sequences does.
            corpus: One source of a blend; None for all training data.
        """
        evaluation = self.config.evaluation
        limit = evaluation.final_max_sequences if whole else evaluation.max_sequences
        return _held_out_batches(self.config, corpus or self.corpus, self.groups, limit)


def resolve_config(config: Config, corpus: Corpus) -> Config:
    """Return the configuration with the values that it takes from its corpus.

    Raises:
        ConfigError: The modalities or their content are not those of the corpus.
    """
    names = [modality.name for modality in corpus.description.modalities]
    description = corpus.description
    return config.resolved_for(names, description.vocab_size, description.continuous)


def choose_placement(config: Config, corpus: Corpus) -> Placement | None:
    """Return the placement of the towers; None without modality parallelism."""
    return place_towers(config, _tower_tokens(config, corpus))


def tower_flops(config: Config, corpus: Corpus) -> tuple[float, ...]:
    """Return the FLOPs of each tower's tokens over the training split, K of them."""
    return flops_of_towers(config.model, _tower_tokens(config, corpus))


def _tower_tokens(config: Config, corpus: Corpus) -> tuple[int, ...]:
    split = corpus.description.splits[TRAIN_SPLIT]
    return tokens_of_towers(config.model, split.tokens_per_modality)


def build_groups(config: Config, corpus: Corpus, device: torch.device) -> ProcessGroups:
    """Build the process groups of a resolved configuration. Collective over the world.

    Raises:
        ConfigError: Experts cannot be distributed over the ranks that hold their tower, or a rank
            has nothing to train.
    """
    return build_placed_groups(config, choose_placement(config, corpus), device)


def build_placed_groups(
    config: Config, placement: Placement | None, device: torch.device
) -> ProcessGroups:
    """Build the process groups for a placement of the towers; as ``build_groups``."""
    parallel = config.parallel
    check_placed(config, placement, dist.get_world_size())
    return build_process_groups(
        parallel.tensor_model_parallel_size,
        device,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        placement=placement,
        balanced_towers=config.model.balanced_towers,
    )


def grouping_plan(config: Config, groups: ProcessGroups | None = None) -> GroupingPlan:
    """Return how batches are grouped by tower for the model of a resolved configuration.

    Args:
        config: Resolved configuration.
        groups: Process groups; None for a model that one rank holds whole.
    """
    parallel = config.parallel
    shard = None
    if groups is not None and groups.placement is not None:
        shard = ModalityShard(groups.placement, groups.modality_rank, parallel.attention_exchange)
    return GroupingPlan(
        towers_of_modalities=config.model.towers_of_modalities,
        num_towers=config.model.num_towers,
        slot_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        shard=shard,
        objectives=tuple(m.objective for m in config.model.modalities.values()),
    )


def build_session(
    config: Config,
    corpus: Corpus,
    groups: ProcessGroups,
    progress_report: ProgressReport | None = None,
) -> Session:
    """Build model, optimizer and data of a resolved configuration on this rank.

    Collective over the world.
    """
    loader = _build_loader(config, corpus, groups)
    # Check documents of both splits before building the model, which may take minutes.
    _held_out_batches(config, corpus, groups, limit_sequences=None)
    trainer = build_trainer(config, groups, loader, progress_report)
    return Session(
        config=config,
        groups=groups,
        engine=trainer.engine,
        loader=loader,
        pipeline=trainer.pipeline,
        progress_report=trainer.progress_report,
        corpus=corpus,
        schedule=build_schedule(config),
    )


def _build_loader(config: Config, corpus: Corpus, groups: ProcessGroups) -> PackedLoader:
    on_gpu = groups.device.type == "cuda"
    build: Callable[..., PackedLoader] = PackedLoader
    if on_gpu if config.data.prefetch is None else config.data.prefetch:
        ahead = config.accumulation_steps(groups.data_size)
        build = functools.partial(PrefetchedLoader, ahead=ahead, pin=on_gpu)
    return build(
        corpus,
        TRAIN_SPLIT,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        grouping=grouping_plan(config, groups),
        shard=_data_shard(groups),
        seed=config.run.seed,
        packing=config.data.packing,
    )


def build_trainer(
    config: Config,
    groups: ProcessGroups,
    loader: MicroBatchSource,
    progress_report: ProgressReport | None = None,
) -> Trainer:
    """Build model and optimizer of a resolved configuration on this rank.

    Collective over the world.
    """
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = MixtureOfTransformers(config, groups, dtype)
    engine = ZeroEngine(
        model, _optimizer_settings(config, groups), groups, num_towers=config.model.num_towers
    )
    pipeline = Pipeline(model, config, groups) if groups.pipeline_size > 1 else None
    return Trainer(config, groups, engine, loader, pipeline, progress_report or ProgressReport())


def _data_shard(groups: ProcessGroups) -> DataShard:
    """Return this rank's data shard; the ranks of a modality group share one."""
    size = groups.modality_size
    return DataShard(groups.data_rank // size, groups.data_size // size)


def _held_out_batches(
    config: Config, corpus: Corpus, groups: ProcessGroups, limit_sequences: int | None
) -> Iterator[MicroBatch]:
    return evaluation_batches(
        corpus,
        HELD_OUT_SPLIT,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        grouping=grouping_plan(config, groups),
        shard=_data_shard(groups),
        limit_sequences=limit_sequences,
    )


def _optimizer_settings(config: Config, groups: ProcessGroups) -> OptimizerSettings:
    optimizer, training = config.optimizer, config.training
    return OptimizerSettings(
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        zero_stage=config.parallel.zero_stage,
        offload=config.parallel.offload,
        precision=training.precision,
        gradient_accumulation_steps=config.accumulation_steps(groups.data_size),
        micro_batch_size=training.micro_batch_size,
        lr_mults=config.model.lr_mults,
    )


def build_schedule(config: Config) -> LearningRateSchedule:
    """Return the learning-rate schedule of a configuration."""
    optimizer = config.optimizer
    last = optimizer.lr_decay_steps or config.training.train_steps
    warmup = config.num_warmup_steps
    return LearningRateSchedule(
        peak=optimizer.lr,
        minimum=optimizer.min_lr,
        warmup_steps=warmup,
        decay_steps=max(0, last - warmup),
        style=optimizer.lr_decay_style,
    )
