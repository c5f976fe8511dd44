"""The arguments of ``mot prepare documents`` and ``mot prepare megatron``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_json, add_output, positive_int, user_path

if TYPE_CHECKING:
    from pathlib import Path

    from mot_megatron.data.documents.build import DocumentBuild, NewVocabulary
    from mot_megatron.data.documents.vocabulary import GivenCodebook


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mot prepare documents``."""
    parser.add_argument(
        "inputs",
        nargs="+",
        type=user_path,
        metavar="INPUT",
        help="file .jsonl, .txt, .tar (WebDataset), .parquet or .arrow, or a folder of one kind",
    )
    add_output(parser, "new or empty folder")
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--root",
        type=user_path,
        metavar="DIR",
        help="folder of pictures and sounds; no others are read (default: that of each list)",
    )
    reading.add_argument(
        "--text-documents",
        choices=("line", "file"),
        default="line",
        help="what is a document in .txt files (default: line)",
    )
    reading.add_argument(
        "--picture-fit",
        choices=("crop", "pad"),
        default="crop",
        help="how a picture becomes a square: the largest one in its middle, or the whole picture "
        "on a white one (default: crop)",
    )
    reading.add_argument(
        "--max-broken",
        type=_not_negative,
        default=0,
        metavar="N",
        help="documents that may be left out because they cannot be used (default: 0)",
    )
    reading.add_argument(
        "--validation-share",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="share of the documents that are held out, chosen by their content (default: 0.05)",
    )
    reading.add_argument(
        "--split-key",
        metavar="KEY",
        help="key of every document; those with the same value are in the same split",
    )
    reading.add_argument(
        "--license",
        type=_pair,
        action="append",
        default=[],
        metavar="SOURCE=LICENSE",
        help="license of a source, by any name, which corpus.toml keeps; may be repeated",
    )
    _add_vocabulary(parser)
    work = parser.add_argument_group("work")
    work.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    work.add_argument("--workers", type=positive_int, default=2, help="processes (default: 2)")
    work.add_argument(
        "--shard-documents",
        type=positive_int,
        default=4096,
        metavar="N",
        help="lines that are encoded together, the unit of resumption (default: 4096)",
    )
    add_json(parser)


def add_megatron(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mot prepare megatron``."""
    for split in ("train", "validation"):
        parser.add_argument(
            f"--{split}",
            type=user_path,
            required=True,
            metavar="PREFIX",
            help=f"path of the .bin and .idx of the {split} split, without the suffix",
        )
    add_output(parser, "new or empty folder")
    add_tokenizer(parser, required=True)
    add_json(parser)


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("vocabulary")
    group.add_argument(
        "--codebooks-from",
        type=user_path,
        metavar="CORPUS",
        help="use the vocabulary of this corpus; excludes the other options of this group",
    )
    for option, default, what in (
        ("--text-vocabulary", 4096, "ids of the tokenizer that is trained"),
        ("--image-codes", 1024, "codes for pictures"),
        ("--picture-pixels", 32, "width and height to which pictures are resized"),
        ("--patch-pixels", 4, "width and height of the patches that become one code each"),
        ("--speech-codes", 500, "codes for sound"),
        ("--sample-documents", 10_000, "documents read to train the codebooks"),
    ):
        group.add_argument(
            option, type=positive_int, metavar="N", help=f"{what} (default: {default})"
        )
    for kind in ("image", "speech"):
        group.add_argument(
            f"--{kind}-codebook",
            type=user_path,
            metavar="FILE",
            help=f"codebook file for {kind}, from mot prepare codec or of --{kind}-codec; none is "
            "trained then",
        )
        group.add_argument(
            f"--{kind}-codec",
            metavar="NAME",
            help=f"codec of --{kind}-codebook: a registered name or module:Class",
        )
    group.add_argument(
        "--kinds",
        type=_names,
        metavar="KIND,...",
        help="modalities besides text, of: image, speech (default: those in the sample)",
    )
    group.add_argument(
        "--languages",
        type=_names,
        metavar="NAME,...",
        help="languages with a token of their own (default: those in the sample)",
    )
    add_tokenizer(group, required=False)


def add_tokenizer(group: argparse._ArgumentGroup | argparse.ArgumentParser, required: bool) -> None:
    """Add ``--tokenizer``, ``--special`` and ``--special-file``."""
    group.add_argument(
        "--tokenizer",
        type=user_path,
        required=required,
        metavar="FILE",
        help="a Hugging Face tokenizer.json, which is used for text",
    )
    group.add_argument(
        "--special",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=TOKEN",
        help="what the tokenizer calls a special token, such as <bos>; may be repeated",
    )
    group.add_argument(
        "--special-file",
        type=user_path,
        metavar="FILE",
        help='the same as a TOML file with lines such as "<bos>" = "<s>"',
    )


def document_build(options: argparse.Namespace) -> DocumentBuild:
    """Return what the options ask for.

    Raises:
        DataError: Options exclude each other, or a file of options cannot be read.
    """
    from mot_megatron.data.documents.build import DocumentBuild
    from mot_megatron.data.documents.sources import Reading

    return DocumentBuild(
        inputs=tuple(options.inputs),
        output=options.output,
        vocabulary=_vocabulary(options),
        reading=Reading(
            options.root,
            options.split_key,
            options.text_documents,
            options.shard_documents,
            options.picture_fit,
        ),
        validation_share=options.validation_share,
        seed=options.seed,
        workers=options.workers,
        max_broken=options.max_broken,
        licences=tuple(options.license),
    )


def _vocabulary(options: argparse.Namespace) -> NewVocabulary | Path:
    from mot_megatron.data.documents.build import NewVocabulary
    from mot_megatron.data.structure import IMAGE, SPEECH
    from mot_megatron.errors import DataError

    special = special_names(options)
    given = {
        "--text-vocabulary": ("text_ids", options.text_vocabulary),
        "--image-codes": ("image_codes", options.image_codes),
        "--picture-pixels": ("picture_pixels", options.picture_pixels),
        "--patch-pixels": ("patch_pixels", options.patch_pixels),
        "--image-codebook": ("image_codebook", _given_codebook(options, "image")),
        "--speech-codebook": ("speech_codebook", _given_codebook(options, "speech")),
        "--speech-codes": ("speech_codes", options.speech_codes),
        "--sample-documents": ("sample_documents", options.sample_documents),
        "--kinds": ("kinds", options.kinds),
        "--languages": ("languages", options.languages),
        "--tokenizer": ("tokenizer", options.tokenizer),
        "--special": ("special", special or None),
    }
    given = {option: pair for option, pair in given.items() if pair[1] is not None}
    if options.codebooks_from is not None:
        if given:
            raise DataError(
                f"{', '.join(given)}: not with --codebooks-from, which gives the whole vocabulary"
            )
        return options.codebooks_from
    if special and options.tokenizer is None:
        raise DataError("--special: only with --tokenizer; a trained tokenizer has all of them")
    if options.tokenizer is not None and options.text_vocabulary is not None:
        raise DataError("--text-vocabulary: not with --tokenizer, which has its own")
    of_images = {"--image-codes", "--picture-pixels", "--patch-pixels"} & given.keys()
    for name, others in (("image", of_images), ("speech", {"--speech-codes"} & given.keys())):
        if f"--{name}-codebook" in given and others:
            raise DataError(
                f"{', '.join(sorted(others))}: not with --{name}-codebook, which has its own"
            )
    if unknown := {*(options.kinds or ())} - {IMAGE, SPEECH}:
        raise DataError(f"--kinds {','.join(sorted(unknown))}: expected {IMAGE}, {SPEECH} or both")
    return NewVocabulary(**dict(given.values()))


def _given_codebook(options: argparse.Namespace, kind: str) -> GivenCodebook | None:
    from mot_megatron.data.codebooks.weights import codec_of
    from mot_megatron.data.documents.vocabulary import GivenCodebook
    from mot_megatron.errors import DataError

    path = getattr(options, f"{kind}_codebook")
    codec = getattr(options, f"{kind}_codec")
    if path is None:
        if codec is not None:
            raise DataError(f"--{kind}-codec {codec}: only with --{kind}-codebook, its file")
        return None
    return GivenCodebook(codec or codec_of(path, kind), path)


def special_names(options: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """Return the tokenizer's name of each special token that the options name.

    Raises:
        DataError: The file of ``--special-file`` cannot be read.
    """
    from mot_megatron.data.documents.vocabulary import read_special_names

    names = read_special_names(options.special_file) if options.special_file else {}
    return tuple((names | dict(options.special)).items())


def _pair(text: str) -> tuple[str, str]:
    name, equals, token = text.partition("=")
    if not (name and equals and token):
        raise argparse.ArgumentTypeError(f"{text!r}, expected two texts with = between them")
    return name, token


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len({*names}) < len(names) or not all(
        name.replace("-", "_").isidentifier() for name in names
    ):
        raise argparse.ArgumentTypeError(f"{text!r}, expected names separated by commas")
    return names


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected a number between 0 and 1")
    return value
