"""The corpus has the bytes of the reference, and losses are judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mot_megatron.machine_check import parity
from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.corpus import digest_of, make_corpus
from mot_megatron.machine_check.parity import REFERENCE_FILE, judge, small_config, steps_of

REFERENCE = json.loads(REFERENCE_FILE.read_text())


def test_the_corpus_is_that_of_the_reference(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    assert digest_of(corpus) == REFERENCE["corpus"]
    assert digest_of(make_corpus(tmp_path / "corpus")) == REFERENCE["corpus"]


def test_the_reference_is_complete_and_learns() -> None:
    for model, bits in REFERENCE["bits"].items():
        assert len(bits) == steps_of(model)
        assert bits[-1] < bits[0] - 0.5


@pytest.mark.parametrize(
    ("change", "step", "precision", "words"),
    [
        (0.0, 1, "fp32", None),
        (9e-4, 4, "fp32", None),
        (2e-3, 1, "fp32", "the first loss is wrong: look at forward"),
        (2e-3, 3, "fp32", "wrong from step 3 on: look at backward"),
        (2e-3, 3, "bf16", None),
        (0.2, 2, "bf16", "wrong from step 2 on"),
        (math.nan, 5, "bf16", "wrong from step 5 on"),
    ],
)
def test_differences_are_judged(
    change: float, step: int, precision: str, words: str | None
) -> None:
    wanted = REFERENCE["bits"]["plain"]
    bits = list(wanted[:5])
    bits[step - 1] += change
    config = small_config(Path("corpus"), "plain", [f'training.precision="{precision}"'])
    outcome = judge(bits, wanted, config)
    assert outcome.status == ("FAIL" if words else "PASS")
    assert (words or "") in outcome.advice
    assert outcome.numbers["bits"] == bits


def test_losses_of_another_corpus_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "digest_of", lambda _: "other")
    outcome = parity.parity(Context("cpu", 1, tmp_path, tmp_path, {}), steps=1)
    assert outcome.status == "FAIL"
    assert "has other bytes than the one of the reference" in outcome.seen
