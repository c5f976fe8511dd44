"""A small tuxpaint-stamps package made on the spot: drawings, captions and recordings."""

import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

FOLDER = "usr/share/tuxpaint/stamps/"


def picture(seed: int) -> bytes:
    """A .png of random flat squares, part of it transparent."""
    random = np.random.default_rng(seed)
    pixels = np.repeat(np.repeat(random.integers(0, 255, (20, 20, 4)), 4, 0), 4, 1).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[:8] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def recording(seed: int, seconds: float = 0.8) -> bytes:
    """A .wav of noise whose colour changes, at 22.05 kHz."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=int(seconds * 22050))
    for _ in range(int(random.integers(1, 6))):
        noise[1:] += 0.7 * noise[:-1]
    stream = io.BytesIO()
    soundfile.write(stream, noise / np.abs(noise).max(), 22050, format="WAV")
    return stream.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    """An ar archive."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        parts += [header.encode(), content, b"\n" * (len(content) % 2)]
    return b"".join(parts)


def deb(files: dict[str, bytes]) -> bytes:
    """A .deb with these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    data = lzma.compress(stream.getvalue(), preset=0)
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data})


def stamps_deb(path: Path, count: int) -> Path:
    """Write a package of ``count`` stamps with a French caption and recordings."""
    files = {}
    for number in range(count):
        stem = f"{FOLDER}things/thing{number}"
        files[stem + ".png"] = picture(number)
        files[stem + ".txt"] = f"Thing {number}.\nfr.utf8=Chose {number}\nxx.utf8=?\n".encode()
        files[stem + "_desc.wav"] = recording(number)
        files[stem + "_desc_fr.wav"] = recording(1000 + number)
    path.write_bytes(deb(files))
    return path
