"""Next-token loss over a vocabulary split by tensor parallelism, per modality, with z-loss.

Sums, never means: the mean is over the tokens of the *global* batch, which no micro-batch knows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

from mot_megatron.model.micro_batch import NO_LABEL


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and log-partition of every row, in fp32.

    Collectives over ``group``: two small all-reduces forward, none backward.

    Args:
        logits: [g, V / tp], this rank's part of the vocabulary; overwritten if fp32.
        labels: [g] int64 global ids; rows with NO_LABEL give losses of no meaning.
        group: the tensor-parallel group.
        rank: this rank's place in it.

    Returns:
        Cross entropy [g] in nats, and log Z [g], Z = sum exp(logits).
    """
    return _TokenLosses.apply(logits, labels.clamp(min=0), group, rank)


class _TokenLosses(torch.autograd.Function):
    """megatron's vocabulary-parallel loss, with log Z for the z-loss as a second output.

    megatron's own function gives no log Z, and rebuilding it from the target's logit would cost
    two more passes over the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        maximum = logits.amax(dim=-1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        start = rank * logits.shape[-1]
        mask, local_targets, target_logits, sum_exp, exp = (
            VocabParallelCrossEntropy.calculate_predicted_logits(
                logits, targets, maximum, start, start + logits.shape[-1]
            )
        )
        sums = torch.stack((target_logits, sum_exp))
        dist.all_reduce(sums, group=group)
        target_logits, sum_exp = sums
        log_sum = sum_exp.log()
        ctx.save_for_backward(exp, sum_exp, mask, local_targets)
        return log_sum - target_logits, log_sum + maximum

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # d cross entropy / d logits = softmax - onehot(target); d log Z / d logits = softmax.
        of_cross_entropy, of_log_z = gradients
        exp, sum_exp, mask, local_targets = ctx.saved_tensors
        gradient = exp.mul_(((of_cross_entropy + of_log_z) / sum_exp)[:, None])
        rows = torch.arange(gradient.shape[0], device=gradient.device)
        gradient[rows, local_targets] -= of_cross_entropy.masked_fill(mask, 0.0)
        return gradient, None, None, None


def sum_losses(
    cross_entropy: torch.Tensor,
    z_loss: torch.Tensor,
    labels: torch.Tensor,
    label_modalities: torch.Tensor,
    loss_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum to differentiate, and plain sums to report.

    Args:
        cross_entropy: [g].
        z_loss: [g].
        labels: [g]; rows with NO_LABEL count nowhere.
        label_modalities: [g], a modality index for every row.
        loss_weights: [M], one per modality.

    Returns:
        The sum over labels of weight * (cross entropy + z-loss), and the sums of cross entropy in
        nats per modality, [M], detached.
    """
    labeled = labels != NO_LABEL
    weights = torch.where(labeled, loss_weights[label_modalities], 0.0)
    total = torch.sum(weights * (cross_entropy + z_loss))
    counted = torch.where(labeled, cross_entropy.detach(), 0.0)
    sums = torch.zeros_like(loss_weights).index_add_(0, label_modalities, counted)
    return total, sums
