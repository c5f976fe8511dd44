"""Runs with random weights, their exports, and the logits of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mot_megatron.checkpoint import NamedTensor, save_checkpoint
from mot_megatron.checkpoint.names import STATE_KINDS, checkpoint_directory
from mot_megatron.config import Config
from mot_megatron.conversion.huggingface.export import plan_export, write_export
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.corpus import Corpus
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import parts_of
from mot_megatron.parallel.groups import build_single_process_groups
from tests.model.small_models import vary_vectors

DENSE = [f"model.modalities.{name}.tower=one" for name in ("text", "image", "speech")]
PRE = "model.norm_placement=pre"
NO_QK_NORM = "model.qk_norm=false"
BIASES = "model.add_qkv_bias=true"
TIED = "model.untie_embeddings_and_output_weights=false"
CHOSEN = "model.towers.text.experts={num_moe_experts=4,capacity_factor=1.5,causal_router=true}"
TOP2 = "model.towers.image.experts={num_moe_experts=4,routing='topk',topk=2,capacity_factor=1.0}"


def random_model(config: Config) -> MixtureOfTransformers:
    """Build a model with random weights, none of them all ones or zeros."""
    model = MixtureOfTransformers(config, build_single_process_groups(torch.device("cpu")))
    vary_vectors(model)
    return model


def save_run(model: MixtureOfTransformers, config: Config, corpus: Corpus, step: int = 7) -> Path:
    """Save weights, and moments of the same values, as a checkpoint; return the run's folder."""
    tensors = [
        NamedTensor(f"{kind}/{part.name}", parameter.detach()[part.rows], part.sharding)
        for kind in STATE_KINDS
        for name, parameter in model.named_parameters()
        for part in parts_of(name, parameter)
    ]
    save_checkpoint(
        checkpoint_directory(config.run_directory),
        step,
        tensors,
        metadata={"data": {"corpus": corpus.fingerprint}, "vocabulary": corpus.vocabulary_digest},
        config_text=config.to_toml(),
        groups=None,
        keep=1,
    )
    return config.run_directory


def export(
    run: Path,
    corpus: Corpus,
    directory: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 1 << 30,
) -> Path:
    """Export a run's checkpoint; return the folder."""
    write_export(plan_export(CheckpointSource(run), corpus, dtype, shard_bytes), directory)
    return directory


def random_ids(seed: int, corpus: Corpus, shape: tuple[int, int]) -> torch.Tensor:
    """Return sequences of short runs of all modalities, [b, s]."""
    random = np.random.default_rng(seed)
    modalities = corpus.description.modalities
    runs = random.integers(0, len(modalities), shape[0] * shape[1])
    chosen = np.repeat(runs, random.integers(1, 5, len(runs)))[: len(runs)]
    bounds = np.array([(modality.first_id, modality.end_id) for modality in modalities])
    ids = random.integers(bounds[chosen, 0], bounds[chosen, 1])
    return torch.from_numpy(ids).view(shape)


@torch.no_grad()
def own_logits(
    model: MixtureOfTransformers, corpus: Corpus, ids: torch.Tensor, causal: bool = True
) -> torch.Tensor:
    """Return this program's logits [b, s, V] of documents [b, s]."""
    batch = build_micro_batch(
        ids.numpy(),
        np.zeros(ids.shape, dtype=np.int32),
        corpus.description.modality_of_id,
        model.config.towers_of_modalities,
        num_towers=model.config.num_towers,
        slot_multiple=1,
    )
    if not causal:
        return model.sequence_logits(batch).view(*ids.shape, -1)
    with model.routed_causally():
        return model.sequence_logits(batch).view(*ids.shape, -1)
