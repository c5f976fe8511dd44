"""``mot prepare codec``: codebook files from pretrained weights, and from there to a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mot_megatron.cli import prepare
from mot_megatron.data.corpus import Corpus
from tests.data.codebooks.test_hubert import save_model
from tests.data.codebooks.test_vqgan import janus, taming_names
from tests.data.documents.raw_files import make_items, write_jsonl


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert prepare.main(command) == 2
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    return error


def test_codebooks_become_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "raw", make_items(12))
    save_file(taming_names(janus()), tmp_path / "vqgan.safetensors")
    save_model(tmp_path / "hubert")
    image, speech = tmp_path / "image.safetensors", tmp_path / "speech.safetensors"
    vqgan = ["codec", "vqgan", "--weights", str(tmp_path / "vqgan.safetensors"), "--pixels", "24"]
    assert prepare.main([*vqgan, "--output", str(image)]) == 0
    assert capsys.readouterr().out == f"{image}: 50 codes of codec vqgan\n"
    hubert = [
        "codec", "hubert_units", "--weights", str(tmp_path / "hubert"), "--layer", "2",
        "--codes", "9", "--train-on", str(tmp_path / "raw"),
    ]  # fmt: skip
    assert prepare.main([*hubert, "--output", str(speech), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"output": str(speech), "codec": "hubert_units", "codes": 9}
    command = [
        "documents", str(source), "--output", str(tmp_path / "corpus"), "--workers", "1",
        "--text-vocabulary", "300", "--validation-share", "0.3", "--image-codebook", str(image),
        "--speech-codebook", str(speech),
    ]  # fmt: skip
    assert prepare.main(command) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    found = [(each.codec, each.size) for each in corpus.description.modalities]
    assert found == [("bpe", 300), ("vqgan", 50), ("hubert_units", 9)]
    # 0.4 s at 16 kHz in windows of 400 samples every 320
    counts = corpus.description.splits["train"]
    assert counts.tokens_per_modality["speech"] == 19 * counts.documents
    assert counts.tokens_per_modality["image"] == 36 * counts.documents
    capsys.readouterr()
    assert f"{image}: exists already" in error_of([*vqgan, "--output", str(image)], capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "image.npz"], "--output image.npz: expected a name that ends in .safet"),
        (["--output", "new.safetensors"], "absent.safetensors: No such file"),
        (
            ["--output", "new.safetensors", "--quantizer", "fsq"],
            "--levels: needed with --quantizer fsq, and only then",
        ),
        (
            ["--output", "new.safetensors", "--pixels", "5000"],
            "--pixels 5000: expected at most 4096",
        ),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["codec", "vqgan", "--weights", "absent.safetensors", "--pixels", "24", *options]
    assert message in error_of(command, capsys)


def test_bad_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "speech.safetensors")
    command = [
        "codec", "hubert_units", "--weights", str(tmp_path), "--layer", "2", "--output", output,
        "--train-on", str(tmp_path),
    ]  # fmt: skip
    assert f"--train-on {tmp_path}: no .wav, .flac" in error_of(command, capsys)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    assert "a.wav: not a readable sound" in error_of(command, capsys)
