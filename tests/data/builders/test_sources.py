"""The parts that builders share: packages, splits, pictures and voices."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from mot_megatron.data.builders.concepts import join_concepts
from mot_megatron.data.builders.deb import read_deb
from mot_megatron.data.builders.espeak import VARIANTS, Speaker, Utterance, speak
from mot_megatron.data.builders.openmoji import VOICES, list_emoji
from mot_megatron.data.builders.packages import optional_package
from mot_megatron.data.builders.pictures import read_picture, render_svg, vary_picture
from mot_megatron.data.builders.randomness import generator, split_of
from mot_megatron.data.builders.stamps import concepts_of, list_stamps
from mot_megatron.errors import DataError
from tests.data.builders.packages import ar, deb, picture, recording


def test_deb_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"usr/a": b"first", "etc/b": b"second", "usr/c": b""}))
    found = read_deb(path, lambda name: name.startswith("usr/"))
    assert found == {"usr/a": b"first", "usr/c": b""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "not a .deb"),
        (ar({"debian-binary": b"2.0\n"}), r"no data\.tar inside"),
        (ar({"data.tar.zst": b""}), r"data\.tar\.zst has an unsupported compression"),
        (ar({"data.tar.xz": b"rubbish"}), "damaged or truncated"),
        (deb({"usr/a": b"x" * 5000})[:-40], "damaged or truncated"),
        (b"!<arch>\n" + b"data.tar.xz" + b" " * 49, "has size"),
    ],
)
def test_error_names_a_bad_deb(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.deb"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.deb: .*{message}"):
        read_deb(path, lambda _: True)


def test_error_names_a_missing_deb(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.deb: No such file"):
        read_deb(tmp_path / "none.deb", lambda _: True)


def test_error_names_a_missing_package() -> None:
    with pytest.raises(DataError, match="package no-such-thing is not installed; run pip install"):
        optional_package("no_such_thing", "no-such-thing")


def test_pictures_do_not_depend_on_system_fonts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts = tmp_path / ".fonts"
    fonts.mkdir()
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", fonts)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = '<text x="5" y="60" font-size="40" font-family="DejaVu Sans">word</text>'
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 99 99">{text}</svg>'
    with_fonts = optional_package("resvg_py", "resvg_py").svg_to_bytes(svg_string=drawing)
    assert not (read_picture(bytes(with_fonts), "a.svg") == 255).all()
    with pytest.raises(DataError, match=r"a\.svg: the picture is fully transparent"):
        render_svg(drawing, "a.svg")


def test_split_depends_only_on_the_concept() -> None:
    splits = [split_of(f"concept {number}") for number in range(5000)]
    assert 0.05 < splits.count("validation") / 5000 < 0.07  # 6%, standard error 0.3%
    assert splits == [split_of(f"concept {number}") for number in range(5000)]


def test_generators_differ_by_key_and_seed() -> None:
    draws = {
        int(generator(seed, *key).integers(2**62))
        for seed in (0, 1)
        for key in (("a", "b"), ("a", "c"), ("a",))
    }
    assert len(draws) == 6


def test_concepts_are_joined_transitively() -> None:
    marks = {"d": ["1"], "b": ["2", "3"], "c": ["3"], "a": ["4"], "e": ["1", "2"]}
    assert join_concepts(marks) == {"a": "a", "b": "b", "c": "b", "d": "b", "e": "b"}


def test_emoji_tones_share_a_name() -> None:
    emoji = list_emoji()
    assert len(emoji) > 3900
    assert all(set(each.names) == set(VOICES) for each in emoji)
    by_characters = {each.characters: each for each in emoji}
    thumb = by_characters["\U0001f44d"]
    dark = by_characters["\U0001f44d\U0001f3ff"]
    assert (thumb.base_name, thumb.has_tone) == ("thumbs_up", False)
    assert (dark.base_name, dark.has_tone) == ("thumbs_up", True)
    assert dark.names["fr"].startswith("pouce vers le haut")
    # The package's name mentions the people only if there are two with different tones.
    plain = {each.base_name for each in emoji if not each.has_tone}
    assert {each.base_name for each in emoji if each.has_tone} <= plain


def test_stamps_are_listed_and_joined() -> None:
    files = {
        "a.png": picture(1),
        "a.txt": b"A cat.\nfr.utf8=Un chat\nca@valencia.utf8=Un gat\nde.utf8=\n",
        "a_desc.ogg": recording(1),
        "a_desc_pt_BR.wav": recording(2),
        "b.svg": b"<svg/>",
        "b.txt": b"a CAT",
        "c.png": picture(3),
        "c.txt": b"A dog.",
        "c_desc_fr.ogg": recording(2),
        "c.dat": b"noflip\nnomirror\n",
        "d.png": picture(4),
        "e.txt": b"No picture.",
        "f.png": picture(5),
        "f.txt": b"\nfr.utf8=sans anglais",
        "g.png": picture(6),
        "g.txt": b"A hen.",
        "g_desc.txt": b"no recording",
    }
    stamps = {stamp.name: stamp for stamp in list_stamps(files)}
    assert sorted(stamps) == ["a", "b", "c", "g"]
    assert stamps["a"].captions == {"en": "A cat.", "fr": "Un chat"}
    assert stamps["a"].recordings == {"en": "a_desc.ogg", "pt_BR": "a_desc_pt_BR.wav"}
    assert stamps["b"].picture == "b.svg"
    assert stamps["g"].recordings == {}
    assert [stamps[name].may_mirror for name in "ac"] == [True, False]
    # a and b share their caption's words, a and c a recording
    assert concepts_of(stamps.values(), files) == {"a": "a", "b": "a", "c": "a", "g": "g"}


def test_pictures_are_centered_on_white_and_varied() -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">'
        '<rect x="4" width="4" height="8" fill="#f00"/></svg>'
    )
    master = render_svg(svg, "square")
    assert master.shape == (64, 64, 3)
    # cropped to the rectangle, which is twice as tall as wide, and centered on white
    assert master[32, 32].tolist() == [255, 0, 0]
    assert master[32, 4].tolist() == [255, 255, 255]
    varied = [vary_picture(master, generator(0, str(key)), mirror=False) for key in range(8)]
    assert all(one.shape == (32, 32, 3) for one in varied)
    assert len({one.tobytes() for one in varied}) > 4
    assert np.array_equal(varied[3], vary_picture(master, generator(0, "3"), mirror=False))


def test_error_names_a_bad_picture() -> None:
    with pytest.raises(DataError, match=r"x\.svg: cannot be rendered"):
        render_svg("<svg", "x.svg")
    with pytest.raises(DataError, match=r"x\.png: not an image"):
        read_picture(b"no", "x.png")
    with pytest.raises(DataError, match=r"x\.svg: the picture is fully transparent"):
        render_svg('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>', "x.svg")


def test_voices_are_deterministic() -> None:
    sentences = [Utterance("a red heart", "en-us" + variant, 170, 50) for variant in VARIANTS]
    first, second = speak(sentences), speak(sentences)
    for one, other in zip(first, second, strict=True):
        assert len(one.units) > 10
        assert np.array_equal(one.units, other.units)
    # different voices give different sounds
    assert len({one.units.tobytes() for one in first}) == len(VARIANTS)


def test_error_names_an_unknown_voice() -> None:
    with Speaker() as speaker, pytest.raises(DataError, match="no voice 'klingonese'"):
        speaker.say(Utterance("x", "klingonese", 170, 50))
