"""Time how fast raw files become ids, on one core, beside the speed of the codec alone.

Sources are made here: lines of random words, PNG pictures of shapes, and WAV files of tones. The
codebooks are the built-in ones, trained on a part of the sources. "The codec alone" gets what was
read and decoded before.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mot_megatron.data.codebooks.codec import Codec, PictureCodec, SoundCodec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.documents.decode import MediaFormat, decode_document
from mot_megatron.data.documents.encode import encode_shard
from mot_megatron.data.documents.sample import plan_sample, sample_shard
from mot_megatron.data.documents.sources import Reading, Shard, list_shards, read_shard
from mot_megatron.data.documents.vocabulary import Training, Vocabulary, train_vocabulary
from mot_megatron.data.structure import IMAGE, SPEECH, TEXT
from mot_megatron.job.hardware import describe_machine

PIXELS, SOUND_SECONDS, RATE = 256, 2.0, 22_050
"""Size of a source picture; length of a source sound and its samples per second."""
_WORDS, _WORDS_PER_TEXT = 20_000, 200


@dataclass(frozen=True)
class DocumentsSettings:
    """What to time."""

    documents: int = 400
    """Documents of each kind."""
    repeats: int = 5
    """Samples of each time."""
    seed: int = 0


@dataclass(frozen=True)
class _Source:
    shards: Sequence[Shard]
    num_bytes: int
    """Of all files that are read."""


def benchmark(settings: DocumentsSettings) -> dict[str, Any]:
    """Time every kind of document, one after the other within each repeat.

    Returns:
        For JSON: by kind, documents and source megabytes per second of the whole way from files to
        ids, the same of the codec alone, and the share of the whole that the codec takes, each with
        median, low and high.
    """
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        sources = {
            kind: _make(Path(folder) / kind, kind, settings) for kind in (TEXT, IMAGE, SPEECH)
        }
        vocabulary = _vocabulary(Path(folder) / "vocabulary", sources, settings)
        codecs = vocabulary.load_codecs()
        ready = {kind: _decoded(source) for kind, source in sources.items()}
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in tqdm(range(settings.repeats), desc="timing", ncols=100):
            for kind, source in sources.items():
                shard_file = Path(folder) / "shard"
                works = {
                    "whole": partial(_encode_files, source, vocabulary, shard_file),
                    "codec": partial(_encode, codecs[kind], ready[kind]),
                }
                for what, work in works.items():
                    seconds.setdefault((kind, what), []).append(_timed(work))
    return {
        "kinds": {
            kind: _rates(
                settings.documents,
                source.num_bytes,
                *(seconds[kind, what] for what in ("whole", "codec")),
            )
            for kind, source in sources.items()
        },
        "documents": settings.documents,
        "machine": describe_machine(torch.device("cpu")),
    }


def _rates(
    documents: int, num_bytes: int, whole: Sequence[float], codec: Sequence[float]
) -> dict[str, dict[str, float]]:
    return {
        "documents_per_second": _spread([documents / each for each in whole]),
        "megabytes_per_second": _spread([num_bytes / 1e6 / each for each in whole]),
        "codec_documents_per_second": _spread([documents / each for each in codec]),
        "share_of_codec": _spread([part / all_ for part, all_ in zip(codec, whole, strict=True)]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _make(folder: Path, kind: str, settings: DocumentsSettings) -> _Source:
    """Write the source files of one kind."""
    folder.mkdir()
    random = np.random.default_rng(settings.seed)
    words = [
        "".join(map(chr, random.integers(97, 123, random.integers(2, 10)))) for _ in range(_WORDS)
    ]
    lines, num_bytes = [], 0
    for number in range(settings.documents):
        if kind == TEXT:
            # Word n is drawn with a probability of about 1 / n, as in natural text.
            ranks = np.minimum(random.zipf(1.2, _WORDS_PER_TEXT), _WORDS) - 1
            lines.append(json.dumps({"text": " ".join(words[rank] for rank in ranks)}))
            continue
        content = _picture(random) if kind == IMAGE else _sound(random)
        name = f"{number}.png" if kind == IMAGE else f"{number}.wav"
        (folder / name).write_bytes(content)
        num_bytes += len(content)
        lines.append(json.dumps({"image" if kind == IMAGE else "audio": name}))
    text = "\n".join(lines).encode()
    (folder / "documents.jsonl").write_bytes(text)
    shards = list_shards([folder / "documents.jsonl"], Reading())
    return _Source(shards, num_bytes + len(text))


def _picture(random: np.random.Generator) -> bytes:
    image = Image.new("RGB", (PIXELS, PIXELS), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = (int(each) for each in random.integers(0, PIXELS - 40, 2))
        color = tuple(int(each) for each in random.integers(0, 256, 3))
        draw.ellipse((left, top, left + 40, top + 40), fill=color)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _sound(random: np.random.Generator) -> bytes:
    seconds = np.arange(int(SOUND_SECONDS * RATE)) / RATE
    tones = [np.sin(2 * np.pi * hertz * seconds) for hertz in random.uniform(100, 3000, 3)]
    noise = random.normal(0, 0.02, len(seconds))
    stream = io.BytesIO()
    soundfile.write(stream, np.mean(tones, axis=0) + noise, RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _vocabulary(
    folder: Path, sources: dict[str, _Source], settings: DocumentsSettings
) -> Vocabulary:
    """Train small codebooks on the sources."""
    shards = [shard for source in sources.values() for shard in source.shards]
    samples = [
        sample_shard(each, Reading(), 1e-9, MediaFormat())
        for each in plan_sample(shards, 3 * settings.documents, settings.seed)
    ]
    sample = samples[0]
    for other in samples[1:]:
        sample.extend(other)
    codes = min(256, 8 * settings.documents)
    sizes = ((TEXT, 4096), (IMAGE, codes), (SPEECH, codes))
    return train_vocabulary(folder, sample, Training(sizes, settings.seed), [])


def _decoded(source: _Source) -> list[str | np.ndarray]:
    """Return the content of all documents, ready to be encoded."""
    return [
        decode_document(document, 1e-9, MediaFormat()).segments[0].content
        for shard in source.shards
        for document in read_shard(shard, Reading())
    ]


def _encode_files(source: _Source, vocabulary: Vocabulary, path: Path) -> None:
    for shard in source.shards:
        encode_shard(shard, Reading(), vocabulary, 1e-9, path)


def _encode(codec: Codec, contents: Sequence[Any]) -> None:
    if isinstance(codec, PictureCodec):
        codec.encode(np.stack(contents))
    else:
        assert isinstance(codec, TextCodec | SoundCodec)
        for content in contents:
            codec.encode(content)
