"""Options of ``mot prepare documents`` and ``mot prepare megatron``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mot_megatron.cli import inspect, prepare
from mot_megatron.data.codebooks.text import train_text_codebook
from tests.data.documents.raw_files import make_items, write_jsonl


def test_documents_become_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "raw", make_items(12))
    source.write_text(source.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes(train_text_codebook(["a"], 300, ["<s>", "</s>"]))
    (tmp_path / "names.toml").write_text('"<bos>" = "<s>"\n"<eos>" = "x"', encoding="utf-8")
    output = tmp_path / "corpus"
    command = [
        "documents", str(source), "--output", str(output), "--json", "--workers", "1",
        "--image-codes", "8", "--speech-codes", "6", "--kinds", "speech,image",
        "--languages", "en,de", "--tokenizer", str(tmp_path / "tokenizer.json"),
        "--special-file", str(tmp_path / "names.toml"), "--special", "<eos>=</s>",
        "--validation-share", "0.3", "--max-broken", "1", "--seed", "2", "--license", "squares=CC0",
    ]  # fmt: skip
    assert prepare.main(command) == 0
    printed = capsys.readouterr()
    splits = json.loads(printed.out)["splits"]
    assert sum(split["documents"] for split in splits.values()) == 12
    assert set(splits["train"]["tokens_per_modality"]) == {"text", "image", "speech"}
    assert f"mot prepare: 1 broken documents left out; {output}/broken.jsonl lists" in printed.err
    assert inspect.main([str(output), "--output", str(tmp_path / "seen")]) == 0
    shown = capsys.readouterr().out
    assert "licenses: squares: CC0" in shown
    held_out, tokens = splits["validation"]["documents"], sum(s["tokens"] for s in splits.values())
    line = f"{source}: 12 documents ({held_out} held out), {tokens:,} tokens, 1 broken"
    assert f"  {line}\n" in shown
    again = ["documents", str(source), "--output", str(tmp_path / "again"), "--workers", "1"]
    assert prepare.main([*again, "--codebooks-from", str(output), "--validation-share", "0.3"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {source}:13: not JSON")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codebooks-from", "c", "--image-codes", "8"], "--image-codes: not with --codebooks-"),
        (["--special", "<bos>=<s>"], "--special: only with --tokenizer"),
        (["--tokenizer", "t", "--text-vocabulary", "9"], "--text-vocabulary: not with --tokenizer"),
        (["--kinds", "video"], "--kinds video: expected image, speech or both"),
        (["--image-codec", "vqgan"], "--image-codec vqgan: only with --image-codebook"),
        (
            ["--image-codebook", "i.npz", "--image-codes", "8", "--patch-pixels", "2"],
            "--image-codes, --patch-pixels: not with --image-codebook, which has its own",
        ),
        (["--image-codebook", "i.npz"], "i.npz: No such file"),
        (["--speech-codebook", "s.safetensors"], "s.safetensors: No such file"),
        (["--codebooks-from", "absent"], "absent/corpus.toml: No such file"),
        (["--tokenizer", "absent.json"], "absent.json: No such file"),
    ],
)
def test_options_that_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("a\n", encoding="utf-8")
    command = ["documents", str(tmp_path / "a.txt"), "--output", str(tmp_path / "new"), *options]
    assert prepare.main(command) == 2
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--special", "<bos>"), ("--kinds", "image,image"), ("--languages", "a b"),
        ("--max-broken", "-1"), ("--validation-share", "1"), ("--text-documents", "page"),
    ],
)  # fmt: skip
def test_values(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["documents", "a.txt", "--output", "new", option, value])
    assert option in capsys.readouterr().err
