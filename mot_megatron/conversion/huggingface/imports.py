"""Import a model in a format of another program as the start of a new run, tensor by tensor.

Every tower of the new run copies one tower of the source, as ``mot upcycle`` does: a dense model's
weights go into all towers, or into all experts of a tower. The embedding and the output head are
resized to the corpus's vocabulary. Moments are zero and the run begins at step 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from mot_megatron.checkpoint import CheckpointInfo
from mot_megatron.checkpoint.names import STATE_KINDS, WEIGHT_PREFIX, checkpoint_directory
from mot_megatron.config import Config
from mot_megatron.config_model import ModelConfig
from mot_megatron.conversion.huggingface.foreign import ForeignModel
from mot_megatron.conversion.huggingface.names import Correspondence
from mot_megatron.conversion.huggingface.vocabulary import Rows, match_rows
from mot_megatron.conversion.tensors import OutputTensor, TensorInfo
from mot_megatron.conversion.write import write_checkpoint
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import CheckpointError
from mot_megatron.files import write_atomically
from mot_megatron.model.initialization import initial_values
from mot_megatron.model.inventory import is_frozen
from mot_megatron.train.state import Progress
from mot_megatron.train.upcycle import initial_position
from mot_megatron.train.upcycle_plan import check_upcycling, plan_tensors, source_towers

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_VOCABULARY_MATRICES = ("embedding.lookup.weight", "head.linear.weight")


@dataclass(frozen=True)
class ImportPlan:
    """What an import writes."""

    outputs: tuple[OutputTensor, ...]
    towers: Mapping[str, str]
    """Source tower of each new tower."""
    left_out: Mapping[str, int]
    """Number of the source's tensors that are not used, by what they are."""
    drawn: tuple[str, ...]
    """Names of parameters that are initialized, because the source has none like them."""
    rows: Rows


def plan_import(
    source: ForeignModel, config: Config, corpus: Corpus, wanted: Mapping[str, str]
) -> ImportPlan:
    """Plan an import; only names, shapes and tokenizers are read.

    Args:
        source: The model.
        config: Resolved configuration of the new run.
        corpus: Its corpus.
        wanted: Source tower of new towers; see ``source_towers``.

    Raises:
        ConfigError: The configuration is not one of such a model.
        CheckpointError: A tensor is missing, unknown, or of another shape or type.
        DataError: A tokenizer cannot be read.
    """
    old = source.config_for(config)
    towers = source_towers(old.model, config.model, wanted)
    check_upcycling(old.model, config.model, towers)
    used = {each.name: each for each in source.correspondences(old)}
    _check_tensors(source, used.values())
    plan = plan_tensors(old, config, towers)
    rows = match_rows(
        source.description, source.vocab_size, corpus, config.model.num_vocabulary_rows
    )
    outputs: list[OutputTensor] = []
    for new, name in plan.copied.items():
        weight = _copy(source, new, used[name], rows, config.run.seed)
        outputs += _with_moments(weight, config.model)
    for name, shape in plan.drawn.items():
        outputs += _with_moments(_draw(name, shape, config), config.model)
    left_out = _left_out(source, used, set(plan.copied.values()), old.model.tower_names)
    return ImportPlan(tuple(outputs), towers, left_out, tuple(plan.drawn), rows)


def write_import(
    source: ForeignModel, plan: ImportPlan, config: Config, corpus: Corpus, verify: bool = False
) -> CheckpointInfo:
    """Write the folder of a new run, which training continues from step 0.

    Args:
        source: The model.
        plan: See ``plan_import``.
        config: Resolved configuration of the new run.
        corpus: Its corpus.
        verify: Read the checkpoint back and compare it with tensors that are produced again.

    Raises:
        CheckpointError: The run has checkpoints, or a file cannot be read or written.
    """
    directory = checkpoint_directory(config.run_directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(
            f"{directory} is not empty, so run.name = {config.run.name} is in use; choose another"
            " name for the new run"
        )
    checkpoint = write_checkpoint(
        directory,
        plan.outputs,
        step=0,
        metadata={
            "progress": asdict(Progress()),
            "optimizer_steps": 0,
            "data": initial_position(config, corpus),
            "vocabulary": corpus.vocabulary_digest,
            "meaning_of_ids": corpus.vocabulary,
            "imported_from": {
                "folder": str(source.directory),
                "format": source.kind,
                "towers": dict(plan.towers),
            },
        },
        config_text=config.to_toml(),
        verify=verify,
    )
    path = config.run_directory / "config.toml"
    try:
        write_atomically(path, config.to_toml())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return checkpoint


def _copy(
    source: ForeignModel, new: str, each: Correspondence, rows: Rows, seed: int
) -> OutputTensor:
    read = source.tensors.read
    if each.name in _VOCABULARY_MATRICES:
        (old,) = each.split_into

        def resized() -> torch.Tensor:
            return rows.resized(read(old), new, seed)

        return _weight(new, each.shape, each.split_into, resized)

    def joined() -> torch.Tensor:
        return each.join([read(name) for name in each.split_into]).float()

    return _weight(new, each.shape, each.split_into, joined)


def _draw(name: str, shape: tuple[int, ...], config: Config) -> OutputTensor:
    def drawn() -> torch.Tensor:
        return initial_values(name, shape, config.run.seed, config.model.init_std)

    return _weight(name, shape, (), drawn)


def _weight(
    name: str,
    shape: tuple[int, ...],
    sources: tuple[str, ...],
    produce: Callable[[], torch.Tensor],
) -> OutputTensor:
    return OutputTensor(WEIGHT_PREFIX + name, TensorInfo(shape, torch.float32), sources, produce)


def _with_moments(weight: OutputTensor, model: ModelConfig) -> Iterator[OutputTensor]:
    yield weight
    name = weight.name.removeprefix(WEIGHT_PREFIX)
    if is_frozen(model, name):
        return
    for kind in STATE_KINDS[1:]:
        shape = weight.info.shape
        yield OutputTensor(
            f"{kind}/{name}", weight.info, (), lambda shape=shape: torch.zeros(shape)
        )


def _check_tensors(source: ForeignModel, used: Iterable[Correspondence]) -> None:
    """Check that the source has the tensors of its model, in their shapes and as numbers."""
    infos = source.tensors.infos
    for each in used:
        for name, shape in zip(each.split_into, each.shapes(), strict=True):
            if each.name in _VOCABULARY_MATRICES:
                shape = (source.vocab_size, *shape[1:])
            if name not in infos:
                raise CheckpointError(f"{source.directory}: it lacks {name}")
            if infos[name].shape != shape or infos[name].dtype not in _FLOATS:
                kind = str(infos[name].dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{source.directory}: {name} is {list(infos[name].shape)} {kind}; needed:"
                    f" {list(shape)} in float32, bfloat16 or float16"
                )


def _left_out(
    source: ForeignModel,
    known: Mapping[str, Correspondence],
    copied: set[str],
    tower_names: Sequence[str],
) -> dict[str, int]:
    """Count the tensors that are not used, by what they are.

    Raises:
        CheckpointError: A tensor is unknown.
    """
    counts: Counter[str] = Counter(source.unread)
    reasons = {
        name: f"tower {_tower_of(each.name, tower_names)}, which no tower copies"
        for each in known.values()
        for name in each.split_into
        if each.name not in copied
    }
    used = {name for each in known.values() if each.name in copied for name in each.split_into}
    for name in source.tensors.infos.keys() - used:
        reason = reasons.get(name) or next(
            (what for start, what in source.known_left_out.items() if name.startswith(start)), None
        )
        if reason is None and name.endswith(".rotary_emb.inv_freq"):
            reason = "angles of the rotary embedding, which are computed"
        if reason is None:
            raise CheckpointError(
                f"{source.directory}: {name} is not a tensor of a {source.kind} model of its"
                " configuration"
            )
        counts[reason] += 1
    return dict(sorted(counts.items()))


def _tower_of(name: str, tower_names: Sequence[str]) -> str:
    place = name.partition(".towers.")[2]
    return tower_names[int(place.partition(".")[0])] if place else ", ".join(tower_names)
