"""The manifest of a checkpoint: size and SHA-256 of every file, and a SHA-256 of the manifest.

torch loads a tensor file with a flipped bit without an error, and training would continue with
wrong values. Only these hashes detect it.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from tqdm import tqdm

from mot_megatron.checkpoint import agreement
from mot_megatron.errors import CheckpointError
from mot_megatron.files import read_regular_file, regular_file_size

MANIFEST_NAME = "manifest.json"

_CHUNK_BYTES = 1 << 22
_LONGEST_MANIFEST_BYTES = 1 << 26

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A plain file name, so that it cannot point outside the checkpoint's folder.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]*[A-Za-z0-9_]$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Strict):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Manifest(_Strict):
    """Contents of a complete checkpoint, with the files of all ranks."""

    format: Literal[1] = 1
    """Version of the manifest format."""
    step: Annotated[int, Field(ge=0)]
    """Number of optimizer steps completed."""
    num_tensors: Annotated[int, Field(ge=0)]
    """Number of global tensors, over all ranks."""
    files: dict[FileName, FileRecord]
    """Record of every file except the manifest itself, by file name."""

    @property
    def num_bytes(self) -> int:
        """Total size of all files except the manifest."""
        return sum(record.size for record in self.files.values())


class _SealedManifest(_Strict):
    manifest: Manifest
    sha256: Sha256


def write_durably(path: Path, content: str) -> None:
    """Write a text file and flush it to disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the entries of ``directory`` (file creations and renames) to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(path: Path) -> FileRecord:
    """Return the current size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size=size, sha256=digest.hexdigest())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest`` to ``directory``, together with its own SHA-256."""
    sealed = _SealedManifest(manifest=manifest, sha256=_own_sum(manifest))
    write_durably(directory / MANIFEST_NAME, sealed.model_dump_json(indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest; of the files that it lists, only the sizes are checked.

    Raises:
        CheckpointError: The manifest is missing, unreadable or damaged, or a file that it lists is
            missing or has a different size. The message does not include ``directory``.
    """
    try:
        content = read_regular_file(directory / MANIFEST_NAME, _LONGEST_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST_NAME} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {error.strerror}") from None
    try:
        sealed = _SealedManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{MANIFEST_NAME} is damaged: {where + ': ' if where else ''}{first['msg']}"
        ) from None
    if sealed.sha256 != _own_sum(sealed.manifest):
        raise CheckpointError(f"{MANIFEST_NAME} is damaged: it does not match its own SHA-256")
    for name, record in sealed.manifest.files.items():
        _check_size(directory / name, record)
    return sealed.manifest


def verify_files(directory: Path, manifest: Manifest, threads: int = 1) -> str | None:
    """Compare the SHA-256 of every file with ``manifest``, with files divided among all ranks.

    Every rank calls this, with the same arguments and on a shared file system, and divides its
    files among ``threads``. Collectives: one all-gather of objects over the default group.

    Returns:
        The problem with the first bad file, or None if all files are good; the same on every rank.
    """
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    own = by_size[agreement.rank() :: agreement.world_size()]
    problems = agreement.on_every_rank(lambda: _first_bad_file(directory, own, threads))
    return next((problem for problem in problems if problem is not None), None)


def _first_bad_file(
    directory: Path, records: list[tuple[str, FileRecord]], threads: int
) -> str | None:
    with tqdm(
        total=sum(record.size for _, record in records),
        desc=f"verifying {directory.name}",
        unit="B",
        unit_scale=True,
        delay=5,
        ncols=100,
        leave=False,
        disable=agreement.rank() != 0,
    ) as progress:

        def problem(item: tuple[str, FileRecord]) -> str | None:
            name, record = item
            try:
                if record_of(directory / name) != record:
                    return f"{name} does not match its SHA-256"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
            progress.update(record.size)
            return None

        with ThreadPoolExecutor(threads) as pool:
            return next(filter(None, pool.map(problem, records)), None)


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        size = regular_file_size(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    if size != record.size:
        raise CheckpointError(f"{path.name} has {size} bytes, not {record.size}")


def _own_sum(manifest: Manifest) -> str:
    canonical = json.dumps(manifest.model_dump(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
