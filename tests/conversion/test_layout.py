"""The layout of every rank's file is what the ranks of a training job write."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.checkpoint.streaming import Piece, divide
from mot_megatron.config import Config
from mot_megatron.conversion.layout import Layout, describe_layout, layout_config
from mot_megatron.errors import CheckpointError, ConfigError, DataError
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import parts_of
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train.staging import writers
from tests.conversion.states import (
    BATCH,
    EP2,
    EXPERTS,
    FOUR_LAYERS,
    MP2,
    PP2,
    TIED,
    TP2,
    VPP2,
    config_of,
    infos_of,
    kinds_of,
)
from tests.fake_world import fake_world
from tests.model.small_models import small_config

HEADS = "parallel.attention_exchange=heads"
LISTED = "parallel.placement=[{text=1.0,image=0.4},{image=0.6,speech=1.0}]"
TWO_RANKS = "parallel.placement=[{text=1.0,speech=1.0},{image=1.0}]"
FOUR_RANKS = (
    "parallel.modality_parallel_size=4",
    "parallel.placement=[{text=0.6},{image=1.0},{text=0.4},{speech=1.0}]",
)


def written_by_models(layout: Layout) -> list[list[Piece]]:
    """Build every rank's model and return the pieces that it writes."""
    config, parallel = layout.config, layout.config.parallel
    pieces = []
    for rank in range(layout.mesh.world_size):
        with fake_world(rank, layout.mesh.world_size):
            groups = build_process_groups(
                parallel.tensor_model_parallel_size,
                torch.device("cpu"),
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                expert_model_parallel_size=parallel.expert_model_parallel_size,
                placement=layout.placement,
            )
            model = MixtureOfTransformers(config, groups)
            own = []
            for name, parameter, _, writer in writers(model, groups):
                if writer != rank:
                    continue
                for kind in kinds_of(config, name):
                    for part in parts_of(name, parameter):
                        sizes = part.sharding.local_shape(groups.tensor_size)
                        offsets = [0] * len(sizes)
                        if part.sharding.shard_dim is not None:
                            split = part.sharding.shard_dim
                            offsets[split] = sizes[split] * groups.tensor_rank
                        shape = part.sharding.global_shape
                        where = f"{kind}/{part.name}"
                        own.append(Piece(where, shape, torch.float32, tuple(offsets), sizes))
            pieces.append(own)
    return divide(pieces)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, []),
        (2, [TP2]),
        (4, [TP2, TIED]),
        (2, [PP2, TIED]),
        (2, [PP2, VPP2, FOUR_LAYERS]),
        (4, [PP2, FOUR_LAYERS, "parallel.pipeline_layers=[1, 3]"]),
        (2, [MP2, LISTED]),
        (4, [MP2, TWO_RANKS, HEADS, "model.untied.qkv=false", "model.untied.norms=false"]),
        (4, [*FOUR_RANKS, *EXPERTS[:1], EP2]),
        (4, [*EXPERTS, EP2]),
        (4, [*EXPERTS, EP2, TP2, "parallel.sequence_parallel=true"]),
        (8, [*EXPERTS, EP2, PP2, TP2, "parallel.sequence_parallel=true"]),
        (8, [MP2, LISTED, PP2, TP2, TIED]),
        (4, ["parallel.zero_stage=3", TP2]),
        (4, ["model.towers.image.frozen=true", MP2, LISTED]),
        (4, ["model.towers.text={frozen=true,experts={num_moe_experts=4}}", EP2]),
    ],
    ids=lambda value: "+".join(value)[:70] if isinstance(value, list) else None,
)
def test_files_are_those_that_the_ranks_write(world_size: int, overrides: list[str]) -> None:
    config = config_of(*overrides)
    layout = Layout.of(config, world_size)
    files = layout.files(infos_of(config))
    assert files == written_by_models(layout)
    # Every element once.
    infos = infos_of(config)
    written = dict.fromkeys(infos, 0)
    for piece in (piece for of_rank in files for piece in of_rank):
        written[piece.name] += piece.num_bytes
    assert written == {name: info.num_bytes for name, info in infos.items()}


@pytest.mark.parametrize("towers", [1, 2])
def test_fewer_towers(towers: int) -> None:
    names = ["one", "one" if towers == 1 else "two", "one"]
    config = small_config(dict(zip(("text", "image", "speech"), names, strict=True)), BATCH, TP2)
    layout = Layout.of(config, 4)
    assert layout.files(infos_of(config)) == written_by_models(layout)


def test_tensors_of_another_model_are_named() -> None:
    config = config_of()
    layout = Layout.of(config, 1)
    infos = infos_of(config)
    lacking = dict(list(infos.items())[1:])
    with pytest.raises(CheckpointError, match=r"it lacks weight/embedding.lookup.weight$"):
        layout.files(lacking)
    with pytest.raises(CheckpointError, match=r"weight/extra is not of this model$"):
        layout.files({**infos, "weight/extra": infos["weight/embedding.lookup.weight"]})
    wrong = {**infos, "weight/embedding.lookup.weight": infos["weight/final_norm.towers.0.weight"]}
    with pytest.raises(CheckpointError, match=r"has shape \[32\], expected \[128, 32\]"):
        layout.files(wrong)


def changed(source: Config, *overrides: str) -> tuple[Config, list[str]]:
    return layout_config(source, config_of(*overrides))


def test_only_the_layout_is_taken_from_a_configuration() -> None:
    source = config_of("optimizer.lr=0.5", "optimizer.lr_warmup_steps=3")
    config, others = changed(source, TP2, "training.micro_batch_size=2")
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.training.micro_batch_size == 2
    assert config.optimizer == source.optimizer
    assert set(others) == {"optimizer.lr", "optimizer.lr_warmup_steps"}


def test_vocabulary_and_order_of_modalities_may_be_left_to_the_checkpoint() -> None:
    source = config_of()
    model = source.model.model_copy(
        update={
            "vocab_size": None,
            "modalities": dict(reversed(list(source.model.modalities.items()))),
        }
    )
    assert layout_config(source, source.model_copy(update={"model": model})) == (source, [])


def test_layouts_that_do_not_fit() -> None:
    source = config_of()
    with pytest.raises(ConfigError, match=r"model.num_layers = 4 where the checkpoint has 2;"):
        changed(source, FOUR_LAYERS)
    with pytest.raises(ConfigError, match="world size 3 is not divisible"):
        Layout.of(config_of(TP2), 3)
    with pytest.raises(DataError, match="none"):  # "auto" needs the corpus
        Layout.of(config_of(MP2), 2)


def test_description() -> None:
    assert describe_layout(config_of()) == "ZeRO-1"
    text = describe_layout(config_of(TP2, PP2, VPP2, FOUR_LAYERS, MP2, LISTED))
    assert text == (
        "tensor 2, pipeline 2, pieces per stage 2, modality 2,"
        " placement listed, exchange sequence, ZeRO-1"
    )


def test_a_world_of_thousands_of_ranks() -> None:
    config = config_of("training.global_batch_size=4096", TP2, PP2)
    files = Layout.of(config, 4096).files(infos_of(config))
    assert len(files) == 4096
    assert sum(piece.num_bytes for of_rank in files for piece in of_rank) == sum(
        info.num_bytes for info in infos_of(config).values()
    )
