"""Micro-batches of a split for one data-parallel rank.

All ranks read different slices of one global stream of packed sequences. The stream depends only on
(corpus, seed, seq_length) and, with budget packing, on the budgets and the micro-batch size.
Therefore only a position is saved, and a run can resume with any data-parallel size. Letters: b
sequences of s positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mot_megatron.config import ObjectiveConfig
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.budget import BudgetPlan, pack_budget_epoch
from mot_megatron.data.continuous import Image, ImageReader, Place, intervals, with_images
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.data.packing import ALGORITHM_VERSION, Packing, check_lengths, pack_epoch
from mot_megatron.errors import CheckpointError, DataError
from mot_megatron.model.micro_batch import MicroBatch

_EVALUATION_SEED = 0


@dataclass(frozen=True)
class GroupingPlan:
    """How the tokens of a micro-batch are assigned to towers."""

    towers_of_modalities: tuple[int, ...]
    """Tower index of each modality, in the order of the corpus."""
    num_towers: int
    slot_multiple: int = 1
    """The slots of each tower are rounded up to a multiple of this: the tensor-parallel size with
    sequence parallelism, otherwise 1."""
    shard: ModalityShard | None = None
    """With modality parallelism, this rank's part of the group's micro-batches."""
    objectives: tuple[ObjectiveConfig, ...] = ()
    """Objective of each modality; needed if the corpus has modalities of vectors."""

    @property
    def batches_per_group(self) -> int:
        """Micro-batches of b sequences that a modality group consumes per pass.

        There is one per rank of the group, or a single one if attention is split by heads.
        """
        if self.shard is None or self.shard.exchange == "heads":
            return 1
        return self.shard.placement.num_ranks


@dataclass(frozen=True)
class DataShard:
    """The slices of the global stream that a rank reads.

    The ranks of a modality group read the same slices and count as one.
    """

    rank: int
    """Index among the readers of different slices."""
    size: int
    """Number of readers of different slices."""


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
        self._images: ImageReader | None = None
        if corpus.description.continuous:
            if not grouping.objectives:
                raise DataError(
                    f"{corpus.directory}: modality {next(iter(corpus.description.continuous))} "
                    "consists of vectors, which need a model's objectives"
                )
            self._images = ImageReader(self._split, self._description, grouping.objectives)

    def use_budgets(self, micro_batch_size: int) -> BudgetPlan:
        """Switch to budget packing with micro-batches of ``micro_batch_size`` sequences."""
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

    def read(self, sequences: list[np.ndarray], places: Sequence[Place]) -> MicroBatch:
        """Build the micro-batch of these documents, given as b arrays of document numbers.

        ``places`` are those of the sequences in the stream, which the noise of vectors depends on.
        """
        shape = (len(sequences), self._seq_length)
        token_ids = np.full(shape, self._description.pad_token, dtype=np.int64)
        document_ids = np.empty(shape, dtype=np.int32)
        filled = np.zeros(len(sequences), dtype=np.int64)
        images: list[Image] = []
        for row, documents in enumerate(sequences):
            end = 0
            found = []
            for number, document in enumerate(documents):
                begin, tokens = end, self._split[document]
                end = begin + len(tokens)
                token_ids[row, begin:end] = tokens
                document_ids[row, begin:end] = number
                found.append((int(document), begin, tokens))
            # The rest counts as another document, so that no token attends to it.
            document_ids[row, end:] = len(documents)
            filled[row] = end
            if self._images is not None:
                images += self._images.read(places[row], row, found)
        if self.budget_plan is not None:
            self.budget_plan.fill(token_ids, filled, sequences)
        batch = build_micro_batch(
            token_ids,
            document_ids,
            self._description.modality_of_id,
            self._grouping.towers_of_modalities,
            num_towers=self._grouping.num_towers,
            slot_multiple=self._grouping.slot_multiple,
            filled_tokens=filled,
            visible=intervals(document_ids, images) if self._images is not None else None,
            shard=self._grouping.shard,
        )
        if self._images is None:
            return batch
        widths = [modality.width for modality in self._description.modalities]
        return with_images(batch, images, self._description.modality_of_id, widths)


class PackedLoader:
    """An endless iterator over the micro-batches of one rank; each epoch is packed separately.

    Micro-batch i of rank r consists of sequences [(i * size + r) * b, ... + b) of the global
    stream. A modality group takes m * b instead of b, with m = ``GroupingPlan.batches_per_group``.
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
            shard: This rank's slices.
            seed: Seed of the order of documents.
            packing: "sequence" fills each sequence as far as possible. "budget" also gives each
                micro-batch of b sequences exactly ``budgets[tower]`` tokens of each tower.

        Raises:
            DataError: There is no such split, a document is longer than ``seq_length`` or exceeds a
                budget, or the corpus has another number of modalities than ``grouping``.
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
        """With budget packing, tokens per tower of each micro-batch of b sequences including
        fillers; K of them, which sum to b * s."""
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
        """Fraction of positions that documents occupy in the current epoch."""
        return self._reader.fill(self._packing(self._epoch))

    def next_micro_batch(self) -> MicroBatch:
        """Return this rank's next micro-batch; no collectives, since all ranks advance equally."""
        first = self._next_sequence + self._shard.rank * self._rows
        numbers = range(first, first + self._rows)
        sequences = [self._sequence(number) for number in numbers]
        places = [self._place(number) for number in numbers]
        self._next_sequence += self._shard.size * self._rows
        while self._next_sequence >= len(self._packing(self._epoch)):
            self._next_sequence -= len(self._packing(self._epoch))
            del self._packings[self._epoch]
            self._epoch += 1
        return self._reader.read(sequences, places)

    def state_dict(self) -> dict[str, int | str]:
        """Return the position in the global stream, and what the stream depends on.

        It is equal on all ranks.
        """
        return {"epoch": self._epoch, "next_sequence": self._next_sequence, **self._identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from the position in ``state``, with any data-parallel size.

        Without budget packing, the micro-batch size may differ too.

        Raises:
            CheckpointError: The state belongs to another stream, or its keys or values are invalid.
        """
        for key, value in self._identity.items():
            # Compare values first, since another packing mode has other keys.
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

    def documents_at(self, position: Mapping[str, int | str], count: int) -> list[list[int]]:
        """Return the documents of ``count`` sequences of the global stream, for reports.

        Args:
            position: An earlier ``state_dict`` of this loader.
            count: Number of sequences from there on.

        Returns:
            Numbers of documents in the split, one list per sequence.
        """
        epoch, number = int(position["epoch"]), int(position["next_sequence"])
        packing = self._reader.pack(self._seed, epoch)
        found = []
        for _ in range(count):
            while number >= len(packing):
                number -= len(packing)
                epoch += 1
                packing = self._reader.pack(self._seed, epoch)
            found.append([int(document) for document in packing[number]])
            number += 1
        return found

    def _packing(self, epoch: int) -> Packing:
        if epoch not in self._packings:
            self._packings[epoch] = self._reader.pack(self._seed, epoch)
        return self._packings[epoch]

    def _sequence(self, number: int) -> np.ndarray:
        """Return the documents of a sequence, counted from the start of the current epoch."""
        place = self._place(number)
        return self._packing(place.epoch)[place.sequence]

    def _place(self, number: int) -> Place:
        """Return the place of a sequence, counted from the start of the current epoch."""
        epoch = self._epoch
        while number >= len(self._packing(epoch)):
            number -= len(self._packing(epoch))
            epoch += 1
        return Place(self._seed, epoch, number, training=True)


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
    """Yield the micro-batches of one pass over a split, always in the same order.

    Each document occurs once over all ranks. All ranks yield the same number of micro-batches, so
    that collectives match; after the last document, sequences are empty and have no labels.
    Sequences are never packed to budgets, so they do not depend on the micro-batch size.

    Args:
        corpus: The corpus.
        split: Name of its split.
        seq_length: s.
        micro_batch_size: b.
        grouping: Assignment of tokens to towers.
        shard: This rank's slices.
        limit_sequences: Stop after this many sequences over all ranks; None for all.

    Raises:
        DataError: As ``PackedLoader``; raised by the call, not by the first batch.
    """
    reader = _SequenceReader(corpus, split, seq_length, grouping)
    packing = reader.pack(_EVALUATION_SEED, 0)
    total = len(packing) if limit_sequences is None else min(limit_sequences, len(packing))
    nothing = np.empty(0, dtype=np.int64)
    rows = micro_batch_size * grouping.batches_per_group
    stride = shard.size * rows
    starts = range(shard.rank * rows, -(-total // stride) * stride, stride)
    return (
        reader.read(
            [packing[i] if i < total else nothing for i in range(start, start + rows)],
            [Place(_EVALUATION_SEED, 0, i, training=False) for i in range(start, start + rows)],
        )
        for start in starts
    )
