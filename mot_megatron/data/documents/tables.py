"""Tables, as Parquet files and as the Arrow files in folders of Hugging Face datasets.

A row is a document: a column ``segments``, or columns ``text``, ``image`` and ``audio``. Pictures
and sounds are paths, bytes, or Hugging Face's pairs of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mot_megatron.data.builders.packages import optional_package
from mot_megatron.data.documents.raw import FindMedia, RawDocument, parse_document
from mot_megatron.errors import DataError

_ROWS_PER_BATCH = 64
"""Rows in memory at a time, since they may contain pictures."""


@contextmanager
def _readable(path: Path, format_name: str) -> Iterator[Any]:
    """Yield pyarrow; its errors while reading ``path`` become one line."""
    arrow = optional_package("pyarrow", "pyarrow")
    try:
        yield arrow
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable {format_name} file: {reason}") from None


def row_groups(path: Path) -> list[int]:
    """Return the number of the first row of each row group of a Parquet file, counted from 1.

    Raises:
        DataError: The file cannot be read, or pyarrow is not installed.
    """
    with _readable(path, "Parquet"):
        parquet = optional_package("pyarrow.parquet", "pyarrow")
        with parquet.ParquetFile(path) as table:
            groups = table.metadata.num_row_groups
            sizes = [table.metadata.row_group(group).num_rows for group in range(groups)]
    return [1 + sum(sizes[:group]) for group in range(groups)]


def parquet_rows(path: Path, group: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group."""
    with _readable(path, "Parquet"):
        parquet = optional_package("pyarrow.parquet", "pyarrow")
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(_ROWS_PER_BATCH, row_groups=[group], use_threads=False):
                yield from batch.to_pylist()


def arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file, of the stream format or the random-access format."""
    with _readable(path, "Arrow") as arrow, arrow.memory_map(str(path)) as source:
        ipc = optional_package("pyarrow.ipc", "pyarrow")
        try:
            batches = iter(ipc.open_stream(source))
        except arrow.ArrowInvalid:
            table = ipc.open_file(source)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                yield from batch.slice(start, _ROWS_PER_BATCH).to_pylist()


def read_rows(
    path: Path,
    rows: Iterator[dict[str, Any]],
    first: int,
    find: FindMedia,
    split_key: str | None,
) -> Iterator[RawDocument]:
    """Yield the document of each row; ``first`` is the number of the first one in the file."""
    for number, row in enumerate(rows, start=first):
        yield parse_document(row, f"{path}:{number}", find, split_key)
