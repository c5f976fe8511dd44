"""The global stream of packed sequences, which is made window by window.

A window is packed and shuffled at once, and is a pure function of where it starts. A position is
the start of a window and a number of sequences in it. The windows of a corpus are its epochs;
blend_stream.py has those of a blend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mot_megatron.data.packing import Packing
from mot_megatron.errors import CheckpointError

Position = dict[str, Any]
"""A position in a stream and what the stream depends on, as JSON values. It is equal on all
ranks."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of the stream."""

    packing: Packing
    """Its sequences, with document numbers of the whole training data."""
    tokens: int
    """Tokens of its documents."""


W = TypeVar("W", bound=Window)


class Stream(ABC, Generic[W]):
    """A stream of sequences."""

    def __init__(self, identity: Mapping[str, int | str], source: str) -> None:
        """Describe a stream.

        Args:
            identity: What the stream depends on, apart from the corpora.
            source: Name for error messages.
        """
        self._identity = dict(identity)
        self._source = source

    @abstractmethod
    def first(self) -> W:
        """Return the window at the start."""

    @abstractmethod
    def after(self, window: W) -> W:
        """Return the window after another one."""

    @abstractmethod
    def position(self, window: W, next_sequence: int) -> Position:
        """Return the position before a sequence of a window."""

    @abstractmethod
    def find(self, position: Mapping[str, Any]) -> tuple[W, int, list[str]]:
        """Return the window of a position, the next sequence in it, and what has changed since.

        Raises:
            CheckpointError: The position belongs to another stream, or its keys or values are
                invalid.
        """

    def _check_identity(self, position: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        for key, value in identity.items():
            # Compare values first, since another packing mode has other keys.
            if position.get(key, value) != value:
                raise CheckpointError(
                    f"data position was saved with {key} = {position[key]!r}, but this run has "
                    f"{value!r} ({self._source})"
                )

    def _check_keys(self, position: Mapping[str, Any], keys: set[str]) -> None:
        if set(position) != keys:
            raise CheckpointError(
                f"data position has keys {sorted(position)}, expected {sorted(keys)}"
            )

    def _next_sequence(self, position: Mapping[str, Any], packing: Packing) -> int:
        """Return the next sequence of a position inside of a window with this packing."""
        next_sequence = count_in(position, "next_sequence")
        if next_sequence >= len(packing):
            raise CheckpointError(
                f"data position has next_sequence = {next_sequence}, expected "
                f"0..{len(packing) - 1} ({self._source})"
            )
        multiple = self._identity.get("micro_batch_size", 1)
        if next_sequence % int(multiple):
            raise CheckpointError(
                f"data position has next_sequence = {next_sequence}, expected a multiple of "
                f"micro_batch_size = {multiple} ({self._source})"
            )
        return next_sequence


def count_in(position: Mapping[str, Any], key: str) -> int:
    """Return a number of a position that is 0 or more.

    Raises:
        CheckpointError: It is another kind of value.
    """
    value = position[key]
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"data position has {key} = {value!r}, expected a count")
    return value


@dataclass(frozen=True, kw_only=True)
class EpochWindow(Window):
    """All documents of a corpus, once."""

    epoch: int


class EpochStream(Stream[EpochWindow]):
    """The epochs of a corpus."""

    def __init__(
        self,
        identity: Mapping[str, int | str],
        source: str,
        fingerprint: str,
        pack: Callable[[int], Packing],
        tokens: int,
    ) -> None:
        """Describe the stream of a corpus.

        Args:
            identity: See ``Stream``.
            source: See ``Stream``.
            fingerprint: That of the corpus.
            pack: Packs the epoch of a number.
            tokens: Tokens of an epoch.
        """
        super().__init__({**identity, "corpus": fingerprint}, source)
        self._pack = pack
        self._tokens = tokens

    def first(self) -> EpochWindow:
        """Return epoch 0."""
        return self._window(0)

    def after(self, window: EpochWindow) -> EpochWindow:
        """Return the next epoch."""
        return self._window(window.epoch + 1)

    def position(self, window: EpochWindow, next_sequence: int) -> Position:
        """Return the epoch and the next sequence."""
        return {"epoch": window.epoch, "next_sequence": next_sequence, **self._identity}

    def find(self, position: Mapping[str, Any]) -> tuple[EpochWindow, int, list[str]]:
        """Return the epoch of a position; see ``Stream``."""
        self._check_identity(position, self._identity)
        self._check_keys(position, {"epoch", "next_sequence", *self._identity})
        epoch = count_in(position, "epoch")
        count_in(position, "next_sequence")
        window = self._window(epoch)
        return window, self._next_sequence(position, window.packing), []

    def _window(self, epoch: int) -> EpochWindow:
        return EpochWindow(packing=self._pack(epoch), tokens=self._tokens, epoch=epoch)
