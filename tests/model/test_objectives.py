"""Cross entropy, log-partition and z-loss equal torch's, on one rank and split over two."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mot_megatron.model.micro_batch import NO_LABEL
from mot_megatron.model.objectives import sum_losses, token_losses
from mot_megatron.parallel.groups import build_single_process_groups
from tests.model.small_models import single_rank_model, small_config
from tests.ranks import run_ranks

VOCABULARY, ROWS = 48, 20


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(ROWS, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[[3, 11]] = NO_LABEL
    return logits, labels


def with_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    group: dist.ProcessGroup,
    rank: int,
    z_coefficient: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    # The loss overwrites its input, which autograd forbids for a leaf.
    cross_entropy, log_z = token_losses(leaf * 1.0, labels, group, rank)
    labeled = labels != NO_LABEL
    total = torch.where(labeled, cross_entropy + z_coefficient * log_z.square(), 0.0)
    (total * torch.arange(1.0, ROWS + 1)).sum().backward()
    assert leaf.grad is not None
    return cross_entropy.detach()[labeled], log_z.detach(), leaf.grad


def plain(z_coefficient: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, labels = example()
    leaf = logits.requires_grad_()
    cross_entropy = F.cross_entropy(leaf, labels, reduction="none", ignore_index=NO_LABEL)
    log_z = torch.logsumexp(leaf, dim=-1)
    labeled = labels != NO_LABEL
    total = torch.where(labeled, cross_entropy + z_coefficient * log_z.square(), 0.0)
    (total * torch.arange(1.0, ROWS + 1)).sum().backward()
    assert leaf.grad is not None
    return cross_entropy.detach()[labeled], log_z.detach(), leaf.grad


def test_losses_equal_torchs_on_one_rank() -> None:
    groups = build_single_process_groups(torch.device("cpu"))
    for z_coefficient in (0.0, 0.01):
        actual = with_gradient(*example(), groups.tensor, 0, z_coefficient)
        for value, expected in zip(actual, plain(z_coefficient), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def split_vocabulary(z_coefficient: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, labels = example()
    rank = dist.get_rank()
    part = logits.chunk(2, dim=-1)[rank].contiguous()
    assert dist.group.WORLD is not None
    return with_gradient(part, labels, dist.group.WORLD, rank, z_coefficient)


def test_losses_equal_torchs_with_the_vocabulary_split_over_two_ranks() -> None:
    results = run_ranks(split_vocabulary, 2, 0.01)
    cross_entropy, log_z, gradient = plain(0.01)
    for rank, (of_cross_entropy, of_log_z, of_gradient) in enumerate(results):
        torch.testing.assert_close(of_cross_entropy, cross_entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_log_z, log_z, rtol=1e-5, atol=1e-5)
        expected = gradient.chunk(2, dim=-1)[rank]
        torch.testing.assert_close(of_gradient, expected, rtol=1e-5, atol=1e-5)


def test_bf16_logits_give_fp32_losses_and_a_bf16_gradient() -> None:
    groups = build_single_process_groups(torch.device("cpu"))
    logits, labels = example()
    leaf = logits.bfloat16().requires_grad_()
    before = leaf.detach().clone()
    cross_entropy, log_z = token_losses(leaf, labels, groups.tensor, 0)
    cross_entropy.sum().backward()
    assert (cross_entropy.dtype, log_z.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(log_z, torch.logsumexp(before.float(), dim=-1))
    assert torch.equal(leaf.detach(), before)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_loss_is_weighted_by_the_modality_of_the_label() -> None:
    cross_entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    z_loss = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5])
    labels = torch.tensor([7, NO_LABEL, 8, 9, NO_LABEL])
    modalities = torch.tensor([0, 0, 2, 2, 0])
    total, sums = sum_losses(
        cross_entropy, z_loss, labels, modalities, torch.tensor([2.0, 1.0, 0.5])
    )
    assert total.item() == 2 * 1.5 + 0.5 * 3.5 + 0.5 * 4.5
    assert sums.tolist() == [1.0, 0.0, 7.0]
    total.backward()
    assert cross_entropy.grad is not None
    assert cross_entropy.grad.tolist() == [2.0, 0.0, 0.5, 0.5, 0.0]


def test_no_labels_give_a_zero_loss_and_a_zero_gradient() -> None:
    cross_entropy = torch.tensor([1.0, 2.0, 3.0])
    total, sums = sum_losses(
        cross_entropy.requires_grad_(),
        torch.zeros(3),
        torch.full((3,), NO_LABEL),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(2),
    )
    assert sums.tolist() == [0.0, 0.0]
    assert total.item() == 0.0
    total.backward()
    assert cross_entropy.grad is not None
    assert not cross_entropy.grad.any()


def test_loss_weights_stay_fp32_in_a_bf16_model() -> None:
    towers = {name: name for name in ("text", "image", "speech")}
    config = small_config(towers, "model.modalities.image.loss_weight=0.3")
    model = single_rank_model(config, torch.bfloat16).to(torch.bfloat16)
    assert model.loss_weights.tolist() == torch.tensor([1.0, 0.3, 1.0]).tolist()
