"""Tokens that are context only have no loss, in every layout; the rest trains as usual."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mot_megatron.data.corpus import Corpus
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.model.micro_batch import NO_LABEL
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train.session import build_session, resolve_config
from tests.ranks import run_ranks
from tests.small_runs import small_config
from tests.train.parity import (
    BATCH,
    MP2,
    PP2,
    SP,
    TIED,
    TP2,
    TWO_TOWERS,
    ZERO2,
    ZERO3,
    assert_complete,
    assert_equal,
    reference,
    run_steps,
)

HEADS = "parallel.attention_exchange=heads"
BUDGET = ["data.packing=budget", "training.micro_batch_size=2"]


def is_context(ids: np.ndarray) -> np.ndarray:
    """Choose tokens by their ids, so that a label tells whether it should be one."""
    return ids % 3 == 0


@pytest.fixture(scope="module")
def masked(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus "mixed", with a third of its ids as context."""
    corpus = Corpus.open(corpora["mixed"])
    directory = tmp_path_factory.mktemp("masked") / "corpus"
    with CorpusWriter(
        directory=directory,
        name="small",
        builder="tests 1",
        seed=7,
        modalities=corpus.description.modalities,
        pad_token=0,
    ) as writer:
        for name, split in corpus.splits.items():
            for ids in split:
                writer.add_document(name, ids, is_context(np.asarray(ids)))
    return directory


def plain_losses(unmasked: Path, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Compute the first step's and the held-out losses from logits of the unmasked corpus."""
    corpus = Corpus.open(unmasked)
    config = resolve_config(small_config(unmasked, [BATCH, *overrides]), corpus)
    groups = build_process_groups(1, torch.device("cpu"))
    session = build_session(config, corpus, groups)
    model = MixtureOfTransformers(config, groups)
    accumulation = config.accumulation_steps(1)
    batches = [session.loader.next_micro_batch() for _ in range(accumulation)]
    table = torch.from_numpy(corpus.description.modality_of_id.astype(np.int64))

    def means(batches: list) -> list[float]:
        sums, counts = torch.zeros(3), torch.zeros(3)
        for batch in batches:
            labels = batch.labels[batch.ungroup_index]
            kept = (labels != NO_LABEL) & (labels % 3 != 0)
            with torch.no_grad():
                logits = model.sequence_logits(batch)[kept]
            losses = F.cross_entropy(logits, labels[kept], reduction="none")
            sums.index_add_(0, table[labels[kept]], losses)
            counts.index_add_(0, table[labels[kept]], torch.ones_like(losses))
        return (sums / counts / math.log(2)).tolist()

    return means(batches), means(list(session.held_out_batches()))


@pytest.mark.parametrize("packing", [[], BUDGET], ids=["sequence", "budget"])
def test_losses_are_means_over_the_other_labels(
    corpora: dict[str, Path], masked: Path, packing: list[str]
) -> None:
    ((first, _),) = run_ranks(plain_losses, 1, corpora["mixed"], packing)
    outcome = reference(masked, tuple(packing))
    assert outcome.losses[0] == pytest.approx(first, rel=1e-5)
    assert outcome.losses[0] != pytest.approx(
        reference(corpora["mixed"], tuple(packing)).losses[0], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, [ZERO3], []),
        (2, [TP2, SP], [TIED]),
        (2, [PP2], []),
        (2, [MP2, ZERO2], TWO_TOWERS),
        (2, [MP2, HEADS], TWO_TOWERS),
        (2, [MP2], [*BUDGET, *TWO_TOWERS]),
    ],
)
def test_layout_equals_one_process(
    masked: Path, world_size: int, layout: list[str], model: list[str]
) -> None:
    expected = reference(masked, tuple(model))
    outcomes = run_ranks(run_steps, world_size, masked, [*layout, *model])
    assert_complete(outcomes, expected)
    for outcome in outcomes:
        assert_equal(outcome, expected)
