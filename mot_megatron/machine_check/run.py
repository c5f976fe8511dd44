"""Run checks one after the other until the time is over, and keep a record after each."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mot_megatron.errors import ConfigError, DataError
from mot_megatron.files import read_regular_file, write_atomically
from mot_megatron.job.exclusive import exclusive
from mot_megatron.machine_check.checks import TIMES_SUFFIX, Check, Context
from mot_megatron.machine_check.isolated import log_name, run_isolated
from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.machine_check.report import page

RECORD_FILE = "check.json"
REPORT_FILE = "check.md"
FORMAT = 1
_PATIENCE = 4.0
"""A check is killed after this many times the seconds that it should take."""
_LATER = "give the same command again, or a longer --minutes"
_MAY_DIFFER = "devices"
"""What the record says of the machine, but may change when checks are continued."""


@dataclass(frozen=True)
class Entry:
    """The outcome of a check in the record."""

    outcome: Outcome
    seconds: float


@dataclass
class Record:
    """The record of a machine's checks, by the name of the check."""

    machine: dict[str, Any]
    """What must be the same when checks are continued."""
    entries: dict[str, Entry] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the record for JSON."""
        return {
            "format": FORMAT,
            "machine": self.machine,
            "checks": {
                name: asdict(entry.outcome) | {"seconds": round(entry.seconds, 2)}
                for name, entry in self.entries.items()
            },
        }

    def write(self, directory: Path) -> None:
        """Write the record and the report.

        Raises:
            DataError: The folder cannot be written.
        """
        try:
            write_atomically(directory / RECORD_FILE, json.dumps(self.document(), indent=1) + "\n")
            outcomes = {name: entry.outcome for name, entry in self.entries.items()}
            write_atomically(directory / REPORT_FILE, page(self.machine, outcomes))
        except OSError as error:
            raise DataError(f"{directory}: cannot be written: {error.strerror}") from None


def open_record(directory: Path, machine: dict[str, Any], again: Collection[str] = ()) -> Record:
    """Create the folder of a report, or read the record in it.

    Args:
        directory: Folder of the report.
        machine: Description of this machine.
        again: Names of checks whose outcomes are forgotten.

    Raises:
        DataError: The folder cannot be written, or holds something else.
        ConfigError: The record is of another machine or other software, and has further checks.
    """
    path = directory / RECORD_FILE
    record = Record(machine)
    try:
        if path.exists():
            found = json.loads(read_regular_file(path))
            entries = _entries(found)
            record.entries = {name: e for name, e in entries.items() if name not in again}
            if record.entries:
                _check_same(path, found, machine)
            if again:
                # Checks use the steps that others have timed.
                for timed in (directory / "logs").glob(f"*{TIMES_SUFFIX}"):
                    timed.unlink()
        elif directory.exists() and any(directory.iterdir()):
            raise DataError(f"{directory}: not empty, and holds no {RECORD_FILE}")
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{directory}: cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not written by mot check-machine: {error}") from None
    record.write(directory)
    return record


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other checks of this machine out of a folder; a process that ends gives it back.

    Raises:
        DataError: Another one is running.
    """
    problem = f"{directory}: another mot check-machine is running there"
    with exclusive(directory / "logs" / "lock", problem):
        yield


def _check_same(path: Path, found: dict[str, Any], machine: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(machine))
    for key in [*wanted, *found["machine"]]:
        before, now = found["machine"].get(key), wanted.get(key)
        if before != now and key != _MAY_DIFFER:
            raise ConfigError(
                f"{path}: recorded with {key} {before!r}, but here it is {now!r}; give --again to"
                " replace the record, or another --output"
            )


def _entries(found: dict[str, Any]) -> dict[str, Entry]:
    entries = {}
    for name, fields in found["checks"].items():
        seconds = float(fields.pop("seconds"))
        entries[name] = Entry(Outcome(**fields), seconds)
    return entries


def run_checks(
    checks: Sequence[Check],
    context: Context,
    record: Record,
    limit_seconds: float,
    say: Callable[[str], None],
) -> None:
    """Run the checks that have no outcome yet, in order, and write the record after each.

    Those that were skipped before are tried again. A check that should take longer than the time
    that is left is skipped.

    Args:
        checks: The checks, the most telling first.
        context: What they are given.
        record: The record, which is extended.
        limit_seconds: Time for all of them.
        say: Receives a line per check.

    Raises:
        DataError: The folder cannot be written.
    """
    deadline = time.monotonic() + limit_seconds
    # The report has the order of the checks, also when it is continued with others.
    before = record.entries
    record.entries = {}
    for number, check in enumerate(checks, 1):
        entry = before.pop(check.name, None)
        if entry is None or entry.outcome.status == "SKIPPED":
            begin = time.monotonic()
            outcome = skipped(check, context, deadline - begin)
            if outcome is None:
                say(f"{number}/{len(checks)}: {check.name}")
                outcome = _outcome(check, context, deadline - begin)
            entry = Entry(outcome, time.monotonic() - begin)
            advice = f" -> {outcome.advice}" if outcome.advice else ""
            say(f"{outcome.status} {check.name}: {outcome.seen}{advice}")
        record.entries[check.name] = entry
        rest = dict(before)
        Record(record.machine, record.entries | rest).write(context.directory)
    record.entries |= before


def _outcome(check: Check, context: Context, seconds_left: float) -> Outcome:
    """Run a check; one that takes far too long fails, unless the time for all checks ended it."""
    patience = _PATIENCE * check.seconds
    outcome = run_isolated(check, context, min(seconds_left, patience))
    if outcome is not None:
        return outcome
    if seconds_left < patience:
        return Outcome("SKIPPED", f"cut off after {seconds_left:.0f} s, at the limit", _LATER)
    return Outcome("FAIL", f"not done after {patience:.0f} s", f"it hangs: see {log_name(check)}")


def skipped(check: Check, context: Context, seconds_left: float) -> Outcome | None:
    """Return why a check is not run here, or None if it is."""
    if check.num_devices > context.num_devices:
        return Outcome("SKIPPED", f"needs {check.num_devices} devices, --devices has fewer")
    if check.seconds > seconds_left:
        return Outcome(
            "SKIPPED",
            f"may take {check.seconds:.0f} s, but {max(seconds_left, 0):.0f} s are left",
            _LATER,
        )
    return None
