"""Choose the placement of towers from their numbers of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mot_megatron.config import Config
from mot_megatron.config_model import ModelConfig
from mot_megatron.model.flops import step_flops
from mot_megatron.parallel.placement import Placement, balanced_placement
from mot_megatron.rules import check_expert_holders, check_trained


def tokens_of_towers(model: ModelConfig, tokens_per_modality: Mapping[str, int]) -> tuple[int, ...]:
    """Return the tokens of each tower, K of them, from the tokens of each modality."""
    tokens = [0] * model.num_towers
    for modality, tower in zip(model.modalities, model.towers_of_modalities, strict=True):
        tokens[tower] += tokens_per_modality[modality]
    return tuple(tokens)


def flops_of_towers(model: ModelConfig, tower_tokens: Sequence[int]) -> tuple[float, ...]:
    """Return the FLOPs of each tower's tokens, K of them: projections, networks and head.

    Attention is excluded, because its distribution over ranks does not depend on towers. Every
    token counts as a row of the head, though the last one of a document has no label.
    """
    of_towers = step_flops(model, tower_tokens, attended_pairs=0, labels=0).towers
    heads = (step_flops(model, (0,) * len(of_towers), 0, labels=n).head for n in tower_tokens)
    return tuple(float(sum(pair)) for pair in zip(of_towers, heads, strict=True))


def place_towers(config: Config, tower_tokens: Sequence[int]) -> Placement | None:
    """Return the placement of a resolved configuration; None without modality parallelism.

    Args:
        config: Configuration with a placement, or "auto" to balance the FLOPs of the tokens.
        tower_tokens: Tokens of each tower in the training split, K of them; only their proportions
            count.
    """
    parallel, model = config.parallel, config.model
    if parallel.modality_parallel_size == 1:
        return None
    if parallel.placement == "auto":
        flops = flops_of_towers(model, tower_tokens)
        return balanced_placement(flops, parallel.modality_parallel_size)
    return Placement(
        tuple(
            tuple(shares.get(tower, 0.0) for tower in model.tower_names)
            for shares in parallel.placement
        )
    )


def check_placed(config: Config, placement: Placement | None, world_size: int) -> None:
    """Check what depends on where the towers are: their experts, and that all ranks train.

    Raises:
        ConfigError: See ``check_expert_holders`` and ``check_trained``.
    """
    check_experts_placed(config, placement, world_size)
    if placement is not None:
        names = config.model.tower_names
        ranks = range(config.parallel.modality_parallel_size)
        check_trained(config, [[names[k] for k in placement.towers(rank)] for rank in ranks])


def check_experts_placed(config: Config, placement: Placement | None, world_size: int) -> None:
    """Check that the holders of each tower can share its experts equally.

    Raises:
        ConfigError: See ``check_expert_holders``.
    """
    if placement is None:
        return  # all data-parallel ranks hold all towers; check_world_size has checked them
    parallel = config.parallel
    copies = world_size // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.modality_parallel_size
    )
    names = config.model.tower_names
    holders = {name: len(placement.holders(tower)) for tower, name in enumerate(names)}
    check_expert_holders(config, {name: ranks * copies for name, ranks in holders.items()})
