"""Load a trained model from its checkpoint, in one process and without an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mot_megatron.checkpoint import CheckpointInfo, open_checkpoint, read_config_text, read_metadata
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.config import Config, ParallelConfig
from mot_megatron.config_files import parse_config
from mot_megatron.data.blend import open_training_data
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.vocabulary_difference import first_difference
from mot_megatron.errors import CheckpointError
from mot_megatron.model.flops import count_parameters
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.train.state import load_weights

_LEAST_BYTES_PER_PARAMETER = 2


@dataclass(frozen=True)
class SavedRun:
    """The newest verified checkpoint of a run and its configuration; tensors are not read yet."""

    checkpoint: CheckpointInfo
    config: Config
    skipped: tuple[str, ...]
    """One line per skipped checkpoint, with the reason."""

    @classmethod
    def open(cls, path: Path) -> SavedRun:
        """Open the checkpoint at ``path``.

        Args:
            path: Folder of a run, of its checkpoints, or of a single checkpoint.

        Raises:
            CheckpointError: There is no usable checkpoint.
        """
        inside = checkpoint_directory(path)
        search = open_checkpoint(inside if inside.is_dir() else path)
        checkpoint = search.checkpoint
        assert checkpoint is not None  # open_checkpoint raises instead
        config = parse_config(read_config_text(checkpoint), f"{checkpoint.path}: its configuration")
        _check_size(config, checkpoint)
        return cls(checkpoint, config, search.skipped)

    def check_corpus(self, corpus: Corpus, remedy: str) -> None:
        """Check that the ids of ``corpus`` mean what those of the run's corpus meant.

        Its documents may be others.

        Args:
            corpus: The corpus to use.
            remedy: The option or key that sets the corpus, for the error message.

        Raises:
            CheckpointError: The modalities, the special tokens or a codebook differ.
        """
        metadata = read_metadata(self.checkpoint)
        if metadata.get("data", {}).get("corpus") == corpus.fingerprint:
            return
        vocabulary = metadata.get("vocabulary")
        if vocabulary == corpus.vocabulary_digest:
            return
        known = "differ" if vocabulary else "may differ (the checkpoint is too old to tell)"
        if meaning := metadata.get("meaning_of_ids"):
            names = "the checkpoint", "the corpus"
            known += f" ({first_difference(meaning, corpus.vocabulary, names)})"
        raise CheckpointError(
            f"{self.checkpoint.path} was trained on another corpus than {corpus.directory}, and the"
            f" meanings of their token ids {known}; set the right corpus with {remedy}"
        )


def _check_size(config: Config, checkpoint: CheckpointInfo) -> None:
    """Check that a checkpoint's files are long enough for the model that it describes.

    A damaged configuration may describe a model that does not fit into memory.

    Raises:
        CheckpointError: The files are too short.
    """
    stored = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    parameters = count_parameters(config.model).total
    if parameters * _LEAST_BYTES_PER_PARAMETER > stored:
        raise CheckpointError(
            f"{checkpoint.path}: its configuration describes {parameters:,} parameters, for"
            f" which its {stored:,} bytes are too few"
        )


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its configuration, corpus and checkpoint."""

    model: MixtureOfTransformers
    config: Config
    """Configuration of the run, adapted to a single process."""
    corpus: Corpus
    checkpoint: CheckpointInfo
    skipped: tuple[str, ...]
    """One line per skipped checkpoint, with the reason."""


def load_trained_model(
    path: Path, device: torch.device, corpus_directory: Path | None = None
) -> TrainedModel:
    """Load the weights of a checkpoint that was saved in any layout.

    On a CPU the weights stay in fp32, which is as precise as the checkpoint and not slower there.

    Args:
        path: Folder of a run, of its checkpoints, or of a single checkpoint.
        device: Device of the model.
        corpus_directory: Folder of a corpus to use instead of the training data, for example
            because that has moved since; None: the training data.

    Raises:
        CheckpointError: There is no usable checkpoint, or the corpus is another one.
        DataError: The corpus cannot be opened.
    """
    saved = SavedRun.open(path)
    data = saved.config.data
    if corpus_directory is not None:
        data = data.model_copy(update={"corpus": corpus_directory, "sources": ()})
    corpus = open_training_data(data)
    saved.check_corpus(corpus, "--corpus")
    # Experts must choose among as many tokens as in training.
    pool = {"micro_batch_size": saved.config.pool_sequences}
    training = saved.config.training.model_copy(update=pool)
    alone = {"parallel": ParallelConfig(), "training": training}
    config = saved.config.model_copy(update=alone)
    groups = build_single_process_groups(device)
    narrow = config.training.precision == "bf16" and device.type != "cpu"
    model = MixtureOfTransformers(config, groups, torch.bfloat16 if narrow else torch.float32)
    load_weights(model, saved.checkpoint, groups)
    return TrainedModel(model, config, corpus, saved.checkpoint, saved.skipped)
