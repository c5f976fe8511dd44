"""How the jobs of a check end; the launcher itself does not run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mot_megatron.job.local_job import Ended
from mot_megatron.machine_check import jobs, parity
from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.jobs import JobError, timed_job
from mot_megatron.machine_check.parity import small_config

GOOD = Ended(status=0, errors=(), has_traceback=False, last_step=0, survivors=0)


class FakeJob:
    """A job that has ended, and wrote what it was told to."""

    ended = GOOD
    record = "{}"
    text = "Traceback\nRuntimeError: CUDA error\n\n"

    def __init__(
        self,
        arguments: Sequence[str],
        world_size: int,
        output: Path,
        environment: Mapping[str, str],
    ) -> None:
        del environment
        self.is_running = False
        output.write_text(self.text)
        FakeJob.arguments, FakeJob.world_size = list(arguments), world_size
        file = next(word for word in arguments if word.startswith("--benchmark="))
        if self.ended.status == 0:
            Path(file.partition("=")[2]).write_text(self.record)

    arguments: Sequence[str] = ()
    world_size = 0

    def wait(self, seconds: float, poll_seconds: float) -> bool:
        del seconds, poll_seconds
        return True

    def end(self, seconds: float) -> Ended:
        del seconds
        return self.ended


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(jobs, "Job", FakeJob)
    (tmp_path / "logs").mkdir()
    return Context("cpu", 1, tmp_path, tmp_path, {})


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(2, ("error: no GPU",), False, 0, 0), "x.job.log: status 2: error: no GPU"),
        (Ended(1, (), True, 0, 0), "x.job.log: status 1: RuntimeError: CUDA error"),
        (Ended(None, (), False, 0, 3), "x.job.log: status None: RuntimeError: CUDA error"),
    ],
)
def test_a_failed_job_is_one_line(
    context: Context, monkeypatch: pytest.MonkeyPatch, ended: Ended, words: str
) -> None:
    monkeypatch.setattr(FakeJob, "ended", ended)
    with pytest.raises(JobError) as error:
        timed_job(context, "x", small_config(Path("corpus"), "plain"), 1)
    assert str(error.value) == words


def test_losses_of_a_job_are_compared(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads(parity.REFERENCE_FILE.read_text())["bits"]["top-2"]
    overrides = ["parallel.expert_model_parallel_size=2"]
    for change, status in ((0.0, "PASS"), (0.01, "FAIL")):
        record = json.dumps({"total_bits": [*wanted[:4], wanted[4] + change]})
        monkeypatch.setattr(FakeJob, "record", record)
        outcome = parity.parity(context, model="top-2", overrides=overrides, steps=5, world_size=2)
        assert outcome.status == status
    assert FakeJob.world_size == 2
    (config,) = (word for word in FakeJob.arguments if word.startswith("--config="))
    text = Path(config.partition("=")[2]).read_text()
    assert "expert_model_parallel_size = 2" in text
    assert "topk = 2" in text
    monkeypatch.setattr(FakeJob, "ended", GOOD._replace(status=3, errors=("error: rank died",)))
    outcome = parity.parity(context, steps=5)
    assert outcome.status == "FAIL"
    assert outcome.seen.endswith("status 3: error: rank died")
