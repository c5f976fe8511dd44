"""What every rank copied, assembled later, equals the state at the time of the copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mot_megatron.data.corpus import Corpus
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.staging import STATE_KINDS, Staging
from mot_megatron.train.step import train_step
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

STAGES = [
    ["parallel.zero_stage=0"],
    ["parallel.zero_stage=1"],
    ["parallel.zero_stage=2", "training.precision=bf16"],
    ["parallel.zero_stage=3"],
]
EXPERTS = "model.towers.text.experts={num_moe_experts=4,causal_router=true}"
DIFFERENT_OWNERS = [["parallel.modality_parallel_size=2", EXPERTS]]


def assemble(
    corpus_directory: Path, layouts: list[list[str]]
) -> list[tuple[set[str], set[str], set[str]]]:
    """Return for each layout the names that this rank assembled, the wrong ones, and all it has."""
    corpus = Corpus.open(corpus_directory)
    groups: ProcessGroups | None = None
    found = []
    for overrides in layouts:
        config = resolve_config(small_config(corpus_directory, overrides), corpus)
        groups = groups or build_groups(config, corpus, torch.device("cpu"))
        session = build_session(config, corpus, groups)
        train_step(session, step=1, learning_rate=1e-2)
        # An independent way: collectives for every parameter, on all of its owners.
        wanted = {
            f"{kind}/{name}": state[kind].flatten()
            for name, state in session.engine.export_state()
            for kind in STATE_KINDS
        }
        staged, broken = Staging().copy(session)
        assert broken == []
        train_step(session, step=2, learning_rate=1e-2)
        now = dict(session.engine.export_state())
        # Otherwise the copies could be of live memory.
        assert all((s["weight"].flatten() != wanted[f"weight/{n}"]).any() for n, s in now.items())
        assembled = {
            f"{kind}/{name}": values[kind]
            for name, _, values in staged.assemble(None)
            for kind in STATE_KINDS
        }
        wrong = {name for name in assembled if not torch.equal(assembled[name], wanted[name])}
        found.append((set(assembled), wrong, set(wanted)))
    return found


@pytest.mark.parametrize("layouts", [STAGES, DIFFERENT_OWNERS], ids=["stages", "owners"])
def test_assembled_state_is_that_of_the_copy(tmp_path: Path, layouts: list[list[str]]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    ranks = run_ranks(assemble, 2, corpus, layouts)
    for (mine, wrong, held), (theirs, wrong_there, held_there) in zip(*ranks, strict=True):
        assert wrong == wrong_there == set()
        assert mine
        assert theirs
        assert mine.isdisjoint(theirs)
        assert mine | theirs == held | held_there
