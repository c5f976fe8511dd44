"""Commands that take the corpus of a configuration take a blend as well."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from mot_megatron.cli.corpora import resolve_from_corpus
from mot_megatron.cli.plan import resolve
from mot_megatron.cli.timed_jobs import on_corpus
from mot_megatron.config import Config
from mot_megatron.conversion.layout import Layout
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import ConfigError, DataError
from tests.small_runs import small_config, write_corpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("corpora")
    return [write_corpus(root / "all", seed=1), write_corpus(root / "few", seed=2, without="text")]


def blended(folders: list[Path], weights: tuple[float, float], *overrides: str) -> Config:
    tables = ", ".join(
        f'{{corpus="{folder}", weight={weight}}}'
        for folder, weight in zip(folders, weights, strict=True)
    )
    given = ["-data.corpus", f"data.sources=[{tables}]", *overrides]
    return small_config(folders[0], given)


@pytest.mark.parametrize("weights", [(1, 1), (1, 9), (9, 1)])
def test_tokens_of_modalities_follow_the_weights(
    folders: list[Path], weights: tuple[float, float]
) -> None:
    config, tokens = resolve_from_corpus(blended(folders, weights))
    assert config.model.vocab_size == 256
    assert tokens is not None
    counts = [Corpus.open(folder).description.splits["train"] for folder in folders]
    share = Fraction(weights[0]) / Fraction(sum(weights))
    text = share * Fraction(counts[0].tokens_per_modality["text"], counts[0].tokens)
    total = sum(each.tokens for each in counts)
    assert sum(tokens.values()) == total
    assert abs(tokens["text"] - text * total) <= 1
    _, of_towers, note = resolve(config)
    assert of_towers == tuple(tokens.values())
    assert note.endswith(f"({folders[0]}, {folders[1]})")


def test_an_absent_source_is_an_absent_corpus(folders: list[Path], tmp_path: Path) -> None:
    config = blended([folders[0], tmp_path / "none"], (1, 1))
    assert resolve_from_corpus(config) == (config, None)
    with pytest.raises(ConfigError, match=f"there is no .*, {tmp_path}/none/corpus.toml to derive"):
        resolve(config)
    with pytest.raises(DataError, match=f"{tmp_path}/none/corpus.toml: absent"):
        on_corpus(config, synthetic=False)
    assert on_corpus(config, synthetic=True).data.folders[1] == tmp_path / "none"


def test_jobs_get_absolute_paths(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders[0].parent)
    config = blended([Path("all"), Path("few")], (1, 1))
    assert on_corpus(config, synthetic=False).data.folders == tuple(folders)


def test_placement_of_towers_follows_the_weights(folders: list[Path]) -> None:
    busiest = []
    for weights in ((1, 0.001), (0.001, 1)):
        settings = ["parallel.modality_parallel_size=2", "model.vocab_size=256"]
        layout = Layout.of(blended(folders, weights, *settings), 2)
        assert layout.placement is not None
        busiest.append(layout.placement.shares)
    # With hardly any text, a single rank can hold text and another tower.
    assert busiest[0] != busiest[1]
