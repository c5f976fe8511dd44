"""The stamps corpus: pictures, captions in many languages, and recorded speech in fourteen.

The source is the Debian package tuxpaint-stamps-default, which ``apt-get download`` fetches without
root and which is read without installing it. Many stamps share a caption or have an identical
drawing or recording. Such stamps are one concept, so that the two splits share no content.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile

from mot_megatron.data.builders.assembly import Draft, open_writer, write_documents
from mot_megatron.data.builders.concepts import join_concepts
from mot_megatron.data.builders.deb import read_deb
from mot_megatron.data.builders.pictures import read_picture, render_svg, vary_picture
from mot_megatron.data.builders.randomness import generator
from mot_megatron.data.builders.workers import start_stage, worker_pool
from mot_megatron.data.codebooks.mel import resample, trim_silence
from mot_megatron.data.codebooks.speech import SpeechFeatures, speech_features
from mot_megatron.errors import DataError

BUILDER = "mot_megatron.data.builders.stamps 2"
LICENCES = {"tuxpaint-stamps-default": "GPL-2.0-or-later"}
SPOKEN = ("en", "be", "bg", "ca", "da", "el", "es", "fr", "lt", "ml", "nl", "pt_BR", "ro", "ru")
"""Languages that have recordings."""
# fmt: off
WRITTEN = (
    "an", "ast", "cs", "de", "eo", "eu", "fi", "ga", "gd", "gl", "hr", "hu", "id", "is",
    "it", "lv", "nb", "nn", "pl", "pt", "sk", "sl", "sq", "sv", "tr", "uk",
)
# fmt: on
"""Other languages with nearly complete captions, in scripts that the spoken languages also use."""
_FOLDER = "usr/share/tuxpaint/stamps/"
_RECORDING = re.compile(r"(?P<stamp>.+?)_desc(?:_(?P<language>[a-z]{2,3}(?:_[A-Z]{2})?))?\.\w+")
_CAPTION = re.compile(r"(?P<language>[a-z]{2,3}(?:_[A-Z]{2})?)\.utf8=(?P<text>.*)")
_SUFFIXES = {".txt", ".png", ".svg", ".dat", ".ogg", ".wav"}
_PICTURES_PER_TASK, _RECORDINGS_PER_TASK = 16, 128


@dataclass
class Stamp:
    """A stamp: a picture with captions and recordings."""

    name: str
    captions: dict[str, str]
    """Language -> caption; always includes English."""
    picture: str
    """Name of the picture file."""
    may_mirror: bool
    recordings: dict[str, str] = field(default_factory=dict)
    """Language -> name of the file with the spoken caption."""


def list_stamps(files: Mapping[str, bytes]) -> list[Stamp]:
    """List the stamps that have a picture and an English caption, sorted by name.

    Args:
        files: The package's files by name, relative to its folder of stamps.
    """
    stamps = {}
    for name in sorted(files):
        stem = name.removesuffix(".txt")
        picture = next((stem + end for end in (".png", ".svg") if stem + end in files), None)
        captions = _captions(files[name]) if stem != name else {}
        if picture is not None and "en" in captions:
            may_mirror = b"nomirror" not in files.get(stem + ".dat", b"")
            stamps[stem] = Stamp(stem, captions, picture, may_mirror)
    for name in sorted(files):
        match = _RECORDING.fullmatch(name)
        if match and match["stamp"] in stamps and PurePosixPath(name).suffix in {".ogg", ".wav"}:
            stamps[match["stamp"]].recordings.setdefault(match["language"] or "en", name)
    return list(stamps.values())


def _captions(content: bytes) -> dict[str, str]:
    """Parse captions: English on the first line, then lines such as ``fr.utf8=Un chat``."""
    lines = content.decode("utf-8", "replace").splitlines()
    captions = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        match = _CAPTION.fullmatch(line.strip())
        if match:
            captions.setdefault(match["language"], match["text"].strip())
    return {language: text for language, text in captions.items() if text}


def concepts_of(stamps: Iterable[Stamp], files: Mapping[str, bytes]) -> dict[str, str]:
    """Map the name of each stamp to its concept.

    Two stamps share content if their English captions have the same words, or if their pictures or
    any of their recordings are identical.
    """
    return join_concepts({stamp.name: marks_of(stamp, files) for stamp in stamps})


def marks_of(stamp: Stamp, files: Mapping[str, bytes]) -> list[str]:
    """Return the marks of a stamp: words of its English caption, digests of picture and sounds."""
    words = re.findall(r"\w+", stamp.captions["en"].lower())
    contents = [files[name] for name in (stamp.picture, *stamp.recordings.values())]
    return [" ".join(words), *(hashlib.sha256(content).hexdigest() for content in contents)]


def draw_pictures(tasks: list[tuple[str, bytes]]) -> list[np.ndarray]:
    """Render the masters of drawings and photographs, given as (file name, content)."""
    return [
        render_svg(content.decode("utf-8", "replace"), name)
        if name.endswith(".svg")
        else read_picture(content, name)
        for name, content in tasks
    ]


def listen(tasks: list[tuple[str, bytes]]) -> list[SpeechFeatures]:
    """Compute the features of recordings, given as (file name, content)."""
    return [speech_features(_sound(name, content)) for name, content in tasks]


def _sound(name: str, content: bytes) -> np.ndarray:
    """Decode a recording to mono [n] float32 at 16 kHz, with silence trimmed from both ends."""
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DataError(f"{name}: not a recording: {error.error_string}") from None
    return trim_silence(resample(samples.mean(axis=1), rate))


def read_package(path: Path) -> dict[str, bytes]:
    """Return the files in the package's folder of stamps by name, relative to that folder.

    Raises:
        DataError: The file is missing, damaged, or a different package.
    """

    def wanted(name: str) -> bool:
        return name.startswith(_FOLDER) and PurePosixPath(name).suffix in _SUFFIXES

    files = read_deb(path, wanted)
    if not files:
        raise DataError(f"{path}: has no {_FOLDER}, expected package tuxpaint-stamps-default")
    return {name.removeprefix(_FOLDER): content for name, content in files.items()}


def _drafts(
    stamps: list[Stamp],
    concepts: Mapping[str, str],
    masters: Mapping[str, np.ndarray],
    recorded: Mapping[str, SpeechFeatures],
    seed: int,
) -> list[Draft]:
    drafts = []
    for stamp in stamps:
        for language in (*SPOKEN, *WRITTEN):
            if language not in stamp.captions:
                continue
            key = f"{stamp.name}/{language}"
            random = generator(seed, key, "picture")
            picture = vary_picture(masters[stamp.name], random, mirror=stamp.may_mirror)
            speech = recorded.get(stamp.recordings.get(language, ""))
            concept, text = concepts[stamp.name], stamp.captions[language]
            drafts.append(Draft(key, concept, language, text, picture, speech))
    return drafts


def build_stamps(
    deb: Path, directory: Path, *, seed: int = 0, workers: int = 2, limit: int | None = None
) -> None:
    """Build the stamps corpus.

    Args:
        deb: The downloaded package.
        directory: Output directory, which must be new or empty. The corpus appears there only once
            it is complete.
        seed: Random seed. The same seed gives the same bytes for any number of workers.
        workers: Number of processes that render pictures and decode recordings.
        limit: Approximate number of stamps to use, evenly spaced, for a quick trial. None uses all.

    Raises:
        DataError: The directory is not empty, the file is not that package, the limit is too low
            to train the codebooks, or the disk is full.
    """
    writer = open_writer(
        directory,
        name="stamps",
        builder=BUILDER,
        seed=seed,
        languages=[*SPOKEN, *WRITTEN],
        licences=LICENCES,
    )
    with writer, worker_pool(workers) as pool:
        files = read_package(deb)
        stamps = list_stamps(files)
        # Use all stamps here, so that the limit does not change which concepts are held out.
        concepts = concepts_of(stamps, files)
        if limit is not None:
            stamps = stamps[:: max(1, len(stamps) // limit)]
        pictures = [(stamp.picture, files[stamp.picture]) for stamp in stamps]
        names = _recordings(stamps)
        recordings = [(name, files[name]) for name in names]
        drawing = start_stage(pool, draw_pictures, pictures, _PICTURES_PER_TASK, "drawing")
        decoding = start_stage(pool, listen, recordings, _RECORDINGS_PER_TASK, "listening")
        masters = dict(zip((stamp.name for stamp in stamps), drawing.results(), strict=True))
        recorded = dict(zip(names, decoding.results(), strict=True))
        write_documents(writer, _drafts(stamps, concepts, masters, recorded, seed))


def _recordings(stamps: Iterable[Stamp]) -> list[str]:
    """Return the sorted names of the recordings that the documents use."""
    return sorted(
        stamp.recordings[language]
        for stamp in stamps
        for language in stamp.captions.keys() & stamp.recordings.keys() & set(SPOKEN)
    )
