"""Make a folder of tensor files a checkpoint: a temporary name, a manifest, then one rename.

A kill at any time leaves the older checkpoints and either no new one or a complete new one. When
the same step is saved again, a kill between two renames leaves the older save under a name that the
search for checkpoints knows.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_megatron.checkpoint.find import (
    CONFIG_NAME,
    METADATA_NAME,
    REPLACED_SUFFIX,
    UNFINISHED_SUFFIX,
    CheckpointInfo,
    step_name,
)
from mot_megatron.checkpoint.manifest import (
    FileRecord,
    Manifest,
    record_of,
    sync_directory,
    write_durably,
    write_manifest,
)
from mot_megatron.checkpoint.storage import INDEX_NAME, check_complete
from mot_megatron.errors import CheckpointError


def documents_of(metadata: Mapping[str, Any], config_text: str) -> dict[str, str]:
    """Return the text files of a checkpoint, by name."""
    return {METADATA_NAME: json.dumps(metadata, indent=1) + "\n", CONFIG_NAME: config_text}


@dataclass(frozen=True)
class UnfinishedSave:
    """A checkpoint that is being written. One process calls the methods, which may fail."""

    directory: Path
    """Folder of the checkpoints."""
    step: int
    confirm: Callable[[], None] | None = None
    """Called before folders are created, renamed and deleted; raises CheckpointError if they belong
    to another job by now. None: nobody else writes there."""

    @property
    def final(self) -> Path:
        """Folder of the complete checkpoint."""
        return self.directory / step_name(self.step)

    @property
    def temporary(self) -> Path:
        """Folder to write tensor files to."""
        return self.directory / (step_name(self.step) + UNFINISHED_SUFFIX)

    def begin(self, clear: str = "step_*") -> None:
        """Create the temporary folder and delete unfinished saves.

        Args:
            clear: Names of the checkpoints whose unfinished saves are deleted, as a glob pattern.
        """
        self._confirm()
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(clear + UNFINISHED_SUFFIX):
            final = leftover.with_name(leftover.name.removesuffix(REPLACED_SUFFIX))
            if leftover.name.endswith(REPLACED_SUFFIX) and not final.exists():
                leftover.rename(final)
            else:
                shutil.rmtree(leftover)
        self.temporary.mkdir()

    def complete(
        self,
        names: Collection[str],
        records: Mapping[str, FileRecord],
        documents: Mapping[str, str],
    ) -> CheckpointInfo:
        """Check the tensor files and their index, add the rest and rename the folder.

        Args:
            names: The tensors that the files must contain.
            records: Records of all tensor files.
            documents: Text of the other files, by name; see ``documents_of``.

        Raises:
            CheckpointError: A tensor, part of a tensor, or a file is missing.
            OSError: A file cannot be written.
        """
        self._confirm()
        num_tensors = check_complete(self.temporary, names)
        for name, text in documents.items():
            write_durably(self.temporary / name, text)
        small = {name: record_of(self.temporary / name) for name in (INDEX_NAME, *documents)}
        files = dict(sorted({**records, **small}.items()))
        manifest = Manifest(step=self.step, num_tensors=num_tensors, files=files)
        write_manifest(self.temporary, manifest)
        sync_directory(self.temporary)
        replaced = self.final.with_name(self.final.name + REPLACED_SUFFIX)
        if self.final.exists():
            self.final.rename(replaced)
        self.temporary.rename(self.final)
        sync_directory(self.directory)
        if replaced.exists():
            shutil.rmtree(replaced)
        return CheckpointInfo(self.final, self.step, num_tensors, manifest.num_bytes)

    def discard(self) -> None:
        """Delete the temporary folder, unless it belongs to another job by now."""
        with contextlib.suppress(CheckpointError):
            self._confirm()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _confirm(self) -> None:
        if self.confirm is not None:
            self.confirm()
