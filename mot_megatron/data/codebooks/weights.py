"""Codebook files of neural networks: safetensors with the codec's name and settings in the header.

``mot prepare codec`` writes them. Nothing in them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mot_megatron.data.structure import CODECS
from mot_megatron.errors import DataError, first_problem
from mot_megatron.files import regular_file_size

SUFFIX = ".safetensors"
_CODEC, _SETTINGS = "mot_codec", "mot_settings"
_SettingsType = TypeVar("_SettingsType", bound=BaseModel)


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file, whose values are read when they are asked for."""

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor."""

    @classmethod
    def open(cls, path: Path) -> WeightsFile:
        """Read the header.

        Raises:
            DataError: The file is missing or damaged.
        """
        try:
            regular_file_size(path)
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                return cls(path, file.metadata() or {}, shapes)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise DataError(f"{path}: not a safetensors file: {error}") from None

    def read(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the tensors whose names begin with ``prefix``, as fp32 and without it.

        Raises:
            DataError: The file has changed, or a value is not finite.
        """
        tensors = {}
        try:
            with safe_open(self.path, "pt") as file:
                for name in self.shapes:
                    if name.startswith(prefix):
                        tensors[name.removeprefix(prefix)] = file.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from None
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise DataError(f"{self.path}: {prefix}{name} has values that are not finite")
        return tensors

    @cached_property
    def codec(self) -> str:
        """Name of the codec that the file is for.

        Raises:
            DataError: The header names none.
        """
        if _CODEC not in self.metadata:
            raise DataError(
                f"{self.path}: the header names no codec; mot prepare codec makes a codebook file "
                "from the weights of a pretrained model"
            )
        return self.metadata[_CODEC]

    def settings(self, kind: type[_SettingsType]) -> _SettingsType:
        """Return the settings in the header.

        Raises:
            DataError: They are absent or invalid.
        """
        name = self.codec
        try:
            return kind.model_validate_json(self.metadata.get(_SETTINGS, ""))
        except ValidationError as error:
            raise DataError(f"{self.path}: settings of {name}: {first_problem(error)}") from None


def write_codebook(
    path: Path, codec: str, settings: BaseModel, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a codebook file; it is complete or absent.

    Raises:
        DataError: The file cannot be written.
    """
    metadata = {_CODEC: codec, _SETTINGS: settings.model_dump_json()}
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file({name: each.contiguous() for name, each in tensors.items()}, unfinished, metadata)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be written: {error}") from None


def codec_of(path: Path, kind: str) -> str:
    """Return the name of the codec that a codebook file is for.

    Args:
        path: The file.
        kind: Kind of its segments, which decides for a file of arrays (.npz).

    Raises:
        DataError: The file is missing or damaged, or its header names no codec.
    """
    if path.suffix == SUFFIX:
        return WeightsFile.open(path).codec
    return CODECS[kind][0]


def read_json(text: str, source: str) -> object:
    """Parse JSON, named ``source`` in errors.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{source}: not JSON: {error}") from None
