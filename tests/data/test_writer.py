"""The corpus writer: its files, the input it rejects, and that errors leave no partial output."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mot_megatron.data.corpus import Corpus, Modality, parse_description
from mot_megatron.data.writer import CorpusWriter, render_description
from mot_megatron.errors import DataError
from mot_megatron.job.processes import Process

from .corpora import MODALITIES, random_documents, write_corpus, writer

PRINTABLE = st.characters(exclude_categories=["Cc", "Cs"])


def assert_refused(
    parent: Path, message: str, write: Callable[[CorpusWriter], object], **settings: Any
) -> None:
    """Assert that ``write``, after a valid document, fails with ``message`` and leaves no file."""

    def run() -> None:
        with writer(parent / "corpus", **settings) as corpus:
            corpus.add("train", [("text", [1])])
            write(corpus)

    with pytest.raises(DataError, match=message) as caught:
        run()
    assert str(caught.value).startswith(f"{parent / 'corpus'}: ")
    assert "\n" not in str(caught.value)
    assert list(parent.iterdir()) == []


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Limit the file size, so writes fail as on a full disk but with a different errno (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_segments_round_trip_and_are_counted(tmp_path: Path) -> None:
    with writer(tmp_path / "corpus") as corpus:
        corpus.add("train", [("text", [1, 3]), ("image", np.array([100, 159])), ("text", [4])])
        corpus.add("train", [("speech", [199])])
        corpus.add("validation", [("text", [99])])
    opened = Corpus.open(tmp_path / "corpus")
    assert [ids.tolist() for ids in opened.split("train")] == [[1, 3, 100, 159, 4], [199]]
    assert opened.split("validation")[0].tolist() == [99]
    counts = opened.description.splits["train"]
    assert (counts.documents, counts.tokens, counts.longest_document) == (2, 6, 5)
    assert counts.tokens_per_modality == {"text": 3, "image": 2, "speech": 1}
    assert opened.description.modalities == MODALITIES
    assert opened.description.licences == {"tests": "CC0"}


def test_megatron_reads_the_files(tmp_path: Path) -> None:
    documents = random_documents(20, 30)
    write_corpus(tmp_path / "corpus", train=documents)
    dataset = IndexedDataset(str(tmp_path / "corpus" / "train"))
    assert len(dataset) == 20
    for number, ids in enumerate(documents):
        assert np.array_equal(np.array(dataset[number]), ids)


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_dtype_follows_the_vocabulary(tmp_path: Path, size: int, dtype: type) -> None:
    text = Modality(name="text", first_id=0, size=size)
    with writer(tmp_path / "corpus", [text]) as corpus:
        corpus.add_document("train", np.array([size - 1, 0]))
    tokens = Corpus.open(tmp_path / "corpus").split("train").tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [size - 1, 0]


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_corpus(tmp_path / name, train=random_documents(9, 9))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["corpus.toml", "train.bin", "train.idx"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@given(name=st.text(PRINTABLE, min_size=1), licences=st.dictionaries(st.text(), st.text()))
def test_description_survives_toml(name: str, licences: dict[str, str]) -> None:
    parsed = parse_description(
        """
        format = 1
        name = "x"
        builder = "b"
        seed = 0
        vocab_size = 1
        pad_token = 0
        modalities = [{ name = "text", first_id = 0, size = 1 }]
        [splits.train]
        documents = 1
        tokens = 1
        tokens_per_modality = { text = 1 }
        longest_document = 1
        sha256 = { bin = "", idx = "" }
        """,
        "text",
    )
    description = parsed.model_copy(update={"name": name, "licences": licences})
    assert parse_description(render_description(description), "text") == description


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "document 1 of split train: empty"),
        ([("text", [])], "document 1 of split train: empty"),
        ([("text", [1]), ("image", [99])], "token id 99 in a segment of modality image.* 100..159"),
        ([("image", [160])], "token id 160 in a segment of modality image.* 100..159"),
        ([("text", [-1])], "token id -1 in a segment of modality text.* 0..99"),
        ([("video", [1])], r"modality 'video', expected \['text', 'image', 'speech'\]"),
        ([("text", np.array([1.5]))], "ids of dtype float64"),
        ([("text", np.zeros((2, 2), int))], r"shape \(2, 2\)"),
    ],
)
def test_bad_segments_are_rejected(tmp_path: Path, segments: list, message: str) -> None:
    assert_refused(tmp_path, message, lambda corpus: corpus.add("train", segments))


@pytest.mark.parametrize(("ids", "message"), [([200], "token id 200"), ([], "empty")])
def test_bad_documents_are_rejected(tmp_path: Path, ids: list[int], message: str) -> None:
    message = f"document 1 of split train: {message}"
    assert_refused(tmp_path, message, lambda corpus: corpus.add_document("train", np.array(ids)))


def test_error_in_the_with_block_leaves_no_files(tmp_path: Path) -> None:
    def run() -> None:
        with writer(tmp_path / "corpus") as corpus:
            corpus.add("train", [("text", [1])])
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_no_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"), writer(tmp_path / "corpus"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_corpus_is_not_overwritten(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", train=[np.array([1])])
    with pytest.raises(DataError, match="exists already"), writer(tmp_path / "corpus"):
        pytest.fail("entered")
    assert Corpus.open(tmp_path / "corpus").split("train")[0].tolist() == [1]


def test_empty_directory_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    assert len(write_corpus(tmp_path / "corpus", train=[np.array([1])]).split("train")) == 1


@pytest.mark.parametrize("documents", [1, 40])  # the write fails on closing, while adding
def test_full_disk_while_writing_tokens(tmp_path: Path, documents: int) -> None:
    def write(corpus: CorpusWriter) -> None:
        for _ in range(documents):
            corpus.add_document("train", np.zeros(3000, int))  # 6000 bytes

    with file_size_limit(4096):
        assert_refused(tmp_path, "cannot write the corpus: File too large", write)


def test_full_disk_while_adding_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    message = "cannot write the corpus: No space left on device"
    assert_refused(tmp_path, message, lambda corpus: corpus.add_file("codebook", b"x"))


def test_full_disk_while_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", refuse)
    assert_refused(tmp_path, "cannot write the corpus: No space left on device", lambda _: None)


@pytest.mark.parametrize("name", ["../outside", "corpus.toml", "train.bin", "a/b"])
def test_conflicting_file_names_are_rejected(tmp_path: Path, name: str) -> None:
    assert_refused(tmp_path, "cannot add a file", lambda corpus: corpus.add_file(name, b""))


def test_adding_a_file_twice_is_rejected(tmp_path: Path) -> None:
    def write(corpus: CorpusWriter) -> None:
        corpus.add_file("codebook", b"1")
        corpus.add_file("codebook", b"2")

    assert_refused(tmp_path, "file 'codebook' was added twice", write)


def test_missing_codebook_is_rejected(tmp_path: Path) -> None:
    text = Modality(name="text", first_id=0, size=9, codec="bpe", codebook="codebook")
    message = "codebook 'codebook' of modality text was not added"
    assert_refused(tmp_path, message, lambda _: None, modalities=[text])
    with writer(tmp_path / "corpus", [text]) as corpus:
        corpus.add_file("codebook", b"{}")
        corpus.add("train", [("text", [1])])
    assert (tmp_path / "corpus" / "codebook").read_bytes() == b"{}"


def test_files_of_a_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    dead, alive, elsewhere = Process.of(child.pid), Process.of(os.getpid()), "node9"
    child.kill()
    child.wait()
    names = {
        "dead": f".corpus.partial-{dead.pid}.{dead.started}@{dead.host}-abcd_123",
        "alive": f".corpus.partial-{alive.pid}.{alive.started}@{alive.host}-abcd_123",
        "elsewhere": f".corpus.partial-{dead.pid}.{dead.started}@{elsewhere}-abcd_123",
        "another corpus": f".other.partial-{dead.pid}.{dead.started}@{dead.host}-abcd_123",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    with writer(tmp_path / "corpus") as corpus:
        corpus.add("train", [("text", [1])])
        (own,) = {path.name for path in tmp_path.iterdir()} - set(names.values())
        assert own.startswith(f".corpus.partial-{alive.pid}.{alive.started}@{alive.host}-")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"corpus", *names.values()} - {names["dead"]}
