"""A corpus is verified once per machine, and again as soon as a file has changed."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from mot_megatron.data import corpus as corpus_module
from mot_megatron.data import verification
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import DataError

from .corpora import random_documents, write_corpus


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus whose files count as old enough, and an empty folder of stamps."""
    monkeypatch.setattr(verification, "_SETTLED_SECONDS", -1.0)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    documents = random_documents(20, 10)
    write_corpus(tmp_path / "corpus", train=documents, validation=documents[:5])
    return tmp_path / "corpus"


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits whose tokens were read, in order."""
    found: list[str] = []
    check = corpus_module._check_content

    def counted(split: corpus_module.TokenSplit, *others: object) -> None:
        found.append(split.name)
        check(split, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(corpus_module, "_check_content", counted)
    return found


def stamps(directory: Path) -> list[Path]:
    return list((directory.parent / "temporary").glob("*/*.json"))


def test_the_second_opening_reads_no_tokens(directory: Path, checked: list[str]) -> None:
    first = Corpus.open(directory, once=True)
    assert checked == ["train", "validation"]
    second = Corpus.open(directory, once=True)
    assert checked == ["train", "validation"]
    assert np.array_equal(first.split("train").tokens, second.split("train").tokens)
    assert np.array_equal(first.split("train").offsets, second.split("train").offsets)
    Corpus.open(directory)
    assert checked == ["train", "validation"] * 2


@pytest.mark.parametrize("name", ["train.bin", "validation.idx"])
def test_a_changed_file_is_verified_again(directory: Path, name: str) -> None:
    """Even if somebody sets its size and its time of change as they were."""
    Corpus.open(directory, once=True)
    path = directory / name
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=name):
        Corpus.open(directory, once=True)
    with pytest.raises(DataError, match=name):  # the failure left no stamp
        Corpus.open(directory, once=True)


def test_a_damaged_corpus_gets_no_stamp(directory: Path) -> None:
    path = directory / "train.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="sha256"):
        Corpus.open(directory, once=True)
    assert not stamps(directory)


def test_files_that_have_just_changed_get_no_stamp(
    directory: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_SETTLED_SECONDS", 1000.0)
    Corpus.open(directory, once=True)
    Corpus.open(directory, once=True)
    assert checked == ["train", "validation"] * 2
    assert not stamps(directory)


def test_a_damaged_stamp_or_a_public_folder_costs_a_verification(
    directory: Path, checked: list[str]
) -> None:
    Corpus.open(directory, once=True)
    (stamp,) = stamps(directory)
    good = stamp.read_text()
    for bad in ("", "{", json.dumps({**json.loads(good), "train.bin": []})):
        stamp.write_text(bad)
        checked.clear()
        Corpus.open(directory, once=True)
        assert checked == ["train", "validation"]
        assert stamp.read_text() == good
    stamp.parent.chmod(0o777)
    Corpus.open(directory, once=True)
    assert checked == ["train", "validation"] * 2


def test_processes_take_turns(directory: Path, checked: list[str]) -> None:
    """Eight ranks start at once; one verifies, and the others wait for its stamp."""
    threads = [
        threading.Thread(target=Corpus.open, args=[directory], kwargs={"once": True})
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checked == ["train", "validation"]
