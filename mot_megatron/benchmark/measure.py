"""What a training step holds on this rank, read from its tensors.

Model state is measured between micro-batches and before the optimizer's step, when nothing is
under way: storages of tensors, each counted once, padding included.
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
    """Run forward and backward of a step's micro-batches, all but the optimizer's step.

    On a CPU: elsewhere backward runs in threads of its own, where what it keeps is not seen. As
    collective as a training step. The session is of no use afterwards.
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
        # Without ZeRO, AdamW steps the weights themselves.
        optimizer=sum(size for place, size in optimizer.items() if place not in weights),
    )


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of every piece of memory, by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
