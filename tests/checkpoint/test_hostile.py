"""Tests that an untrusted checkpoint with a valid manifest cannot run code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from mot_megatron.checkpoint import CheckpointInfo, find_checkpoint, load_checkpoint
from mot_megatron.checkpoint.find import read_metadata
from mot_megatron.checkpoint.storage import read_index
from mot_megatron.errors import CheckpointError
from tests.checkpoint.states import reseal, save, state


class Poison:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _resealed(tmp_path: Path, files: dict[str, bytes]) -> CheckpointInfo:
    path = save(tmp_path, 1).path
    for name, content in files.items():
        (path / name).write_bytes(content)
    reseal(path)
    checkpoint = find_checkpoint(tmp_path).checkpoint
    assert checkpoint is not None  # the manifest does not protect against an attacker
    return checkpoint


def test_plain_unpickling_runs_the_poison(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Poison(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_poisoned_index(tmp_path: Path) -> None:
    poison = pickle.dumps(Poison(tmp_path / "marker"))
    # torch.distributed.checkpoint would read __0.metadata if .metadata could not be read.
    checkpoint = _resealed(tmp_path, {".metadata": poison, "__0.metadata": poison})
    with pytest.raises(CheckpointError, match=r"refers to posix.mkdir, which no index needs"):
        load_checkpoint(checkpoint, state(1), None)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("what", ["torch.load", "torch.hub.load", "builtins.eval", "os.system"])
def test_index_may_not_name_other_functions(tmp_path: Path, what: str) -> None:
    module, name = what.rsplit(".", 1)
    content = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    checkpoint = _resealed(tmp_path, {".metadata": content})
    with pytest.raises(CheckpointError, match=f"refers to {what}"):
        load_checkpoint(checkpoint, state(1), None)


def test_index_whose_enumeration_members_are_pickled_by_getattr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = read_index(save(tmp_path, 1).path)
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    content = pickle.dumps(index)
    assert b"getattr" in content
    load_checkpoint(_resealed(tmp_path, {".metadata": content}), state(1), None)


def test_index_may_not_use_getattr_otherwise(tmp_path: Path) -> None:
    content = b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__new__'\ntR."
    checkpoint = _resealed(tmp_path, {".metadata": content})
    with pytest.raises(CheckpointError, match=r"calls getattr on <class 'torch.Size'>"):
        load_checkpoint(checkpoint, state(1), None)


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps({"a": 1})])
def test_file_that_is_not_an_index(tmp_path: Path, content: bytes) -> None:
    checkpoint = _resealed(tmp_path, {".metadata": content})
    with pytest.raises(CheckpointError, match="not an index of tensors"):
        load_checkpoint(checkpoint, state(1), None)


def test_poisoned_tensor(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    stream = io.BytesIO()
    torch.save(Poison(tmp_path / "marker"), stream)
    index = read_index(path)
    for place in index.storage_data.values():
        place.offset, place.length = 0, len(stream.getvalue())
    files = {".metadata": pickle.dumps(index), "__0_0.distcp": stream.getvalue()}
    with pytest.raises(CheckpointError, match="cannot load checkpoint"):
        load_checkpoint(_resealed(tmp_path, files), state(1), None)
    assert not (tmp_path / "marker").exists()


def test_index_with_objects_besides_tensors(tmp_path: Path) -> None:
    index = read_index(save(tmp_path, 1).path)
    index.state_dict_metadata["count"] = BytesStorageMetadata()
    with pytest.raises(CheckpointError, match=r"refers to .*BytesStorageMetadata"):
        load_checkpoint(_resealed(tmp_path, {".metadata": pickle.dumps(index)}), state(1), None)


def test_index_that_points_outside_the_folder(tmp_path: Path) -> None:
    index = read_index(save(tmp_path, 1).path)
    next(iter(index.storage_data.values())).relative_path = "../../other.distcp"
    with pytest.raises(CheckpointError, match=r"points to ../../other.distcp"):
        load_checkpoint(_resealed(tmp_path, {".metadata": pickle.dumps(index)}), state(1), None)


def _first(index: Metadata) -> TensorStorageMetadata:
    entry = index.state_dict_metadata["model/column"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def _without_pieces(index: Metadata) -> None:
    _first(index).chunks.clear()


def _sparse(index: Metadata) -> None:
    entry = _first(index)
    entry.size = torch.Size([2**40, 6])
    entry.chunks[0].sizes = torch.Size([2**40, 6])


def _overlapping(index: Metadata) -> None:
    (chunk,) = _first(index).chunks
    half = ChunkStorageMetadata(chunk.offsets, torch.Size([2, 6]))
    _first(index).chunks[:] = [half, half]


def _outside(index: Metadata) -> None:
    _first(index).chunks[0].offsets = torch.Size([-1, 0])


def _with_a_number_for_a_name(index: Metadata) -> None:
    index.state_dict_metadata[7] = _first(index)  # type: ignore[index]


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (_without_pieces, "only part of model/column is in the files"),
        (_sparse, "part of model/column is missing from the files"),
        (_overlapping, "pieces of model/column overlap"),
        (_outside, "a piece of model/column lies outside of it"),
        (_with_a_number_for_a_name, "a tensor is named 7"),
    ],
)
def test_pieces_that_do_not_make_up_a_tensor(
    tmp_path: Path, tamper: Callable[[Metadata], None], problem: str
) -> None:
    index = read_index(save(tmp_path, 1).path)
    tamper(index)
    checkpoint = _resealed(tmp_path, {".metadata": pickle.dumps(index)})
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(checkpoint, state(1), None)


def test_a_memo_of_gigabytes_is_not_allocated(tmp_path: Path) -> None:
    content = b"\x80\x02Nr\xff\xff\xff\x0f."
    checkpoint = _resealed(tmp_path, {".metadata": content})
    with pytest.raises(CheckpointError, match="memo entry"):
        load_checkpoint(checkpoint, state(1), None)


def test_compressed_tensor(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    index = read_index(path)
    stream = io.BytesIO()
    torch.save(torch.zeros(4, 6), stream)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(stream) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for member in plain.namelist():
            archive.writestr(member, plain.read(member))
        archive.writestr("archive/bomb", bytes(1 << 20))
    content = (path / "__0_0.distcp").read_bytes()
    (place,) = [place for key, place in index.storage_data.items() if key.fqn == "model/column"]
    place.offset, place.length = len(content), len(packed.getvalue())
    files = {".metadata": pickle.dumps(index), "__0_0.distcp": content + packed.getvalue()}
    with pytest.raises(CheckpointError, match="contains compressed data"):
        load_checkpoint(_resealed(tmp_path, files), state(1), None)


@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "__0_0.distcp", ".metadata"])
def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1).path
    (path / name).unlink()
    os.mkfifo(path / name)
    search = find_checkpoint(tmp_path)
    assert search.checkpoint is None
    assert "not a regular file" in search.skipped[0]


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]", b"\xff"])
def test_metadata_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    checkpoint = _resealed(tmp_path, {"metadata.json": content})
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        read_metadata(checkpoint)
