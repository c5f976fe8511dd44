"""The stream of a blend: windows of documents that are drawn from all sources in turn.

Every source has its own epochs, each a random order of its documents. ``interleaving.draw`` says
from which source the next document of a window is; the documents of a window are then packed and
shuffled together. If sources or weights change, the documents of the present window that were not
yet read are carried over, so that each source goes on where it was. Letters: D documents of a
window, S sources.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from mot_megatron.data.blend import Source
from mot_megatron.data.interleaving import WindowSize, draw
from mot_megatron.data.packing import Packing
from mot_megatron.data.streams import Position, Stream, Window, count_in
from mot_megatron.errors import CheckpointError

WINDOW_DOCUMENTS = 1 << 16
"""Documents of a window, unless they are short or a source has fewer."""
_MOST_DOCUMENTS = 1 << 20
_BINS = 64
"""Sequences or micro-batches that a window fills at least, since the last ones have more
padding."""
_ORDERS_KEPT = 2
"""Epochs of a source whose orders stay in memory: a window may begin in one and end in the next."""


@dataclass(frozen=True)
class SourcePosition:
    """Where a source is at the start of a window."""

    epoch: int = 0
    next_document: int = 0
    """Place in the epoch's order."""
    begun_alone: tuple[int, int] | None = None
    """Epoch, and sequence in it, at which a run on this source alone became a blend. The order of
    that epoch is then the rest of that run's epoch."""
    carried: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Documents to read before those of the epoch's order."""
    lag: Fraction = Fraction(0)
    """Tokens by which the source is behind its share."""
    tokens: int = 0
    """Tokens drawn from the source before."""
    documents: int = 0
    """Documents drawn from the source before."""


@dataclass(frozen=True)
class SourceProgress:
    """What a run has read of a source."""

    name: str
    tokens: int
    epochs: float
    """Documents read over documents of the source."""


def progress_of_sources(position: Mapping[str, Any]) -> list[SourceProgress]:
    """Return what was read of each source up to a position; nothing if it is not of a blend."""
    return [
        SourceProgress(each["name"], each["tokens"], each["documents"] / each["of_documents"])
        for each in position.get("sources", ())
    ]


class SourceOrder:
    """The documents of a source, epoch after epoch, each in an order of its own."""

    def __init__(
        self,
        source: Source,
        first: int,
        lengths: np.ndarray,
        seed: int,
        pack_alone: Callable[[int], Packing],
        traits: Mapping[str, str],
    ) -> None:
        """Describe a source.

        Args:
            source: The source.
            first: Number of its first document in the training data.
            lengths: [documents] int64, tokens of its documents.
            seed: Seed of the orders.
            pack_alone: Packs an epoch of a run on this source alone.
            traits: Keys of a position that say on what its documents depend.
        """
        self.source = source
        self.first = first
        self.lengths = lengths
        self.pack_alone = pack_alone
        self.traits = dict(traits)
        self._seed = seed
        self._orders: dict[tuple[int, tuple[int, int] | None], np.ndarray] = {}

    def upcoming_lengths(self, position: SourcePosition) -> Iterator[int]:
        """Yield the lengths of the documents after a position, without an end."""
        yield from self.lengths[position.carried].tolist()
        epoch, at = position.epoch, position.next_document
        while True:
            order = self._order(epoch, position)
            for begin in range(at, len(order), WINDOW_DOCUMENTS):
                yield from self.lengths[order[begin : begin + WINDOW_DOCUMENTS]].tolist()
            epoch, at = epoch + 1, 0

    def take(self, position: SourcePosition, count: int) -> tuple[np.ndarray, SourcePosition]:
        """Return the next ``count`` documents, [count] int64, and the position after them."""
        taken = [position.carried[:count]]
        left = count - len(taken[0])
        epoch, at = position.epoch, position.next_document
        while left:
            order = self._order(epoch, position)
            taken.append(order[at : at + left])
            left -= len(taken[-1])
            at += len(taken[-1])
            if at >= len(order):
                epoch, at = epoch + 1, 0
        documents = np.concatenate(taken)
        return documents, replace(
            position,
            epoch=epoch,
            next_document=at,
            carried=position.carried[count:],
            tokens=position.tokens + int(self.lengths[documents].sum()),
            documents=position.documents + count,
        )

    def _order(self, epoch: int, position: SourcePosition) -> np.ndarray:
        begun_alone = position.begun_alone
        key = epoch, begun_alone
        if key not in self._orders:
            while len(self._orders) >= _ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
            if begun_alone is not None and begun_alone[0] == epoch:
                packing = self.pack_alone(epoch)
                self._orders[key] = packing.order[packing.bin_offsets[begun_alone[1]] :]
            else:
                # The corpus is part of the seed, so that other sources do not change its order.
                words = [self._seed, epoch, int(self.source.corpus.fingerprint[:16], 16)]
                generator = np.random.default_rng(words)
                self._orders[key] = generator.permutation(len(self.lengths))
        return self._orders[key]


@dataclass(frozen=True, kw_only=True)
class BlendWindow(Window):
    """Documents drawn from all sources."""

    number: int
    starts: tuple[SourcePosition, ...]
    ends: tuple[SourcePosition, ...]
    sequences: tuple[np.ndarray, ...]
    """Per source, the sequence of each of its documents, in the order in which they were drawn."""
    tokens_before: np.ndarray
    """[sequences, S] int64: tokens of each source in the sequences before."""
    documents_before: np.ndarray
    """[sequences, S] int64: the same in documents."""


class BlendStream(Stream[BlendWindow]):
    """The windows of a blend."""

    def __init__(
        self,
        identity: Mapping[str, int | str],
        source: str,
        orders: Sequence[SourceOrder],
        pack: Callable[[np.ndarray, np.random.Generator], Packing],
        budgets: Mapping[str, str],
    ) -> None:
        """Describe the stream of a blend.

        Args:
            identity: See ``Stream``; contains the seed and ``seq_length``.
            source: See ``Stream``.
            orders: The sources.
            pack: Packs documents, given in the order of drawing; the result has their places in it.
            budgets: With budget packing, the key of a position with the budgets of the blend.
        """
        super().__init__(identity, source)
        self._orders = list(orders)
        self._pack = pack
        self._budgets = dict(budgets)
        bin_tokens = int(identity["seq_length"]) * int(identity.get("micro_batch_size", 1))
        self._least_tokens = _BINS * bin_tokens

    def first(self) -> BlendWindow:
        """Return the window in which every source begins."""
        return self._window(0, [SourcePosition() for _ in self._orders])

    def after(self, window: BlendWindow) -> BlendWindow:
        """Return the window in which every source goes on."""
        return self._window(window.number + 1, window.ends)

    def position(self, window: BlendWindow, next_sequence: int) -> Position:
        """Return the start of the window per source, and which documents are yet to be read."""
        sources = [
            {
                **_as_json(order, start),
                "tokens": start.tokens + int(window.tokens_before[next_sequence, place]),
                "documents": start.documents + int(window.documents_before[next_sequence, place]),
                "drawn": len(window.sequences[place]),
                "unread": _encode(np.packbits(window.sequences[place] >= next_sequence)),
            }
            for place, (order, start) in enumerate(zip(self._orders, window.starts, strict=True))
        ]
        return {
            "window": window.number,
            "next_sequence": next_sequence,
            "sources": sources,
            **self._identity,
            **self._budgets,
        }

    def find(self, position: Mapping[str, Any]) -> tuple[BlendWindow, int, list[str]]:
        """Return the window of a position of this blend, of another one, or of a single corpus.

        In the second case, the next window begins there: sources that both blends have go on where
        they were, and the others begin. See ``Stream`` for the errors.
        """
        self._check_identity(position, self._identity)
        if "sources" not in position:
            return self._go_on_from_corpus(position)
        self._check_keys(
            position, {"window", "next_sequence", "sources", *self._identity, *self._budgets}
        )
        number = count_in(position, "window")
        count_in(position, "next_sequence")
        try:
            saved = {each["corpus"]: each for each in position["sources"]}
            starts = {corpus: _from_json(each, self._source) for corpus, each in saved.items()}
            shares = {corpus: Fraction(each["share"]) for corpus, each in saved.items()}
            return self._go_on(position, number, saved, starts, shares)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"data position has invalid sources: {error!r} ({self._source})"
            ) from error

    def _go_on(
        self,
        position: Mapping[str, Any],
        number: int,
        saved: Mapping[str, Mapping[str, Any]],
        starts: Mapping[str, SourcePosition],
        shares: Mapping[str, Fraction],
    ) -> tuple[BlendWindow, int, list[str]]:
        here = {order.source.corpus.fingerprint: order for order in self._orders}
        for corpus in saved.keys() & here.keys():
            self._check_identity(saved[corpus], here[corpus].traits)
        if shares == {corpus: order.source.share for corpus, order in here.items()}:
            self._check_identity(position, self._budgets)
            # The order of the sources decides between two that are level with their shares.
            self._orders = [here[corpus] for corpus in saved]
            window = self._window(number, list(starts.values()))
            return window, self._next_sequence(position, window.packing), []
        if not saved.keys() & here.keys():
            raise self._nothing_stays([str(each["name"]) for each in saved.values()])
        begins = [
            _carry(order, starts[corpus], saved[corpus]) if corpus in saved else SourcePosition()
            for corpus, order in here.items()
        ]
        changes = [
            _describe_change(order, shares.get(corpus)) for corpus, order in here.items()
        ] + [
            f"source {each['name']}: left out, after"
            f" {each['documents'] / each['of_documents']:.2f} epochs"
            for corpus, each in saved.items()
            if corpus not in here
        ]
        return self._window(number + 1, begins), 0, [line for line in changes if line]

    def _go_on_from_corpus(self, position: Mapping[str, Any]) -> tuple[BlendWindow, int, list[str]]:
        corpus = position.get("corpus")
        stays = [each for each in self._orders if each.source.corpus.fingerprint == corpus]
        if not stays:
            raise self._nothing_stays([f"of the corpus {str(corpus)[:12]}"])
        known = {*self._identity, *self._budgets, *stays[0].traits}
        self._check_identity(position, stays[0].traits)
        self._check_keys(position, {"epoch", "next_sequence", "corpus", *known})
        epoch = count_in(position, "epoch")
        count_in(position, "next_sequence")
        begins, changes = [], []
        for order in self._orders:
            if order is not stays[0]:
                begins.append(SourcePosition())
                changes.append(_describe_change(order, None))
                continue
            packing = order.pack_alone(epoch)
            next_sequence = self._next_sequence(position, packing)
            read = packing.order[: packing.bin_offsets[next_sequence]]
            begins.append(
                SourcePosition(
                    epoch=epoch,
                    begun_alone=(epoch, next_sequence),
                    tokens=epoch * int(order.lengths.sum()) + int(order.lengths[read].sum()),
                    documents=epoch * len(order.lengths) + len(read),
                )
            )
            changes.append(_describe_change(order, Fraction(1)))
        return self._window(0, begins), 0, changes

    def _nothing_stays(self, names: Sequence[str]) -> CheckpointError:
        now = ", ".join(order.source.name for order in self._orders)
        return CheckpointError(
            f"data position was saved with the sources {', '.join(names)}, but this run has {now}:"
            " at least one must stay; run.initialize_from starts a new run from weights"
        )

    def _window(self, number: int, starts: Sequence[SourcePosition]) -> BlendWindow:
        orders = self._orders
        pairs = list(zip(orders, starts, strict=True))
        drawn, lags = draw(
            [order.source.share for order in orders],
            [start.lag for start in starts],
            [order.upcoming_lengths(start) for order, start in pairs],
            # Not many epochs of a source at once, since they are shuffled together.
            WindowSize(
                documents=WINDOW_DOCUMENTS,
                of_sources=tuple(len(order.lengths) for order in orders),
                least_tokens=self._least_tokens,
                most_documents=_MOST_DOCUMENTS,
            ),
        )
        documents, lengths = np.empty_like(drawn), np.empty_like(drawn)
        ends = []
        for place, (order, start) in enumerate(pairs):
            mine = drawn == place
            taken, end = order.take(start, int(mine.sum()))
            documents[mine], lengths[mine] = taken + order.first, order.lengths[taken]
            ends.append(replace(end, lag=lags[place]))
        generator = np.random.default_rng([int(self._identity["seed"]), number])
        places = self._pack(documents, generator)
        sequence_of = np.empty_like(drawn)
        sequence_of[places.order] = np.repeat(np.arange(len(places)), np.diff(places.bin_offsets))
        cells = sequence_of * len(orders) + drawn
        return BlendWindow(
            packing=Packing(documents[places.order], places.bin_offsets),
            tokens=int(lengths.sum()),
            number=number,
            starts=tuple(starts),
            ends=tuple(ends),
            sequences=tuple(sequence_of[drawn == place] for place in range(len(orders))),
            tokens_before=_sums_before(cells, lengths, (len(places), len(orders))),
            documents_before=_sums_before(cells, np.ones_like(drawn), (len(places), len(orders))),
        )


def _sums_before(cells: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Sum values by cell of a table, and return the sums of all rows before each row."""
    sums = np.zeros(shape[0] * shape[1], dtype=np.int64)
    np.add.at(sums, cells, values)
    table = sums.reshape(shape)
    return table.cumsum(axis=0) - table


def _as_json(order: SourceOrder, start: SourcePosition) -> dict[str, Any]:
    return {
        "name": order.source.name,
        "corpus": order.source.corpus.fingerprint,
        "share": str(order.source.share),
        "of_documents": len(order.lengths),
        "epoch": start.epoch,
        "next_document": start.next_document,
        "begun_alone": start.begun_alone and list(start.begun_alone),
        "carried": _encode(start.carried.astype("<i8")),
        "lag": str(start.lag),
        "tokens_at_start": start.tokens,
        "documents_at_start": start.documents,
        **order.traits,
    }


def _from_json(saved: Mapping[str, Any], source: str) -> SourcePosition:
    for key in ("of_documents", "epoch", "next_document", "drawn", "tokens", "documents"):
        count_in(saved, key)
    carried = _decode(saved["carried"], "<i8").astype(np.int64)
    if len(carried) and not 0 <= carried.min() <= carried.max() < saved["of_documents"]:
        raise CheckpointError(f"data position carries documents that do not exist ({source})")
    alone = saved["begun_alone"]
    return SourcePosition(
        epoch=saved["epoch"],
        next_document=saved["next_document"],
        begun_alone=None if alone is None else (int(alone[0]), int(alone[1])),
        carried=carried,
        lag=Fraction(saved["lag"]),
        tokens=count_in(saved, "tokens_at_start"),
        documents=count_in(saved, "documents_at_start"),
    )


def _carry(order: SourceOrder, start: SourcePosition, saved: Mapping[str, Any]) -> SourcePosition:
    """Return the position of a source whose window was read in part, before what is unread."""
    drawn, end = order.take(start, saved["drawn"])
    bits = np.unpackbits(_decode(saved["unread"], "u1"), count=saved["drawn"]).astype(bool)
    return replace(
        end,
        carried=np.concatenate([drawn[bits], end.carried]),
        lag=Fraction(0),
        tokens=saved["tokens"],
        documents=saved["documents"],
    )


def _describe_change(order: SourceOrder, before: Fraction | None) -> str:
    name, share = order.source.name, order.source.share
    if before == share:
        return ""
    was = "new" if before is None else f"{float(before):.1%} before"
    return f"source {name}: {float(share):.1%} of the tokens, {was}"


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
