"""Tests of the summary table, and of the exit status if a loss is not below a baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mot_megatron.cli.summary import main
from tests.cli.console import only_error
from tests.columns import widest


def write_run(folder: Path, text_bits: float) -> Path:
    def modality(bits: float) -> dict[str, float]:
        return {
            "held_out_bits_per_token": bits,
            "unigram_entropy": 7.0,
            "two_token_context_entropy": 4.0,
        }

    folder.mkdir()
    summary = {
        "name": "mine",
        "steps": 20,
        "seconds": 10.0,
        "tokens": 12345,
        "tokens_per_second": 1234.5,
        "parameters": 2_000_000,
        "world_size": 2,
        "device": "a machine",
        "modalities": {"text": modality(text_bits), "image": modality(3.5)},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 5.25)
    assert main(["--checkpoint", str(run), "--require", "unigram"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    (text,) = [line for line in lines if line.startswith("text")]
    assert text.split() == ["text", "5.250", "7.000", "4.000", "below", "unigram"]
    (image,) = [line for line in lines if line.startswith("image")]
    assert image.endswith("below unigram and context")


def test_losses_in_other_units_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no entropies, so neither the table nor --require compares them with one."""
    run = write_run(tmp_path / "run", 5.25)
    summary = json.loads((run / "summary.json").read_text())
    summary["modalities"]["image"] = {"held_out_loss": 0.75, "unit": "squared error"}
    (run / "summary.json").write_text(json.dumps(summary))
    assert main(["--checkpoint", str(run), "--require", "unigram"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["", "squared error, held out", f"{'image':26}{'0.750':>8}"]
    assert not any("image" in line for line in lines[:-3])


def test_several_runs_as_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, bits) for name, bits in (("a", 5.25), ("b", 7.5))]
    given = [part for run in runs for part in ("--checkpoint", str(run))]
    assert main([*given, "--require", "unigram", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "not below unigram: text\n"
    assert json.loads(printed.out) == {
        "runs": [json.loads((run / "summary.json").read_text()) for run in runs]
    }


def test_missed_baseline_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 5.25)
    assert main(["--checkpoint", str(run), "--require", "two-token"]) == 1
    assert capsys.readouterr().err.strip() == "not below two-token: text"
    # A loss that equals the baseline is not below it.
    assert (
        main(["--checkpoint", str(write_run(tmp_path / "equal", 7.0)), "--require", "unigram"]) == 1
    )


def test_modality_without_held_out_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", 5.25)
    summary = json.loads((run / "summary.json").read_text())
    summary["tokens_per_second"] = None
    summary["modalities"]["text"] = dict.fromkeys(summary["modalities"]["text"])
    (run / "summary.json").write_text(json.dumps(summary))
    assert main(["--checkpoint", str(run)]) == 0
    assert "no held-out tokens" in capsys.readouterr().out
    assert main(["--checkpoint", str(run), "--require", "unigram"]) == 1


@pytest.mark.parametrize("content", [None, "{"])
def test_bad_summary_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert main(["--checkpoint", str(tmp_path)]) == 2
    assert "summary.json" in only_error(capsys.readouterr().err)


@pytest.mark.parametrize("has_causal_router", [True, False])
def test_losses_with_causal_routing_are_preferred(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_causal_router: bool
) -> None:
    run = write_run(tmp_path / "run", 5.25)
    summary = json.loads((run / "summary.json").read_text())
    summary["routed_with_later_tokens"] = True
    if has_causal_router:
        for modality, bits in (("text", 7.5), ("image", 3.75)):
            summary["modalities"][modality]["held_out_bits_per_token_causal"] = bits
    (run / "summary.json").write_text(json.dumps(summary))
    # 7.5 is above the unigram entropy of 7, 5.25 is not.
    assert main(["--checkpoint", str(run), "--require", "unigram"]) == int(has_causal_router)
    printed = capsys.readouterr().out
    assert widest(printed.splitlines()) <= 120
    if has_causal_router:
        assert "7.500" in printed
        assert "routing sees later tokens: text 5.250, image 3.500" in printed
    else:
        assert "which may flatter these losses: the model has no causal router" in printed
