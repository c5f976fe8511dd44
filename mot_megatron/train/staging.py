"""The state of a run on its way to a checkpoint: copied to the host, then assembled.

Training stands still only while every rank copies the pieces that it stores under ZeRO
(``Staging.copy``), which needs no communication. Each parameter is later assembled on one of its
owners (``StagedState.assemble``), which may happen in a thread beside training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.checkpoint.names import STATE_KINDS
from mot_megatron.model.sharding import experts_of, is_replica, tower_of
from mot_megatron.optim.partitions import WEIGHT, Piece
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.session import Session


@dataclass
class _Staged:
    """One parameter on this rank."""

    name: str
    parameter: nn.Parameter
    start: int
    """First element of this rank's piece in the flattened parameter."""
    kinds: tuple[str, ...]
    """What is stored of it: STATE_KINDS, or the weight alone if it is frozen."""
    values: torch.Tensor
    """This rank's piece, on the host: [kinds, length]."""
    numel: int
    owners: tuple[int, ...]
    """The ranks whose pieces are the parameter."""
    writer: int
    """The owner that assembles it."""


class Staging:
    """Copies a run's state to host memory, for one save at a time.

    Pieces on a GPU are copied to pinned memory, without waiting for each of them. Pinned memory is
    slow to get and therefore kept for the next save.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, session: Session) -> tuple[StagedState, list[str]]:
        """Copy this rank's pieces; return them and the names of those that are not finite.

        Needs host memory of 12 bytes per element of the pieces. No collectives.
        """
        groups = session.groups
        pieces = dict(session.engine.pieces())
        staged: list[_Staged] = []
        extremes: list[torch.Tensor] = []
        for name, parameter, owners, writer in writers(session.model, groups):
            piece = pieces[name]
            kinds = STATE_KINDS if parameter.requires_grad else STATE_KINDS[:1]
            extremes.append(_extremes(piece, groups.device))
            staged.append(
                _Staged(
                    name,
                    parameter,
                    piece.start,
                    kinds,
                    self._put(name, piece, kinds, is_sent=writer != dist.get_rank()),
                    _numel(parameter),
                    owners,
                    writer,
                )
            )
        # One read of the device, which also waits for the copies.
        finite = torch.stack(extremes).isfinite().all(1).tolist()
        broken = [each.name for each, good in zip(staged, finite, strict=True) if not good]
        return StagedState(staged), broken

    def _put(self, name: str, piece: Piece, kinds: tuple[str, ...], is_sent: bool) -> torch.Tensor:
        if not piece.values or (is_sent and piece.is_full):  # then the writer has it too
            return torch.empty(len(kinds), 0)
        sources = [piece.values[kind] for kind in kinds]
        host = self._pinned.get(name)
        if host is None:
            on_gpu = sources[0].is_cuda
            host = torch.empty(len(sources), sources[0].numel(), pin_memory=on_gpu)
            if on_gpu:
                self._pinned[name] = host
        for row, source in enumerate(sources):
            host[row].copy_(source, non_blocking=True)
        return host


def writers(
    model: nn.Module, groups: ProcessGroups
) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...], int]]:
    """Yield name, parameter, owners and writer of this rank's parameters, in the model's order.

    The owners of a parameter take turns as its writer. ``conversion.layout`` says the same for
    every rank without a model. No collectives.
    """
    # Counted per group of owners, so that all of them have the same count.
    seen: Counter[tuple[int, ...]] = Counter()
    for name, parameter in model.named_parameters():
        if is_replica(parameter):
            continue
        owners = _owners(parameter, groups)
        yield name, parameter, owners, owners[seen[owners] % len(owners)]
        seen[owners] += 1


class StagedState:
    """The pieces of a run's state that this rank has copied to the host."""

    def __init__(self, staged: list[_Staged]) -> None:
        self._staged = staged

    def assemble(
        self, group: dist.ProcessGroup | None
    ) -> Iterator[tuple[str, nn.Parameter, dict[str, torch.Tensor]]]:
        """Yield name, parameter and full flat values by kind of what this rank writes.

        Every parameter is written by one of its owners, which take turns. The others send their
        pieces to it, point to point, in the model's order on every rank, which rules out deadlocks.
        May be called once, because memory is freed on the way; exhaust it on all ranks.

        Args:
            group: A gloo group of all ranks; None for the default group.
        """
        rank = dist.get_rank()
        sizes = _exchange_sizes(self._staged, rank, group)
        waiting = self._staged[::-1]
        self._staged = []
        while waiting:
            each = waiting.pop()
            sends = rank != each.writer
            if sends and each.values.numel():
                dist.send(each.values, each.writer, group)
            if sends:
                continue
            values = each.values
            if values.shape[1] < each.numel:
                values = torch.empty(len(each.kinds), each.numel)
                values[:, each.start : each.start + each.values.shape[1]] = each.values
                for owner in each.owners:
                    start, length = sizes[owner].pop()
                    if length:
                        received = torch.empty(len(each.kinds), length)
                        dist.recv(received, owner, group)
                        values[:, start : start + length] = received
            else:
                for owner in each.owners:
                    sizes[owner].pop()
            yield each.name, each.parameter, dict(zip(each.kinds, values, strict=True))


def _exchange_sizes(
    staged: list[_Staged], rank: int, group: dist.ProcessGroup | None
) -> dict[int, list[tuple[int, int]]]:
    """Tell the writers of this rank's pieces where they are.

    Returns:
        By owner, start and length of its piece of every parameter that this rank writes and that
        this owner shares, the last parameter first. A length of 0 if it need not send.
    """
    mine: dict[int, list[tuple[int, int]]] = {}
    shared: Counter[int] = Counter()
    for each in staged:
        if each.writer != rank:
            mine.setdefault(each.writer, []).append((each.start, each.values.shape[1]))
        else:
            shared.update(each.owners)
    works, tables = [], {}
    for peer, places in mine.items():
        works.append(dist.isend(torch.tensor(places), peer, group))
    for peer, count in shared.items():
        tables[peer] = torch.zeros(count, 2, dtype=torch.int64)
        if peer != rank:
            works.append(dist.irecv(tables[peer], peer, group))
    for work in works:
        assert work is not None
        work.wait()
    return {
        peer: [(start, length) for start, length in reversed(table.tolist())]
        for peer, table in tables.items()
    }


def _extremes(piece: Piece, device: torch.device) -> torch.Tensor:
    """Return least and greatest values, which are finite if and only if all values are."""
    if not piece.values or not piece.values[WEIGHT].numel():
        return torch.zeros(2 * len(STATE_KINDS), device=device)
    # A frozen parameter has no moments: its weight counts in their place.
    tensors = [piece.values.get(kind, piece.values[WEIGHT]) for kind in STATE_KINDS]
    found = [bound for tensor in tensors for bound in torch.aminmax(tensor)]
    return torch.stack(found).to(device, torch.float32)


def _owners(parameter: nn.Parameter, groups: ProcessGroups) -> tuple[int, ...]:
    group = groups.reduction_group(tower_of(parameter), experts_of(parameter) is not None)
    return tuple(dist.get_process_group_ranks(group))


def _numel(parameter: nn.Parameter) -> int:
    """Return the size of the full parameter, which ZeRO-3 has emptied."""
    return getattr(parameter, "ds_numel", parameter.numel())
