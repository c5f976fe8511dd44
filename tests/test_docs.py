"""README says what is true: every configuration key is in its table and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mot_megatron.config import Config, ExpertsConfig, ModalityConfig, Section, UntiedConfig
from mot_megatron.config_files import load_config
from mot_megatron.data.corpus import Corpus

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sections() -> dict[str, type[Section]]:
    """Section names as README writes them."""
    named: dict[str, type[Section]] = {
        "model.modalities.NAME": ModalityConfig,
        "model.towers.NAME.experts": ExpertsConfig,
        "model.untied": UntiedConfig,
    }
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        named[name] = field.annotation
    return named


@pytest.mark.parametrize(("name", "section"), sections().items())
def test_every_key_stands_in_its_section(name: str, section: type[Section]) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `[{name}]`"))
    tables = {"modalities", "towers", "untied"}  # sections of their own
    missing = [key for key in section.model_fields if f"`{key}`" not in row and key not in tables]
    assert not missing


def test_the_corpus_example_writes_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    corpus = Corpus.open(tmp_path / "corpora" / "mine")
    assert [modality.name for modality in corpus.description.modalities] == ["text", "image"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_configurations_load(path: Path) -> None:
    assert load_config(path).run.name == path.stem


def test_files_named_in_readme_exist() -> None:
    named = set(re.findall(r"\b((?:launch|tools|tests|configs|docs)/[\w./-]+\.\w+)\b", README))
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]
