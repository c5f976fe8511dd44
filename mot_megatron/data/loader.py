"""Micro-batches of a split for one data-parallel rank.

All ranks read different slices of one global stream of packed sequences. The stream depends only on
(corpora, weights, seed, seq_length) and, with budget packing, on the budgets and the micro-batch
size. Therefore only a position is saved, and a run can resume with any data-parallel size. Letters:
b sequences of s positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mot_megatron.config_model import ObjectiveConfig
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.blend import Blend, sources_of
from mot_megatron.data.blend_stream import BlendStream, SourceOrder
from mot_megatron.data.budget import (
    BudgetPlan,
    pack_budget,
    pack_budget_epoch,
    tower_budgets,
)
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.continuous import Image, ImageReader, Place, intervals, with_images
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.data.packing import (
    ALGORITHM_VERSION,
    Packing,
    pack,
    pack_epoch,
    shuffled,
)
from mot_megatron.data.pieces import Pieces, describe_pieces, pieces_of
from mot_megatron.data.streams import EpochStream, EpochWindow, Position, Stream, Window
from mot_megatron.errors import DataError
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


def read_pieces(corpus: Corpus, split: str, seq_length: int) -> list[Pieces]:
    """Return the documents of a split as training reads them, for each source.

    Raises:
        DataError: There is no such split, or a document does not fit into a sequence.
    """
    key = split, seq_length, corpus.long_documents
    for source, place in zip(sources_of(corpus), _places_of(corpus, split), strict=True):
        prepared = source.corpus.prepared
        if key not in prepared:
            prepared[key] = pieces_of(
                source.corpus.split(split),
                source.corpus.description,
                seq_length,
                corpus.long_documents,
                place,
                partial(_tokens_per_item, source.corpus.directory),
            )
    return [source.corpus.prepared[key] for source in sources_of(corpus)]


def _tokens_per_item(directory: Path, modality: Modality) -> int | None:
    return load_codec(directory, modality).tokens_per_item


def describe_long_documents(corpus: Corpus, split: str, seq_length: int) -> list[str]:
    """Return what becomes of long documents, a line per source that has some."""
    return describe_pieces(read_pieces(corpus, split, seq_length), _places_of(corpus, split))


def _places_of(corpus: Corpus, split: str) -> list[str]:
    return [f"{source.corpus.directory}: split {split}" for source in sources_of(corpus)]


class _SequenceReader:
    """Builds micro-batches from documents of one split, numbered through all sources of a blend."""

    def __init__(self, corpus: Corpus, split: str, seq_length: int, grouping: GroupingPlan) -> None:
        self._shares = [source.share for source in sources_of(corpus)]
        self._description = corpus.description
        self._seq_length = seq_length
        self._grouping = grouping
        modalities = [modality.name for modality in corpus.description.modalities]
        if len(modalities) != len(grouping.towers_of_modalities):
            raise DataError(
                f"{corpus.directory}: the corpus has {len(modalities)} modalities ({modalities}), "
                f"the model maps {len(grouping.towers_of_modalities)} to towers"
            )
        self.sources = _places_of(corpus, split)
        self.source = self.sources[0] if len(self.sources) == 1 else f"blend: split {split}"
        self.parts = read_pieces(corpus, split, seq_length)
        lengths = [part.lengths for part in self.parts]
        self.lengths = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
        """[documents] int64, tokens of each document."""
        self.bounds = [0, *np.cumsum([len(part) for part in self.parts]).tolist()]
        """Number of the first document of each source, and of all documents."""
        self.budget_plan: BudgetPlan | None = None
        self._images = self._image_reader(corpus) if corpus.description.continuous else None

    def _image_reader(self, corpus: Corpus) -> ImageReader:
        """Return the reader of a corpus with vectors, for which some features are missing."""
        where = f"{corpus.directory}: modality {next(iter(corpus.description.continuous))}"
        if not self._grouping.objectives:
            raise DataError(f"{where} consists of vectors, which need a model's objectives")
        problems = {
            "data.sources": len(self.parts) > 1,
            f"data.long_documents = {corpus.long_documents!r}": self.parts[0].num_long > 0,
            "segments that are context only": self.parts[0].split.has_context,
        }
        for what, occurs in problems.items():
            if occurs:
                raise DataError(f"{where} consists of vectors, which do not go with {what} yet")
        return ImageReader(self.parts[0].split, self._description, self._grouping.objectives)

    def use_budgets(self, micro_batch_size: int) -> BudgetPlan:
        """Switch to budget packing with micro-batches of ``micro_batch_size`` sequences."""
        self.budget_plan = BudgetPlan.build(
            self.parts,
            self._shares,
            self._description,
            self._grouping.towers_of_modalities,
            num_towers=self._grouping.num_towers,
            micro_batch_size=micro_batch_size,
            seq_length=self._seq_length,
            sources=self.sources,
        )
        return self.budget_plan

    def pack(self, seed: int, epoch: int, place: int | None = None) -> Packing:
        """Pack all documents in a random order, or those of the source at ``place`` alone."""
        numbers = slice(None) if place is None else slice(*self.bounds[place : place + 2])
        source = self.source if place is None else self.sources[place]
        if self.budget_plan is not None:
            plan = self.budget_plan
            counts, budgets = plan.counts[numbers], plan.budgets
            if place is not None:
                budgets = tower_budgets(counts, plan.micro_batch_size * self._seq_length)
            return pack_budget_epoch(
                counts,
                budgets,
                sequences=plan.micro_batch_size,
                capacity=self._seq_length,
                seed=seed,
                epoch=epoch,
                source=source,
            )
        return pack_epoch(
            self.lengths[numbers], self._seq_length, seed=seed, epoch=epoch, source=source
        )

    def pack_chosen(self, documents: np.ndarray, generator: np.random.Generator) -> Packing:
        """Pack documents mostly in their order; return a packing of their places in it."""
        places = np.arange(len(documents))
        if self.budget_plan is None:
            packing = pack(self.lengths[documents], self._seq_length, self.source)
            return shuffled(packing, places, generator)
        plan = self.budget_plan
        packing = pack_budget(
            plan.counts[documents],
            plan.budgets,
            sequences=plan.micro_batch_size,
            capacity=self._seq_length,
            source=self.source,
        )
        return shuffled(packing, places, generator, sequences_per_bin=plan.micro_batch_size)

    def locate(self, document: int) -> tuple[int, int]:
        """Return the source of a document, and the number there of the document that it is of."""
        place, number = self._place(document)
        return place, self.parts[place].document_of(number)

    def _place(self, document: int) -> tuple[int, int]:
        place = bisect_right(self.bounds, document) - 1
        return place, document - self.bounds[place]

    def _tokens(self, document: int) -> np.ndarray:
        place, number = self._place(document)
        return self.parts[place][number]

    def _context(self, document: int) -> np.ndarray:
        place, number = self._place(document)
        return self.parts[place].context_of(number)

    def read(self, sequences: list[np.ndarray], places: Sequence[Place]) -> MicroBatch:
        """Build the micro-batch of these documents, given as b arrays of document numbers.

        ``places`` are those of the sequences in the stream, which the noise of vectors depends on.
        """
        shape = (len(sequences), self._seq_length)
        token_ids = np.full(shape, self._description.pad_token, dtype=np.int64)
        document_ids = np.empty(shape, dtype=np.int32)
        filled = np.zeros(len(sequences), dtype=np.int64)
        has_context = any(part.split.has_context for part in self.parts)
        context = np.zeros(shape, dtype=bool) if has_context else None
        images: list[Image] = []
        for row, documents in enumerate(sequences):
            end = 0
            found = []
            for number, document in enumerate(documents):
                begin, tokens = end, self._tokens(int(document))
                end = begin + len(tokens)
                token_ids[row, begin:end] = tokens
                document_ids[row, begin:end] = number
                if context is not None:
                    context[row, begin:end] = self._context(document)
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
            context=context,
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
            DataError: There is no such split, a document does not fit into a sequence or exceeds a
                budget, or the corpus has another number of modalities than ``grouping``.
        """
        self._reader = _SequenceReader(corpus, split, seq_length, grouping)
        self._corpus = corpus
        identity: dict[str, int | str] = {
            "seed": seed,
            "seq_length": seq_length,
            "packing": packing,
            "packing_version": ALGORITHM_VERSION,
        }
        self.budgets: tuple[int, ...] | None = None
        """With budget packing, tokens per tower of each micro-batch of b sequences including
        fillers; K of them, which sum to b * s."""
        if packing == "budget":
            self.budgets = self._reader.use_budgets(micro_batch_size).budgets
            identity["micro_batch_size"] = micro_batch_size
        self._identity = identity
        self._seq_length = seq_length
        self._rows = micro_batch_size * grouping.batches_per_group
        self._shard = shard
        blended = isinstance(corpus, Blend)
        self._stream: Stream[Any] = self._blend_stream() if blended else self._epoch_stream()
        self._windows: deque[Window] = deque()
        self._next_sequence = 0
        self.changes: list[str] = []
        """What has changed about the sources since the position that was loaded was saved."""

    def _epoch_stream(self) -> EpochStream:
        reader, seed = self._reader, int(self._identity["seed"])
        return EpochStream(
            self._traits(0) | self._identity | self._joined_budgets(),
            reader.source,
            self._corpus.fingerprint,
            lambda epoch: reader.pack(seed, epoch),
            int(reader.lengths.sum()),
        )

    def _blend_stream(self) -> BlendStream:
        reader, seed = self._reader, int(self._identity["seed"])
        orders = [
            SourceOrder(
                source,
                first,
                reader.lengths[first:end],
                seed,
                lambda epoch, place=place: reader.pack(seed, epoch, place),
                self._traits(place),
            )
            for place, (source, (first, end)) in enumerate(
                zip(sources_of(self._corpus), pairwise(reader.bounds), strict=True)
            )
        ]
        return BlendStream(
            self._identity, reader.source, orders, reader.pack_chosen, self._joined_budgets()
        )

    def _traits(self, place: int) -> dict[str, str]:
        """Return what a source's documents depend on; without long ones, only on the corpus."""
        has_long = self._reader.parts[place].num_long > 0
        return {"long_documents": self._corpus.long_documents} if has_long else {}

    def _joined_budgets(self) -> dict[str, str]:
        return {} if self.budgets is None else {"budgets": ", ".join(map(str, self.budgets))}

    @property
    def fill(self) -> float:
        """Fraction of positions that documents occupy in the current window: a corpus's epoch."""
        window = self._window(0)
        return window.tokens / (len(window.packing) * self._seq_length)

    def next_micro_batch(self) -> MicroBatch:
        """Return this rank's next micro-batch; no collectives, since all ranks advance equally."""
        first = self._next_sequence + self._shard.rank * self._rows
        numbers = range(first, first + self._rows)
        sequences = [self._sequence(number) for number in numbers]
        places = [self._place(number) for number in numbers]
        self._next_sequence += self._shard.size * self._rows
        while self._next_sequence >= len(self._window(0).packing):
            self._next_sequence -= len(self._window(0).packing)
            self._window(1)
            self._windows.popleft()
        return self._reader.read(sequences, places)

    def state_dict(self) -> Position:
        """Return the position in the global stream, and what the stream depends on.

        It is equal on all ranks.
        """
        return self._stream.position(self._window(0), self._next_sequence)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from the position in ``state``, with any data-parallel size.

        Without budget packing, the micro-batch size may differ too. A blend may have other sources
        or weights, if it keeps one of the sources; ``changes`` then says what is different.

        Raises:
            CheckpointError: The state belongs to another stream, or its keys or values are invalid.
        """
        if "sources" in state and isinstance(self._stream, EpochStream):
            # All other sources of a blend are gone. It goes on as the blend of the one that stays.
            self._stream = self._blend_stream()
        window, self._next_sequence, self.changes = self._stream.find(state)
        self._windows = deque([window])

    def documents_at(self, position: Mapping[str, Any], count: int) -> list[list[Any]]:
        """Return the documents of ``count`` sequences of the global stream, for reports.

        Args:
            position: An earlier ``state_dict`` of this loader.
            count: Number of sequences from there on.

        Returns:
            Numbers of documents in the split, one list per sequence; for a blend, pairs of the
            source's name and the number in its split.
        """
        window, number, _ = self._stream.find(position)
        found = []
        for _ in range(count):
            while number >= len(window.packing):
                number -= len(window.packing)
                window = self._stream.after(window)
            found.append([self._report(int(document)) for document in window.packing[number]])
            number += 1
        return found

    def _report(self, document: int) -> int | list[int | str]:
        place, number = self._reader.locate(document)
        if not isinstance(self._corpus, Blend):
            return number
        return [self._corpus.sources[place].name, number]

    def _window(self, ahead: int) -> Window:
        """Return the current window, or one that follows it."""
        while len(self._windows) <= ahead:
            last = self._windows[-1] if self._windows else None
            self._windows.append(self._stream.first() if last is None else self._stream.after(last))
        return self._windows[ahead]

    def _sequence(self, number: int) -> np.ndarray:
        """Return the documents of a sequence, counted from the start of the current window."""
        window, number = self._find(number)
        return window.packing[number]

    def _place(self, number: int) -> Place:
        """Return the place of a sequence, counted from the start of the current window."""
        window, number = self._find(number)
        # It seeds the noise of vectors, which a blend cannot have.
        epoch = window.epoch if isinstance(window, EpochWindow) else 0
        return Place(int(self._identity["seed"]), epoch, number, training=True)

    def _find(self, number: int) -> tuple[Window, int]:
        """Return the window of such a sequence, and the sequence's number in it."""
        ahead = 0
        while number >= len(self._window(ahead).packing):
            number -= len(self._window(ahead).packing)
            ahead += 1
        return self._window(ahead), number


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

    Each document occurs once over all ranks; of a blend, each document of every source. All ranks
    yield the same number of micro-batches, so that collectives match; after the last document,
    sequences are empty and have no labels.
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
