"""Describe a corpus: counts, fill, entropies, example documents, pictures and sound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mot_megatron.data.builders.assembly import NUM_SAMPLES, SAMPLES_FILE
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.arrays import read_arrays
from mot_megatron.data.codebooks.codec import Codec, PictureCodec, SoundCodec, write_sound
from mot_megatron.data.codebooks.image import peak_signal_to_noise
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import TRAIN_SPLIT, Corpus
from mot_megatron.data.inspection_plot import plot_lengths
from mot_megatron.data.packing import pack
from mot_megatron.data.statistics import ModalityStatistics, statistics_of
from mot_megatron.data.structure import SOURCES_FILE
from mot_megatron.errors import DataError
from mot_megatron.files import read_regular_file

_COLUMNS = 16
_MAGNIFICATION, _SMALL_PIXELS = 2, 64
"""Smaller pictures than these are magnified."""
_PICTURES = 96
_SOUNDS = 8
_PAUSE_SECONDS = 0.4
_MOST_DOCUMENTS = 100_000
"""Documents whose segments are measured at most."""
_LARGEST_SHEET = 1 << 23
"""Pixels of a contact sheet at most."""


def segments(document: np.ndarray, modality_of_id: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the segments of a document: modality index and ids."""
    kinds = modality_of_id[document]
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(document)]
    for start, end in pairwise(edges):
        yield int(kinds[start]), document[start:end]


def packing_fill(corpus: Corpus, split: str, seq_length: int) -> float:
    """Return the fraction of positions that hold a token once ``split`` is packed."""
    lengths = corpus.split(split).lengths
    if lengths.max() > seq_length:
        raise DataError(
            f"--seq-length {seq_length}: the longest document of split {split} has {lengths.max()} "
            "tokens, expected at least that"
        )
    sequences = len(pack(lengths, seq_length).bin_offsets) - 1
    return float(lengths.sum() / (sequences * seq_length))


def load_codecs(corpus: Corpus) -> dict[int, Codec]:
    """Load the codec of each modality that has one, by modality index."""
    return {
        index: load_codec(corpus.directory, modality)
        for index, modality in enumerate(corpus.description.modalities)
        if modality.codebook is not None
    }


def readable(document: np.ndarray, corpus: Corpus, codecs: dict[int, Codec]) -> str:
    """Return a document in one line: text as it is, other segments as length and first ids."""
    parts = []
    for index, ids in segments(document, corpus.description.modality_of_id):
        codec = codecs.get(index)
        if isinstance(codec, TextCodec):
            parts.append(codec.decode(ids, keep_special=True))
        else:
            name = corpus.description.modalities[index].name
            parts.append(f"[{name} {len(ids)}: {' '.join(map(str, ids[:4]))} ..]")
    return "".join(parts)


def held_out_segments(corpus: Corpus, index: int, count: int) -> list[np.ndarray]:
    """Return segments of a modality from documents spread over the validation split."""
    validation = corpus.split("validation")
    table = corpus.description.modality_of_id
    found = []
    for document in np.linspace(0, len(validation) - 1, min(len(validation), 2 * count)).astype(
        int
    ):
        found += [ids for kind, ids in segments(validation[document], table) if kind == index]
    return found[:count]


def contact_sheet(
    corpus: Corpus, index: int, codec: PictureCodec
) -> tuple[Image.Image, float | None]:
    """Return originals above reconstructions, and the mean peak signal-to-noise ratio in dB.

    A corpus without originals gives reconstructions only, and no ratio.
    """
    samples = corpus.directory / SAMPLES_FILE
    blank = np.full((1, codec.pixels, codec.pixels, 3), 255, np.uint8)
    count = max(1, min(_PICTURES, _LARGEST_SHEET // codec.pixels**2))
    if samples.is_file():
        shape = (NUM_SAMPLES, *blank.shape[1:])
        originals = read_arrays(samples, {"pictures": shape}, at_most=True)["pictures"]
        originals = originals[:count].astype(np.uint8)
        decoded = np.stack([codec.decode(ids) for ids in codec.encode(originals)])
        ratio = float(peak_signal_to_noise(originals, decoded).mean())
        kinds = [originals, decoded]
    else:
        chosen = held_out_segments(corpus, index, count)
        kinds = [np.stack([codec.decode(ids) for ids in chosen])] if chosen else [blank]
        ratio = None
    # Fill the last row with blanks.
    columns = min(_COLUMNS, len(kinds[0]))
    missing = blank.repeat(-len(kinds[0]) % columns, axis=0)
    rows = [
        np.hstack(list(np.concatenate((kind, missing))[start : start + columns]))
        for start in range(0, len(kinds[0]), columns)
        for kind in kinds
    ]
    sheet = Image.fromarray(np.vstack(rows))
    magnification = _MAGNIFICATION if codec.pixels < _SMALL_PIXELS else 1
    size = (sheet.width * magnification, sheet.height * magnification)
    return sheet.resize(size, Image.Resampling.NEAREST), ratio


def segment_lengths(corpus: Corpus) -> dict[str, np.ndarray]:
    """Return the lengths of the segments of evenly spaced training documents, by modality.

    Special tokens, which are text, do not count.
    """
    train = corpus.split(TRAIN_SPLIT)
    table = corpus.description.modality_of_id
    found: dict[int, list[int]] = {}
    special = np.zeros(len(table), dtype=bool)
    special[list(corpus.description.special_tokens.values())] = True
    for document in range(0, len(train), -(-len(train) // _MOST_DOCUMENTS)):
        for kind, ids in segments(train[document], table):
            if length := len(ids) - int(special[ids].sum()):
                found.setdefault(kind, []).append(length)
    names = [modality.name for modality in corpus.description.modalities]
    return {names[kind]: np.array(lengths) for kind, lengths in sorted(found.items())}


def sources_of_files(corpus: Corpus) -> list[dict[str, Any]]:
    """Return what each source file of a corpus from raw files contributed; empty for others.

    Raises:
        DataError: The list is damaged.
    """
    path = corpus.directory / SOURCES_FILE
    if not path.is_file():
        return []
    try:
        return json.loads(read_regular_file(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


def write_files(corpus: Corpus, codecs: dict[int, Codec], output: Path) -> dict[str, object]:
    """Write lengths, contact sheet and sound; return the file names and the signal-to-noise ratio.

    Raises:
        DataError: A file cannot be written.
    """
    report: dict[str, object] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        documents = {name: corpus.split(name).lengths for name in corpus.splits}
        path = output / "lengths.png"
        plot_lengths(documents, segment_lengths(corpus), corpus.description.name, path)
        report["lengths"] = str(path)
        for index, codec in codecs.items():
            if isinstance(codec, PictureCodec):
                sheet, ratio = contact_sheet(corpus, index, codec)
                sheet.save(output / "contact_sheet.png")
                report["contact_sheet"] = str(output / "contact_sheet.png")
                if ratio is not None:
                    report["psnr_db"] = ratio
            elif isinstance(codec, SoundCodec):
                pause = np.zeros(int(_PAUSE_SECONDS * codec.sample_rate), np.float32)
                chosen = held_out_segments(corpus, index, _SOUNDS)
                parts = [part for ids in chosen for part in (codec.decode(ids), pause)]
                write_sound(
                    np.concatenate([*parts, pause]), codec.sample_rate, output / "speech.wav"
                )
                report["speech"] = str(output / "speech.wav")
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from None
    return report


def inspect(
    corpus: Corpus, output: Path, seq_length: int | None = None, num_examples: int = 4
) -> dict[str, Any]:
    """Write pictures and sound, and return a description of the corpus, ready for JSON.

    Args:
        corpus: The corpus.
        output: Folder for the files.
        seq_length: Tokens per sequence, for the fill; None for 512 or the longest document.
        num_examples: Number of held-out documents to show.

    Raises:
        DataError: A document is longer than ``seq_length``, or a file cannot be read or written.
    """
    codecs = load_codecs(corpus)
    description = corpus.description
    longest = max(counts.longest_document for counts in description.splits.values())
    seq_length = seq_length or max(512, longest)
    statistics = statistics_of(corpus)
    validation = corpus.split("validation")
    shown = np.linspace(0, len(validation) - 1, min(num_examples, len(validation)))
    return {
        "name": description.name,
        "builder": description.builder,
        "seed": description.seed,
        "modalities": [
            {
                "name": modality.name,
                "first_id": modality.first_id,
                "size": modality.size,
                "codec": modality.codec,
            }
            for modality in description.modalities
        ],
        "splits": {
            name: counts.model_dump(exclude={"sha256": True, "context": {"sha256"}})
            for name, counts in description.splits.items()
        },
        "seq_length": seq_length,
        "fill": {name: packing_fill(corpus, name, seq_length) for name in description.splits},
        "entropies": {name: _entropies(measured) for name, measured in statistics.items()},
        "licences": description.licences,
        "sources": sources_of_files(corpus),
        "examples": [readable(validation[int(place)], corpus, codecs) for place in shown],
        "files": write_files(corpus, codecs, output),
    }


def _entropies(measured: ModalityStatistics) -> dict[str, Any]:
    return asdict(measured) | {"pair": measured.pair}
