"""Write a corpus directory document by document, checking each one.

Files are written to a temporary directory next to the target, which is renamed at the end, so a
corpus is complete or absent. Equal documents give equal bytes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from mot_megatron.data.context import DTYPE, ContextCounts, context_path
from mot_megatron.data.corpus import (
    DESCRIPTION_FILE,
    HELD_OUT_SPLIT,
    TRAIN_SPLIT,
    Corpus,
    CorpusDescription,
    FileDigests,
    Modality,
    SplitCounts,
    describe,
    parse_description,
)
from mot_megatron.data.indexed import (
    TokenFileWriter,
    bin_path,
    idx_path,
    read_token_file,
)
from mot_megatron.data.intervals import intervals_of
from mot_megatron.data.latents import (
    LatentDigests,
    LatentFileWriter,
    checked_vectors,
    offsets_path,
    rows_path,
)
from mot_megatron.data.statistics import STATISTICS_FILE, render_statistics
from mot_megatron.errors import DataError
from mot_megatron.job.processes import Process

_TOKENS_PER_CHUNK = 1 << 22
_SUFFIXES = {".bin", ".idx", ".context", ".rows", ".offsets"}
"""Endings of the files of splits."""
_OWNER = re.compile(r"(?P<pid>\d+)\.(?P<started>\d+)@(?P<host>.+)-[^-]+")
"""End of the name of an unfinished corpus: the process that writes it, and random letters."""


@dataclass
class _OpenSplit:
    tokens: TokenFileWriter
    tokens_per_modality: np.ndarray
    context_per_modality: np.ndarray
    latents: dict[str, LatentFileWriter]
    documents: int = 0
    longest_document: int = 0
    intervals: int = 0
    context: BinaryIO | None = None
    """File of the intervals of context-only tokens, once there is one."""


@dataclass(kw_only=True)
class CorpusWriter:
    """A context manager that writes one corpus; the directory appears only after success.

    Example::

        text = Modality(name="text", first_id=0, size=256)
        image = Modality(name="image", first_id=256, size=1024)
        with CorpusWriter(directory=Path("corpora/mine"), name="mine", builder="mine 1", seed=0,
                          modalities=[text, image], pad_token=0) as writer:
            writer.add("train", [("text", [1, 2, 3]), ("image", [256, 700])])
            writer.add("validation", [("text", [4, 5])])
    """

    directory: Path
    """Target folder, which must be absent or empty."""
    name: str
    builder: str
    """Name and version of the program that writes the corpus."""
    seed: int
    modalities: Sequence[Modality]
    """Modalities in the order of their indices; their ranges are contiguous and start at id 0."""
    pad_token: int
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._description: CorpusDescription = self._describe({})
        self._by_name = {modality.name: modality for modality in self._description.modalities}
        self._splits: dict[str, _OpenSplit] = {}
        self._linked: dict[str, SplitCounts] = {}
        self._stack = ExitStack()
        self._temporary: Path | None = None

    def __enter__(self) -> CorpusWriter:
        directory = self.directory
        with self._errors():
            check_target(directory)
            directory.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(directory)
            owner = Process.of(os.getpid())
            prefix = f".{directory.name}.partial-{owner.pid}.{owner.started}@{owner.host}-"
            self._temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._stack.close()
            shutil.rmtree(self._root, ignore_errors=True)

    def add(
        self,
        split: str,
        segments: Sequence[tuple[str, Sequence[int] | np.ndarray]],
        context: Collection[int] = (),
    ) -> None:
        """Append a document given as segments.

        Args:
            split: "train", "validation", or another name.
            segments: Modality name and content of each segment, in order: ids of the whole
                vocabulary in the range of the modality, or if it is continuous vectors [n, width],
                which are stored in float16. Two segments of a continuous modality need a token
                between them.
            context: Places of the segments that are context only: nothing is trained to predict
                their tokens.

        Raises:
            DataError: The document is empty, a modality is unknown, an id is outside its range, a
                vector is invalid, ``context`` names no segment, or the disk is full; the message
                names the document.
        """
        where = self._where(split)
        if wrong_places := [place for place in context if not 0 <= place < len(segments)]:
            raise DataError(
                f"{where}: context has segment {wrong_places[0]}, expected 0..{len(segments) - 1}"
            )
        parts: list[np.ndarray] = []
        latents: dict[str, list[np.ndarray]] = {name: [] for name in self._description.continuous}
        before = None
        for name, content in segments:
            if name not in self._by_name:
                raise DataError(f"{where}: modality {name!r}, expected {list(self._by_name)}")
            modality = self._by_name[name]
            if modality.width is not None:
                if name == before:
                    raise DataError(
                        f"{where}: two segments of modality {name} without a token between them"
                    )
                vectors = checked_vectors(content, modality.width, where)
                latents[name].append(vectors)
                part = np.full(len(vectors), modality.first_id)
            else:
                part = _integers(content, where)
            before = name if len(part) else before
            wrong = np.flatnonzero((part < modality.first_id) | (part >= modality.end_id))
            if wrong.size:
                raise DataError(
                    f"{where}: token id {part[wrong[0]]} in a segment of modality {name}, expected "
                    f"{modality.first_id}..{modality.end_id - 1}"
                )
            parts.append(part)
        masks = [np.full(len(part), place in context) for place, part in enumerate(parts)]
        self._append(
            split,
            np.concatenate([np.empty(0, np.int64), *parts]),
            np.concatenate([np.empty(0, bool), *masks]),
            latents,
        )

    def add_document(
        self, split: str, token_ids: np.ndarray, context: np.ndarray | None = None
    ) -> None:
        """Append a document given as [n] integer ids.

        Args:
            split: "train", "validation", or another name.
            token_ids: The ids.
            context: [n] bool, which tokens are context only; None: none.

        Raises:
            DataError: The document is empty, an id is outside the vocabulary or the placeholder of
                a continuous modality, ``context`` is not of its length, or the disk is full; the
                message names the document.
        """
        where = self._where(split)
        ids = _integers(token_ids, where)
        for name in self._description.continuous:
            if (ids == self._by_name[name].first_id).any():
                raise DataError(
                    f"{where}: token id {self._by_name[name].first_id} is the placeholder of "
                    f"modality {name}, whose vectors are missing"
                )
        wrong = np.flatnonzero((ids < 0) | (ids >= self._description.vocab_size))
        if wrong.size:
            raise DataError(
                f"{where}: token id {ids[wrong[0]]}, expected 0..{self._description.vocab_size - 1}"
            )
        if context is None:
            context = np.zeros(len(ids), bool)
        if context.shape != ids.shape or context.dtype != bool:
            raise DataError(
                f"{where}: context of dtype {context.dtype} and shape {context.shape}, expected "
                f"bool and {ids.shape}"
            )
        self._append(split, ids, context, {name: [] for name in self._description.continuous})

    def link(self, split: str, prefix: Path) -> None:
        """Use existing token files as a split, by symbolic links to them.

        Args:
            split: Name of the split, to which no documents are added.
            prefix: Path of both files without their suffix.

        Raises:
            DataError: The files are not those of one sequence per document in the dtype of the
                vocabulary, an id is outside of it, or a modality is continuous.
        """
        vocab_size = self._description.vocab_size
        if self._description.continuous:
            raise DataError(
                f"{self.directory}: token files have no vectors for modality "
                f"{next(iter(self._description.continuous))}"
            )
        tokens, offsets = read_token_file(prefix, vocab_size)
        occurrences = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _TOKENS_PER_CHUNK):
            chunk = tokens[start : start + _TOKENS_PER_CHUNK]
            if chunk.min() < 0 or chunk.max() >= vocab_size:
                wrong = chunk[(chunk < 0) | (chunk >= vocab_size)][0]
                raise DataError(
                    f"{bin_path(prefix)}: token id {wrong}, expected 0..{vocab_size - 1}"
                )
            occurrences += np.bincount(chunk, minlength=vocab_size)
        self._linked[split] = SplitCounts(
            documents=len(offsets) - 1,
            tokens=len(tokens),
            tokens_per_modality={
                modality.name: int(occurrences[modality.first_id : modality.end_id].sum())
                for modality in self.modalities
            },
            longest_document=int(np.diff(offsets).max()),
            sha256=FileDigests(bin=_sha256(bin_path(prefix)), idx=_sha256(idx_path(prefix))),
        )
        with self._errors():
            for path in (bin_path, idx_path):
                path(self._root / split).symlink_to(path(prefix).resolve())

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Add a file, for example a codebook, to the corpus directory.

        Args:
            name: Name of the file in the corpus.
            content: Content, or a file with it.

        Raises:
            DataError: The name is taken or not a plain file name, or the disk is full.
        """
        path = self._root / name
        reserved = (DESCRIPTION_FILE, STATISTICS_FILE)
        if Path(name).name != name or name in reserved or path.suffix in _SUFFIXES:
            raise DataError(f"{self.directory}: cannot add a file named {name!r}")
        if path.exists():
            raise DataError(f"{self.directory}: file {name!r} was added twice")
        with self._errors():
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)

    @property
    def _root(self) -> Path:
        assert self._temporary is not None, "CorpusWriter is used outside its with block"
        return self._temporary

    def _where(self, split: str) -> str:
        number = self._splits[split].documents if split in self._splits else 0
        return f"{self.directory}: document {number} of split {split}"

    def _append(
        self,
        split: str,
        ids: np.ndarray,
        context: np.ndarray,
        latents: Mapping[str, Sequence[np.ndarray]],
    ) -> None:
        if ids.size == 0:
            raise DataError(f"{self._where(split)}: empty, expected at least one token")
        with self._errors():
            if split not in self._splits:
                self._splits[split] = self._open(split)
            state = self._splits[split]
            state.tokens.add(ids)
            self._add_context(split, state, ids, context)
            for name, parts in latents.items():
                state.latents[name].add(parts)
        state.documents += 1
        state.longest_document = max(state.longest_document, ids.size)
        state.tokens_per_modality += np.bincount(
            self._description.modality_of_id[ids], minlength=len(self.modalities)
        )

    def _add_context(
        self, split: str, state: _OpenSplit, ids: np.ndarray, context: np.ndarray
    ) -> None:
        """Append the intervals of a document that is not counted yet."""
        intervals = intervals_of(context, start=int(state.tokens_per_modality.sum()))
        if not len(intervals):
            return
        if state.context is None:
            state.context = context_path(self._root / split).open("wb")
            self._stack.callback(_close_after_error, state.context)
        state.context.write(intervals.astype(DTYPE).tobytes())
        state.intervals += len(intervals)
        state.context_per_modality += np.bincount(
            self._description.modality_of_id[ids[context]], minlength=len(self.modalities)
        )

    def _open(self, split: str) -> _OpenSplit:
        if not split.isidentifier():
            raise DataError(f"{self.directory}: split {split!r}, expected letters, digits and _")
        tokens = TokenFileWriter(self._root / split, self._description.vocab_size)
        self._stack.enter_context(tokens)
        nothing = np.zeros(len(self.modalities), dtype=np.int64)
        latents = {}
        for name in self._description.continuous:
            latents[name] = LatentFileWriter(self._root / split, name)
            self._stack.callback(latents[name].close)
        return _OpenSplit(tokens, nothing, nothing.copy(), latents)

    def _finish(self) -> None:
        if not self._splits and not self._linked:
            raise DataError(f"{self.directory}: no documents were added, expected at least one")
        for modality in self.modalities:
            if modality.codebook and not (self._root / modality.codebook).is_file():
                raise DataError(
                    f"{self.directory}: codebook {modality.codebook!r} of modality {modality.name} "
                    "was not added"
                )
        with self._errors():
            counts = {name: self._close(name, split) for name, split in self._splits.items()}
            counts |= self._linked
            text = render_description(self._describe(counts))
            parse_description(text, DESCRIPTION_FILE)
            (self._root / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
            if {TRAIN_SPLIT, HELD_OUT_SPLIT} <= counts.keys():
                statistics = render_statistics(Corpus.open_unchecked(self._root))
                (self._root / STATISTICS_FILE).write_text(statistics, encoding="utf-8")
            for path in self._root.iterdir():
                _flush_to_disk(path)
            self._root.chmod(0o755)  # mkdtemp makes directories for the owner only
            self._root.rename(self.directory)

    def _close(self, name: str, split: _OpenSplit) -> SplitCounts:
        split.tokens.finish()
        for latents in split.latents.values():
            latents.finish()
        names = [modality.name for modality in self.modalities]
        prefix = self._root / name
        return SplitCounts(
            documents=split.documents,
            tokens=int(split.tokens_per_modality.sum()),
            tokens_per_modality=dict(zip(names, split.tokens_per_modality.tolist(), strict=True)),
            longest_document=split.longest_document,
            sha256=FileDigests(bin=_sha256(bin_path(prefix)), idx=_sha256(idx_path(prefix))),
            context=self._close_context(prefix, split),
            latents={
                modality: LatentDigests(
                    rows=_sha256(rows_path(prefix, modality)),
                    offsets=_sha256(offsets_path(prefix, modality)),
                )
                for modality in split.latents
            },
        )

    def _close_context(self, prefix: Path, split: _OpenSplit) -> ContextCounts | None:
        if split.context is None:
            return None
        split.context.close()
        names = [modality.name for modality in self.modalities]
        return ContextCounts(
            intervals=split.intervals,
            tokens_per_modality=dict(zip(names, split.context_per_modality.tolist(), strict=True)),
            sha256=_sha256(context_path(prefix)),
        )

    def _describe(self, splits: dict[str, SplitCounts]) -> CorpusDescription:
        values: dict[str, object] = {
            "format": 1 if all(modality.width is None for modality in self.modalities) else 2,
            "name": self.name,
            "builder": self.builder,
            "seed": self.seed,
            "vocab_size": sum(modality.size for modality in self.modalities),
            "pad_token": self.pad_token,
            "modalities": tuple(self.modalities),
            "special_tokens": dict(self.special_tokens),
            "splits": splits,
            "licences": dict(self.licences),
        }
        return describe(values, f"{self.directory / DESCRIPTION_FILE}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.directory}: cannot write the corpus: {error.strerror}"
            ) from error


def _close_after_error(file: BinaryIO) -> None:
    """Close a file; on a full disk, closing retries the write whose error is raised already."""
    with suppress(OSError):
        file.close()


def check_target(directory: Path) -> None:
    """Check that a corpus can be written to ``directory``.

    Raises:
        DataError: It exists and is not an empty directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory}: exists already, expected a new or empty directory")


def _integers(ids: Sequence[int] | np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{where}: ids of dtype {array.dtype} and shape {array.shape}, expected integers in "
            "one dimension"
        )
    return array.astype(np.int64, copy=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def render_description(description: CorpusDescription) -> str:
    """Return the text of corpus.toml; ``parse_description`` is the inverse."""
    values = description.model_dump(exclude_none=True)
    modalities, splits = values.pop("modalities"), values.pop("splits")
    tables = {key: values.pop(key) for key in ("special_tokens", "licences")}
    lines = [*_pairs(values), ""]
    for modality in modalities:
        lines += ["[[modalities]]", *_pairs(modality), ""]
    lines += ["[special_tokens]", *_pairs(tables["special_tokens"]), ""]
    for name, counts in splits.items():
        if not counts["latents"]:
            del counts["latents"]
        lines += [f"[splits.{name}]", *_pairs(counts), ""]
    lines += ["[licences]", *_pairs(tables["licences"]), ""]
    return "\n".join(lines)


def _pairs(table: Mapping[str, object]) -> list[str]:
    return [f"{_quote(key)} = {_value(value)}" for key, value in table.items()]


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_pairs(value)) + " }"
    assert isinstance(value, str | int)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quote(key: str) -> str:
    plain = key.isascii() and key.replace("-", "_").isidentifier()
    return key if plain else _value(key)


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed writers of ``directory`` have left, if they ran on this host."""
    for path in directory.parent.glob(f".{glob.escape(directory.name)}.partial-*"):
        owner = _OWNER.fullmatch(path.name.rpartition(".partial-")[2])
        if owner and Process(owner["host"], int(owner["pid"]), owner["started"]).is_dead:
            shutil.rmtree(path, ignore_errors=True)
