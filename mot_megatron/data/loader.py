"""Micro-batches of a split, for one data-parallel rank.

All ranks read one global stream of packed sequences, epoch after epoch, each its own slices of it.
The stream depends only on (corpus, seed, seq_length) and, where micro-batches have budgets, on
these and their size, so its position is all there is to save and any data-parallel size can go on
from it. Letters: b sequences of s positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.budget import BudgetPlan, pack_budget_epoch
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.data.packing import ALGORITHM_VERSION, Packing, check_lengths, pack_epoch
from mot_megatron.errors import CheckpointError, DataError
from mot_megatron.model.micro_batch import MicroBatch

_EVALUATION_SEED = 0


@dataclass(frozen=True)
class GroupingPlan:
    """How a micro-batch's tokens are assigned to towers."""

    towers_of_modalities: tuple[int, ...]
    """Tower index of every modality, in the corpus's order of modalities."""
    num_towers: int
    slot_multiple: int = 1
    """Slots per tower are rounded up to this: tensor-parallel size under sequence parallelism."""
    shard: ModalityShard | None = None
    """Under modality parallelism, which part of its group's micro-batches a rank takes."""

    @property
    def batches_per_group(self) -> int:
        """Micro-batches of b sequences that the ranks which read them together pass over at once.

        One per rank of a modality group; one for the group where it splits attention by heads.
        """
        if self.shard is None or self.shard.exchange == "heads":
            return 1
        return self.shard.placement.num_ranks


@dataclass(frozen=True)
class DataShard:
    """Which slices of the global stream a rank reads.

    The ranks of a modality-parallel group read the same ones, and count as one.
    """

    rank: int
    """Place among those that read different slices."""
    size: int
    """How many those are."""


class _SequenceReader:
    """Builds micro-batches from documents of one split."""

    def __init__(self, corpus: Corpus, split: str, seq_length: int, grouping: GroupingPlan) -> None:
        self._split = corpus.split(split)
        self._description = corpus.description
        self._seq_length = seq_length
        self._grouping = grouping
        modalities = [modality.name for modality in corpus.description.modalities]
        if len(modalities) != len(grouping.towers_of_modalities):
            raise DataError(
                f"{corpus.directory}: the corpus has {len(modalities)} modalities ({modalities}), "
                f"the model maps {len(grouping.towers_of_modalities)} to towers"
            )
        self.source = f"{corpus.directory}: split {split}"
        check_lengths(self._split.lengths, seq_length, self.source)
        self.budget_plan: BudgetPlan | None = None

    def use_budgets(self, micro_batch_size: int) -> BudgetPlan:
        """From now on, pack and read micro-batches of this many sequences to budgets."""
        self.budget_plan = BudgetPlan.build(
            self._split,
            self._description,
            self._grouping.towers_of_modalities,
            num_towers=self._grouping.num_towers,
            micro_batch_size=micro_batch_size,
            seq_length=self._seq_length,
            source=self.source,
        )
        return self.budget_plan

    def pack(self, seed: int, epoch: int) -> Packing:
        if self.budget_plan is not None:
            return pack_budget_epoch(
                self.budget_plan.counts,
                self.budget_plan.budgets,
                sequences=self.budget_plan.micro_batch_size,
                capacity=self._seq_length,
                seed=seed,
                epoch=epoch,
                source=self.source,
            )
        return pack_epoch(
            self._split.lengths, self._seq_length, seed=seed, epoch=epoch, source=self.source
        )

    def fill(self, packing: Packing) -> float:
        return len(self._split.tokens) / (len(packing) * self._seq_length)

    def read(self, sequences: list[np.ndarray]) -> MicroBatch:
        """The micro-batch whose sequences hold these documents, b arrays of document numbers."""
        shape = (len(sequences), self._seq_length)
        token_ids = np.full(shape, self._description.pad_token, dtype=np.int64)
        document_ids = np.empty(shape, dtype=np.int32)
        filled = np.zeros(len(sequences), dtype=np.int64)
        for row, documents in enumerate(sequences):
            end = 0
            for number, document in enumerate(documents):
                begin, tokens = end, self._split[document]
                end = begin + len(tokens)
                token_ids[row, begin:end] = tokens
                document_ids[row, begin:end] = number
            # What is left forms one more document, so that no other attends to it.
            document_ids[row, end:] = len(documents)
            filled[row] = end
        if self.budget_plan is not None:
            self.budget_plan.fill(token_ids, filled, sequences)
        return build_micro_batch(
            token_ids,
            document_ids,
            self._description.modality_of_id,
            self._grouping.towers_of_modalities,
            num_towers=self._grouping.num_towers,
            slot_multiple=self._grouping.slot_multiple,
            filled_tokens=filled,
            shard=self._grouping.shard,
        )


class PackedLoader:
    """Endless micro-batches of one rank; every epoch packs all documents anew.

    Micro-batch i on rank r takes sequences [(i * size + r) * b, ... + b) of the global stream; a
    modality-parallel group takes m * b instead of b, m being ``GroupingPlan.batches_per_group``.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        *,
        seq_length: int,
        micro_batch_size: int,
        grouping: GroupingPlan,
        shard: DataShard,
        seed: int,
        packing: Literal["sequence", "budget"] = "sequence",
    ) -> None:
        """Start at the beginning of epoch 0.

        Args:
            corpus: The corpus.
            split: Name of its split.
            seq_length: s.
            micro_batch_size: b.
            grouping: Assignment of tokens to towers.
            shard: This rank's share.
            seed: Of the order of documents.
            packing: sequence: as many tokens as fit into each sequence. budget: every b sequences
                of the stream hold exactly ``budgets`` tokens of the towers.

        Raises:
            DataError: No such split, a document longer than ``seq_length`` or beyond a budget, or
                a corpus whose number of modalities differs from the plan's.
        """
        self._reader = _SequenceReader(corpus, split, seq_length, grouping)
        self._source = self._reader.source
        self._identity: dict[str, int | str] = {
            "seed": seed,
            "seq_length": seq_length,
            "corpus": corpus.fingerprint,
            "packing": packing,
            "packing_version": ALGORITHM_VERSION,
        }
        self.budgets: tuple[int, ...] | None = None
        """With packing = budget: tokens per tower of every micro-batch of b sequences, fillers
        included; K of them, adding up to b * s."""
        if packing == "budget":
            self.budgets = self._reader.use_budgets(micro_batch_size).budgets
            self._identity["micro_batch_size"] = micro_batch_size
            self._identity["budgets"] = ", ".join(map(str, self.budgets))
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._rows = micro_batch_size * grouping.batches_per_group
        self._shard = shard
        self._epoch = 0
        self._next_sequence = 0
        self._packings: dict[int, Packing] = {}

    @property
    def fill(self) -> float:
        """Fraction of the current epoch's positions that documents occupy."""
        return self._reader.fill(self._packing(self._epoch))

    def next_micro_batch(self) -> MicroBatch:
        """This rank's next micro-batch; no communication, all ranks advance alike."""
        first = self._next_sequence + self._shard.rank * self._rows
        sequences = [self._sequence(first + row) for row in range(self._rows)]
        self._next_sequence += self._shard.size * self._rows
        while self._next_sequence >= len(self._packing(self._epoch)):
            self._next_sequence -= len(self._packing(self._epoch))
            del self._packings[self._epoch]
            self._epoch += 1
        return self._reader.read(sequences)

    def state_dict(self) -> dict[str, int | str]:
        """The position in the global stream, equal on all ranks, and what the stream depends on."""
        return {"epoch": self._epoch, "next_sequence": self._next_sequence, **self._identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where ``state`` was taken, with any data-parallel size.

        And with any micro-batch size, unless packing = budget.

        Raises:
            CheckpointError: The state belongs to another stream or is not a state.
        """
        for key, value in self._identity.items():
            # Another mode has other keys, so the values come first.
            if state.get(key, value) != value:
                raise CheckpointError(
                    f"data position was saved with {key} = {state[key]!r}, but this run has "
                    f"{value!r} ({self._source})"
                )
        expected_keys = {"epoch", "next_sequence", *self._identity}
        if set(state) != expected_keys:
            raise CheckpointError(
                f"data position has keys {sorted(state)}, expected {sorted(expected_keys)}"
            )
        epoch, next_sequence = _count(state, "epoch"), _count(state, "next_sequence")
        packing = self._reader.pack(self._seed, epoch)
        if next_sequence >= len(packing):
            raise CheckpointError(
                f"data position has next_sequence = {next_sequence}, expected "
                f"0..{len(packing) - 1} ({self._source})"
            )
        if self.budgets is not None and next_sequence % self._micro_batch_size:
            raise CheckpointError(
                f"data position has next_sequence = {next_sequence}, expected a multiple of "
                f"micro_batch_size = {self._micro_batch_size} ({self._source})"
            )
        self._epoch, self._next_sequence = epoch, next_sequence
        self._packings = {epoch: packing}

    def _packing(self, epoch: int) -> Packing:
        if epoch not in self._packings:
            self._packings[epoch] = self._reader.pack(self._seed, epoch)
        return self._packings[epoch]

    def _sequence(self, number: int) -> np.ndarray:
        """Documents of the stream's sequence ``number``, counted from the current epoch's first."""
        epoch = self._epoch
        while number >= len(self._packing(epoch)):
            number -= len(self._packing(epoch))
            epoch += 1
        return self._packing(epoch)[number]


def _count(state: Mapping[str, object], key: str) -> int:
    value = state[key]
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"data position has {key} = {value!r}, expected a count")
    return value


def evaluation_batches(
    corpus: Corpus,
    split: str,
    *,
    seq_length: int,
    micro_batch_size: int,
    grouping: GroupingPlan,
    shard: DataShard,
    limit_sequences: int | None = None,
) -> Iterator[MicroBatch]:
    """One pass over a split, each document once over all ranks, always in the same order.

    Every rank yields the same number of micro-batches, so that collectives match; behind the last
    document come sequences without documents, which have no labels. Always packed by sequence: the
    counts of towers vary, the sequences do not depend on the micro-batch size.

    Args:
        corpus: The corpus.
        split: Name of its split.
        seq_length: s.
        micro_batch_size: b.
        grouping: Assignment of tokens to towers.
        shard: This rank's share.
        limit_sequences: Stop after this many sequences over all ranks; None: all.

    Raises:
        DataError: As ``PackedLoader``; on the call, not on the first batch.
    """
    reader = _SequenceReader(corpus, split, seq_length, grouping)
    packing = reader.pack(_EVALUATION_SEED, 0)
    total = len(packing) if limit_sequences is None else min(limit_sequences, len(packing))
    nothing = np.empty(0, dtype=np.int64)
    rows = micro_batch_size * grouping.batches_per_group
    stride = shard.size * rows
    starts = range(shard.rank * rows, -(-total // stride) * stride, stride)
    return (
        reader.read([packing[i] if i < total else nothing for i in range(start, start + rows)])
        for start in starts
    )
