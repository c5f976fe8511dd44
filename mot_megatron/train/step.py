"""One training step and one evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.distributed as dist
from tqdm import tqdm

from mot_megatron.config_model import ModelConfig
from mot_megatron.data.blend import sources_of
from mot_megatron.errors import TrainingError
from mot_megatron.job.hardware import synchronize
from mot_megatron.job.stop import never
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.optim.norms import StepNorms
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.planning.placing import tokens_of_towers
from mot_megatron.train.counts import GlobalCounts
from mot_megatron.train.session import Session, Trainer

Judge = Callable[[float, float], str | None]
"""Receives the loss and the gradient norm of a step; returns what is wrong with them, if anything.

It must return the same on all ranks."""
_ROUNDS_AT_ONCE = 8
"""Micro-batches per stage that an evaluation runs before the pipeline drains."""


@dataclass(frozen=True)
class StepSeconds:
    """Time spent in the parts of a step, on this rank."""

    data: float
    forward_backward: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.data + self.forward_backward + self.optimizer


@dataclass(frozen=True)
class StepResult:
    """Result of one training step, equal on all ranks except for the seconds."""

    modality_losses: tuple[float, ...]
    """Mean loss per modality in the unit of its objective; NaN for a modality without labels."""
    counts: GlobalCounts
    norms: StepNorms
    learning_rate: float
    seconds: StepSeconds
    total_loss: float = math.nan
    """The training loss: the mean over the labels of all modalities with their loss weights;
    NaN if no label has a weight."""
    problem: str | None = None
    """What was wrong, in words; no weight and no optimizer state was then changed."""


@dataclass(frozen=True)
class HeldOut:
    """Mean loss per modality in the unit of its objective; NaN for a modality without labels."""

    as_trained: tuple[float, ...]
    """With the routing of training, in which experts may also see later tokens."""
    causal: tuple[float, ...] | None = None
    """With causal routing; None if training routes causally or if causal routing is impossible."""
    total: float = math.nan
    """Mean over the labels of all modalities with their loss weights, routed as in training."""
    sources: dict[str, SourceLoss] = field(default_factory=dict)
    """With evaluation.per_source, the losses of each source by name."""


@dataclass(frozen=True)
class SourceLoss:
    """Held-out loss of one source of a blend, routed as in training."""

    of_modalities: tuple[float, ...]
    """Per modality, as ``HeldOut.as_trained``."""
    total: float
    """As ``HeldOut.total``."""


def train_step(
    session: Trainer,
    *,
    step: int,
    learning_rate: float,
    stop: bool = False,
    judge: Judge | None = None,
) -> StepResult:
    """Make one optimizer step on one global batch.

    Collectives: one all-reduce of counts and one of loss sums over the world, in addition to those
    of the model and the engine.

    Args:
        session: Model, optimizer and data.
        step: Number of the step, counted from 1.
        learning_rate: Learning rate of this step.
        stop: Whether this rank was asked to stop; the result says whether any rank was.
        judge: Judges finite losses and norms. With it, a step with a problem is part of the result,
            and no error.

    Raises:
        TrainingError: Without ``judge``: the loss or a gradient is not finite; no weight was
            changed.
    """
    config, groups = session.config, session.groups
    clock = _Clock(groups.device)
    session.progress_report.enter("data", step)
    accumulation = config.accumulation_steps(groups.data_size)
    batches = [session.loader.next_micro_batch() for _ in range(accumulation)]
    counts = GlobalCounts.gather(batches, config.model, groups, stop)
    divisor = counts.loss_weight(config.model.loss_weights)
    data_seconds = clock.lap()

    session.progress_report.enter("forward and backward")
    factor = session.engine.loss_factor
    modality_tokens = dict(zip(config.model.modalities, counts.modality_tokens, strict=True))
    tower_tokens = tokens_of_towers(config.model, modality_tokens)
    session.model.routing.token_weights = tuple(factor / max(n, 1) for n in tower_tokens)
    sums = _accumulate_gradients(session, batches, divisor)
    losses = mean_losses(sums, counts.modality_labels, config.model, groups)
    total_loss = weighted_mean(losses, counts.modality_labels, config.model.loss_weights)
    problem = _problem_of_loss(losses, counts.modality_labels, list(config.model.modalities))
    if problem and judge is None:
        raise TrainingError(unchanged(step, problem))
    forward_backward_seconds = clock.lap()

    session.progress_report.enter("optimizer")

    def accept(norms: StepNorms) -> bool:
        nonlocal problem
        problem = problem or _problem_of_norms(norms, config.model.tower_names)
        if judge is not None:
            problem = problem or judge(total_loss, norms.total)
        return problem is None

    norms = session.engine.step(learning_rate, accept)
    if problem and judge is None:
        raise TrainingError(unchanged(step, problem))
    seconds = StepSeconds(data_seconds, forward_backward_seconds, clock.lap())
    return StepResult(losses, counts, norms, learning_rate, seconds, total_loss, problem)


def unchanged(step: int, problem: str) -> str:
    """Return the message about a step with a problem."""
    return f"step {step}: {problem}; no weight was changed"


def _accumulate_gradients(
    session: Trainer, batches: Sequence[MicroBatch], divisor: float
) -> torch.Tensor:
    """Run forward and backward on all micro-batches; return this rank's loss sums, [M] in nats."""
    engine, device = session.engine, session.groups.device
    if session.pipeline is not None:
        sums = session.pipeline.forward_backward(batches, divisor)
        engine.reduce_gradients()
        return sums
    sums = _no_losses(session)
    for batch in batches:
        loss, modality_sums = engine.forward(batch.to(device))
        engine.backward(loss / divisor)
        sums += modality_sums
    return sums


def evaluate(
    session: Session, batches: Iterable[MicroBatch], check_stop: Callable[[], None] = never
) -> tuple[tuple[float, ...], list[int]]:
    """Return the mean loss, in the unit of the objective, and the number of labels, per modality.

    Both are over the batches of all ranks, and every rank must have the same number of batches. The
    mean of a modality without labels is NaN. On a terminal, the first rank shows a progress bar if
    this takes longer than 5 s.

    Args:
        session: The run.
        batches: This rank's micro-batches.
        check_stop: Called by every rank between batches; may raise to end the evaluation.
    """
    groups = session.groups
    # None: tqdm draws a bar only on a terminal.
    silent = None if groups.rank == 0 else True
    sums = _no_losses(session)
    labels = torch.zeros(len(sums), dtype=torch.int64)
    # A pipeline fills and drains once per window, so run many micro-batches in each.
    at_once = 1 if session.pipeline is None else _ROUNDS_AT_ONCE * groups.pipeline_size
    bar = tqdm(batches, "held out", delay=5, ncols=100, leave=False, disable=silent)
    remaining = iter(bar)
    with torch.no_grad():
        while window := list(islice(remaining, at_once)):
            check_stop()
            sums += _window_sums(session, window)
            labels += torch.tensor([batch.modality_labels for batch in window]).sum(0)
    labels = labels.to(groups.device)
    dist.all_reduce(labels, group=groups.data)
    return mean_losses(sums, labels.tolist(), session.config.model, groups), labels.tolist()


def evaluate_held_out(
    session: Session, whole: bool, check_stop: Callable[[], None] = never
) -> HeldOut:
    """Evaluate on the validation split; every rank must call this.

    A model whose routing depends on later tokens is evaluated a second time with causal routing, if
    that is possible. With evaluation.per_source, each source of a blend is evaluated too.

    Args:
        session: The run.
        whole: See ``Session.held_out_batches``.
        check_stop: See ``evaluate``.
    """
    model = session.config.model
    as_trained, labels = evaluate(session, session.held_out_batches(whole), check_stop)
    total = weighted_mean(as_trained, labels, model.loss_weights)
    sources = {}
    if session.config.evaluation.per_source:
        for source in sources_of(session.corpus):
            batches = session.held_out_batches(whole, source.corpus)
            bits, counts = evaluate(session, batches, check_stop)
            loss = SourceLoss(bits, weighted_mean(bits, counts, model.loss_weights))
            sources[source.name] = loss
    if not (model.sees_the_future and model.can_be_causal):
        return HeldOut(as_trained, total=total, sources=sources)
    with session.model.routed_causally():
        causal, _ = evaluate(session, session.held_out_batches(whole), check_stop)
        return HeldOut(as_trained, causal, total, sources)


def _window_sums(session: Session, window: Sequence[MicroBatch]) -> torch.Tensor:
    if session.pipeline is not None:
        return session.pipeline.forward(window)
    (batch,) = window
    return session.engine.forward(batch.to(session.groups.device))[1]


def _no_losses(session: Trainer) -> torch.Tensor:
    """Return zeros to add loss sums to, [M] fp64."""
    size, device = len(session.config.model.modalities), session.groups.device
    return torch.zeros(size, dtype=torch.float64, device=device)


def mean_losses(
    sums: torch.Tensor, labels: Sequence[int], model: ModelConfig, groups: ProcessGroups
) -> tuple[float, ...]:
    """Sum over all ranks, divide by the global number of labels and convert to reported units.

    Tensor-parallel ranks have equal sums, so only the first one's count; pipeline stages before the
    last have zeros. Collectives: one all-reduce over the world.
    """
    if groups.tensor_rank > 0:
        sums = torch.zeros_like(sums)
    dist.all_reduce(sums)
    return tuple(
        loss / count * unit.factor if count else math.nan
        for loss, count, unit in zip(sums.tolist(), labels, model.loss_units.values(), strict=True)
    )


def weighted_mean(
    losses: Sequence[float], labels: Sequence[int], loss_weights: Sequence[float]
) -> float:
    """Return the mean over the labels of all modalities, each with its modality's loss weight.

    Modalities without labels do not count; without any weighted label, the mean is NaN.
    """
    weights = [count * weight for count, weight in zip(labels, loss_weights, strict=True)]
    if not sum(weights):
        return math.nan
    total = sum(value * weight for value, weight in zip(losses, weights, strict=True) if weight)
    return total / sum(weights)


class _Clock:
    """A stopwatch that waits for the device, so that each phase includes its own kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = time.perf_counter()

    def lap(self) -> float:
        synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def _problem_of_loss(
    losses: Sequence[float], labels: Sequence[int], names: Sequence[str]
) -> str | None:
    broken = [
        f"{name} ({value})"
        for name, value, count in zip(names, losses, labels, strict=True)
        if count and not math.isfinite(value)
    ]
    return f"the loss of {', '.join(broken)} is not finite" if broken else None


def _problem_of_norms(norms: StepNorms, towers: Sequence[str]) -> str | None:
    if norms.finite:
        return None
    named = zip(
        ("shared weights", *towers, "the causal routers"),
        (norms.shared, *norms.per_tower, norms.auxiliary),
        strict=True,
    )
    broken = [name for name, value in named if not math.isfinite(value)]
    return f"the gradient of {', '.join(broken)} is not finite"
