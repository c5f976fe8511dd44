"""Next-token loss per modality, with z-loss, over a vocabulary split by tensor parallelism.

The logits of a micro-batch would be its largest tensor, so the head and the loss run together, on
one chunk of rows after the other: forward computes the losses and at once the gradients, and no
logits remain for backward. Rows without a label are skipped.

The function returns sums, never means: the mean is over the tokens of the *global* batch, and a
micro-batch does not know their number.

Letters: g rows, of which n have labels, h hidden size, V vocabulary rows, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mot_megatron.model.micro_batch import TokenRows

CHUNK_BYTES = 1 << 20
"""Size of a chunk's logits in fp32, that of a CPU core's cache, unless the hidden size is large."""


@dataclass(frozen=True)
class Weighting:
    """How the losses of tokens are summed."""

    of_modalities: torch.Tensor
    """[M] fp32."""
    z_loss_coefficient: float


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary whose logits this rank computes."""

    group: dist.ProcessGroup
    """The tensor-parallel group."""
    rank: int
    """This rank's index in it."""


def head_losses(
    rows: torch.Tensor,
    weight: torch.Tensor,
    of_rows: TokenRows,
    weighting: Weighting,
    shard: VocabularyShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project rows to logits and sum their losses.

    Collectives over the tensor-parallel group: two small all-reduces per chunk in forward, none in
    backward. The gradient of ``rows`` is this rank's part of a sum over the group.

    Args:
        rows: [g, h], the same on all ranks of the group.
        weight: [V / tp, h], this rank's shard of the vocabulary.
        of_rows: Their labels.
        weighting: Of the losses.
        shard: Which part of the vocabulary ``weight`` has.

    Returns:
        The sum over labels of weight * (cross entropy + coefficient * log^2 Z) in fp32, with Z =
        sum exp(logits) (Chameleon, arXiv 2405.09818, section 2.4.3); and the detached sums of cross
        entropy in nats per modality, [M] fp64: an fp32 sum of 65,000 rows is off by 3e-6.
    """
    return _HeadLosses.apply(rows, weight, of_rows, weighting, shard, torch.is_grad_enabled())


class _HeadLosses(torch.autograd.Function):
    """Losses and, if they are needed, gradients in forward; backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        labels: TokenRows,
        weighting: Weighting,
        shard: VocabularyShard,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = labels.labeled()
        of_rows = of_weight = None
        if differentiable:
            of_rows = torch.zeros_like(rows)
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        sums = torch.zeros_like(weighting.of_modalities, dtype=torch.float64)
        for part in _chunks(kept, weight):
            inputs = rows.index_select(0, part)
            modalities = labels.label_modalities.index_select(0, part)
            weights = weighting.of_modalities.index_select(0, modalities)
            losses = _ChunkLosses.of(inputs, weight, labels.labels.index_select(0, part), shard)
            z_loss = weighting.z_loss_coefficient * losses.log_z.square()
            total += (weights * (losses.cross_entropy + z_loss)).sum(dtype=torch.float64)
            sums.index_add_(0, modalities, losses.cross_entropy.double())
            if of_rows is not None and of_weight is not None:
                of_log_z = 2 * weighting.z_loss_coefficient * weights * losses.log_z
                gradient = losses.gradient(weights, of_log_z).to(rows.dtype)
                of_rows.index_copy_(0, part, gradient @ weight)
                if weight.dtype == torch.float32:
                    of_weight.addmm_(gradient.t(), inputs)
                else:
                    of_weight += gradient.t() @ inputs
                del gradient
            del losses  # before those of the next chunk are computed
        if of_rows is not None:
            ctx.save_for_backward(of_rows, of_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(sums)
        return total.float(), sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_rows, of_weight = ctx.saved_tensors
        scale = gradients[0]
        # In place if possible: they are as large as the rows and the weight, and of no other use.
        scaled = of_weight
        if ctx.weight_dtype != of_weight.dtype:
            scaled = torch.empty_like(of_weight, dtype=ctx.weight_dtype)
        torch.mul(of_weight, scale, out=scaled)
        return of_rows.mul_(scale), scaled, None, None, None, None


def _chunks(kept: torch.Tensor, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Divide the labeled rows into chunks."""
    vocabulary, hidden = weight.shape
    # Every chunk reads and writes the gradient of the weight, which is as large as the logits of as
    # many rows as the hidden size. That many also make efficient matrix products on a GPU.
    size = max(hidden, CHUNK_BYTES // (4 * vocabulary))
    return iter(kept.split(size) if len(kept) else ())


@dataclass(frozen=True)
class _ChunkLosses:
    """Losses of a chunk of rows, all of which have labels."""

    cross_entropy: torch.Tensor
    """[n] fp32."""
    log_z: torch.Tensor
    """[n] fp32."""
    exp: torch.Tensor
    """[n, V / tp] fp32: exp(logits - maximum); ``gradient`` overwrites it."""
    sum_exp: torch.Tensor
    """[n]: its sum over the whole vocabulary."""
    targets: torch.Tensor
    """[n, 1]: the label's index in this shard; 0 if another shard has it."""
    is_elsewhere: torch.Tensor
    """[n] bool."""

    @classmethod
    def of(
        cls, rows: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, shard: VocabularyShard
    ) -> _ChunkLosses:
        """Compute the losses; collective over the shard's group."""
        logits = (rows @ weight.t()).float()
        maximum = logits.amax(dim=-1)
        if shard.group.size() > 1:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
        logits.sub_(maximum[:, None])
        size = logits.shape[-1]
        targets = ids - shard.rank * size
        is_elsewhere = (targets < 0) | (targets >= size)
        targets = targets.masked_fill(is_elsewhere, 0)[:, None]
        of_targets = logits.gather(1, targets)[:, 0].masked_fill(is_elsewhere, 0.0)
        exp = logits.exp_()
        sums = torch.stack((of_targets, exp.sum(dim=-1)))
        if shard.group.size() > 1:
            dist.all_reduce(sums, group=shard.group)
        of_targets, sum_exp = sums
        log_sum = sum_exp.log()
        return cls(log_sum - of_targets, log_sum + maximum, exp, sum_exp, targets, is_elsewhere)

    def gradient(self, of_cross_entropy: torch.Tensor, of_log_z: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the logits, given those of the losses; in place of ``exp``."""
        # d cross entropy / d logits = softmax - onehot(target); d log Z / d logits = softmax.
        gradient = self.exp.mul_(((of_cross_entropy + of_log_z) / self.sum_exp)[:, None])
        at_targets = -of_cross_entropy.masked_fill(self.is_elsewhere, 0.0)
        return gradient.scatter_add_(1, self.targets, at_targets[:, None])
