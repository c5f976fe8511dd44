"""Documents that are longer than a sequence: refused, split into pieces, or truncated.

A document is a list of segments: runs of text, and items of other modalities with the tokens before
and after them. A piece holds as many whole segments as fit. A segment that is longer than a
sequence continues the piece before it and is cut wherever a piece is full; items with a fixed
number of tokens, such as pictures, are never cut. Each piece is a document of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mot_megatron.data.codec_names import NO_CODEC
from mot_megatron.data.corpus import CorpusDescription, LongDocuments, Modality, TokenSplit
from mot_megatron.data.packing import check_lengths
from mot_megatron.data.structure import BEGIN_DOCUMENT, END_DOCUMENT, PADDING
from mot_megatron.errors import DataError

ItemTokens = Callable[[Modality], int | None]


@dataclass(frozen=True)
class Pieces:
    """The documents of a split as training reads them, all of which fit into a sequence."""

    split: TokenSplit
    """The split, cut into pieces: indexing returns the ids of a piece."""
    kept: np.ndarray | None
    """[pieces] int64, those that are read; None: all."""
    starts: np.ndarray
    """[documents] int64: where the documents of the corpus begin."""
    num_long: int = 0
    """Number of documents that are longer than a sequence."""
    num_made: int = 0
    """Number of pieces that are read of them."""
    dropped_tokens: int = 0
    """Number of their tokens that are not read."""

    def __len__(self) -> int:
        return len(self.split) if self.kept is None else len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each piece that is read, [pieces] int64."""
        return self.split.lengths if self.kept is None else self.split.lengths[self.kept]

    def __getitem__(self, number: int) -> np.ndarray:
        return self.split[self._place(number)]

    def context_of(self, number: int) -> np.ndarray:
        """Return which tokens of a piece are context only, [length] bool."""
        return self.split.context_of(self._place(number))

    def document_of(self, number: int) -> int:
        """Return the number of the document in the corpus to which a piece belongs."""
        start = self.split.offsets[self._place(number)]
        return int(np.searchsorted(self.starts, start, side="right")) - 1

    def of_kept(self, counts: np.ndarray) -> np.ndarray:
        """Return the rows of the pieces that are read, given a row per piece."""
        return counts if self.kept is None else counts[self.kept]

    def _place(self, number: int) -> int:
        return number if self.kept is None else int(self.kept[number])


def pieces_of(
    split: TokenSplit,
    description: CorpusDescription,
    seq_length: int,
    long_documents: LongDocuments,
    source: str,
    tokens_per_item: ItemTokens,
) -> Pieces:
    """Return the documents of a split as training reads them.

    This reads the tokens of documents that are longer than a sequence.

    Args:
        split: The documents.
        description: Of their corpus.
        seq_length: Tokens of the longest piece.
        long_documents: What to do with longer documents.
        source: Name for error messages, for example the path of the split.
        tokens_per_item: Returns the fixed number of tokens of an item of a modality that has a
            codec, or None if it varies; called only if there are documents to cut.

    Raises:
        DataError: A document is longer than ``seq_length`` and may not be cut, or has an item that
            is and may not, or there are no documents.
    """
    starts = split.offsets[:-1]
    long = np.flatnonzero(split.lengths > seq_length)
    if long_documents == "refuse" or not len(long):
        check_lengths(split.lengths, seq_length, source)
        return Pieces(split, None, starts)
    finder = _SegmentFinder(description, tokens_per_item)
    inner = [
        starts[number] + _cuts(finder, split[number], seq_length, f"{source}: document {number}")
        for number in long.tolist()
    ]
    offsets = np.sort(np.concatenate([split.offsets, *inner]))
    pieces = replace(split, offsets=offsets)
    num_made = len(offsets) - len(split.offsets) + len(long)
    check_lengths(pieces.lengths, seq_length, source)
    if long_documents == "split":
        return Pieces(pieces, None, starts, len(long), num_made)
    kept = np.searchsorted(offsets, starts)
    dropped = int(split.lengths.sum() - pieces.lengths[kept].sum())
    return Pieces(pieces, kept, starts, len(long), len(long), dropped)


def describe_pieces(pieces: Sequence[Pieces], sources: Sequence[str]) -> list[str]:
    """Return a line per source with long documents, about what became of them."""
    lines = []
    for each, source in zip(pieces, sources, strict=True):
        if not each.num_long:
            continue
        documents = f"{source}: {each.num_long:,} documents longer than data.seq_length"
        if each.kept is None:
            lines.append(f"{documents}, split into {each.num_made:,} pieces")
            continue
        dropped = each.dropped_tokens
        share = dropped / len(each.split.tokens)
        lines.append(f"{documents}, truncated: {dropped:,} tokens ({share:.1%}) are not read")
    return lines


def _is_fixed(modality: Modality, item_tokens: int | None) -> bool:
    """Return whether a segment of the modality is an item that would be useless in parts.

    That holds if its codec has a fixed number of tokens per item, and is assumed of a modality
    without a codec that has tokens before and after its segments.
    """
    if modality.codec == NO_CODEC:
        return modality.begin_token is not None or modality.end_token is not None
    return item_tokens is not None


class _SegmentFinder:
    """Finds where the segments of documents begin, and which of them may be cut."""

    def __init__(self, description: CorpusDescription, tokens_per_item: ItemTokens) -> None:
        modalities = description.modalities
        self._modality_of_id = description.modality_of_id
        self._begins = np.zeros(description.vocab_size, dtype=bool)
        self._ends = np.zeros(description.vocab_size, dtype=bool)
        brackets = set()
        for modality in modalities:
            for token, table in (
                (modality.begin_token, self._begins),
                (modality.end_token, self._ends),
            ):
                if token is not None:
                    table[token] = True
                    brackets.add(token)
        # Other special tokens, such as those of languages, begin a segment of text.
        inside = {description.pad_token, *brackets} | {
            description.special_tokens[name]
            for name in (PADDING, BEGIN_DOCUMENT, END_DOCUMENT)
            if name in description.special_tokens
        }
        for token in set(description.special_tokens.values()) - inside:
            self._begins[token] = True
        items = [None if each.codec == NO_CODEC else tokens_per_item(each) for each in modalities]
        pairs = list(zip(modalities, items, strict=True))
        self._fixed = np.array([_is_fixed(modality, tokens) for modality, tokens in pairs])
        # After how many tokens an item ends that nothing else delimits; 0 if that varies.
        self._item_tokens = np.array(
            [0 if each.begin_token is not None else tokens or 0 for each, tokens in pairs]
        )

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the starts of a document's segments, [n], and which of them may be cut, [n].

        A segment ends after an end token and before a begin token, where the modality changes
        without such a token, and after every item of a modality that has neither.
        """
        modalities = self._modality_of_id[ids]
        begins, ends = self._begins[ids], self._ends[ids]
        # Between a token and the next: a bracket joins what it encloses.
        changes = modalities[1:] != modalities[:-1]
        joined = begins[:-1] | ends[1:]
        cut = begins[1:] | ends[:-1] | (changes & ~joined)
        if self._item_tokens.any():
            runs = np.concatenate(([0], np.flatnonzero(changes) + 1))
            in_run = np.arange(len(ids)) - np.repeat(runs, np.diff(np.append(runs, len(ids))))
            items = self._item_tokens[modalities][1:]
            cut |= (items > 0) & (in_run[1:] % np.maximum(items, 1) == 0) & (in_run[1:] > 0)
        starts = np.concatenate(([0], np.flatnonzero(cut) + 1))
        fixed = np.logical_or.reduceat(self._fixed[modalities], starts)
        return starts, ~fixed


def _cuts(finder: _SegmentFinder, ids: np.ndarray, seq_length: int, source: str) -> np.ndarray:
    """Return where the pieces of a document begin, apart from the first, [pieces - 1]."""
    starts, may_cut = finder.find(ids)
    ends = np.append(starts[1:], len(ids))
    too_long = np.flatnonzero((ends - starts > seq_length) & ~may_cut)
    if len(too_long):
        length = ends[too_long[0]] - starts[too_long[0]]
        raise DataError(
            f"{source} has an item of {length} tokens, which cannot be split; expected at most"
            f" {seq_length} (data.seq_length)"
        )
    cuts: list[int] = []
    begin = 0
    while len(ids) - begin > seq_length:
        # The last segment that begins inside of the piece decides where it ends.
        limit = begin + seq_length
        at = int(np.searchsorted(starts, limit, side="right")) - 1
        splits = ends[at] > limit and may_cut[at] and ends[at] - starts[at] > seq_length
        begin = limit if splits else int(starts[at])
        cuts.append(begin)
    return np.array(cuts, dtype=np.int64)
