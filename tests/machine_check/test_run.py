"""The order of checks, their time limit, the record after each, and how it is continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mot_megatron.errors import ConfigError, DataError
from mot_megatron.machine_check import run
from mot_megatron.machine_check.checks import Check, Context
from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.machine_check.run import Record, locked, open_record, run_checks
from tests.machine_check.fakes import fake

MACHINE = {"device": "cpu", "torch": "2"}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Run checks in this process, and return a list of their names and time limits."""
    found: list[tuple[str, float]] = []

    def run_here(check: Check, context: Context, seconds: float) -> Outcome:
        found.append((check.name, seconds))
        return check.run(context)

    monkeypatch.setattr(run, "run_isolated", run_here)
    return found


def checked(
    directory: Path, checks: list[Check], seconds: float = 1000.0, again: bool = False
) -> Record:
    names = [check.name for check in checks] if again else ()
    record = open_record(directory, MACHINE, names)
    context = Context("cpu", 1, directory, directory, {})
    run_checks(checks, context, record, seconds, lambda _: None)
    return record


def recorded(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "check.json").read_text())["checks"]


def test_outcomes_are_recorded_in_order(tmp_path: Path, ran: list[tuple[str, float]]) -> None:
    checked(tmp_path, [fake("b/one"), fake("a/two", "is_slow", seconds=10)])
    assert [name for name, _ in ran] == ["b/one", "a/two"]
    # A check may take four times as long as it should, but not longer than the time that is left.
    assert ran[0][1] == pytest.approx(120)
    assert ran[1][1] == pytest.approx(40)
    found = recorded(tmp_path)
    assert list(found) == ["b/one", "a/two"]
    assert {found["b/one"]["status"], found["a/two"]["status"]} == {"PASS", "SLOW"}
    assert found["b/one"]["numbers"] == {"number": 1.5}
    report = (tmp_path / "check.md").read_text()
    assert report.index("## B") < report.index("## A")


def test_checks_that_take_too_long_are_named(tmp_path: Path, ran: list[tuple[str, float]]) -> None:
    checks = [fake("a/one", seconds=50), fake("a/two", seconds=200), fake("a/three", seconds=60)]
    checked(tmp_path, checks, seconds=100)
    assert [name for name, _ in ran] == ["a/one", "a/three"]
    assert ran[0][1] == pytest.approx(100, abs=2)
    assert recorded(tmp_path)["a/two"]["status"] == "SKIPPED"
    assert recorded(tmp_path)["a/two"]["seen"].startswith("may take 200 s, but ")
    # The same command tries them again, and nothing else.
    checked(tmp_path, checks)
    assert [name for name, _ in ran[2:]] == ["a/two"]
    assert list(recorded(tmp_path)) == ["a/one", "a/two", "a/three"]


def test_checks_for_more_devices_are_skipped(tmp_path: Path, ran: list[tuple[str, float]]) -> None:
    check = Check("a/b", "tests.machine_check.fakes:passes", 1, num_devices=2)
    record = checked(tmp_path, [check])
    assert ran == []
    assert record.entries["a/b"].outcome.status == "SKIPPED"
    assert "needs 2 devices" in record.entries["a/b"].outcome.seen


def test_an_interrupted_check_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[tuple[str, float]]
) -> None:
    del ran
    good = run.run_isolated

    def interrupted(check: Check, context: Context, seconds: float) -> Outcome | None:
        if check.name == "a/two":
            raise KeyboardInterrupt
        return good(check, context, seconds)

    checks = [fake("a/one"), fake("a/two"), fake("a/three")]
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_isolated", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checked(tmp_path, checks)
    assert list(recorded(tmp_path)) == ["a/one"]
    assert "one" in (tmp_path / "check.md").read_text()
    checked(tmp_path, checks)
    assert (tmp_path / "logs" / "ran").read_text().count("fine") == 3  # each once
    # Other checks are added to the record; --again runs only the chosen ones.
    checked(tmp_path, [fake("a/four")])
    checked(tmp_path, checks[:1], again=True)
    assert set(recorded(tmp_path)) == {"a/one", "a/two", "a/three", "a/four"}
    assert (tmp_path / "logs" / "ran").read_text().count("fine") == 5


def test_a_hang_is_a_failure_unless_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def hang(check: Check, context: Context, seconds: float) -> None:
        del check, context
        limits.append(seconds)

    monkeypatch.setattr(run, "run_isolated", hang)
    checks = [fake("a/one", seconds=10), fake("a/two", seconds=40)]
    found = checked(tmp_path, checks, seconds=100).entries
    assert limits == pytest.approx([40, 100], abs=2)
    assert found["a/one"].outcome.status == "FAIL"
    assert found["a/one"].outcome.seen == "not done after 40 s"
    assert found["a/one"].outcome.advice == "it hangs: see logs/a-one.log"
    assert found["a/two"].outcome.status == "SKIPPED"
    assert found["a/two"].outcome.seen.startswith("cut off after ")


def test_two_checks_do_not_write_one_folder(tmp_path: Path) -> None:
    open_record(tmp_path, MACHINE)
    words = "another mot check-machine is running"
    with locked(tmp_path), pytest.raises(DataError, match=words), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_records_of_something_else_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_isolated", lambda check, context, _: check.run(context))
    checked(tmp_path / "one", [fake("a/b")])
    with pytest.raises(ConfigError, match=r"recorded with torch '2', but here it is '3'; give --"):
        open_record(tmp_path / "one", {**MACHINE, "torch": "3"})
    open_record(tmp_path / "one", {**MACHINE, "devices": 8})
    open_record(tmp_path / "one", {**MACHINE, "torch": "3"}, ["a/b"])
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "letter").touch()
    with pytest.raises(DataError, match=r"two: not empty, and holds no check\.json"):
        open_record(tmp_path / "two", MACHINE)
    for content in ("[]", "{", '{"machine": {}, "checks": {"a/b": {"seconds": 1}}}'):
        (tmp_path / "one" / "check.json").write_text(content)
        with pytest.raises(DataError, match=r"check\.json: not written by mot check-machine"):
            open_record(tmp_path / "one", MACHINE)
