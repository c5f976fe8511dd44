"""The inventory lists exactly the parameters of the built model, on every rank of many layouts."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.model.inventory import held_parameters, is_frozen
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import experts_of, is_auxiliary, is_replica, sharding_of, tower_of
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.parallel.placement import balanced_placement
from tests.fake_world import fake_world
from tests.model.small_models import small_config

THREE = {"text": "text", "image": "image", "speech": "speech"}
TIED = "model.untie_embeddings_and_output_weights=false"
BIASES = "model.add_qkv_bias=true"
TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
VECTORS = [
    "model.modalities.image.objective.kind=diffusion",
    "model.modalities.image.width=6",
]
EXPERTS = [
    "model.towers.text.experts={num_moe_experts=4,causal_router=true}",
    "model.towers.speech.experts={num_moe_experts=2,routing='topk'}",
]
FOUR_LAYERS = "model.num_layers=4"


def build(config: Config, rank: int, world_size: int) -> MixtureOfTransformers:
    parallel = config.parallel
    size = parallel.modality_parallel_size
    placement = balanced_placement([3.0, 2.0, 1.0], size) if size > 1 else None
    groups = build_process_groups(
        parallel.tensor_model_parallel_size,
        torch.device("cpu"),
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        placement=placement,
    )
    assert groups.mesh.world_size == world_size
    assert groups.rank == rank
    return MixtureOfTransformers(config, groups)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (1, [TIED, "model.qk_norm=false", "model.num_query_groups=2"]),
        (
            1,
            ["model.untied.norms=false", "model.untied.qkv=false", "model.untied.final_norm=false"],
        ),
        (2, [TP2, BIASES, "model.num_query_groups=2", "model.untied.qkv=false"]),
        (2, [TP2, "model.num_query_groups=2", "model.untied.feed_forward=false"]),
        (2, [PP2]),
        (2, [PP2, TIED]),
        (2, [PP2, TIED, FOUR_LAYERS, "parallel.virtual_pipeline_model_parallel_size=2"]),
        (2, [PP2, FOUR_LAYERS, "parallel.pipeline_layers=[1, 3]"]),
        (2, ["parallel.modality_parallel_size=2", "model.untied.output_projection=false"]),
        (4, ["parallel.modality_parallel_size=4", "model.untied.qk_norm=false"]),
        (8, [TP2, PP2, BIASES, "parallel.modality_parallel_size=2", TIED]),
        (1, VECTORS),
        (4, [*VECTORS, TP2, PP2, TIED]),
        (1, EXPERTS),
        (1, ["model.towers.image.frozen=true", "model.untied.norms=false"]),
        (2, ["model.towers.text={frozen=true,experts={num_moe_experts=4}}", EP2]),
        (2, [*EXPERTS, EP2]),
        (4, [*EXPERTS, EP2, TP2, "parallel.sequence_parallel=true"]),
        (4, [*EXPERTS, EP2, PP2]),
        (4, [*EXPERTS, EP2, "parallel.modality_parallel_size=2"]),
    ],
)
def test_inventory_equals_the_parameters_of_the_built_model(
    world_size: int, overrides: list[str]
) -> None:
    config = small_config(THREE, *overrides)
    seen = set()
    for rank in range(world_size):
        with fake_world(rank, world_size):
            model = build(config, rank, world_size)
        built = [
            (
                name,
                tuple(parameter.shape),
                tower_of(parameter),
                sharding_of(parameter),
                is_replica(parameter),
                len(experts_of(parameter) or ()),
                is_auxiliary(parameter),
                not parameter.requires_grad,
            )
            for name, parameter in model.named_parameters()
        ]
        held = held_parameters(config, model.groups.pipeline_rank, model.towers)
        assert [
            (p.name, p.shape, p.tower, p.sharding, p.replica, p.experts, p.auxiliary, p.frozen)
            for p in held
        ] == built
        assert [p.frozen for p in held] == [is_frozen(config.model, p.name) for p in held]
        assert sum(p.size for p in held) == sum(p.numel() for p in model.parameters())
        seen.update(built)
    replicas = [name for name, _, _, _, replica, *_ in seen if replica]
    assert replicas == (
        ["embedding.lookup.weight"] if PP2 in overrides and TIED in overrides else []
    )
