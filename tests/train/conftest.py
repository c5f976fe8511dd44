"""Corpora that several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import write_corpus


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Corpora with all modalities in every document, one per document, and one modality absent."""
    root = tmp_path_factory.mktemp("corpora")
    return {
        "mixed": write_corpus(root / "mixed"),
        "lacking": write_corpus(root / "lacking", single_modality=True),
        "absent": write_corpus(root / "absent", without="image"),
    }
