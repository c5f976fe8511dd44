"""Traces of chosen steps of a run, and the table of where their time went."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import ConfigError
from mot_megatron.rules import check_world_size
from mot_megatron.run import loop
from mot_megatron.run.profile import split_text
from mot_megatron.run.step_clock import COMPUTE, EXCHANGE
from mot_megatron.train.session import build_groups, resolve_config
from tests.columns import widest
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

STEPS = ["training.train_steps=4", "parallel.modality_parallel_size=2"]


def train(corpus_directory: Path, runs: Path, overrides: list[str]) -> str:
    """Train, and return what this rank prints."""
    corpus = Corpus.open(corpus_directory)
    config = small_config(corpus_directory, [f"run.directory={runs}", *STEPS, *overrides])
    config = resolve_config(config, corpus)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        loop.train(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    return output.getvalue()


@pytest.mark.slow
def test_chosen_ranks_trace_chosen_steps_and_train_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_ranks(train, 2, corpus, tmp_path / "plain", [])
    traced = ["training.profile_steps=[2, 3]", "training.profile_ranks=[1, 0]"]
    of_first, of_second = run_ranks(train, 2, corpus, tmp_path / "traced", traced)
    folder = tmp_path / "traced" / "small" / "traces"
    for rank in (0, 1):
        trace = json.loads((folder / f"rank_{rank}.2.pt.trace.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        assert "aten::mm" in names
        # Steps 2 and 3: AdamW updates three groups of parameters in each.
        assert sum("Optimizer.step" in str(name) for name in names) == 6
        # The clock of the next step is not in it.
        assert "PythonDispatchMode" not in names
        assert "aten::mm" in (folder / f"rank_{rank}.2.operators.txt").read_text()
    assert "traced from" not in of_first
    assert f"traced from step 2 on: {folder / 'rank_1.2.pt.trace.json'}\n" in of_second
    _, _, table = of_second.partition("step 4 on rank 1:\n")
    assert COMPUTE in table
    assert EXCHANGE in table
    assert widest(table.splitlines()[1:8]) <= 120
    plain, other = (
        json.loads((tmp_path / name / "small" / "summary.json").read_text())
        for name in ("plain", "traced")
    )
    assert plain["modalities"] == other["modalities"]


def test_shares_of_a_split_are_printed_in_order() -> None:
    lines = split_text({"optimizer": 0.001, "computation": 0.003, "data": 0.0}).splitlines()
    assert [line.split() for line in lines] == [
        ["computation", "3.0", "ms", "75.0%"],
        ["optimizer", "1.0", "ms", "25.0%"],
    ]


@pytest.mark.parametrize("steps", ["[3, 2]", "[2, 4]"])
def test_steps_that_do_not_exist_are_refused(tmp_path: Path, steps: str) -> None:
    with pytest.raises(ConfigError, match=r"training.profile_steps = \[\d, \d\]; expected"):
        small_config(tmp_path, ["training.train_steps=4", f"training.profile_steps={steps}"])


def test_ranks_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, ["training.profile_ranks=[0, 2]"])
    check_world_size(config, 4)
    with pytest.raises(ConfigError, match=r"training\.profile_ranks has 2; allowed: 0 to 1"):
        check_world_size(config, 2)
