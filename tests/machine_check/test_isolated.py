"""Checks run in processes of their own: nothing that one does ends the others or outlives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.job.processes import start_of
from mot_megatron.machine_check import isolated
from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.isolated import run_isolated
from tests.machine_check.fakes import fake


@pytest.fixture
def context(tmp_path: Path) -> Context:
    (tmp_path / "logs").mkdir()
    return Context("cpu", 1, tmp_path, tmp_path, {})


def test_the_outcome_comes_back_and_the_output_goes_to_a_file(context: Context) -> None:
    outcome = run_isolated(fake("a/b c", words="seen"), context, 60)
    assert outcome is not None
    assert (outcome.status, outcome.seen, outcome.numbers) == ("PASS", "seen", {"number": 1.5})
    assert context.file("a-b-c.log").read_text() == "what a check prints\n"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "the process ended with status 1: ValueError: no cpu today"),
        ("crashes", "the process ended with signal SIGKILL: before the crash"),
    ],
)
def test_a_failure_is_an_outcome(context: Context, function: str, words: str) -> None:
    outcome = run_isolated(fake("x/y", function), context, 60)
    assert outcome is not None
    assert outcome.status == "FAIL"
    assert outcome.seen == words
    assert outcome.advice == "see logs/x-y.log"


def test_an_earlier_outcome_is_not_taken_for_a_new_one(context: Context) -> None:
    run_isolated(fake("x/y"), context, 60)
    outcome = run_isolated(fake("x/y", "crashes"), context, 60)
    assert outcome is not None
    assert outcome.status == "FAIL"


@pytest.mark.slow
def test_a_hanging_check_is_killed_with_all_that_it_started(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_END_SECONDS", 0.5)
    assert run_isolated(fake("x/y", "hangs"), context, 8) is None
    assert start_of(int(context.file("pid").read_text())) == ""
