"""Token files in megatron-core's IndexedDataset format, with one document per sequence.

Megatron reads and writes the format. Problems that it does not detect, such as a truncated .bin,
are checked here first. Its arrays must not outlive its dataset, so lengths are copied and tokens
are memory-mapped by NumPy.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from mot_megatron.errors import DataError

LARGEST_UINT16_VOCABULARY = 65536
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_MAGIC = b"MMIDIDX\x00\x00"


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype in which a corpus with ``vocab_size`` ids is stored."""
    return np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.int32


def bin_path(prefix: Path) -> Path:
    """Return the path of the token file of ``prefix``."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of the index of ``prefix``, which has the document lengths."""
    return prefix.with_name(prefix.name + ".idx")


class TokenFileWriter:
    """A context manager that writes PREFIX.bin and PREFIX.idx; call ``finish`` at the end."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._dtype = token_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=self._dtype)

    def add(self, token_ids: np.ndarray) -> None:
        """Append one document of [n] integer ids, which the caller has checked.

        Raises:
            OSError: The file cannot be written.
        """
        # Megatron's annotation says tensor, but it accepts anything that NumPy can convert.
        self._builder.add_document(token_ids, [len(token_ids)])  # pyright: ignore[reportArgumentType]

    def finish(self) -> None:
        """Write the index and close both files.

        Raises:
            OSError: A file cannot be written.
        """
        self._builder.finalize(str(idx_path(self._prefix)))

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the token file, which is valid only after ``finish``."""
        try:
            self._builder.data_file.close()
        except OSError:
            # Closing retries the flush that failed on a full disk; add or finish has already raised
            # that error. The stream is closed nevertheless.
            assert self._builder.data_file.closed


def read_token_file(prefix: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Map PREFIX.bin and read PREFIX.idx.

    Args:
        prefix: Path of both files without their suffix.
        vocab_size: Vocabulary size, which determines the dtype of the file.

    Returns:
        The tokens of all documents concatenated, read-only [tokens] of ``token_dtype(vocab_size)``,
        and the start of each document and the end of the last one, [documents + 1] int64.

    Raises:
        DataError: A file is missing, truncated or of another format or dtype, or contains a
            document without tokens.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    dtype = token_dtype(vocab_size)
    _check_index(idx_path(prefix), dtype, vocab_size)
    lengths = _read_lengths(prefix)
    if len(lengths) == 0:
        raise DataError(f"{idx_path(prefix)}: holds no documents, expected at least one")
    if (empty := np.flatnonzero(lengths <= 0)).size:
        raise DataError(
            f"{idx_path(prefix)}: document {empty[0]} has {lengths[empty[0]]} tokens, "
            "expected at least one"
        )
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    expected_bytes = int(offsets[-1]) * np.dtype(dtype).itemsize
    found_bytes = bin_path(prefix).stat().st_size
    if found_bytes != expected_bytes:
        raise DataError(
            f"{bin_path(prefix)}: {found_bytes} bytes, expected {expected_bytes} "
            f"({offsets[-1]} tokens according to {idx_path(prefix).name}); truncated or replaced?"
        )
    # A plain array, which keeps the mapping alive, because slicing a memmap object is slower.
    return np.asarray(np.memmap(bin_path(prefix), dtype=dtype, mode="r")), offsets


def _check_index(path: Path, dtype: type, vocab_size: int) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{path}: not an index of a Megatron token file")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1:
        raise DataError(f"{path}: index version {version}, expected 1")
    if code != DType.code_from_dtype(dtype):
        known = {kind.value: kind.name for kind in DType}
        raise DataError(
            f"{path}: tokens are stored as {known.get(code, f'dtype code {code}')}, expected "
            f"{dtype.__name__} for a vocabulary of {vocab_size}"
        )
    expected = _HEADER.size + sequences * 12 + boundaries * 8  # int32 length, int64 pointer
    if size != expected:
        raise DataError(f"{path}: {size} bytes, expected {expected}; truncated or replaced?")
    if boundaries != sequences + 1:
        raise DataError(
            f"{path}: {sequences} sequences in {boundaries - 1} documents, expected one sequence "
            "per document"
        )


def _read_lengths(prefix: Path) -> np.ndarray:
    # mmap=False: Megatron cannot map an empty .bin, and the tokens are mapped here anyway.
    try:
        dataset = IndexedDataset(str(prefix), mmap=False)
    except AssertionError:
        raise DataError(
            f"{idx_path(prefix)}: its document boundaries disagree with its sequence count"
        ) from None
    lengths = np.array(dataset.sequence_lengths, dtype=np.int64)
    starts = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1] * np.dtype(dataset.index.dtype).itemsize, out=starts[1:])
    for found, expected, what in (
        (dataset.index.sequence_pointers, starts, "positions of documents"),
        (dataset.index.document_indices, np.arange(len(lengths) + 1), "document boundaries"),
    ):
        if not np.array_equal(found, expected):
            raise DataError(f"{idx_path(prefix)}: its {what} do not describe contiguous documents")
    return lengths
