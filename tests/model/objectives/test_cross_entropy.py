"""Losses and gradients of head and loss in chunks equal torch's, on one rank and split over two."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mot_megatron.model.micro_batch import NO_LABEL, TokenRows
from mot_megatron.model.objectives import cross_entropy as losses
from mot_megatron.model.objectives.cross_entropy import VocabularyShard, Weighting, head_losses
from mot_megatron.parallel.groups import build_single_process_groups
from tests.model.small_models import single_rank_model, small_config
from tests.ranks import run_ranks

MODALITIES = 3
WEIGHTS = (2.0, 1.0, 0.5)


@dataclass(frozen=True)
class Case:
    """Sizes of a random example."""

    rows: int
    hidden: int
    vocabulary: int
    z_coefficient: float
    unlabeled: float = 0.3
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Result:
    total: torch.Tensor
    sums: torch.Tensor
    of_rows: torch.Tensor
    of_weight: torch.Tensor


def example(case: Case) -> tuple[torch.Tensor, torch.Tensor, TokenRows]:
    """Return rows that are not contiguous, the whole weight, and labels."""
    generator = torch.Generator().manual_seed(case.rows)
    rows = torch.randn(case.rows, 2 * case.hidden, generator=generator)[:, ::2]
    weight = 0.7 * torch.randn(case.vocabulary, case.hidden, generator=generator)
    ids = torch.randint(0, case.vocabulary, (case.rows,), generator=generator)
    ids[torch.rand(case.rows, generator=generator) < case.unlabeled] = NO_LABEL
    modalities = torch.randint(0, MODALITIES, (case.rows,), generator=generator)
    labels = TokenRows(ids, modalities, int((ids != NO_LABEL).sum()))
    return rows.to(case.dtype), weight.to(case.dtype), labels


def chunked(case: Case, shard: VocabularyShard) -> Result:
    """Return what this rank computes; the upper gradient is not one."""
    rows, weight, labels = example(case)
    size = case.vocabulary // shard.group.size()
    weight = weight[shard.rank * size : (shard.rank + 1) * size]
    rows, weight = rows.requires_grad_(), weight.clone().requires_grad_()
    weighting = Weighting(torch.tensor(WEIGHTS), case.z_coefficient)
    total, sums = head_losses(rows, weight, labels, weighting, shard)
    (total / 7).backward()
    assert rows.grad is not None
    assert weight.grad is not None
    return Result(total.detach(), sums, rows.grad, weight.grad)


def plain(case: Case) -> Result:
    """Compute the same in fp64, with torch's functions and all logits at once."""
    rows, weight, labels = example(case)
    rows, weight = rows.double().requires_grad_(), weight.double().requires_grad_()
    logits = rows @ weight.t()
    cross_entropy = F.cross_entropy(logits, labels.labels, reduction="none", ignore_index=NO_LABEL)
    z_loss = case.z_coefficient * torch.logsumexp(logits, dim=-1).square()
    labeled = labels.labels != NO_LABEL
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[labels.label_modalities]
    total = torch.where(labeled, weights * (cross_entropy + z_loss), 0.0).sum()
    (total / 7).backward()
    sums = torch.zeros(MODALITIES, dtype=torch.float64)
    sums.index_add_(0, labels.label_modalities, cross_entropy.detach())
    assert rows.grad is not None
    assert weight.grad is not None
    return Result(total.detach(), sums, rows.grad, weight.grad)


def assert_equal(actual: Result, expected: Result, tolerance: float = 1e-6) -> None:
    """Compare relative to the largest entry, as sums of many rows have entries near zero."""
    for name in ("total", "sums", "of_rows", "of_weight"):
        one, other = getattr(actual, name).double(), getattr(expected, name)
        scale = max(float(other.abs().max()), 1e-30) if other.numel() else 1.0
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=tolerance, msg=name)


def alone() -> VocabularyShard:
    return VocabularyShard(build_single_process_groups(torch.device("cpu")).tensor, 0)


CASES = (
    Case(20, 6, 48, 0.0),
    Case(61, 5, 90, 0.01),
    Case(33, 7, 34, 1e-3, unlabeled=1.0),
    Case(16, 4, 12, 1e-3, unlabeled=0.0),
    Case(1, 3, 10, 0.5, unlabeled=0.0),
)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 11, 1 << 20])
def test_losses_and_gradients_equal_torchs(
    case: Case, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk, in several with a rest, and without any label."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    assert_equal(chunked(case, alone()), plain(case))


def shards_of_cases() -> list[Result]:
    losses.CHUNK_BYTES = 1 << 11
    assert dist.group.WORLD is not None
    return [chunked(case, VocabularyShard(dist.group.WORLD, dist.get_rank())) for case in CASES]


def test_losses_and_gradients_equal_torchs_with_the_vocabulary_split_over_two_ranks() -> None:
    first, second = run_ranks(shards_of_cases, 2)
    for case, one, other in zip(CASES, first, second, strict=True):
        assert one.total == other.total
        assert torch.equal(one.sums, other.sums)
        of_weight = torch.cat((one.of_weight, other.of_weight))
        whole = Result(one.total, one.sums, one.of_rows + other.of_rows, of_weight)
        assert_equal(whole, plain(case))


def test_bf16_weights_have_fp32_losses_and_gradients_of_their_own_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1 << 11)
    case = Case(61, 32, 90, 0.01, dtype=torch.bfloat16)
    actual = chunked(case, alone())
    assert (actual.total.dtype, actual.sums.dtype) == (torch.float32, torch.float64)
    assert (actual.of_rows.dtype, actual.of_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    # Logits and gradients are rounded to 8 bits.
    assert_equal(actual, plain(case), tolerance=2e-2)


def test_no_gradient_is_computed_where_none_is_needed() -> None:
    rows, weight, labels = example(CASES[0])
    weighting = Weighting(torch.tensor(WEIGHTS), 0.0)
    rows.requires_grad_()
    with torch.no_grad():
        total, sums = head_losses(rows, weight, labels, weighting, alone())
    assert not total.requires_grad
    assert torch.equal(sums, chunked(CASES[0], alone()).sums)


def test_loss_weights_stay_fp32_in_a_bf16_model() -> None:
    towers = {name: name for name in ("text", "image", "speech")}
    config = small_config(towers, "model.modalities.image.loss_weight=0.3")
    model = single_rank_model(config, torch.bfloat16).to(torch.bfloat16)
    assert model.loss_weights.tolist() == torch.tensor([1.0, 0.3, 1.0]).tolist()
