"""Raw files, made on the spot: documents of a text, a picture and a sound in every format."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from PIL import Image

from mot_megatron.data.documents.build import DocumentBuild, NewVocabulary, build_documents
from mot_megatron.data.documents.sources import Reading
from mot_megatron.data.structure import SOURCES_FILE

COUNT = 24
TINY = NewVocabulary(text_ids=300, image_codes=8, speech_codes=6)
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


class Item(NamedTuple):
    """A document."""

    text: str
    png: bytes
    wav: bytes


def make_items(count: int = COUNT) -> list[Item]:
    random = np.random.default_rng(0)
    items = []
    for number in range(count):
        color = list(COLORS)[number % 3]
        pixels = np.full((40, 50, 3), 255, np.uint8)
        top, left = random.integers(0, 20, 2)
        pixels[top : top + 16, left : left + 16] = COLORS[color]
        items.append(
            Item(f"a {color} square {number}", png(pixels), wav(random, 220 * (1 + number % 3)))
        )
    return items


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def wav(random: np.random.Generator, hertz: float, rate: int = 8000) -> bytes:
    time = np.arange(int(0.4 * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * hertz * time) + 0.01 * random.normal(size=len(time))
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([tone, tone], axis=1), rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def write_jsonl(folder: Path, items: Sequence[Item]) -> Path:
    """Write the media below ``folder`` and a list of the documents beside them."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(items):
        (folder / "media" / f"{number}.png").write_bytes(item.png)
        (folder / "media" / f"{number}.wav").write_bytes(item.wav)
        segments = [
            {"text": item.text, "language": "en"},
            {"image": f"media/{number}.png"},
            {"audio": f"media/{number}.wav"},
        ]
        lines.append(json.dumps({"segments": segments, "source": f"s{number // 2}"}))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members_of(items: Sequence[Item]) -> list[tuple[str, bytes]]:
    return [
        (f"{number:04}.{suffix}", content)
        for number, item in enumerate(items)
        for suffix, content in (
            ("txt", item.text.encode()),
            ("png", item.png),
            ("wav", item.wav),
            ("json", b'{"language": "en"}'),
        )
    ]


def build(source: Path, output: Path, **changes: object) -> int:
    """Build a corpus with tiny codebooks; ``shard_documents`` goes to the reading."""
    reading = changes.pop("reading", Reading(shard_documents=7))
    values = {"vocabulary": TINY, "validation_share": 0.3, "workers": 1, "reading": reading}
    return build_documents(DocumentBuild((source,), output, **(values | changes)))  # pyright: ignore[reportArgumentType]


def content(directory: Path) -> dict[str, bytes]:
    """Return the content of all files but the list of the sources, whose names differ."""
    files = (path for path in directory.iterdir() if path.name != SOURCES_FILE)
    return {path.name: path.read_bytes() for path in files}
