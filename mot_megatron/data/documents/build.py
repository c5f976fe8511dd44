"""Build a corpus from raw files: sample, train the codebooks, encode shard by shard, write.

Encoded shards are kept in a folder beside the output until the corpus is complete, so that a run
that was killed continues. Everything else depends on the files and settings alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from mot_megatron.data.builders.workers import worker_pool
from mot_megatron.data.codebooks.image import PATCH_PIXELS, PICTURE_PIXELS, check_grid
from mot_megatron.data.codebooks.text import read_tokenizer
from mot_megatron.data.corpus import HELD_OUT_SPLIT, TRAIN_SPLIT, Corpus
from mot_megatron.data.documents.counts import SourceCounts
from mot_megatron.data.documents.decode import MediaFormat
from mot_megatron.data.documents.encode import EncodedShard, encode_shard
from mot_megatron.data.documents.raw import is_language
from mot_megatron.data.documents.sample import Sample, plan_sample, sample_shard
from mot_megatron.data.documents.sources import Reading, Shard, list_shards
from mot_megatron.data.documents.vocabulary import (
    GivenCodebook,
    Training,
    Vocabulary,
    copy_vocabulary,
    train_vocabulary,
)
from mot_megatron.data.structure import IMAGE, KINDS, SOURCES_FILE, SPEECH, TEXT
from mot_megatron.data.writer import CorpusWriter, check_target
from mot_megatron.errors import DataError
from mot_megatron.job.exclusive import exclusive

BUILDER = "mot_megatron.data.documents 1"
BROKEN_FILE = "broken.jsonl"
"""File that lists the documents that were left out, and why."""


@dataclass(frozen=True)
class NewVocabulary:
    """How to make the vocabulary from the data."""

    text_ids: int = 4096
    """Ids of the tokenizer that is trained, special tokens included."""
    image_codes: int = 1024
    picture_pixels: int = PICTURE_PIXELS
    """Width and height to which pictures are resized."""
    patch_pixels: int = PATCH_PIXELS
    """Width and height of the patches that become one code each."""
    speech_codes: int = 500
    image_codebook: GivenCodebook | None = None
    """A codebook for pictures to use instead of training one."""
    speech_codebook: GivenCodebook | None = None
    """A codebook for sound to use instead of training one."""
    kinds: tuple[str, ...] | None = None
    """Modalities besides text; None: those that the sample has."""
    languages: tuple[str, ...] | None = None
    """Languages that have a token; None: those that the sample has."""
    sample_documents: int = 10_000
    """Documents that are read for training."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of training one."""
    special: tuple[tuple[str, str], ...] = ()
    """Its token for each special token that it calls otherwise."""

    @property
    def given(self) -> dict[str, GivenCodebook]:
        """The codebooks that are not trained, by kind of segment."""
        pairs = {IMAGE: self.image_codebook, SPEECH: self.speech_codebook}
        return {kind: codebook for kind, codebook in pairs.items() if codebook is not None}


@dataclass(frozen=True)
class DocumentBuild:
    """What to build from which files."""

    inputs: tuple[Path, ...]
    output: Path
    vocabulary: NewVocabulary | Path = field(default_factory=NewVocabulary)
    """A path: use the codebooks of that corpus."""
    reading: Reading = field(default_factory=Reading)
    validation_share: float = 0.05
    seed: int = 0
    workers: int = 2
    max_broken: int = 0
    """Number of broken documents that may be left out."""
    licences: tuple[tuple[str, str], ...] = ()
    """License of each source, by any name."""

    @property
    def working(self) -> Path:
        """Folder of the unfinished work."""
        return self.output.parent / f".{self.output.name}.working"


def build_documents(build: DocumentBuild) -> int:
    """Build the corpus.

    Returns:
        Number of broken documents that were left out.

    Raises:
        DataError: The output exists, a source or codebook cannot be used, more documents are broken
            than allowed, a split would be empty, or the disk is full.
    """
    check_target(build.output)
    try:
        with _working_folder(build.working), worker_pool(build.workers) as pool:
            # In a worker, because libraries that read tables start threads, and this process forks.
            shards = pool.submit(list_shards, build.inputs, build.reading).result()
            vocabulary = _vocabulary(build, shards, pool)
            broken = _write(build, shards, vocabulary, pool)
            shutil.rmtree(build.working)
    except BrokenProcessPool:
        raise DataError(
            f"{build.output}: a worker process was killed, perhaps for its memory; start again, "
            "perhaps with fewer --workers or --shard-documents"
        ) from None
    except OSError as error:
        raise DataError(f"{error.filename or build.working}: {error.strerror or error}") from error
    return broken


@contextmanager
def _working_folder(working: Path) -> Iterator[None]:
    """Create the folder and hold its lock; afterwards remove it if it has nothing to keep."""
    working.mkdir(parents=True, exist_ok=True)
    with exclusive(working / "lock", f"{working}: another process builds this corpus"):
        try:
            yield
        finally:
            if working.exists() and [path.name for path in working.iterdir()] == ["lock"]:
                shutil.rmtree(working)


def _digest(*values: object) -> str:
    text = json.dumps([BUILDER, *values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _vocabulary(
    build: DocumentBuild, shards: Sequence[Shard], pool: ProcessPoolExecutor
) -> Vocabulary:
    """Return the vocabulary of an earlier run with the same settings and files, or make it."""
    if isinstance(build.vocabulary, Path):
        digest = Corpus.open_vocabulary(build.vocabulary).vocabulary_digest
        directory = build.working / f"vocabulary-{_digest(digest)}"
        return Vocabulary.load(directory) or copy_vocabulary(directory, build.vocabulary)
    new = build.vocabulary
    if wrong := [name for name in new.languages or () if not is_language(name)]:
        raise DataError(f"--languages {wrong[0]}: its token <{wrong[0]}> cannot be a language's")
    check_grid(new.picture_pixels, new.patch_pixels, "--picture-pixels, --patch-pixels")
    given_sizes = {kind: each.load(kind).modality.size for kind, each in new.given.items()}
    tokenizer = read_tokenizer(new.tokenizer) if new.tokenizer else None
    given = [hashlib.sha256(tokenizer or b"").hexdigest()]
    given += [_file_digest(each.path) for each in new.given.values()]
    sources = [asdict(shard) for shard in shards]
    key = _digest(
        asdict(new), given, sources, asdict(build.reading), build.validation_share, build.seed
    )
    directory = build.working / f"vocabulary-{key}"
    if (earlier := Vocabulary.load(directory)) is not None:
        return earlier
    sample = _sample(build, new, shards, pool)
    languages = sorted(sample.languages) if new.languages is None else new.languages
    training = Training(
        sizes=_sizes(new, given_sizes, sample),
        seed=build.seed,
        pixels=new.picture_pixels,
        patch=new.patch_pixels,
        given=new.given,
        tokenizer=tokenizer,
        tokenizer_name=str(new.tokenizer or ""),
        names=new.special,
    )
    # In a worker, because the tokenizer's training starts threads, and this process forks.
    return pool.submit(train_vocabulary, directory, sample, training, languages).result()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample(
    build: DocumentBuild, new: NewVocabulary, shards: Sequence[Shard], pool: ProcessPoolExecutor
) -> Sample:
    # With a given codebook, all that matters of the pictures is whether there are any.
    pixels = PICTURE_PIXELS if new.image_codebook else new.picture_pixels
    form = MediaFormat(pixels=pixels, fit=build.reading.fit)
    futures = [
        pool.submit(sample_shard, sampling, build.reading, build.validation_share, form)
        for sampling in plan_sample(shards, new.sample_documents, build.seed)
    ]
    sample = Sample()
    for future in tqdm(futures, desc="sampling", unit="shard", ncols=100):
        sample.extend(future.result())
    return sample


def _sizes(
    new: NewVocabulary, given: Mapping[str, int], sample: Sample
) -> tuple[tuple[str, int], ...]:
    sizes = {TEXT: new.text_ids, IMAGE: new.image_codes, SPEECH: new.speech_codes, **given}
    kinds = sample.kinds if new.kinds is None else {*new.kinds}
    # The delimiters need a modality, so every corpus has text.
    return tuple((kind, sizes[kind]) for kind in KINDS if kind in kinds | {TEXT})


def _write(
    build: DocumentBuild,
    shards: Sequence[Shard],
    vocabulary: Vocabulary,
    pool: ProcessPoolExecutor,
) -> int:
    """Encode the shards, and write them in their order; return the number of broken documents."""
    same = (vocabulary.directory.name, asdict(build.reading), build.validation_share)
    paths = [build.working / f"shard-{_digest(*same, asdict(shard))}.npz" for shard in shards]
    _remove_others(build.working, {vocabulary.directory, *paths})
    writer = CorpusWriter(
        directory=build.output,
        name=build.output.name,
        builder=BUILDER,
        seed=build.seed,
        modalities=vocabulary.modalities,
        pad_token=vocabulary.pad_token,
        special_tokens=vocabulary.special,
        licences=dict(build.licences),
    )
    broken = 0
    counted = SourceCounts()
    listing = build.working / BROKEN_FILE
    with (
        writer,
        listing.open("w", encoding="utf-8") as listed,
        # Closed before an error is printed, or the error would share a line with its progress bar.
        closing(_encoded(build, shards, paths, vocabulary, pool)) as encoded_shards,
    ):
        for name in sorted({m.codebook for m in vocabulary.modalities if m.codebook}):
            writer.add_file(name, vocabulary.directory / name)
        splits: set[str] = set()
        for shard, encoded in zip(shards, encoded_shards, strict=True):
            broken = _list_broken(encoded, build, broken, listed)
            for held_out, ids, context in encoded.documents():
                split = HELD_OUT_SPLIT if held_out else TRAIN_SPLIT
                splits.add(split)
                writer.add_document(split, ids, context)
            counted.add(shard, encoded)
        if missing := {TRAIN_SPLIT, HELD_OUT_SPLIT} - splits:
            raise DataError(
                f"{build.output}: no documents for split {', '.join(sorted(missing))}; add "
                f"documents or change --validation-share {build.validation_share:g}"
            )
        writer.add_file(SOURCES_FILE, counted.render())
        if broken:
            listed.flush()
            writer.add_file(BROKEN_FILE, listing.read_bytes())
    return broken


def _remove_others(working: Path, wanted: set[Path]) -> None:
    """Remove what runs with other settings or files have left."""
    for path in working.iterdir():
        if path not in wanted and path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _encoded(
    build: DocumentBuild,
    shards: Sequence[Shard],
    paths: Sequence[Path],
    vocabulary: Vocabulary,
    pool: ProcessPoolExecutor,
) -> Generator[EncodedShard]:
    """Yield the encoded shards in their order; those of an earlier run are not encoded again."""

    def submit(shard: Shard, path: Path) -> Future[None]:
        share = build.validation_share
        return pool.submit(encode_shard, shard, build.reading, vocabulary, share, path)

    pairs = list(zip(shards, paths, strict=True))
    futures = [None if path.is_file() else submit(shard, path) for shard, path in pairs]
    with tqdm(total=len(shards), desc="encoding", unit="shard", ncols=100) as bar:
        for (shard, path), future in zip(pairs, futures, strict=True):
            if future is not None:
                future.result()
            encoded = EncodedShard.load(path)
            if encoded is None:  # a file of an earlier run that was damaged since
                submit(shard, path).result()
                encoded = EncodedShard.load(path)
            if encoded is None:
                raise DataError(f"{path}: damaged right after it was written; is the disk broken?")
            yield encoded
            bar.update()


def _list_broken(encoded: EncodedShard, build: DocumentBuild, before: int, listed: TextIO) -> int:
    """Write the broken documents of a shard to the list; return the number of all up to here.

    Raises:
        DataError: There are more than allowed.
    """
    for each in encoded.broken:
        listed.write(json.dumps(asdict(each)) + "\n")
    broken = before + len(encoded.broken)
    if broken > build.max_broken:
        listed.flush()
        last = encoded.broken[build.max_broken - before]
        raise DataError(
            f"{last.where}: {last.problem}; {broken} broken documents up to here, allowed: "
            f"--max-broken {build.max_broken}; {build.working / BROKEN_FILE} lists them"
        )
    return broken
