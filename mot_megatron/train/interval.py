"""Statistics of several consecutive steps, as reported on the console and in TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mot_megatron.optim.norms import StepNorms
from mot_megatron.train.step import StepResult, StepSeconds, weighted_mean


@dataclass(frozen=True)
class Interval:
    """Statistics of the steps since the last report; means unless stated otherwise."""

    modality_losses: tuple[float, ...]
    """Mean loss over all labels of the interval, in the objective's unit; NaN without labels."""
    total_loss: float
    """The training loss: the same mean over all modalities, weighted by their loss weights."""
    modality_rates: tuple[float, ...]
    """Document tokens per second of each modality, over all ranks."""
    norms: StepNorms
    """Norms of the last step, since a mean would hide spikes."""
    learning_rate: float
    """Learning rate of the last step."""
    seconds: StepSeconds
    """Seconds per step on this rank."""
    flops_per_second: float
    """FLOP/s of the model over all ranks, without recomputation."""
    imbalance: float
    """FLOPs of the busiest rank of a modality group over the mean of the group."""

    @property
    def imbalance_percent(self) -> float:
        """Percent of a step that the other ranks of a group wait for the busiest, by FLOPs."""
        waiting = 1 - 1 / self.imbalance
        return 100 * waiting * self.seconds.forward_backward / self.seconds.total

    @property
    def tokens_per_second(self) -> float:
        """Document tokens of all modalities per second, over all ranks."""
        return sum(self.modality_rates)

    @classmethod
    def of(
        cls,
        results: Sequence[StepResult],
        step_flops: Callable[[StepResult], float],
        loss_weights: Sequence[float],
    ) -> Interval:
        """Summarize consecutive steps.

        Args:
            results: Results of the steps.
            step_flops: Returns the FLOPs of a step, over all ranks.
            loss_weights: Weight of each modality's loss.
        """
        seconds = sum(result.seconds.total for result in results)
        last = results[-1]
        modalities = range(len(last.modality_losses))
        losses = tuple(_mean_loss(results, modality) for modality in modalities)
        labels = [
            sum(result.counts.modality_labels[modality] for result in results)
            for modality in modalities
        ]
        return cls(
            modality_losses=losses,
            total_loss=weighted_mean(losses, labels, loss_weights),
            modality_rates=tuple(
                sum(result.counts.modality_tokens[modality] for result in results) / seconds
                for modality in modalities
            ),
            norms=last.norms,
            learning_rate=last.learning_rate,
            seconds=StepSeconds(
                data=_mean([result.seconds.data for result in results]),
                forward_backward=_mean([result.seconds.forward_backward for result in results]),
                optimizer=_mean([result.seconds.optimizer for result in results]),
            ),
            imbalance=_mean([result.counts.imbalance for result in results]),
            flops_per_second=sum(step_flops(result) for result in results) / seconds,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_loss(results: Sequence[StepResult], modality: int) -> float:
    labels = [result.counts.modality_labels[modality] for result in results]
    if not any(labels):
        return math.nan
    pairs = zip(results, labels, strict=True)
    total = sum(result.modality_losses[modality] * count for result, count in pairs if count)
    return total / sum(labels)
