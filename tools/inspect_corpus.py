"""Show what a corpus holds: counts, fill, entropies, example documents, pictures and sound.

``inspect_corpus.py DIR`` prints the first four and writes contact_sheet.png (originals above
their reconstructions, where the corpus keeps originals) and speech.wav (units turned back).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mot_megatron.data.builders.assembly import SAMPLES_FILE
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.codec import Codec
from mot_megatron.data.codebooks.image import PatchCodec, peak_signal_to_noise
from mot_megatron.data.codebooks.speech import UnitCodec, write_sound
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.packing import pack
from mot_megatron.data.statistics import ModalityStatistics, measure_corpus
from mot_megatron.errors import DataError, UserError

_COLUMNS = 16
_MAGNIFICATION = 2
_PICTURES = 96
_SOUNDS = 8
_PAUSE_SECONDS = 0.4
_BLANK = np.full((1, 32, 32, 3), 255, np.uint8)
"""The sheet of a corpus without held-out pictures."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="the corpus directory")
    parser.add_argument("--output", type=Path, help="where files go (default CORPUS/inspection)")
    parser.add_argument("--seq-length", type=int, help="for the fill (default 512, or the longest)")
    parser.add_argument("--examples", type=int, default=4, help="documents shown (default 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser.parse_args(arguments)


def segments(document: np.ndarray, modality_of_id: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of one modality in a document: modality index and ids."""
    kinds = modality_of_id[document]
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(document)]
    for start, end in pairwise(edges):
        yield int(kinds[start]), document[start:end]


def packing_fill(corpus: Corpus, split: str, seq_length: int) -> float:
    """Fraction of token slots that hold a token when ``split`` is packed."""
    lengths = corpus.split(split).lengths
    if lengths.max() > seq_length:
        raise DataError(
            f"--seq-length {seq_length}: the longest document of split {split} has {lengths.max()} "
            "tokens, expected at least that"
        )
    sequences = len(pack(lengths, seq_length).bin_offsets) - 1
    return float(lengths.sum() / (sequences * seq_length))


def load_codecs(corpus: Corpus) -> dict[int, Codec]:
    """Codec of each modality that has one, by modality index."""
    return {
        index: load_codec(corpus.directory, modality)
        for index, modality in enumerate(corpus.description.modalities)
        if modality.codebook is not None
    }


def readable(document: np.ndarray, corpus: Corpus, codecs: dict[int, Codec]) -> str:
    """A document in one line: text as it is, other segments as their length and first ids."""
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
    """Segments of a modality from documents spread over the validation split."""
    validation = corpus.split("validation")
    table = corpus.description.modality_of_id
    found = []
    for document in np.linspace(0, len(validation) - 1, min(len(validation), 2 * count)).astype(
        int
    ):
        found += [ids for kind, ids in segments(validation[document], table) if kind == index]
    return found[:count]


def contact_sheet(corpus: Corpus, index: int, codec: PatchCodec) -> tuple[Image.Image, float]:
    """Originals above reconstructions, and their mean peak signal-to-noise ratio in dB.

    Without originals in the corpus: reconstructions only, and the ratio is not a number.
    """
    samples = corpus.directory / SAMPLES_FILE
    if samples.is_file():
        with np.load(samples, allow_pickle=False) as stored:
            originals = stored["pictures"][:_PICTURES]
        decoded = np.stack([codec.decode(ids) for ids in codec.encode(originals)])
        ratio = float(peak_signal_to_noise(originals, decoded).mean())
        kinds = [originals, decoded]
    else:
        chosen = held_out_segments(corpus, index, _PICTURES)
        kinds = [np.stack([codec.decode(ids) for ids in chosen])] if chosen else [_BLANK]
        ratio = float("nan")
    rows = [
        np.hstack(list(kind[start : start + _COLUMNS]))
        for start in range(0, len(kinds[0]) // _COLUMNS * _COLUMNS or 1, _COLUMNS)
        for kind in kinds
    ]
    sheet = Image.fromarray(np.vstack(rows))
    size = (sheet.width * _MAGNIFICATION, sheet.height * _MAGNIFICATION)
    return sheet.resize(size, Image.Resampling.NEAREST), ratio


def write_files(corpus: Corpus, codecs: dict[int, Codec], output: Path) -> dict[str, object]:
    """Write the sheet and the sound; names of the files and the pictures' ratio."""
    report: dict[str, object] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for index, codec in codecs.items():
            if isinstance(codec, PatchCodec):
                sheet, ratio = contact_sheet(corpus, index, codec)
                sheet.save(output / "contact_sheet.png")
                report["contact_sheet"] = str(output / "contact_sheet.png")
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


def inspect(options: argparse.Namespace) -> dict[str, object]:
    """Everything known about the corpus, as one JSON-able object."""
    corpus = Corpus.open(options.corpus)
    codecs = load_codecs(corpus)
    description = corpus.description
    longest = max(counts.longest_document for counts in description.splits.values())
    seq_length = options.seq_length or max(512, longest)
    statistics = measure_corpus(corpus)
    validation = corpus.split("validation")
    shown = np.linspace(0, len(validation) - 1, min(options.examples, len(validation)))
    return {
        "name": description.name,
        "builder": description.builder,
        "seed": description.seed,
        "splits": {
            name: counts.model_dump(exclude={"sha256"})
            for name, counts in description.splits.items()
        },
        "seq_length": seq_length,
        "fill": {name: packing_fill(corpus, name, seq_length) for name in description.splits},
        "entropies": {name: _entropies(measured) for name, measured in statistics.items()},
        "licences": description.licences,
        "examples": [readable(validation[int(place)], corpus, codecs) for place in shown],
        "files": write_files(corpus, codecs, options.output or corpus.directory / "inspection"),
    }


def _entropies(measured: ModalityStatistics) -> dict[str, Any]:
    return asdict(measured) | {"pair": measured.pair}


def print_report(report: dict, modalities: tuple[Modality, ...]) -> None:
    """The report for people, at most 120 columns but for example documents."""
    print(f"{report['name']} by {report['builder']}, seed {report['seed']}")
    for modality in modalities:
        last = modality.end_id - 1
        print(f"  {modality.name}: ids {modality.first_id}..{last}, codec {modality.codec}")
    print(
        f"\n{'split':<12}{'documents':>10}{'tokens':>12}{'longest':>9}{'fill':>8}  tokens of each"
    )
    for name, counts in report["splits"].items():
        each = ", ".join(f"{key} {value:,}" for key, value in counts["tokens_per_modality"].items())
        print(
            f"{name:<12}{counts['documents']:>10,}{counts['tokens']:>12,}"
            f"{counts['longest_document']:>9}{report['fill'][name]:>8.2%}  {each}"
        )
    print(f"fill: packed into sequences of {report['seq_length']} tokens")
    print(
        "\nheld-out entropy in bits/token from counts on train, given 0, 1 and 2 tokens of context"
    )
    for modality in modalities:
        if modality.name in report["entropies"]:
            _print_entropies(modality.name, report["entropies"][modality.name])
        else:
            print(f"  {modality.name}: not in both splits, so it has none")
    print("\nlicences: " + ", ".join(f"{key} {value}" for key, value in report["licences"].items()))
    print("\nheld-out documents:")
    for example in report["examples"]:
        print(f"  {example}")
    print()
    for key, value in report["files"].items():
        print(f"{key}: {value if isinstance(value, str) else format(value, '.2f')}")


def _print_entropies(name: str, measured: dict) -> None:
    def line(label: str, entropies: dict) -> str:
        bits = (entropies["unigram"], entropies["one_token"], entropies["two_tokens"])
        return f"  {label:<34}" + "".join(f"{value:>7.2f}" for value in bits)

    context = f"the tokens 1 and {measured['pair']} before"
    print(line(name, measured["all_tokens"]) + f"   two tokens: {context}")
    share = f"{measured['most_common_share']:.0%}"
    label = f"{name} without id {measured['most_common']} ({share})"
    print(line(label, measured["without_most_common"]))


def main(arguments: list[str] | None = None) -> int:
    """Inspect; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        report = inspect(options)
        modalities = Corpus.open(options.corpus).description.modalities
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_report(report, modalities)
    return 0


if __name__ == "__main__":
    sys.exit(main())
