"""Weights of a DeepSpeed checkpoint as a source of tensors.

A universal checkpoint has a folder per parameter, ``zero/NAME/fp32.pt``. A ZeRO checkpoint has
files per rank: of the model, with the names and shapes of parameters, and of the optimizer, with
the fp32 weights that a rank owns. ZeRO-1 and 2 concatenate the parameters of a group and give each
rank a consecutive part; ZeRO-3 gives each rank a part of each parameter, padded to equal lengths.
Without optimizer files, the model's own weights are taken, in the type that it computed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mot_megatron.conversion.huggingface.foreign import CONFIG_FILE
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.conversion.torch_archive import StoredTensor, read_archive
from mot_megatron.errors import CheckpointError
from mot_megatron.files import read_regular_file

_LATEST = "latest"
_UNIVERSAL = "zero"
_LONGEST_TAG_BYTES = 4096
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_00_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_00_optim_states\.pt")
_EMBEDDING = "model.embed_tokens.weight"
"""The end of a name that all known models have; what precedes it is a wrapper's prefix."""
_MALFORMED = (AttributeError, KeyError, IndexError, TypeError, ValueError)


@dataclass(frozen=True)
class _Tensor:
    """A tensor, and the parts that it consists of, in order."""

    info: TensorInfo
    parts: tuple[StoredTensor, ...]


class DeepSpeedSource:
    """The weights of a checkpoint, read when they are asked for."""

    directory: Path
    """Folder of the checkpoint itself."""
    description: str
    """What it is, for people."""
    prefix: str
    """Beginning of all its names, which ``infos`` and ``read`` leave out; usually empty."""

    def __init__(self, path: Path) -> None:
        """Open a checkpoint; names, shapes and places are read, but no values.

        Args:
            path: A checkpoint, or a folder of checkpoints with a file ``latest``.

        Raises:
            CheckpointError: There is none, a file is damaged or refers to something that weights do
                not need, or the layout has parallel dimensions besides data.
        """
        self.directory = _checkpoint_folder(path)
        try:
            if (self.directory / _UNIVERSAL).is_dir():
                self.description, tensors = "universal", _universal(self.directory)
            else:
                self.description, tensors = _zero(self.directory)
        except _MALFORMED as error:
            raise CheckpointError(
                f"{self.directory}: its files are not as DeepSpeed writes them: {error!r}"
            ) from None
        beginnings = [n.removesuffix(_EMBEDDING) for n in tensors if n.endswith(_EMBEDDING)]
        self.prefix = beginnings[0] if len(beginnings) == 1 else ""
        self._tensors = {name.removeprefix(self.prefix): each for name, each in tensors.items()}
        if len(self._tensors) < len(tensors):
            raise CheckpointError(
                f"{self.directory}: it has tensors with and without {self.prefix!r} in their names"
            )

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        return {name: each.info for name, each in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor into new memory.

        Raises:
            CheckpointError: A file cannot be read, or has changed since it was opened.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.directory}: it lacks {self.prefix}{name}")
        each = self._tensors[name]
        values = torch.empty(each.info.num_bytes, dtype=torch.uint8)
        memory, start = values.numpy().data, 0
        for part in each.parts:
            part.read_into(memory[start : start + part.info.num_bytes])
            start += part.info.num_bytes
        return values.view(each.info.dtype).view(each.info.shape)


def find_architecture(given: Path | None, directory: Path) -> Path:
    """Return the path of the model's config.json.

    Args:
        given: That file or its folder; None to look in the checkpoint's folder and the one above.
        directory: Folder of the checkpoint.

    Raises:
        CheckpointError: There is no such file.
    """
    if given is not None and given.is_file():
        return given
    folders = [directory, directory.absolute().parent] if given is None else [given]
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            return folder / CONFIG_FILE
    places = " or ".join(map(str, folders))
    raise CheckpointError(
        f"{directory}: there is no {CONFIG_FILE} of the transformers library in {places}, which"
        " describes the architecture; give it with --architecture"
    )


def _checkpoint_folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not (path / _LATEST).is_file():
        return path
    try:
        tag = read_regular_file(path / _LATEST, _LONGEST_TAG_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / _LATEST} cannot be read: {error}") from None
    inside = path / tag
    plain = Path(tag).name == tag and tag not in ("", "..")
    if not plain or not inside.is_dir() or inside.is_symlink():
        raise CheckpointError(
            f"{path / _LATEST}: it names {tag!r}; allowed: the name of a folder beside it"
        )
    return inside


def _whole(stored: Any) -> _Tensor:
    if not isinstance(stored, StoredTensor):
        raise TypeError(f"a {type(stored).__name__} is where a tensor should be")
    return _Tensor(stored.info, (stored,))


def _universal(directory: Path) -> dict[str, _Tensor]:
    tensors = {}
    for folder in sorted((directory / _UNIVERSAL).iterdir()):
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: not read, because it is a symbolic link")
        if folder.is_dir():
            saved = read_archive(folder / "fp32.pt")
            tensors[folder.name] = _whole(saved["param"] if isinstance(saved, dict) else saved)
    if all(len(each.info.shape) == 1 for each in tensors.values()):
        # The converter stores weights of ZeRO-3 as vectors, and copies the files with their shapes.
        shapes = _shapes_beside(directory)
        tensors = {name: _shaped(each.parts, shapes[name]) for name, each in tensors.items()}
    return tensors


def _shapes_beside(directory: Path) -> dict[str, Sequence[int]]:
    files = sorted(directory.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise CheckpointError(
            f"{directory}: its tensors are vectors, as the converter writes them from ZeRO-3, and"
            " the files *_model_states.pt with their shapes are not there; copy them from the"
            " checkpoint that was converted"
        )
    model = read_archive(files[0])
    return {**_merged(model["param_shapes"]), **(model.get("frozen_param_shapes") or {})}


def _shaped(parts: Sequence[StoredTensor], shape: Sequence[int]) -> _Tensor:
    dtypes = {part.info.dtype for part in parts}
    elements = sum(part.num_elements for part in parts)
    if len(dtypes) != 1 or elements != math.prod(shape):
        raise ValueError(f"{elements} elements of {len(dtypes)} types have shape {list(shape)}")
    return _Tensor(TensorInfo(tuple(shape), dtypes.pop()), tuple(parts))


def _zero(directory: Path) -> tuple[str, dict[str, _Tensor]]:
    models, optimizers = _files_by_rank(directory)
    if len(models) == 1 and None in models:
        model = read_archive(models[None])
        tensors = {name: _whole(stored) for name, stored in model["module"].items()}
        if not optimizers:
            return "model states without ZeRO", tensors
        states = _optimizer_states(directory, optimizers)
        tensors.update(_consecutive(model["param_shapes"], states))
        return f"ZeRO-1 or ZeRO-2 of {len(states)} ranks", tensors
    if models.keys() != optimizers.keys():
        raise CheckpointError(
            f"{directory} has model states of {len(models)} ranks and optimizer states of"
            f" {len(optimizers)}; needed: both of every rank"
        )
    states = _optimizer_states(directory, optimizers)
    by_rank = [read_archive(models[rank]) for rank in range(len(states))]
    return f"ZeRO-3 of {len(states)} ranks", _partitioned(by_rank, states)


def _files_by_rank(directory: Path) -> tuple[dict[int | None, Path], dict[int | None, Path]]:
    """Return the files of the model and of the optimizer; rank None wrote for all."""
    models: dict[int | None, Path] = {}
    optimizers: dict[int | None, Path] = {}
    for path in sorted(directory.glob("*_states.pt")):
        for pattern, files in ((_MODEL_FILE, models), (_OPTIMIZER_FILE, optimizers)):
            found = pattern.fullmatch(path.name)
            if found is None:
                continue
            rank = None if found["rank"] is None else int(found["rank"])
            if rank in files:
                raise CheckpointError(f"{path}: {files[rank].name} is of the same rank")
            files[rank] = path
            break
        else:
            raise CheckpointError(
                f"{path} is of a model divided by tensor, pipeline or expert parallelism; allowed:"
                " ZeRO alone, or a universal checkpoint, which"
                " deepspeed.checkpoint.ds_to_universal makes of this where you trust it"
            )
    if not models:
        raise CheckpointError(
            f"{directory} is no DeepSpeed checkpoint; known: universal (a folder"
            f" {_UNIVERSAL}) and ZeRO (mp_rank_00_model_states.pt or"
            " zero_pp_rank_*_mp_rank_00_model_states.pt)"
        )
    return models, optimizers


def _optimizer_states(directory: Path, files: Mapping[int | None, Path]) -> list[dict[str, Any]]:
    """Return the states of all ranks, in their order."""
    if sorted(rank for rank in files if rank is not None) != list(range(len(files))):
        raise CheckpointError(f"{directory}: optimizer states of some ranks are missing")
    states = [read_archive(files[rank])["optimizer_state_dict"] for rank in range(len(files))]
    count = states[0]["partition_count"]
    expected = max(count) if isinstance(count, (list, tuple)) else count
    if expected != len(states):
        raise CheckpointError(
            f"{directory} has optimizer states of {len(states)} ranks, but {expected} wrote it"
        )
    return states


def _consecutive(
    groups: Sequence[Mapping[str, Sequence[int]]], states: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, _Tensor]]:
    """Yield the parameters of ZeRO-1 and 2, group by group."""
    paddings = states[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        vector = [state["single_partition_of_fp32_groups"][number] for state in states]
        gaps = [0] * len(shapes) if paddings is None else paddings[number]
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            yield name, _shaped(_cut(vector, start, math.prod(shape)), shape)
            start += math.prod(shape) + gap
        # The whole is padded to a multiple of twice the ranks.
        unit = 2 * len(states)
        held = sum(part.num_elements for part in vector)
        if math.ceil(start / unit) != math.ceil(held / unit):
            raise ValueError(f"group {number} has {held} elements, of which {start} are known")


def _partitioned(
    models: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]]
) -> dict[str, _Tensor]:
    """Return the parameters and buffers of ZeRO-3."""
    model, ranks = models[0], len(states)
    tensors = {name: _whole(model["module"][name]) for name in model["buffer_names"]}
    for name, shape in (model["frozen_param_shapes"] or {}).items():
        parts = [each["frozen_param_fragments"][name] for each in models]
        tensors[name] = _shaped(_cut(parts, 0, math.prod(shape)), shape)
    start = 0
    for name, shape in _merged(model["param_shapes"]).items():
        length, needed = math.ceil(math.prod(shape) / ranks), math.prod(shape)
        parts = [p for state in states for p in _cut(state["fp32_flat_groups"], start, length)]
        tensors[name] = _shaped(_cut(parts, 0, needed), shape)
        start += length
    for state in states:
        held = sum(part.num_elements for part in state["fp32_flat_groups"])
        if held != start:
            raise ValueError(f"a rank has {held} elements, of which {start} are known")
    for name, other in model["shared_params"].items():
        tensors[name] = tensors[other]
    return tensors


def _merged(groups: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Sequence[int]]:
    return {name: shape for group in groups for name, shape in group.items()}


def _cut(vectors: Sequence[StoredTensor], start: int, length: int) -> list[StoredTensor]:
    """Return the parts of elements ``start`` to ``start + length`` of concatenated vectors."""
    parts, end, first = [], start + length, 0
    for vector in vectors:
        last = first + vector.num_elements
        low, high = max(start, first), min(end, last)
        if low < high:
            parts.append(vector.part(low - first, high - low))
        first = last
    return parts
