"""The small configuration that the jobs of this folder train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import CONFIG, write_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file whose corpus exists."""
    folder = tmp_path_factory.mktemp("jobs")
    file = folder / "small.toml"
    file.write_text(CONFIG.format(corpus=write_corpus(folder / "corpus")))
    return file
