"""Small generated Debian packages: stamps with recordings, clip art and glosses."""

import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

FOLDER = "usr/share/tuxpaint/stamps/"
CLIP_ART_FOLDER = "usr/share/openclipart/svg/"
WORDNET_FOLDER = "usr/share/wordnet/"
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


def picture(seed: int) -> bytes:
    """Return a .png of random single-color squares, partly transparent."""
    random = np.random.default_rng(seed)
    pixels = np.repeat(np.repeat(random.integers(0, 255, (20, 20, 4)), 4, 0), 4, 1).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[:8] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def recording(seed: int, seconds: float = 0.8) -> bytes:
    """Return a .wav of noise with a changing spectrum at 22.05 kHz."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=int(seconds * 22050))
    for _ in range(int(random.integers(1, 6))):
        noise[1:] += 0.7 * noise[:-1]
    stream = io.BytesIO()
    soundfile.write(stream, noise / np.abs(noise).max(), 22050, format="WAV")
    return stream.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    """Return an ar archive."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        parts += [header.encode(), content, b"\n" * (len(content) % 2)]
    return b"".join(parts)


def deb(files: dict[str, bytes]) -> bytes:
    """Return a .deb with these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    data = lzma.compress(stream.getvalue(), preset=0)
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data})


def thing(number: int) -> str:
    """Return a unique made-up word for each number below 676."""
    return "zz" + "".join(chr(ord("a") + digit) for digit in divmod(number, 26))


def stamps_deb(path: Path, count: int) -> Path:
    """Write a package of ``count`` stamps with a French caption and recordings."""
    files = {}
    for number in range(count):
        stem = f"{FOLDER}things/thing{number}"
        files[stem + ".png"] = picture(number)
        files[stem + ".txt"] = (
            f"A {thing(number)}.\nfr.utf8=Un {thing(number)}\nxx.utf8=?\n".encode()
        )
        files[stem + "_desc.wav"] = recording(number)
        files[stem + "_desc_fr.wav"] = recording(1000 + number)
    path.write_bytes(deb(files))
    return path


def clip_art(title: str, *keywords: str, seed: int = 0, licence: str = PUBLIC_DOMAIN) -> bytes:
    """Return a drawing of three random squares."""
    random = np.random.default_rng(seed)
    squares = "".join(
        f'<rect x="{x}" y="{y}" width="40" height="30" fill="#{color:06x}"/>'
        for x, y, color in random.integers((0, 0, 0), (60, 60, 0xFFFFFF), (3, 3))
    )
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    names = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://cc/"'
    )
    about = f'<dc:title>{title}</dc:title>{listed}<cc:license rdf:resource="{licence}"/>'
    return (
        f'<svg {names} viewBox="0 0 100 100"><metadata>{about}</metadata>{squares}</svg>'
    ).encode()


def clip_art_deb(path: Path, count: int) -> Path:
    """Write a package of ``count`` drawings, twenty from a collection and one broken drawing."""
    files = {
        f"{thing(n)}.svg": clip_art(f"The {thing(n)} ({n})", "toy", seed=n) for n in range(count)
    }
    files |= {f"pack/{n}.svg": clip_art("Mega pack", "toy", seed=900 + n) for n in range(20)}
    files["broken.svg"] = clip_art("Broken thing")[:-9]
    path.write_bytes(deb({CLIP_ART_FOLDER + name: content for name, content in files.items()}))
    return path


def wordnet_deb(path: Path, count: int) -> Path:
    """Write a package of ``count`` nouns and an adjective."""
    nouns = [
        f'{n:08d} 03 n 02 {thing(n)} 0 toy_thing 1 000 | a toy to play with; "take {thing(n)}"  \n'
        for n in range(count)
    ]
    lists = {
        "data.noun": "  1 A licence.  \n" + "".join(nouns),
        "data.verb": "",
        "data.adj": "00000001 00 s 01 playful(a) 0 000 | like a toy  \n",
        "data.adv": "",
    }
    path.write_bytes(deb({WORDNET_FOLDER + name: text.encode() for name, text in lists.items()}))
    return path
