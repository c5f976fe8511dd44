"""Modality parallelism: losses and gradients equal those of one process with all towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mot_megatron.config import Config
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import sharding_of, tower_of
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.parallel.placement import Placement, balanced_placement
from tests.model.small_models import (
    Tokens,
    assert_all_close,
    cut,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
    vary_vectors,
)
from tests.model.visibility import Visibility
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TWO = {"text": "text", "image": "image", "speech": "text"}
THREE = {"text": "text", "image": "image", "speech": "speech"}
GROUPED_QUERIES = "model.num_query_groups=2"
BIASES = "model.add_qkv_bias=true"


@dataclass(frozen=True)
class Case:
    """A model, a placement and batches, some of which lack a modality."""

    towers: dict[str, str]
    ranks: int
    overrides: tuple[str, ...] = ()
    shares: tuple[tuple[float, ...], ...] | None = None
    """Share of each tower per rank; None: balanced for equal towers."""
    tensor: int = 1
    sequences: int | None = None
    """Sequences of the modality group; None: one per rank."""
    images: bool = False
    """Whether documents have images, which see all of themselves and may lack their condition."""
    mixes: tuple[tuple[float, ...], ...] = ((3, 2, 1), (1, 0, 4), (0, 1, 0))

    @property
    def config(self) -> Config:
        parallel = [f"parallel.modality_parallel_size={self.ranks}"] if self.ranks > 1 else []
        if self.tensor > 1:
            parallel.append(f"parallel.tensor_model_parallel_size={self.tensor}")
        return small_config(self.towers, *self.overrides, *parallel)

    @property
    def placement(self) -> Placement:
        if self.shares is not None:
            return Placement(self.shares)
        return balanced_placement([1.0] * len(set(self.towers.values())), self.ranks)

    def tokens(self, step: int) -> Tokens:
        """Return the sequences of the modality group."""
        shape = (self.sequences or self.ranks, 24)
        return random_tokens(step, list(self.towers), self.mixes[step], shape)


def micro_batch(case: Case, tokens: Tokens, modality_rank: int) -> MicroBatch:
    """Return a rank's part of the sequences of its modality group."""
    config = case.config
    parallel = config.parallel
    filled = np.full(len(tokens.token_ids), 24)
    filled[-1] = 20  # padding takes part in attention, but in no count
    documents = tokens.document_ids.copy()
    documents[-1, 20:] = documents.max() + 1
    return build_micro_batch(
        tokens.token_ids,
        documents,
        tokens.modality_of_id,
        config.model.towers_of_modalities,
        num_towers=config.model.num_towers,
        slot_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        filled_tokens=filled,
        visible=Visibility.random(documents, 1).intervals if case.images else None,
        shard=ModalityShard(case.placement, modality_rank, parallel.attention_exchange)
        if case.ranks > 1
        else None,
    )


def run_case(case: Case) -> list[dict[str, Any]]:
    """Return per batch the loss sums and gradients, summed over the ranks that hold them."""
    groups = build_process_groups(case.tensor, CPU, placement=case.placement)
    model = MixtureOfTransformers(case.config, groups, torch.float64)
    vary_vectors(model)
    outcomes = []
    for step in range(len(case.mixes)):
        batch = micro_batch(case, case.tokens(step), groups.modality_rank)
        loss, sums = model(batch)
        loss.backward()
        totals = torch.cat((loss.detach()[None], sums))
        counts = torch.tensor(
            [*batch.modality_labels, *batch.modality_tokens, batch.attended_pairs]
        )
        dist.all_reduce(totals, group=groups.data)
        dist.all_reduce(counts, group=groups.data)
        gradients = take_gradients(model)
        parameters = dict(model.named_parameters())
        for name, gradient in gradients.items():
            dist.all_reduce(gradient, group=groups.reduction_group(tower_of(parameters[name])))
        outcomes.append(
            {
                "totals": totals,
                "counts": counts.tolist(),
                "gradients": gradients,
                "held": groups.towers_held(case.config.model.num_towers),
                "tensor_rank": groups.tensor_rank,
                "shardings": {name: sharding_of(p) for name, p in parameters.items()},
            }
        )
    return outcomes


def reference(case: Case) -> list[dict[str, Any]]:
    """Return the same results from one process that holds all towers."""
    overrides = tuple(o for o in case.overrides if "parallel" not in o)
    alone = Case(case.towers, 1, overrides, images=case.images)
    model = single_rank_model(alone.config, torch.float64)
    outcomes = []
    for step in range(len(case.mixes)):
        batch = micro_batch(alone, case.tokens(step), 0)
        loss, sums = model(batch)
        loss.backward()
        outcomes.append(
            {
                "totals": torch.cat((loss.detach()[None], sums)),
                "counts": [*batch.modality_labels, *batch.modality_tokens, batch.attended_pairs],
                "gradients": take_gradients(model),
            }
        )
    return outcomes


HEADS = "parallel.attention_exchange=heads"
CASES = {
    "a tower each": Case(TWO, 2),
    "heads": Case(TWO, 2, (HEADS, "training.recompute=full")),
    "three towers on two": Case(THREE, 2, (GROUPED_QUERIES, "training.recompute=selective")),
    "a split tower": Case(TWO, 3, (GROUPED_QUERIES, BIASES)),
    "more ranks than key-value heads": Case(TWO, 4, (HEADS, GROUPED_QUERIES)),
    "uneven shares, several towers, shared parts": Case(
        THREE,
        2,
        (BIASES, "model.untied.qkv=false", "model.untied.norms=false", "model.norm_placement=pre"),
        ((0.3, 1.0, 0.0), (0.7, 0.0, 1.0)),
    ),
    "heads of several towers": Case(
        THREE, 2, (HEADS, "model.qk_norm=false"), ((0.5, 1.0, 0.0), (0.5, 0.0, 1.0))
    ),
    "tensor and sequence parallel": Case(
        TWO, 2, (GROUPED_QUERIES, BIASES, "parallel.sequence_parallel=true"), tensor=2
    ),
    "tensor parallel heads": Case(TWO, 2, (HEADS,), tensor=2),
    "one sequence on two ranks": Case(THREE, 2, (HEADS,), sequences=1),
    "three sequences on two ranks": Case(TWO, 2, (HEADS, GROUPED_QUERIES), sequences=3),
    "images": Case(THREE, 2, images=True),
    "images, heads": Case(TWO, 2, (HEADS, GROUPED_QUERIES), images=True, sequences=3),
    "images, tensor parallel": Case(
        TWO, 2, ("parallel.sequence_parallel=true",), tensor=2, images=True
    ),
    "one tower on two ranks": Case(dict.fromkeys(TWO, "all"), 2, (HEADS,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_one_process(case: Case) -> None:
    expected = reference(case)
    for outcomes in run_ranks(run_case, case.ranks * case.tensor, case):
        for mine, whole in zip(outcomes, expected, strict=True):
            assert mine["counts"] == whole["counts"]
            # Losses are computed in fp32 and summed in an order that depends on the layout.
            torch.testing.assert_close(mine["totals"], whole["totals"], rtol=1e-6, atol=1e-6)
            parts = {}
            for name, sharding in mine["shardings"].items():
                gradient = whole["gradients"][name]
                parts[name] = cut(gradient, sharding, mine["tensor_rank"], case.tensor)
            assert_all_close(mine["gradients"], parts, 1e-6)
            towers = {int(n.split(".towers.")[1][0]) for n in parts if ".towers." in n}
            assert towers == set(mine["held"])
