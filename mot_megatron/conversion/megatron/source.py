"""A dense GPTModel in a checkpoint of megatron-core (torch_dist) as a source.

Three ways in which megatron-core stores layers are known: one tensor with all layers, one per
layer, and the latter with SwiGLU's two matrices apart. Objects are pickles and are never read;
neither is common.pt.

Letters: h hidden size, d head size, f feed-forward width, L layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.storage import read_foreign_index, stored_tensors
from mot_megatron.checkpoint.streaming import read_box
from mot_megatron.config_model import ModelConfig
from mot_megatron.conversion.huggingface.foreign import DENSE_TOWER, ForeignModel
from mot_megatron.conversion.huggingface.safetensors_files import read_json
from mot_megatron.conversion.megatron.names import (
    DOWN,
    EMBEDDING,
    GATE_UP,
    HEAD,
    LAYERS,
    Q_NORM,
    QKV,
    QKV_BIAS,
    correspondences,
)
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.errors import CheckpointError, ConfigError

FORMAT_FILE, FORMAT = "metadata.json", "torch_dist"
_OPTIMIZER = re.compile(r"(chained_\d+\.)*optimizer\.")
_MOST_LAYERS = 4096
_HALVES = (GATE_UP + "_w", GATE_UP + "_v")
_NUMBERED = re.compile(r"\d{1,4}\..+")
_NOT_IN_FILES = ("norm_eps", "rotary_base")
_NOT_IN_FILES_WITHOUT_QK_NORM = ("num_attention_heads", "num_query_groups")


class MegatronSource:
    """The tensors of a checkpoint under names per layer, ``decoder.layers.N.REST``."""

    def __init__(self, directory: Path) -> None:
        """Open a checkpoint; only names and shapes are read.

        Raises:
            CheckpointError: It is in another format, damaged, or implausible.
        """
        _check_format(directory)
        self.directory = directory
        try:
            self._index, others = read_foreign_index(directory, _is_wanted)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        self.unread = dict(Counter(_kind_of(name) for name in others))
        self._places: dict[str, list[tuple[str, int | None]]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name, entry in stored_tensors(self._index).items():
            self._add(name, TensorInfo(tuple(entry.size), entry.properties.dtype))
        self._join_halves()

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor into new memory.

        Raises:
            CheckpointError: There is no such tensor, or a file is damaged or cannot be read.
        """
        if name not in self._places:
            raise CheckpointError(f"{self.directory}: it lacks {name}")
        parts = [self._part(stored, layer) for stored, layer in self._places[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, stored: str, layer: int | None) -> torch.Tensor:
        entry = stored_tensors(self._index)[stored]
        shape: Sequence[int] = tuple(entry.size)
        offsets, sizes = [0] * len(shape), list(shape)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        try:
            box = read_box(self.directory, self._index, stored, offsets, sizes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory}: {error}") from error
        return box if layer is None else box[0]

    def _add(self, stored: str, info: TensorInfo) -> None:
        """List a stored tensor, once for every layer if it has all of them."""
        rest = stored.removeprefix(LAYERS)
        if rest == stored or _NUMBERED.fullmatch(rest):
            self._add_named(stored, info, stored, None)
            return
        number = info.shape[0] if info.shape else 0
        if not 0 < number <= _MOST_LAYERS:
            raise CheckpointError(
                f"{self.directory}: {stored} is {list(info.shape)}; the first dimension is the"
                f" layer, allowed: 1 to {_MOST_LAYERS}"
            )
        for layer in range(number):
            part = TensorInfo(info.shape[1:], info.dtype)
            self._add_named(f"{LAYERS}{layer}.{rest}", part, stored, layer)

    def _add_named(self, name: str, info: TensorInfo, stored: str, layer: int | None) -> None:
        if name in self.infos:
            raise CheckpointError(f"{self.directory}: it has {name} twice")
        self.infos[name], self._places[name] = info, [(stored, layer)]

    def _join_halves(self) -> None:
        """Make one tensor of SwiGLU's two matrices where they are stored apart."""
        for name in [name for name in self.infos if name.endswith(_HALVES[0])]:
            whole = name.removesuffix("_w")
            other = whole + "_v"
            first, second = self.infos.pop(name), self.infos.pop(other, None)
            if first != second or whole in self.infos or not first.shape:
                raise CheckpointError(f"{self.directory}: {name} has no counterpart {other}")
            shape = (2 * first.shape[0], *first.shape[1:])
            self.infos[whole] = TensorInfo(shape, first.dtype)
            self._places[whole] = self._places.pop(name) + self._places.pop(other)


def open_megatron(directory: Path) -> ForeignModel:
    """Open a checkpoint, and find the model's shapes.

    Args:
        directory: Folder with metadata.json, ``.metadata`` and .distcp files.

    Raises:
        CheckpointError: It is in another format, damaged, or no dense GPTModel with SwiGLU.
    """
    tensors = MegatronSource(directory)
    expert = next((name for name in tensors.infos if ".experts." in name), None)
    if expert is not None:
        raise CheckpointError(
            f"{directory}: {expert} belongs to an expert; only dense models are converted"
        )
    keys = _model_keys(directory, tensors.infos)
    return ForeignModel(
        directory,
        directory,
        FORMAT,
        tensors,
        tensors.infos[EMBEDDING].shape[0],
        keys,
        {DENSE_TOWER: DENSE_TOWER},
        correspondences,
        {},
        tensors.unread,
    )


def check_stated(source: ForeignModel, model: ModelConfig) -> None:
    """Check that the configuration states what the files do not contain.

    Defaults could be wrong, and the model would then compute something else without an error.

    Raises:
        ConfigError: It does not.
    """
    needed = [*_NOT_IN_FILES]
    if not source.keys["qk_norm"]:
        needed += _NOT_IN_FILES_WITHOUT_QK_NORM
    missing = [f"model.{key}" for key in needed if key not in model.model_fields_set]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: absent, and the tensors in {source.directory} do not tell;"
            " set them to the values of the training that wrote it"
        )


def _check_format(directory: Path) -> None:
    path = directory / FORMAT_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {FORMAT_FILE}, so it is no distributed checkpoint of"
            " megatron-core; give the folder of a single checkpoint, such as iter_0001000"
        )
    kind = read_json(path).get("sharded_backend")
    if kind != FORMAT:
        raise CheckpointError(f"{path}: sharded_backend is {kind!r}; known: {FORMAT!r}")


def _is_wanted(name: str) -> bool:
    return _OPTIMIZER.match(name) is None


def _kind_of(name: str) -> str:
    """Return what an entry that is not read is."""
    if not _is_wanted(name):
        return "state of the optimizer"
    if "._extra_state" in name:
        return "objects named _extra_state, which are pickles"
    return f"objects named {name.partition('/')[0]}, which are pickles"


def _model_keys(directory: Path, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the values of the [model] section that names and shapes tell."""
    matrices = (EMBEDDING, *(f"{LAYERS}0.{name}" for name in (QKV, DOWN)))
    for name in matrices:
        if name not in infos:
            raise CheckpointError(f"{directory}: it lacks {name}, so it is no GPTModel")
        if len(infos[name].shape) != 2 or 0 in infos[name].shape:
            raise CheckpointError(f"{directory}: {name} is {list(infos[name].shape)}, no matrix")
    (_, hidden), (qkv, _), (_, width) = (infos[name].shape for name in matrices)
    layers = {int(n.removeprefix(LAYERS).partition(".")[0]) for n in infos if n.startswith(LAYERS)}
    keys: dict[str, Any] = {
        "num_layers": max(layers) + 1,
        "hidden_size": hidden,
        "ffn_hidden_size": width,
        "norm_placement": "pre",
        "qk_norm": f"{LAYERS}0.{Q_NORM}" in infos,
        "add_qkv_bias": f"{LAYERS}0.{QKV_BIAS}" in infos,
        "untie_embeddings_and_output_weights": HEAD in infos,
    }
    if keys["qk_norm"]:
        keys |= _heads(directory, infos[f"{LAYERS}0.{Q_NORM}"].shape, hidden, qkv)
    return keys


def _heads(directory: Path, norm: tuple[int, ...], hidden: int, qkv: int) -> dict[str, int]:
    """Return the numbers of heads, which the size of a head tells: there are h / d of queries."""
    size = norm[0] if len(norm) == 1 else 0
    if size == 0 or hidden % size or (qkv - hidden) % (2 * size) or qkv <= hidden:
        raise CheckpointError(
            f"{directory}: {Q_NORM} is {list(norm)}, {QKV} has {qkv} rows and the hidden size is"
            f" {hidden}; needed: heads of hidden size / number of heads"
        )
    return {
        "num_attention_heads": hidden // size,
        "num_query_groups": (qkv - hidden) // (2 * size),
    }
