"""A checkpoint of this program as a source of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.find import (
    CheckpointInfo,
    open_checkpoint,
    read_config_text,
    read_metadata,
)
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.checkpoint.storage import read_index, stored_tensors
from mot_megatron.checkpoint.streaming import read_box
from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.errors import CheckpointError


class CheckpointSource:
    """A verified checkpoint, whose tensors are read when they are asked for."""

    checkpoint: CheckpointInfo
    skipped: tuple[str, ...]
    """One line per skipped checkpoint, with the reason."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Open and verify the checkpoint at ``path``.

        Args:
            path: Folder of a run, of its checkpoints, or of a single checkpoint.
            threads: Number of files that are verified at a time.

        Raises:
            CheckpointError: There is no usable checkpoint.
        """
        inside = checkpoint_directory(path)
        search = open_checkpoint(inside if inside.is_dir() else path, threads)
        assert search.checkpoint is not None  # open_checkpoint raises instead
        self.checkpoint, self.skipped = search.checkpoint, search.skipped
        try:
            self.index = read_index(self.checkpoint.path)
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from error

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        return {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in stored_tensors(self.index).items()
        }

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Progress, data position and the like, as they were saved."""
        return read_metadata(self.checkpoint)

    @cached_property
    def config_text(self) -> str:
        """The resolved configuration of the run, as TOML."""
        return read_config_text(self.checkpoint)

    @cached_property
    def config(self) -> Config:
        """The resolved configuration of the run.

        Raises:
            ConfigError: This version of the program does not accept it.
        """
        return parse_config(self.config_text, f"{self.checkpoint.path}: its configuration")

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor into new memory.

        Raises:
            CheckpointError: There is no such tensor, or a file is damaged or cannot be read.
        """
        if name not in self.infos:
            raise CheckpointError(f"{self.checkpoint.path}: it lacks {name}")
        shape = self.infos[name].shape
        return self.read_box(name, (0,) * len(shape), shape)

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a box of a tensor into new memory; from the files, only the pages that hold it.

        Args:
            name: Name of a tensor.
            offsets: First index of the box in each dimension.
            sizes: Shape of the box.

        Raises:
            CheckpointError: A file is damaged or cannot be read.
        """
        try:
            return read_box(self.checkpoint.path, self.index, name, offsets, sizes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from error
