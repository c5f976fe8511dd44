"""Raw files with codecs other than the default: larger pictures, pretrained, a user's own."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mot_megatron.data.codebooks import codec_class, load_codec
from mot_megatron.data.codebooks.codec import Codec, PictureCodec
from mot_megatron.data.codebooks.image import PatchCodec
from mot_megatron.data.codebooks.vqgan import ConvolutionalCodec
from mot_megatron.data.codec_names import REGISTERED
from mot_megatron.data.corpus import Corpus, Modality, parse_description
from mot_megatron.data.documents.sources import Reading
from mot_megatron.data.documents.vocabulary import GivenCodebook
from mot_megatron.data.inspection import inspect
from mot_megatron.errors import DataError
from tests.data.codebooks.test_vqgan import imported, janus, taming_names
from tests.data.documents.own_codecs import Loudness, MeanGray
from tests.data.documents.raw_files import TINY, build, content, make_items, write_jsonl

OWN = "tests.data.documents.own_codecs"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("raw"), make_items())


def first_of(corpus: Corpus, kind: int) -> np.ndarray:
    """Return the ids of a segment of the modality with index ``kind``."""
    document = corpus.split("train")[0]
    return document[corpus.description.modality_of_id[document] == kind]


def codec_of(corpus: Corpus, kind: int) -> Codec:
    return load_codec(corpus.directory, corpus.description.modalities[kind])


def test_larger_pictures_in_larger_patches(source: Path, tmp_path: Path) -> None:
    vocabulary = replace(TINY, picture_pixels=40, patch_pixels=8)
    build(source, tmp_path / "corpus", vocabulary=vocabulary, reading=Reading(fit="pad"))
    corpus = Corpus.open(tmp_path / "corpus")
    codec = codec_of(corpus, 1)
    assert isinstance(codec, PatchCodec)
    assert (codec.pixels, codec.patch, codec.tokens_per_item) == (40, 8, 25)
    ids = first_of(corpus, 1)
    assert len(ids) == 25
    codec.write(ids, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (40, 40)
        # The pictures are 50 x 40, so that padding leaves a white row above and below.
        assert np.asarray(picture)[[0, -1]].min() > 200
    report = inspect(corpus, tmp_path / "out")
    assert set(report["entropies"]["image"]["pairs"]) == {2, 5}  # the code above is 5 before
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height % 40 == 0
    again = Corpus.open(tmp_path / "corpus")
    assert again.vocabulary_digest == corpus.vocabulary_digest
    build(source, tmp_path / "other", vocabulary=tmp_path / "corpus", reading=Reading(fit="pad"))
    assert codec_of(Corpus.open(tmp_path / "other"), 1).tokens_per_item == 25


def test_pictures_that_do_not_divide(source: Path, tmp_path: Path) -> None:
    vocabulary = replace(TINY, picture_pixels=40, patch_pixels=7)
    with pytest.raises(DataError, match=r"--picture-pixels, --patch-pixels: pictures of 40"):
        build(source, tmp_path / "corpus", vocabulary=vocabulary)


def test_a_pretrained_codec(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = imported(tmp_path / "model", taming_names(janus()))
    vocabulary = replace(TINY, image_codebook=GivenCodebook("vqgan", path))
    build(source, tmp_path / "corpus", vocabulary=vocabulary)
    build(source, tmp_path / "again", vocabulary=vocabulary, workers=2)
    one, other = (content(tmp_path / name) for name in ("corpus", "again"))
    described = ("corpus.toml", "statistics.json")  # which have the name of the corpus
    assert {**one, **dict.fromkeys(described)} == {**other, **dict.fromkeys(described)}
    corpus = Corpus.open(tmp_path / "corpus")
    codec = codec_of(corpus, 1)
    assert isinstance(codec, ConvolutionalCodec)
    assert codec.modality.codebook == "image.st"
    assert (tmp_path / "corpus" / "image.st").read_bytes() == path.read_bytes()
    ids = first_of(corpus, 1)
    assert len(ids) == codec.tokens_per_item == 36
    assert codec.decode(ids).shape == (24, 24, 3)


def test_codecs_of_a_user(source: Path, tmp_path: Path) -> None:
    (tmp_path / "levels.txt").write_text("16")
    vocabulary = replace(
        TINY,
        image_codebook=GivenCodebook(f"{OWN}:MeanGray", tmp_path / "levels.txt"),
        speech_codebook=GivenCodebook(f"{OWN}:Loudness", tmp_path / "levels.txt"),
    )
    build(source, tmp_path / "corpus", vocabulary=vocabulary)
    corpus = Corpus.open(tmp_path / "corpus")
    text = (tmp_path / "corpus" / "corpus.toml").read_text()
    assert f'codec = "{OWN}:MeanGray"' in text
    image, speech = codec_of(corpus, 1), codec_of(corpus, 2)
    assert isinstance(image, MeanGray)
    assert isinstance(speech, Loudness)
    assert (image.modality.size, speech.modality.size) == (16, 10)
    assert len(first_of(corpus, 1)) == 4
    sound = first_of(corpus, 2)
    assert (sound - speech.modality.first_id).tolist() == [3] * 4  # 0.4 s of amplitude 0.3
    speech.write(sound, tmp_path / "sound.wav")
    with wave.open(str(tmp_path / "sound.wav")) as stream:
        assert stream.getframerate() == 8000
    report = inspect(corpus, tmp_path / "out")
    assert set(report["files"]) == {"lengths", "contact_sheet", "speech"}
    with wave.open(report["files"]["speech"]) as stream:
        assert stream.getframerate() == 8000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vqgn", "codec 'vqgn': expected one of bpe, .* or module:Class"),
        ("none", "codec 'none' has no class"),
        ("not_a_package.codecs:Mine", "module not_a_package.codecs cannot be imported"),
        (f"{OWN}:Missing", f"module {OWN} has no class Missing"),
        (f"{OWN}:Unrelated", "is not a subclass of mot_megatron.data.codebooks.codec.Codec"),
        (f"{OWN}:OWN", "has no class OWN"),
        ("os:getcwd", "is not a subclass of"),
    ],
)
def test_codecs_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        codec_class(name)


def test_a_codec_for_another_kind(source: Path, tmp_path: Path) -> None:
    given = GivenCodebook(f"{OWN}:Loudness", source)
    vocabulary = replace(TINY, image_codebook=given)
    with pytest.raises(DataError, match=r"codec '.*:Loudness' is for speech, expected one for im"):
        build(source, tmp_path / "corpus", vocabulary=vocabulary)


def test_an_unknown_codec_in_a_description(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "corpus")
    path = tmp_path / "corpus" / "corpus.toml"
    text = path.read_text().replace('"image_patches"', '"image patches"')
    with pytest.raises(DataError, match=r"codec = .*expected one of bpe, image_patches"):
        parse_description(text, "corpus.toml")


def test_every_registered_codec_has_its_class() -> None:
    for name in REGISTERED:
        found = codec_class(name)
        assert found.kind in ("text", "image", "speech")
        assert issubclass(found, PictureCodec) == (found.kind == "image")
        assert found.suffix.startswith(".")
        modality = Modality(name="m", first_id=0, size=2, codec=name, codebook="absent.npz")
        with pytest.raises(DataError, match="No such file"):
            load_codec(Path("absent"), modality)
