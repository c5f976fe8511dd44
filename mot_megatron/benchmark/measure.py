"""Measure the memory of a training step on this rank from its tensors.

Model state is measured between micro-batches and before the optimizer step, when no operation is in
progress. Every tensor storage counts once, with its padding.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from mot_megatron.benchmark.saved_tensors import SavedForBackward
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.planning.activations import Rows, activation_bytes
from mot_megatron.planning.memory import RankMemory, StateBytes
from mot_megatron.train.session import Session


def measure_step(session: Session) -> RankMemory:
    """Run forward and backward of all micro-batches of a step, and measure memory.

    The optimizer step is not run, and the session is unusable afterwards. Collective, like a
    training step. Runs only on CPUs: on other devices, backward runs in separate threads, where
    saved tensors are not counted.
    """
    groups, model = session.groups, session.model
    assert groups.device.type == "cpu"
    accumulation = session.config.accumulation_steps(groups.data_size)
    batches = [session.loader.next_micro_batch() for _ in range(accumulation)]
    kept = SavedForBackward(model.parameters())
    states = [_state(session)]
    with kept.watch():
        if session.pipeline is not None:
            session.pipeline.forward_backward(batches, divisor=1.0)
            states.append(_state(session))
            session.engine.reduce_gradients()
            states.append(_state(session))
        else:
            for batch in batches:
                session.engine.backward(session.engine.forward(batch)[0])
                states.append(_state(session))
    names = session.config.model.tower_names

    def needed(rows: Rows) -> int:
        return activation_bytes(session.config, groups.pipeline_rank, rows, accumulation, "cpu")

    return RankMemory(
        stage=groups.pipeline_rank,
        towers=tuple(names[tower] for tower in model.towers),
        state=StateBytes(
            weights=max(state.weights for state in states),
            gradients=max(state.gradients for state in states),
            optimizer=max(state.optimizer for state in states),
        ),
        activations=kept.peak_bytes,
        rows=max((_rows(batch, model.towers) for batch in batches), key=needed),
    )


def _rows(batch: MicroBatch, towers: Container[int]) -> Rows:
    slots = [count if tower in towers else 0 for tower, count in enumerate(batch.tower_slots)]
    return Rows(tuple(slots), batch.positions.numel())


def _state(session: Session) -> StateBytes:
    held = session.engine.held_tensors()
    weights, optimizer = _storages(held.weights), _storages(held.optimizer)
    return StateBytes(
        weights=sum(weights.values()),
        gradients=sum(_storages(held.gradients).values()),
        # Without ZeRO, AdamW updates the weights in place, so they do not count again.
        optimizer=sum(size for place, size in optimizer.items() if place not in weights),
    )


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of every storage, by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
