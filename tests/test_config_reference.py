"""The configuration reference agrees with the code, and docs/configuration.md is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig, ModelConfig
from mot_megatron.config_reference import config_reference
from mot_megatron.config_section import Section

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def rows(section: str) -> dict[str, list[str]]:
    """Return the cells of a section's table by key."""
    part = config_reference().partition(f"## `[{section}]`\n")[2].partition("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in table}


def test_page_equals_the_generated_reference():
    assert PAGE.read_text(encoding="utf-8") == config_reference(), (
        "regenerate it with: python tools/write_config_reference.py"
    )


@pytest.mark.parametrize(
    ("name", "section"),
    [("run", Config), ("model", ModelConfig), ("model.towers.NAME.experts", ExpertsConfig)],
)
def test_every_key_has_a_row(name: str, section: type[Section]) -> None:
    kind = section.model_fields[name].annotation if section is Config else section
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    assert list(rows(name)) == list(kind.model_fields)


def test_types_bounds_and_defaults():
    assert rows("optimizer")["adam_beta1"][:2] == ["number ≥ 0 and < 1", "`0.9`"]
    assert rows("training")["train_steps"][:2] == ["integer > 0", "*required*"]
    assert rows("training")["precision"][:2] == ['`"fp32"`, `"bf16"`', '`"bf16"`']
    assert rows("model")["num_query_groups"][:2] == ["integer > 0", "*absent*"]
    assert rows("run")["directory"][:2] == ["path", '`"runs"`']
    assert rows("parallel")["pipeline_layers"][0] == "array of integers > 0"
    assert rows("parallel")["virtual_pipeline_model_parallel_size"][0] == "integer ≥ 2"


def test_nested_tables_link_to_their_sections():
    assert "(#modelmodalitiesname)" in rows("model")["modalities"][2]
    assert "## `[model.modalities.NAME]`" in config_reference()


def test_arrays_of_tables_link_to_their_sections():
    assert rows("data")["sources"][:2] == ["array of tables", "none"]
    assert "(#datasources)" in rows("data")["sources"][2]
    assert "## `[[data.sources]]`" in config_reference()


def test_every_key_has_a_description():
    meanings = [
        cells[-1]
        for line in config_reference().splitlines()
        if line.startswith("| `")
        for cells in [line.strip("| ").split(" | ")]
    ]
    assert len(meanings) > 70
    assert all(len(meaning) > 5 for meaning in meanings)
