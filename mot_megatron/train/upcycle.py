"""Upcycling: start a new run from a trained model by copying its weights to towers or experts.

Only weights are copied. The new run starts at step 0, with zero optimizer moments, at the start of
its data and learning-rate schedule. No model is built, and host memory holds the old weights once,
however many copies the new run has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from mot_megatron.checkpoint import (
    CheckpointInfo,
    NamedTensor,
    read_whole_tensors,
    save_checkpoint,
)
from mot_megatron.checkpoint.names import STATE_KINDS, WEIGHT_PREFIX, checkpoint_directory
from mot_megatron.config import Config
from mot_megatron.data.corpus import HELD_OUT_SPLIT, TRAIN_SPLIT, Corpus
from mot_megatron.data.loader import DataShard, PackedLoader, evaluation_batches
from mot_megatron.data.streams import Position
from mot_megatron.errors import CheckpointError
from mot_megatron.files import write_atomically
from mot_megatron.model.initialization import initial_values
from mot_megatron.model.inventory import is_frozen
from mot_megatron.model.sharding import ParameterSharding
from mot_megatron.train.session import grouping_plan
from mot_megatron.train.state import Progress
from mot_megatron.train.trained import SavedRun, load_trained_model
from mot_megatron.train.upcycle_plan import TensorPlan, check_upcycling, plan_tensors

_ALONE = DataShard(0, 1)


def upcycle(
    source: SavedRun, config: Config, corpus: Corpus, towers: Mapping[str, str]
) -> CheckpointInfo:
    """Write the folder of a new run, which training continues from step 0; no collectives.

    Args:
        source: The run to copy weights from.
        config: Resolved configuration of the new run.
        corpus: Corpus of both runs.
        towers: Source tower of each new tower; see ``source_towers``.

    Raises:
        ConfigError: See ``check_upcycling``.
        CheckpointError: The new run has checkpoints already, or a file cannot be read or written.
    """
    check_upcycling(source.config.model, config.model, towers)
    directory = checkpoint_directory(config.run_directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(
            f"{directory} is not empty, so run.name = {config.run.name} is in use; choose another"
            " name for the new run"
        )
    plan = plan_tensors(source.config, config, towers)
    checkpoint = save_checkpoint(
        directory,
        0,
        _tensors(source.checkpoint, plan, config),
        metadata={
            "progress": asdict(Progress()),
            "optimizer_steps": 0,
            "data": initial_position(config, corpus),
            "upcycled_from": {"checkpoint": str(source.checkpoint.path), "towers": dict(towers)},
        },
        config_text=config.to_toml(),
        groups=None,
        keep=1,
    )
    path = config.run_directory / "config.toml"
    try:
        write_atomically(path, config.to_toml())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return checkpoint


def _tensors(checkpoint: CheckpointInfo, plan: TensorPlan, config: Config) -> list[NamedTensor]:
    """Return weights, whose copies share memory, and moments, which are one expanded zero."""
    old = read_whole_tensors(checkpoint, {WEIGHT_PREFIX + name for name in plan.copied.values()})
    old = {name: weight.float() for name, weight in old.items()}
    weights = {new: old[WEIGHT_PREFIX + name] for new, name in plan.copied.items()}
    for name, shape in plan.drawn.items():
        weights[name] = initial_values(name, shape, config.run.seed, config.model.init_std)
    zero, (_, *moments) = torch.zeros(()), STATE_KINDS
    tensors = []
    for name, weight in weights.items():
        sharding = ParameterSharding(tuple(weight.shape))
        tensors.append(NamedTensor(WEIGHT_PREFIX + name, weight, sharding))
        tensors += [
            NamedTensor(f"{kind}/{name}", zero.expand(weight.shape), sharding)
            for kind in moments
            if not is_frozen(config.model, name)
        ]
    return tensors


def initial_position(config: Config, corpus: Corpus) -> Position:
    """Return the data position of a run before its first step."""
    return PackedLoader(
        corpus,
        TRAIN_SPLIT,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        grouping=grouping_plan(config),
        shard=_ALONE,
        seed=config.run.seed,
        packing=config.data.packing,
    ).state_dict()


@dataclass(frozen=True)
class Difference:
    """Difference between the logits of two models on the same tokens."""

    largest: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute logit of the source."""
    tokens: int
    """Number of tokens compared."""


def compare_logits(source: SavedRun, upcycled: CheckpointInfo, corpus: Corpus) -> Difference:
    """Run both models in turn on the first held-out sequence, in fp32 on the CPU.

    As in training, expert choice pools all tokens of the sequence.

    Raises:
        DataError: The corpus has no held-out split, or a document of it is too long.
    """
    seq_length = source.config.data.seq_length
    old = _logits(source.checkpoint, corpus, seq_length)
    new = _logits(upcycled, corpus, seq_length)
    return Difference(float((new - old).abs().max()), float(old.abs().max()), len(old))


@torch.no_grad()
def _logits(checkpoint: CheckpointInfo, corpus: Corpus, seq_length: int) -> torch.Tensor:
    """Return the logits of document tokens in sequence order, [tokens, V]."""
    trained = load_trained_model(checkpoint.path, torch.device("cpu"), corpus.directory)
    batch = next(
        evaluation_batches(
            corpus,
            HELD_OUT_SPLIT,
            seq_length=seq_length,
            micro_batch_size=1,
            grouping=grouping_plan(trained.config),
            shard=_ALONE,
        )
    )
    # Leave out padding, which no expert takes.
    return trained.model.sequence_logits(batch)[batch.filled[batch.ungroup_index]]
