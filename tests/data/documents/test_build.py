"""Raw files become a corpus: whole, the same for any number of workers, and resumable."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.image import PatchCodec, peak_signal_to_noise
from mot_megatron.data.codebooks.speech import UnitCodec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.documents import build as building
from mot_megatron.data.documents.sources import Reading
from mot_megatron.data.inspection import segments
from mot_megatron.errors import DataError
from tests.data.documents.raw_files import (
    COUNT,
    TINY,
    Item,
    build,
    content,
    make_items,
    write_jsonl,
)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items()


@pytest.fixture(scope="module")
def source(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("raw"), items)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpora") / "corpus"
    assert build(source, directory) == 0
    return directory


def documents(corpus: Corpus) -> dict[str, list[np.ndarray]]:
    """Return the text of every document, and its segments between the delimiters."""
    text = load_codec(corpus.directory, corpus.description.modalities[0])
    assert isinstance(text, TextCodec)
    kinds = corpus.description.modality_of_id
    found = {}
    for split in corpus.splits.values():
        for ids in split:
            parts = [part for _, part in segments(ids, kinds)]
            found[text.decode(parts[0])] = [ids, *parts]
    return found


def test_documents_decode_to_their_sources(built: Path, items: list[Item]) -> None:
    corpus = Corpus.open(built)
    special = corpus.description.special_tokens
    text, image, speech = (load_codec(built, each) for each in corpus.description.modalities)
    assert isinstance(text, TextCodec)
    assert isinstance(image, PatchCodec)
    assert isinstance(speech, UnitCodec)
    found = documents(corpus)
    assert found.keys() == {item.text for item in items}
    splits = corpus.description.splits
    assert splits["train"].documents + splits["validation"].documents == COUNT
    assert splits["validation"].documents >= 2
    for item in items:
        ids, before, picture, between, sound, after = found[item.text]
        assert before[:2].tolist() == [special["<bos>"], special["<en>"]]
        assert before[-1] == special["<boi>"]
        assert between.tolist() == [special["<eoi>"], special["<boa>"]]
        assert after.tolist() == [special["<eoa>"], special["<eos>"]]
        assert len(ids) == len(before) + 64 + 2 + len(sound) + 2
        assert len(sound) == 10  # 0.4 s at 25 per second
        assert len(speech.decode(sound)) == 10 * 640 - 160
        with Image.open(io.BytesIO(item.png)) as opened:
            square = opened.crop((5, 0, 45, 40)).resize((32, 32), Image.Resampling.LANCZOS)
        original = np.asarray(square)[None]
        assert peak_signal_to_noise(original, image.decode(picture)[None])[0] > 15
    assert not list(built.parent.glob(".corpus.*"))


def test_bytes_do_not_depend_on_workers(built: Path, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "corpus", workers=2)
    assert content(tmp_path / "corpus") == content(built)


KILLED = """
import sys, time
from pathlib import Path
from mot_megatron.data.documents import build as building
from tests.data.documents.raw_files import build

real, calls = building._list_broken, []

def hang_at_third(*arguments):
    calls.append(1)
    if len(calls) == 3:
        print("third", flush=True)
        time.sleep(600)
    return real(*arguments)

building._list_broken = hang_at_third
build(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def test_a_killed_build_continues(
    built: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, working = tmp_path / "corpus", tmp_path / ".corpus.working"
    command = [sys.executable, "-c", KILLED, str(source), str(output)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "third\n"
        with pytest.raises(DataError, match="another process builds this corpus"):
            build(source, output)
        process.kill()
    assert not output.exists()
    wait_for_lock(working / "lock")  # until the workers have noticed
    kept = {path: path.stat().st_mtime_ns for path in working.glob("*-*/*")}
    kept |= {path: path.stat().st_mtime_ns for path in working.glob("*.npz")}
    assert len(kept) >= 4 + 3  # three codebooks and their description, three shards
    damaged = next(path for path in kept if path.suffix == ".npz" and path.parent == working)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    del kept[damaged]

    real = building._list_broken
    used: dict[Path, int] = {}

    def note(*arguments: Any) -> int:
        used.update({path: path.stat().st_mtime_ns for path in kept})
        return real(*arguments)

    monkeypatch.setattr(building, "_list_broken", note)
    build(source, output)
    assert content(output) == content(built)
    assert used == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def wait_for_lock(path: Path) -> None:
    deadline = time.monotonic() + 30
    with path.open() as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "a worker has outlived its parent"
                time.sleep(0.05)


def die(*_: object) -> None:
    os._exit(9)


def test_a_killed_worker_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "sample_shard", die)
    with pytest.raises(DataError, match="a worker process was killed, perhaps for its memory"):
        build(source, tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(DataError, match="exists already, expected a new or empty directory"):
        build(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_kind_that_the_corpus_lacks_is_broken(source: Path, tmp_path: Path) -> None:
    vocabulary = replace(TINY, kinds=("image",))
    with pytest.raises(DataError, match="jsonl:1: a segment of speech, but the corpus has only"):
        build(source, tmp_path / "corpus", vocabulary=vocabulary)


def test_too_little_data_for_a_codebook(source: Path, tmp_path: Path) -> None:
    vocabulary = replace(TINY, speech_codes=5000)
    with pytest.raises(DataError, match=r"speech codebook: .* expected at least 5000"):
        build(source, tmp_path / "corpus", vocabulary=vocabulary)
    vocabulary = replace(TINY, text_ids=20)
    with pytest.raises(DataError, match=r"--text-vocabulary: .* expected at most 20"):
        build(source, tmp_path / "corpus", vocabulary=vocabulary)


def test_other_settings_do_not_use_kept_work(source: Path, tmp_path: Path) -> None:
    """Each of these builds fails after encoding, because nothing is held out."""

    def left(**changes: Any) -> set[str]:
        with pytest.raises(DataError, match="no documents for split validation"):
            build(source, tmp_path / "corpus", validation_share=1e-9, **changes)
        return {path.name for path in (tmp_path / ".corpus.working").glob("*-*")}

    first = left()
    assert len(first) == 1 + 4  # the codebooks and four shards
    assert left(workers=2, max_broken=1) == first
    other = left(vocabulary=replace(TINY, image_codes=5))
    assert len(other) == 5
    assert not other & first


def test_split_key_keeps_documents_together(source: Path, tmp_path: Path) -> None:
    reading = Reading(split_key="source")
    build(source, tmp_path / "corpus", reading=reading, vocabulary=TINY)
    corpus = Corpus.open(tmp_path / "corpus")
    codec = load_codec(corpus.directory, corpus.description.modalities[0])
    kinds = corpus.description.modality_of_id
    numbers = [
        int(codec.decode(document[kinds[document] == 0]).split()[-1])
        for document in corpus.split("validation")
    ]
    # Documents 2n and 2n + 1 have the same source.
    assert numbers
    assert {number ^ 1 for number in numbers} == set(numbers)


def test_codebooks_of_another_corpus(built: Path, items: list[Item], tmp_path: Path) -> None:
    """The same documents in another order, with the same codebooks, have the same ids."""
    source = write_jsonl(tmp_path / "raw", items[::-1])
    build(source, tmp_path / "again", vocabulary=built)
    one, other = Corpus.open(built), Corpus.open(tmp_path / "again")
    assert one.vocabulary_digest == other.vocabulary_digest
    for text, (ids, *_) in documents(one).items():
        assert np.array_equal(documents(other)[text][0], ids)


def test_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(f"line <eos> {number}" for number in range(30)), encoding="utf-8")
    build(path, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    (modality,) = corpus.description.modalities
    codec = load_codec(corpus.directory, modality)
    special = corpus.description.special_tokens
    assert set(special) == {"<pad>", "<bos>", "<eos>"}
    for ids in corpus.split("train"):
        # "<eos>" within a text is text.
        assert (ids == special["<eos>"]).sum() == 1
        assert codec.decode(ids).startswith("line <eos> ")
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"one\ntwo {number}\n", encoding="utf-8")
    build(tmp_path / "texts", tmp_path / "files", reading=Reading(text_documents="file"))
    files = Corpus.open(tmp_path / "files")
    codec = load_codec(files.directory, files.description.modalities[0])
    assert codec.decode(files.split("train")[0]).startswith("one\ntwo ")


def test_broken_documents_are_listed_and_limited(items: list[Item], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "raw", items)
    media = tmp_path / "raw" / "media"
    (media / "3.png").write_bytes(b"not a picture")
    (media / "5.wav").write_bytes(items[5].wav[:60])
    (media / "6.png").unlink()
    lines = source.read_bytes().splitlines()
    lines[8] = b'{"segments": [{"text": "\xff"}]}'
    lines[9] = b"{"
    lines[10] = json.dumps({"segments": [{"text": "\ud800"}]}).encode()
    lines[11] = b'{"segments": [{"text": "x", "image": "media/0.png"}]}'
    lines[12] = b'{"text": ""}'
    lines[13] = b'{"text": "x", "language": "tlh"}'
    lines[14] = b'{"text": "x", "language": "eos"}'
    lines[15] = b'{"image": "\\ud800\\n.png"}'
    lines[16] = b'{"image": "a\\u0000.png"}'
    lines[17] = b'{"image": "absent\\n.png"}'
    lines[18] = b'{"image": 7}'
    lines[19] = b"[]"
    source.write_bytes(b"\n".join(lines))
    wanted = {
        4: "media/3.png: not a readable picture",
        6: "media/5.wav: ",
        7: "media/6.png: No such file",
        9: "not UTF-8 at byte 24 of the line",
        10: "not JSON: Expecting property name enclosed in double quotes at character 2",
        11: "segment 1: text is not UTF-8 at position 0",
        12: "segment 1 has the keys ['text', 'image'], expected one of text, image, audio",
        13: "the text is empty",
        14: "language 'tlh' is none of the corpus",
        15: "segment 1: language eos, expected letters",
        16: "'\\ud800\\n.png' is not the path of a file",
        17: "'a\\x00.png' is not the path of a file",
        18: "'absent\\n.png': No such file",
        19: "7 is not the path of a file",
        20: "no segments, expected a list",
    }
    vocabulary = replace(TINY, languages=("en",))
    assert build(source, tmp_path / "most", max_broken=15, vocabulary=vocabulary) == 15
    listed = (tmp_path / "most" / building.BROKEN_FILE).read_text(encoding="utf-8").splitlines()
    for line, (number, problem) in zip(listed, wanted.items(), strict=True):
        assert json.loads(line)["where"] == f"{source}:{number}"
        assert json.loads(line)["problem"].startswith(problem)
    splits = Corpus.open(tmp_path / "most").description.splits.values()
    assert sum(split.documents for split in splits) == COUNT - 15
    with pytest.raises(DataError) as raised:
        build(source, tmp_path / "fewer", max_broken=14, vocabulary=vocabulary)
    assert f"{source}:20: no segments" in str(raised.value)
    assert "--max-broken 14" in str(raised.value)
    assert not (tmp_path / "fewer").exists()
    assert len((tmp_path / ".fewer.working" / building.BROKEN_FILE).read_text().splitlines()) == 15
