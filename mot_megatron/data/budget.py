"""Budget packing: micro-batches that hold exactly as many tokens of every tower as each other.

A micro-batch has b sequences of s positions and budgets that add up to b * s. Documents are chosen
such that no tower exceeds its budget; the positions they leave are filled with tokens of the towers
that fall short. So every shape of a step is known beforehand and equal on all ranks. Letters: b
sequences of s positions, K towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mot_megatron.data import _native
from mot_megatron.data.corpus import CorpusDescription, TokenSplit
from mot_megatron.data.packing import Packing, check_lengths, shuffled
from mot_megatron.errors import DataError

_TOKENS_PER_CHUNK = 1 << 16
"""Of what is counted at once: small enough for a core's caches, 1.4 times as fast as 1 << 20."""
_MUCH_PADDING = 0.02
"""Fraction of positions."""


def count_tower_tokens(
    split: TokenSplit, tower_of_id: np.ndarray, num_towers: int, source: str
) -> np.ndarray:
    """Tokens per tower of each document, [documents, K] int32; reads all tokens once.

    Every rank does, at every start: counted were 200 million tokens a second on one core from
    memory, five seconds for 10^9; read from a disk they take as long as it takes to read them.

    Args:
        split: The documents.
        tower_of_id: [vocab_size] integers, tower index of every id.
        num_towers: K.
        source: What the error message names, for example the split's path.

    Raises:
        DataError: An id lies outside the vocabulary.
    """
    counts = np.empty((len(split), num_towers), dtype=np.int32)
    offsets, total = split.offsets, int(split.offsets[-1])
    first = 0
    with tqdm(
        total=total,
        desc=f"counting {split.name}",
        unit="token",
        unit_scale=True,
        delay=5,
        ncols=100,
        leave=False,
        disable=None,  # no bar where nobody watches
    ) as bar:
        while first < len(split):
            reached = np.searchsorted(offsets, offsets[first] + _TOKENS_PER_CHUNK, side="right") - 1
            end = max(first + 1, int(reached))
            tokens = split.tokens[offsets[first] : offsets[end]]
            if tokens.size and (tokens.min() < 0 or tokens.max() >= len(tower_of_id)):
                wrong = tokens[(tokens < 0) | (tokens >= len(tower_of_id))][0]
                raise DataError(f"{source}: token id {wrong}, expected 0..{len(tower_of_id) - 1}")
            documents = np.repeat(np.arange(end - first), np.diff(offsets[first : end + 1]))
            cells = documents * num_towers + tower_of_id[tokens]
            found = np.bincount(cells, minlength=(end - first) * num_towers)
            counts[first:end] = found.reshape(-1, num_towers)
            first = end
            bar.update(len(tokens))
    return counts


def tower_budgets(counts: np.ndarray, positions: int) -> tuple[int, ...]:
    """Share ``positions`` among the towers as the documents' tokens are shared.

    Rounded by largest remainders, so that the budgets add up; equal remainders favour lower towers.

    Args:
        counts: [documents, K] tokens per tower, at least one token in all.
        positions: b * s of a micro-batch.
    """
    tokens = [int(count) for count in counts.sum(axis=0, dtype=np.int64)]
    total = sum(tokens)
    budgets = [count * positions // total for count in tokens]
    remainders = [count * positions % total for count in tokens]
    by_remainder = sorted(range(len(tokens)), key=lambda tower: -remainders[tower])
    for tower in by_remainder[: positions - sum(budgets)]:
        budgets[tower] += 1
    return tuple(budgets)


def describe_budgets(budgets: Sequence[int], tower_names: Sequence[str], fill: float) -> str:
    """The budgets for people, and, where much of them is padding, a second line with what helps.

    Args:
        budgets: Tokens per tower of a micro-batch, K of them.
        tower_names: K.
        fill: Fraction of the positions that documents occupy.
    """
    parts = zip(tower_names, budgets, strict=True)
    towers = ", ".join(f"{name} {budget:,}" for name, budget in parts)
    padding = 1 - fill
    lines = [f"tokens of every micro-batch: {towers}; {padding:.1%} of them padding"]
    if padding > _MUCH_PADDING:
        lines.append(
            f"warning: more than {_MUCH_PADDING:.0%} padding; with these documents a larger"
            " data.seq_length or training.micro_batch_size may leave less"
        )
    return "\n".join(lines)


def check_budgets(counts: np.ndarray, budgets: Sequence[int], source: str) -> None:
    """Check that every document fits into a micro-batch.

    Raises:
        DataError: A document has more tokens of a tower than the budget.
    """
    wrong = np.argwhere(counts > np.asarray(budgets))
    if wrong.size:
        document, tower = wrong[0]
        raise DataError(
            f"{source}: document {document} has {counts[document, tower]} tokens of tower {tower}, "
            f"but the budget of a micro-batch is {budgets[tower]}; raise micro_batch_size or "
            'seq_length, or use packing = "sequence"'
        )


def pack_budget(
    counts: np.ndarray,
    budgets: Sequence[int],
    *,
    sequences: int,
    capacity: int,
    source: str = "documents",
) -> Packing:
    """Distribute documents over as few micro-batches as possible, keeping their order where it can.

    Args:
        counts: [documents, K] int32, tokens per tower of each document.
        budgets: K, adding up to ``sequences * capacity``.
        sequences: b, sequences per micro-batch.
        capacity: s, tokens that a sequence holds.
        source: What error messages name.

    Returns:
        Sequences, micro-batch after micro-batch, b each; some may be empty.

    Raises:
        DataError: As ``check_lengths`` and ``check_budgets``.
    """
    check_lengths(counts.sum(axis=1, dtype=np.int64), capacity, source)
    check_budgets(counts, budgets, source)
    return Packing(*_native.pack_budget(counts, list(budgets), sequences, capacity))


def pack_budget_epoch(
    counts: np.ndarray,
    budgets: Sequence[int],
    *,
    sequences: int,
    capacity: int,
    seed: int,
    epoch: int,
    source: str = "documents",
) -> Packing:
    """Pack all documents in an order drawn from (seed, epoch), and draw that of the micro-batches.

    Args:
        counts: As in ``pack_budget``; so are budgets, sequences, capacity, source and the result.
        budgets: See ``counts``.
        sequences: See ``counts``.
        capacity: See ``counts``.
        seed: Not negative.
        epoch: Not negative; epochs of one seed are independent draws.
        source: See ``counts``.

    Raises:
        DataError: As ``pack_budget``, naming documents by their numbers in ``counts``.
    """
    check_lengths(counts.sum(axis=1, dtype=np.int64), capacity, source)
    check_budgets(counts, budgets, source)
    generator = np.random.default_rng([seed, epoch])
    documents = generator.permutation(len(counts))
    packing = pack_budget(counts[documents], budgets, sequences=sequences, capacity=capacity)
    return shuffled(packing, documents, generator, sequences_per_bin=sequences)


def filler_ids(
    description: CorpusDescription, towers_of_modalities: Sequence[int], num_towers: int
) -> np.ndarray:
    """An id of every tower for the positions that no document fills, [K] int64.

    The padding token in its own tower, else the first id of the tower's first modality. A tower
    without modalities has budget 0, so that its id (the padding token) is never used.
    """
    ids = np.full(num_towers, description.pad_token, dtype=np.int64)
    padding_tower = towers_of_modalities[description.modality_of_id[description.pad_token]]
    for tower in set(towers_of_modalities) - {padding_tower}:
        ids[tower] = description.modalities[towers_of_modalities.index(tower)].first_id
    return ids


@dataclass(frozen=True)
class BudgetPlan:
    """A split's documents, counted, and what its micro-batches hold."""

    counts: np.ndarray
    """[documents, K] int32 tokens per tower."""
    budgets: tuple[int, ...]
    """Tokens per tower of every micro-batch of b sequences, K of them."""
    fillers: np.ndarray
    """[K] int64: the id that fills a tower's budget up."""
    micro_batch_size: int
    """b."""

    @classmethod
    def build(
        cls,
        split: TokenSplit,
        description: CorpusDescription,
        towers_of_modalities: Sequence[int],
        *,
        num_towers: int,
        micro_batch_size: int,
        seq_length: int,
        source: str,
    ) -> BudgetPlan:
        """Count the split's tokens and share a micro-batch's positions in proportion.

        Raises:
            DataError: An id outside the vocabulary, or a document that exceeds a budget.
        """
        tower_of_id = np.asarray(towers_of_modalities)[description.modality_of_id]
        counts = count_tower_tokens(split, tower_of_id, num_towers, source)
        budgets = tower_budgets(counts, micro_batch_size * seq_length)
        check_budgets(counts, budgets, source)
        fillers = filler_ids(description, towers_of_modalities, num_towers)
        return cls(counts, budgets, fillers, micro_batch_size)

    def fill(self, token_ids: np.ndarray, filled: np.ndarray, sequences: list[np.ndarray]) -> None:
        """Write fillers behind the documents, so that each micro-batch meets its budgets.

        Args:
            token_ids: [n * b, s], the sequences of whole micro-batches; changed in place.
            filled: [n * b] leading positions of each sequence that documents occupy.
            sequences: Document numbers of each sequence, n * b arrays.
        """
        for first in range(0, len(sequences), self.micro_batch_size):
            rows = range(first, first + self.micro_batch_size)
            documents = np.concatenate([sequences[row] for row in rows])
            missing = np.asarray(self.budgets) - self.counts[documents].sum(axis=0)
            fillers = np.repeat(self.fillers, missing)
            begin = 0
            for row in rows:
                tail = token_ids[row, filled[row] :]
                tail[:] = fillers[begin : begin + len(tail)]
                begin += len(tail)
