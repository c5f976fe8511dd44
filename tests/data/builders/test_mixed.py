"""The mixed corpus: clip art, glosses, and that each concept is in one split across sources."""

import re
from pathlib import Path

import numpy as np
import pytest

from mot_megatron.data.builders.clipart import draw_clip_art, list_clip_art
from mot_megatron.data.builders.concepts import name_words
from mot_megatron.data.builders.mixed import LANGUAGES, DebPackages, build_mixed
from mot_megatron.data.builders.pictures import vary_strongly
from mot_megatron.data.builders.randomness import generator
from mot_megatron.data.builders.wordnet import list_glosses
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.corpus import Corpus
from tests.data.builders.packages import (
    clip_art,
    clip_art_deb,
    deb,
    stamps_deb,
    thing,
    wordnet_deb,
)
from tools import prepare_corpus

pytestmark = pytest.mark.slow

THINGS = 60
"""Items per source, enough to train the codebooks and to hold some items out."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> DebPackages:
    directory = tmp_path_factory.mktemp("packages")
    return DebPackages(
        stamps_deb(directory / "stamps.deb", THINGS),
        clip_art_deb(directory / "clipart.deb", THINGS),
        wordnet_deb(directory / "wordnet.deb", THINGS),
    )


@pytest.fixture(scope="module")
def mixed(packages: DebPackages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpora") / "mixed"
    build_mixed(packages, directory, seed=3, workers=2, limit=THINGS)
    return directory


def texts(directory: Path) -> dict[str, list[str]]:
    """Return the texts of the documents of each split."""
    corpus = Corpus.open(directory)
    codec = load_codec(directory, corpus.description.modalities[0])
    kinds = corpus.description.modality_of_id
    return {
        name: [codec.decode(document[kinds[document] == 0]) for document in split]
        for name, split in corpus.splits.items()
    }


def test_bytes_do_not_depend_on_the_number_of_workers(
    packages: DebPackages, mixed: Path, tmp_path: Path
) -> None:
    build_mixed(packages, tmp_path / "again", seed=3, workers=1, limit=THINGS)
    names = {path.name for path in mixed.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (mixed / name).read_bytes(), name


def test_no_concept_is_in_both_splits(mixed: Path) -> None:
    found = texts(mixed)
    things = {
        split: {word for text in documents for word in re.findall(r"\bzz[a-z]{2}\b", text)}
        for split, documents in found.items()
    }
    assert things["train"] | things["validation"] == {thing(n) for n in range(THINGS)}
    assert things["validation"]
    assert not things["train"] & things["validation"]


def test_every_source_is_in_both_splits(mixed: Path) -> None:
    for documents in texts(mixed).values():
        for pattern in (r"^Un zz..$", r"^The zz.. \(\d+\)", r"^zz.., toy thing \(noun\): a toy"):
            assert any(re.search(pattern, text) for text in documents), pattern
        # only emoji names contain no made-up word
        assert any("zz" not in text for text in documents)


def test_unusable_titles_are_skipped(mixed: Path) -> None:
    every = [text for documents in texts(mixed).values() for text in documents]
    assert not [text for text in every if "pack" in text.lower() or "broken" in text.lower()]


def test_only_the_training_split_repeats_drawings(mixed: Path) -> None:
    found = texts(mixed)
    counts = {
        split: [
            sum(f"The {word} (" in text for text in documents) for word in map(thing, range(THINGS))
        ]
        for split, documents in found.items()
    }
    assert set(counts["train"]) == {0, 10}
    assert set(counts["validation"]) == {0, 1}


def test_documents_are_text_with_or_without_picture_and_speech(mixed: Path) -> None:
    corpus = Corpus.open(mixed)
    kinds = corpus.description.modality_of_id
    special = corpus.description.special_tokens
    seen = set()
    for document in corpus.split("train"):
        assert (document[0], document[-1]) == (special["<bos>"], special["<eos>"])
        assert np.isin(document, [special[f"<{each}>"] for each in LANGUAGES]).sum() == 1
        seen.add(tuple(sorted({int(kind) for kind in kinds[document]})))
    # text alone, with a picture, with speech, with both
    assert seen == {(0,), (0, 1), (0, 2), (0, 1, 2)}


def test_error_names_a_wrong_package(
    packages: DebPackages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.deb"
    other.write_bytes(deb({"usr/bin/thing": b""}))
    options = ("--stamps-deb", "--clipart-deb", "--wordnet-deb")
    expected = ("tuxpaint-stamps-default", "openclipart-svg", "wordnet-base")
    for wrong, package in enumerate(expected):
        paths = [str(other if at == wrong else path) for at, path in enumerate(packages)]
        arguments = [word for pair in zip(options, paths, strict=True) for word in pair]
        assert prepare_corpus.main(["mixed", *arguments, "--output", str(tmp_path / "new")]) == 2
        assert f"expected package {package}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other.deb"]


def test_clip_art_with_unusable_titles_is_skipped() -> None:
    files = {
        "a.svg": clip_art("A_red  bird &amp; nest", "bird", "hash", "bird", "99", "north_pole"),
        "b.svg": clip_art("Clipart by Ann Other - United States - Ohio", "flag"),
        "c.svg": clip_art("Flat icon theme"),
        "d.svg": clip_art("12 - 3"),
        "e.svg": clip_art(""),
        "f.svg": clip_art("Dog", licence="http://creativecommons.org/licenses/GPL/2.0/"),
        "g.svg": clip_art("long " * 13),
        "h.svg": b"<svg/>",
    }
    files |= {f"signed{n}.svg": clip_art("Clipart by Ann Other - cat") for n in range(3)}
    files |= {f"many{n}.svg": clip_art("gramastar") for n in range(16)}
    files |= {f"some{n}.svg": clip_art("lightning") for n in range(15)}
    found = {art.name: art for art in list_clip_art(files)}
    assert set(found) == {"a.svg", "b.svg", *(f"some{n}.svg" for n in range(15))}
    assert (found["a.svg"].title, found["a.svg"].keywords) == (
        "A red bird & nest",
        ("bird", "north pole"),
    )
    assert found["b.svg"].title == "United States - Ohio"
    assert [found[name].may_mirror for name in ("a.svg", "b.svg")] == [True, False]


def test_clip_art_that_cannot_be_rendered_is_none() -> None:
    good = clip_art("bird")
    masters = draw_clip_art([("a", good), ("b", good[:-9]), ("c", b"<svg/>")])
    assert masters[0] is not None
    assert masters[0].shape == (64, 64, 3)
    assert masters[1:] == [None, None]


def test_glosses_are_parsed_and_limited_in_length() -> None:
    lines = {
        "data.noun": "  2 no meaning | at all\n"
        '00000010 03 n 02 living_thing 0 animate_thing 0 001 ~ 00000020 n 0000 | alive; "it is"  \n'
        f"00000020 03 n 01 long 0 000 | {'x' * 161}  \n"
        f'00000030 03 n 01 cut 0 000 | short; "one"; "{"y" * 150}"; "two"  \n',
        "data.verb": "",
        "data.adj": "00000040 00 s 04 a(p) 0 b(ip) 0 a 1 d 0 000 | good  \n",
        "data.adv": "",
    }
    glosses = list_glosses({name: text.encode() for name, text in lines.items()})
    assert [gloss.text for gloss in glosses] == [
        'living thing, animate thing (noun): alive; "it is"',
        'cut (noun): short; "one"',
        "a, b, d (adjective): good",
    ]
    assert [gloss.name for gloss in glosses] == [
        "noun/00000010",
        "noun/00000030",
        "adjective/00000040",
    ]
    assert glosses[0].sentence == "living thing: alive"


def test_name_words_drop_articles_numbers_and_remarks() -> None:
    assert name_words("The dogs (2)") == name_words("dogs 3") == "dogs"
    assert name_words("A dog.") == "dog"
    # no words are left, but these are different things
    assert name_words("24") != name_words("25")


def test_strong_variation_keeps_white_and_gray() -> None:
    master = np.full((64, 64, 3), 255, np.uint8)
    master[20:44, 20:44] = 100
    varied = [vary_strongly(master, generator(0, str(key)), mirror=True) for key in range(8)]
    assert len({picture.tobytes() for picture in varied}) == 8
    for picture in varied:
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
        assert (picture[0, 0] == 255).all()
        assert 60 < picture[16, 16, 0] < 190
        assert (picture == picture[..., :1]).all()
    master[20:44, 20:44] = (200, 30, 30)
    assert (
        len(
            {
                vary_strongly(master, generator(0, str(key)), mirror=False)[16, 16].tobytes()
                for key in range(8)
            }
        )
        == 8
    )
