"""Tests of the text and JSON output of ``mot prepare`` and ``mot inspect``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mot_megatron.cli import inspect, prepare
from mot_megatron.data.builders.assembly import SAMPLES_FILE
from mot_megatron.data.codebooks.arrays import pack_arrays
from mot_megatron.data.corpus import Corpus
from tests.cli.console import only_error
from tests.small_corpus import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def test_prepare_prints_counts(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "build", lambda _: corpus)
    assert prepare.main(["openmoji", "--output", "x", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    train = corpus.description.splits["train"]
    assert document["splits"]["train"]["tokens"] == train.tokens
    assert prepare.main(["openmoji", "--output", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"train: {train.documents:,} documents, {train.tokens:,} tokens (")
    assert lines[-1].startswith("x: complete after ")


def test_inspect(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(corpus.directory), "--output", str(tmp_path), "--examples", "2"]
    assert inspect.main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["splits"].keys() == corpus.description.splits.keys()
    assert len(document["examples"]) == 2
    assert all(0 < fill <= 1 for fill in document["fill"].values())
    assert (tmp_path / "contact_sheet.png").is_file()
    with Image.open(document["files"]["lengths"]) as picture:
        colors = picture.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    assert len(colors) > 50
    assert document["sources"] == []
    assert inspect.main(command) == 0
    printed = capsys.readouterr().out
    assert "licenses: none stated" in printed
    for modality in corpus.description.modalities:
        assert f"  {modality.name}: ids {modality.first_id}..{modality.end_id - 1}," in printed
    assert inspect.main([*command, "--seq-length", "2"]) == 2
    assert "the longest document of split" in only_error(capsys.readouterr().err)


PICTURES = np.zeros((19, 32, 32, 3), dtype=np.uint8)


def inspected(corpus: Corpus, directory: Path, samples: bytes) -> int:
    """Inspect a copy of the corpus with other samples."""
    shutil.copytree(corpus.directory, directory / "copy")
    (directory / "copy" / SAMPLES_FILE).write_bytes(samples)
    return inspect.main([str(directory / "copy"), "--output", str(directory / "out")])


def test_contact_sheet_shows_every_sample(corpus: Corpus, tmp_path: Path) -> None:
    assert inspected(corpus, tmp_path, pack_arrays(pictures=PICTURES)) == 0
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        # Two rows of 16 pictures and their reconstructions, enlarged twice.
        assert sheet.size == (16 * 32 * 2, 2 * 2 * 32 * 2)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (b"", "not an .npz file"),
        (pack_arrays(pictures=PICTURES)[:-40], "not an .npz file"),
        (pack_arrays(other=PICTURES), "contains arrays of shapes {'other'"),
        (pack_arrays(pictures=PICTURES[..., 0]), "expected {'pictures': (96, 32, 32, 3)}"),
        (pack_arrays(pictures=np.full((2, 32, 32, 3), np.nan)), "not finite"),
        (pack_arrays(pictures=np.array("text")), "expected {'pictures'"),
    ],
    ids=["empty", "truncated", "names", "shape", "nan", "text"],
)
def test_broken_samples_are_one_line_errors(
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    samples: bytes,
    message: str,
) -> None:
    assert inspected(corpus, tmp_path, samples) == 2
    error = only_error(capsys.readouterr().err)
    assert f"{tmp_path / 'copy' / SAMPLES_FILE}: " in error
    assert message in error
