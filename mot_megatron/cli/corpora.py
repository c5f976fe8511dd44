"""What a command that builds no model takes from the corpus of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mot_megatron.config import Config

TRAIN_SPLIT = "train"


def resolve_from_corpus(config: Config) -> tuple[Config, Mapping[str, int] | None]:
    """Return the resolved configuration, and the tokens of each modality in the training split.

    Those of a blend are in the proportions in which training reads them. If a corpus is absent, the
    configuration stays as it is, and there are no tokens.

    Raises:
        DataError: The corpus cannot be read.
    """
    if not all((folder / "corpus.toml").exists() for folder in config.data.folders):
        return config, None
    # Imported here because it imports megatron, which takes seconds.
    from mot_megatron.data.blend import open_training_data

    description = open_training_data(config.data).description
    names = [modality.name for modality in description.modalities]
    config = config.resolved_for(names, description.vocab_size, description.continuous)
    return config, description.splits[TRAIN_SPLIT].tokens_per_modality
