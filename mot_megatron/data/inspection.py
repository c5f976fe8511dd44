"""Describe a corpus: counts, fill, entropies, example documents, pictures and sound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mot_megatron.data.builders.assembly import NUM_SAMPLES, SAMPLES_FILE
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.codec import Codec, read_arrays
from mot_megatron.data.codebooks.image import PatchCodec, peak_signal_to_noise
from mot_megatron.data.codebooks.speech import UnitCodec, write_sound
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.packing import pack
from mot_megatron.data.statistics import ModalityStatistics, statistics_of
from mot_megatron.errors import DataError

_COLUMNS = 16
_MAGNIFICATION = 2
_PICTURES = 96
_SOUNDS = 8
_PAUSE_SECONDS = 0.4
_BLANK = np.full((1, 32, 32, 3), 255, np.uint8)
"""Contact sheet of a corpus without held-out pictures."""


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
    corpus: Corpus, index: int, codec: PatchCodec
) -> tuple[Image.Image, float | None]:
    """Return originals above reconstructions, and the mean peak signal-to-noise ratio in dB.

    A corpus without originals gives reconstructions only, and no ratio.
    """
    samples = corpus.directory / SAMPLES_FILE
    if samples.is_file():
        shape = (NUM_SAMPLES, *_BLANK.shape[1:])
        originals = read_arrays(samples, {"pictures": shape}, at_most=True)["pictures"]
        originals = originals[:_PICTURES].astype(np.uint8)
        decoded = np.stack([codec.decode(ids) for ids in codec.encode(originals)])
        ratio = float(peak_signal_to_noise(originals, decoded).mean())
        kinds = [originals, decoded]
    else:
        chosen = held_out_segments(corpus, index, _PICTURES)
        kinds = [np.stack([codec.decode(ids) for ids in chosen])] if chosen else [_BLANK]
        ratio = None
    # Fill the last row with blanks.
    columns = min(_COLUMNS, len(kinds[0]))
    missing = _BLANK.repeat(-len(kinds[0]) % columns, axis=0)
    rows = [
        np.hstack(list(np.concatenate((kind, missing))[start : start + columns]))
        for start in range(0, len(kinds[0]), columns)
        for kind in kinds
    ]
    sheet = Image.fromarray(np.vstack(rows))
    size = (sheet.width * _MAGNIFICATION, sheet.height * _MAGNIFICATION)
    return sheet.resize(size, Image.Resampling.NEAREST), ratio


def write_files(corpus: Corpus, codecs: dict[int, Codec], output: Path) -> dict[str, object]:
    """Write contact sheet and sound; return the file names and the signal-to-noise ratio."""
    report: dict[str, object] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for index, codec in codecs.items():
            if isinstance(codec, PatchCodec):
                sheet, ratio = contact_sheet(corpus, index, codec)
                sheet.save(output / "contact_sheet.png")
                report["contact_sheet"] = str(output / "contact_sheet.png")
                if ratio is not None:
                    report["psnr_db"] = ratio
            elif isinstance(codec, UnitCodec):
                pause = np.zeros(int(_PAUSE_SECONDS * codec.sample_rate), np.float32)
                chosen = held_out_segments(corpus, index, _SOUNDS)
                parts = [part for ids in chosen for part in (codec.decode(ids), pause)]
                write_sound(np.concatenate([*parts, pause]), output / "speech.wav")
                report["speech"] = str(output / "speech.wav")
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from None
    return report


def inspect(
    corpus: Corpus, output: Path, seq_length: int | None = None, num_examples: int = 4
) -> dict[str, Any]:
    """Write contact sheet and sound, and return a description of the corpus, ready for JSON.

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
        "examples": [readable(validation[int(place)], corpus, codecs) for place in shown],
        "files": write_files(corpus, codecs, output),
    }


def _entropies(measured: ModalityStatistics) -> dict[str, Any]:
    return asdict(measured) | {"pair": measured.pair}
