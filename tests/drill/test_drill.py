"""The drill: what it damages, what it calls a problem, and a short one with real jobs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mot_megatron.checkpoint import open_checkpoint
from mot_megatron.cli.drill import main
from mot_megatron.config_files import parse_config
from mot_megatron.drill.faults import KINDS, damage_the_newest_checkpoint
from mot_megatron.drill.rounds import Round, Setting, find_problems, summarize
from mot_megatron.errors import CheckpointError
from mot_megatron.job.local_job import Ended
from tests.checkpoint.states import save
from tests.cli.console import only_error
from tests.columns import widest
from tests.small_runs import CONFIG, write_corpus

GOOD = Ended(status=0, errors=(), has_traceback=False, last_step=20, survivors=0)


def a_round(fault: str, *, last: int = 20, saved: int = 20) -> Round:
    return Round("run-1", fault, "", 1.0, 2.0, 0, fault_step=3, last_step=last, saved_step=saved)


@pytest.mark.parametrize(
    ("result", "ended", "before", "words"),
    [
        (a_round("none"), GOOD, 14, None),
        (a_round("rank killed", saved=14), GOOD._replace(status=3, errors=("error: x",)), 7, None),
        (a_round("rank killed", saved=6), GOOD._replace(status=3), 0, None),
        (a_round("rank killed", saved=5), GOOD, 0, "15 steps lost, more than 14"),
        (a_round("rank killed", saved=14), GOOD, 15, "checkpoint of step 15 is lost"),
        (a_round("stop file", saved=19), GOOD, 7, "stopped without saving: 1 steps lost"),
        (a_round("stop file"), GOOD._replace(status=1), 7, "ended with status 1"),
        (a_round("none"), GOOD._replace(status=None), 7, "the job did not end"),
        (a_round("none"), GOOD._replace(survivors=2), 7, "2 processes outlived the launcher"),
        (a_round("disk full"), GOOD._replace(has_traceback=True), 7, "a traceback was printed"),
        (a_round("disk full"), GOOD._replace(errors=("a", "b")), 7, "2 errors were printed: a | b"),
    ],
)
def test_problems_are_found(result: Round, ended: Ended, before: int, words: str | None) -> None:
    config = parse_config(CONFIG.format(corpus="none"), "test")
    setting = Setting(config, (), 1, Path(), environment={}, kinds=KINDS)
    problems = find_problems(setting, result, ended, before)
    supervised = replace(setting, is_supervised=True)
    if result.fault == "rank killed" and ended.status:
        # It should have come back by itself.
        assert "ended with status 3" in find_problems(supervised, result, ended, before)[-1]
    else:
        assert find_problems(supervised, result, ended, before) == problems
    if words is None:
        assert problems == []
    else:
        assert any(words in problem for problem in problems)


def test_fewer_steps_may_be_lost_if_saves_stop_training() -> None:
    overrides = ["checkpoint.asynchronous=false"]
    config = parse_config(CONFIG.format(corpus="none"), "test", overrides)
    setting = Setting(config, (), 1, Path(), environment={}, kinds=KINDS)
    lost = a_round("rank killed", saved=12)
    assert find_problems(setting, lost, GOOD, 7) == ["8 steps lost, more than 7"]


@pytest.mark.parametrize("seed", range(12))
def test_damaged_checkpoint_does_not_verify(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    save(tmp_path, 1)
    assert damage_the_newest_checkpoint(tmp_path, chance) is None  # the only one
    save(tmp_path, 2)
    assert damage_the_newest_checkpoint(tmp_path, chance)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "step_00000002")
    search = open_checkpoint(tmp_path)
    assert search.checkpoint is not None
    assert search.checkpoint.step == 1


def test_the_table_lists_faults_and_problems() -> None:
    killed = a_round("rank killed", saved=14)
    killed.problems.append("a traceback was printed")
    lines = summarize([a_round("none"), killed, a_round("rank killed")])
    assert lines[2].split() == ["rank", "killed", "2", "2.0", "s", "6", "1"]
    assert lines[-1] == "run-1, rank killed () after 1.0 s: a traceback was printed"
    assert widest(lines) <= 120


def test_bad_arguments_are_one_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    config = tmp_path / "small.toml"
    config.write_text(CONFIG.format(corpus="none"))
    base = ["--config", str(config), "--output"]
    for arguments, words in (
        ([*base, str(tmp_path / "new"), "--fault", "flood"], "'flood': expected one of: rank kil"),
        ([*base, str(tmp_path / "full")], "exists already, expected a new or empty folder"),
    ):
        assert main(arguments) == 2
        assert words in only_error(capsys.readouterr().err)


@pytest.mark.slow
def test_short_drill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    config = tmp_path / "small.toml"
    config.write_text(CONFIG.format(corpus=write_corpus(tmp_path / "corpus")))
    arguments = ["--config", str(config), "--set", "training.train_steps=30"]
    arguments += ["--set", "parallel.tensor_model_parallel_size=2"]
    arguments += ["--set", "parallel.sequence_parallel=true"]
    arguments += ["--set", "training.global_batch_size=4"]
    arguments += ["--fault", "rank killed", "--minutes", "0.1", "--output", str(tmp_path / "out")]
    arguments += ["--supervise"]
    assert main([*arguments, "--json"]) == 0
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert rounds[0]["saved_step"] == 30
    faults = [each["fault"] for each in rounds]
    assert "rank killed" in faults
    # Every job came back by itself and ended well.
    assert all(each["saved_step"] == 30 for each in rounds)
    assert all(each["status"] == 0 for each in rounds)
    # megatron gives every rank this warning; only the first prints it.
    output = (tmp_path / "out" / "reference-1.txt").read_text()
    assert output.count("UserWarning: When using sequence parallelism") == 1
