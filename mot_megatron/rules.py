"""Rules across configuration keys: combinations that are illegal, and the nearest legal values.

All rules are checked before any process group is created. Each violation is explained in one line.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from mot_megatron.config import Config
from mot_megatron.config_model import (
    VOCABULARY_MULTIPLE,
    ModelConfig,
    ObjectiveConfig,
)
from mot_megatron.errors import ConfigError
from mot_megatron.legal_values import divisors, nearest, nearest_multiples
from mot_megatron.rules_experts import check_experts


def check(config: Config, source: str) -> None:
    """Check the rules that do not depend on the number of ranks.

    Raises:
        ConfigError: Names ``source``, the keys, their values and what is allowed.
    """
    _check_data(config, source)
    _check_shapes(config, source)
    _check_tensor_parallel(config, source)
    _check_pipeline(config, source)
    _check_modality_parallel(config, source)
    check_experts(config, source)
    _check_frozen(config, source)
    _check_zero(config, source)
    _check_training(config, source)
    _check_objectives(config, source)
    _check_checkpoint(config, source)


MOST_ACCUMULATION_STEPS = 100_000
"""Micro-batches per step on one rank, far more than any training uses."""


def check_world_size(config: Config, world_size: int) -> None:
    """Check the rules that depend on the number of ranks.

    Call this before creating any process group.

    Raises:
        ConfigError: Names the sizes that do not divide, and the nearest legal values.
    """
    parallel = config.parallel
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "modality_parallel_size": parallel.modality_parallel_size,
    }
    product = math.prod(sizes.values())
    if world_size % product:
        factors = {key: size for key, size in sizes.items() if size > 1}
        names = " * ".join(f"parallel.{key}" for key in factors)
        values = " * ".join(str(size) for size in factors.values())
        raise ConfigError(
            f"the world size {world_size} is not divisible by {names} = {values};"
            f" nearest legal world size: {nearest_multiples(world_size, product)}"
        )
    data_parallel = world_size // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    )
    if parallel.modality_parallel_size == 1:
        check_expert_holders(config, dict.fromkeys(config.model.tower_names, data_parallel))
    per_step = config.sequences_per_pass(data_parallel)
    size = config.training.global_batch_size
    what = "training.micro_batch_size * data-parallel size"
    factors = f"{config.training.micro_batch_size} * {data_parallel}"
    if parallel.attention_exchange == "heads":
        what += " / parallel.modality_parallel_size (heads)"
        factors += f" / {parallel.modality_parallel_size}"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        # megatron's interleaved schedule needs a multiple of the number of stages.
        per_step *= parallel.pipeline_model_parallel_size
        what += " * parallel.pipeline_model_parallel_size (interleaved)"
        factors += f" * {parallel.pipeline_model_parallel_size}"
    if size % per_step:
        raise ConfigError(
            f"training.global_batch_size = {size} is not divisible by {what} = {factors};"
            f" nearest legal: {nearest_multiples(size, per_step)}"
        )
    if beyond := [rank for rank in config.training.profile_ranks if rank >= world_size]:
        raise ConfigError(
            f"training.profile_ranks has {beyond[0]}; allowed: 0 to {world_size - 1}, the ranks"
        )
    if size // per_step > MOST_ACCUMULATION_STEPS:
        raise ConfigError(
            f"training.global_batch_size = {size} needs {size // per_step} micro-batches per step"
            f" and rank; allowed: at most {MOST_ACCUMULATION_STEPS}, which are held in host memory"
        )


def check_expert_holders(config: Config, holders: Mapping[str, int]) -> None:
    """Check that the experts of every tower can be split equally over the ranks that hold it.

    Args:
        config: The configuration.
        holders: Per tower name, the number of data-parallel ranks that hold the tower. With
            modality parallelism it depends on the placement.

    Raises:
        ConfigError: Names the tower, its number of ranks and the nearest legal sizes.
    """
    size = config.parallel.expert_model_parallel_size
    model = config.model
    for tower, experts in zip(model.tower_names, model.experts_of_towers, strict=True):
        if experts is not None and holders[tower] % size:
            common = math.gcd(holders[tower], experts.num_moe_experts)
            raise ConfigError(
                f"parallel.expert_model_parallel_size = {size} does not divide the"
                f" {holders[tower]} data-parallel ranks that hold tower {tower}; nearest legal:"
                f" {nearest(divisors(common), size)}"
            )


def check_trained(config: Config, held: Iterable[Collection[str]]) -> None:
    """Check that every rank has weights to train, as its optimizer needs.

    The first pipeline stage has the embedding and the last one the head, which are always trained.
    A stage between them has only layers, so that a rank there may hold nothing but frozen towers.

    Args:
        config: The configuration.
        held: Names of the towers on each rank of a modality group. With modality parallelism they
            depend on the placement.

    Raises:
        ConfigError: Names the towers and what is allowed.
    """
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    untied = model.untied
    in_layers = (untied.feed_forward, untied.qkv, untied.output_projection, untied.norms)
    if stages <= 2 or not all(in_layers) or (model.qk_norm and not untied.qk_norm):
        return
    frozen = {n for n, held in zip(model.tower_names, model.frozen_towers, strict=True) if held}
    for towers in held:
        if frozen.issuperset(towers):
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size = {stages}: between the first and the last"
                f" stage, ranks hold only {', '.join(towers)}, frozen with model.towers.NAME.frozen"
                " = true, and would have nothing to train; allowed: at most 2 stages, or a tower"
                " that is trained"
            )


def check_tokens_only(model: ModelConfig, what: str) -> None:
    """Check that a model has no modality of vectors.

    Raises:
        ConfigError: It has; the message begins with ``what``.
    """
    for name, modality in model.modalities.items():
        if modality.objective.kind != "next_token":
            raise ConfigError(
                f"{what} takes models of tokens alone, but model.modalities.{name}.objective.kind ="
                f' "{modality.objective.kind}"'
            )


def check_device(config: Config, on_gpus: bool) -> None:
    """Check that the devices of this job support the configuration.

    Raises:
        ConfigError: ``attention_backend = "flex"`` on a CPU.
    """
    if config.model.attention_backend == "flex" and not on_gpus:
        raise ConfigError(
            'model.attention_backend = "flex" has no backward on a CPU; allowed there: "auto"'
            ' or "sdpa"'
        )


def _check_data(config: Config, source: str) -> None:
    data = config.data
    if (data.corpus is None) == (not data.sources):
        given = "are both absent" if data.corpus is None else "are both given"
        raise ConfigError(f"{source}: data.corpus and data.sources {given}; needed: one of them")
    if config.evaluation.per_source and not data.sources:
        raise ConfigError(
            f"{source}: evaluation.per_source = true needs data.sources; with data.corpus there is"
            " one source"
        )
    labels = [each.label for each in data.sources]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"{source}: data.sources has {labels.count(label)} sources named {label};"
                " give them other names (data.sources.name)"
            )


def _check_shapes(config: Config, source: str) -> None:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if model.hidden_size % (2 * heads):
        raise ConfigError(
            f"{source}: model.hidden_size = {model.hidden_size} is not divisible by"
            f" 2 * model.num_attention_heads = 2 * {heads} (the rotary embedding needs an even"
            f" head size); nearest legal: {nearest_multiples(model.hidden_size, 2 * heads)}"
        )
    if heads % groups:
        raise ConfigError(
            f"{source}: model.num_attention_heads = {heads} is not divisible by"
            f" model.num_query_groups = {groups};"
            f" nearest legal model.num_query_groups: {nearest(divisors(heads), groups)}"
        )


def _check_tensor_parallel(config: Config, source: str) -> None:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    split = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_key_value_heads,
        "model.ffn_hidden_size": model.feed_forward_size,
        "model.vocab_size": model.vocab_size or VOCABULARY_MULTIPLE,
    }
    legal = divisors(math.gcd(*split.values()))
    for key, value in split.items():
        if value % tensor:
            raise ConfigError(
                f"{source}: {key} = {value} is not divisible by"
                f" parallel.tensor_model_parallel_size = {tensor};"
                f" nearest legal parallel.tensor_model_parallel_size: {nearest(legal, tensor)}"
            )
    if config.parallel.sequence_parallel and tensor == 1:
        raise ConfigError(
            f"{source}: parallel.sequence_parallel = true needs"
            " parallel.tensor_model_parallel_size of 2 or more, not 1"
        )


def _check_pipeline(config: Config, source: str) -> None:
    parallel, num_layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline_model_parallel_size
    per_stage = parallel.virtual_pipeline_model_parallel_size
    if per_stage is not None and stages == 1:
        raise ConfigError(
            f"{source}: parallel.virtual_pipeline_model_parallel_size = {per_stage} needs"
            " parallel.pipeline_model_parallel_size of 2 or more, not 1"
        )
    pieces = stages * (per_stage or 1)
    key = "parallel.pipeline_model_parallel_size"
    if per_stage is not None:
        key += " * virtual_pipeline_model_parallel_size"
    if pieces > num_layers:
        raise ConfigError(
            f"{source}: {key} = {pieces} is above model.num_layers = {num_layers}; allowed: at"
            f" most one piece per layer, {num_layers}"
        )
    layers = parallel.pipeline_layers
    if layers is None:
        if num_layers % pieces:
            # Interleaved, the number of pieces is a product of two factors of at least 2.
            legal = [
                divisor
                for divisor in divisors(num_layers)
                if per_stage is None or len(divisors(divisor)) > 2
            ]
            raise ConfigError(
                f"{source}: model.num_layers = {num_layers} is not divisible by {key} = {pieces};"
                f" nearest legal: {nearest(legal, pieces)}, or set"
                f" parallel.pipeline_layers, {pieces} numbers that sum to {num_layers}"
            )
    elif len(layers) != pieces or sum(layers) != num_layers:
        raise ConfigError(
            f"{source}: parallel.pipeline_layers = {list(layers)} has {len(layers)} numbers that"
            f" sum to {sum(layers)}; needed: {pieces} ({key}) that sum to {num_layers}"
            " (model.num_layers)"
        )


def _check_modality_parallel(config: Config, source: str) -> None:
    parallel = config.parallel
    size = parallel.modality_parallel_size
    if size == 1 and parallel.attention_exchange != "sequence":
        raise ConfigError(
            f'{source}: parallel.attention_exchange = "{parallel.attention_exchange}" needs'
            " parallel.modality_parallel_size of 2 or more, not 1"
        )
    if parallel.attention_exchange == "heads":
        _check_heads(config, source)
    if parallel.placement != "auto":
        _check_placement(config, source)


def _check_heads(config: Config, source: str) -> None:
    """Check that a modality group can split the heads of a tensor-parallel rank."""
    model, parallel = config.model, config.parallel
    size, tensor = parallel.modality_parallel_size, parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads // tensor, model.num_key_value_heads // tensor
    legal = [
        ranks
        for ranks in divisors(heads)
        if ranks > 1 and (groups % ranks == 0 or ranks % groups == 0)
    ]
    if size not in legal:
        raise ConfigError(
            f'{source}: parallel.attention_exchange = "heads" splits the {heads} heads and'
            f" {groups} key-value heads of a tensor-parallel rank over"
            f" parallel.modality_parallel_size = {size}, which must divide the number of heads and"
            " be a divisor or a multiple of the number of key-value heads; nearest legal:"
            f" {nearest(legal, size)}"
        )


def _check_placement(config: Config, source: str) -> None:
    placement, towers = config.parallel.placement, config.model.tower_names
    assert placement != "auto"
    size = config.parallel.modality_parallel_size
    if size == 1:
        raise ConfigError(
            f"{source}: parallel.placement needs parallel.modality_parallel_size of 2 or more,"
            ' not 1; allowed there: "auto"'
        )
    if len(placement) != size:
        raise ConfigError(
            f"{source}: parallel.placement has {len(placement)} entries; needed: one per rank of"
            f" a modality group, parallel.modality_parallel_size = {size}"
        )
    for rank, shares in enumerate(placement):
        unknown = sorted(set(shares) - set(towers))
        if unknown:
            raise ConfigError(
                f"{source}: parallel.placement[{rank}] names {unknown[0]}, which is not a tower;"
                f" allowed: {', '.join(towers)}"
            )
        if not shares:
            raise ConfigError(
                f"{source}: parallel.placement[{rank}] is empty; every rank needs a tower"
            )
    for tower in towers:
        total = sum(shares.get(tower, 0.0) for shares in placement)
        if not math.isclose(total, 1.0, abs_tol=1e-3):
            raise ConfigError(
                f"{source}: the shares of tower {tower} in parallel.placement sum to {total:g};"
                " needed: 1"
            )


def _check_frozen(config: Config, source: str) -> None:
    model = config.model
    placement, names = config.parallel.placement, model.tower_names
    for name, is_frozen, factor in zip(names, model.frozen_towers, model.lr_mults, strict=True):
        if is_frozen and factor != 1:
            raise ConfigError(
                f"{source}: model.towers.{name}.lr_mult = {factor:g} with frozen = true, which"
                " trains none of the tower's weights; allowed: 1"
            )
    if placement == "auto":
        if config.parallel.modality_parallel_size > 1:
            return  # checked once the placement is known
        held: Sequence[Collection[str]] = [names]
    else:
        held = [[name for name in names if shares.get(name)] for shares in placement]
    try:
        check_trained(config, held)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_zero(config: Config, source: str) -> None:
    parallel = config.parallel
    stage = parallel.zero_stage
    pipeline, modality = parallel.pipeline_model_parallel_size, parallel.modality_parallel_size
    if pipeline > 1 and stage != 1:
        raise ConfigError(
            f"{source}: parallel.zero_stage = {stage} with"
            f" parallel.pipeline_model_parallel_size = {pipeline}: pipeline parallelism"
            " allows zero_stage 1 only"
        )
    if modality > 1 and stage not in (1, 2):
        raise ConfigError(
            f"{source}: parallel.zero_stage = {stage} with parallel.modality_parallel_size ="
            f" {modality}: modality parallelism allows zero_stage 1 and 2"
        )
    if parallel.expert_model_parallel_size > 1 and stage not in (1, 2):
        raise ConfigError(
            f"{source}: parallel.zero_stage = {stage} with parallel.expert_model_parallel_size ="
            f" {parallel.expert_model_parallel_size}: expert parallelism allows zero_stage 1"
            " and 2"
        )
    if parallel.offload != "none" and stage == 0:
        raise ConfigError(
            f'{source}: parallel.offload = "{parallel.offload}" needs parallel.zero_stage 1, 2'
            " or 3, not 0"
        )
    if config.training.precision == "bf16" and stage == 0:
        raise ConfigError(
            f'{source}: training.precision = "bf16" with parallel.zero_stage = 0 would sum'
            " gradients in bf16; allowed: zero_stage 1, 2 or 3, or precision fp32"
        )


def _check_training(config: Config, source: str) -> None:
    optimizer, parallel = config.optimizer, config.parallel
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"{source}: optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr ="
            f" {optimizer.lr}"
        )
    if not any(weight > 0 for weight in config.model.loss_weights):
        raise ConfigError(
            f"{source}: every model.modalities.*.loss_weight is 0; at least one must be above 0"
        )
    if config.training.profile_steps is not None:
        first, last = config.training.profile_steps
        if not first <= last < config.training.train_steps:
            raise ConfigError(
                f"{source}: training.profile_steps = [{first}, {last}]; expected the first and the"
                f" last step, below training.train_steps = {config.training.train_steps}"
            )
    if config.logging.sample_interval_steps is not None and (
        parallel.pipeline_model_parallel_size > 1 or parallel.modality_parallel_size > 1
    ):
        raise ConfigError(
            f"{source}: logging.sample_interval_steps = {config.logging.sample_interval_steps}:"
            " samples can be generated during training only without pipeline and modality"
            " parallelism; mot generate creates them from any checkpoint"
        )


def _check_objectives(config: Config, source: str) -> None:
    """Check the modalities of vectors."""
    modalities, parallel = config.model.modalities, config.parallel
    if not config.model.token_modalities:
        raise ConfigError(
            f"{source}: no model.modalities.*.objective.kind is next_token; at least one must be"
        )
    for name, modality in modalities.items():
        key, objective = f"model.modalities.{name}", modality.objective
        if objective.kind == "next_token":
            plain = ObjectiveConfig()
            for setting in ("times", "condition_dropout", "context_noise_limit"):
                if getattr(objective, setting) != getattr(plain, setting):
                    raise ConfigError(
                        f"{source}: {key}.objective.{setting} is of vectors, but"
                        f' {key}.objective.kind = "next_token"'
                    )
            if modality.width is not None:
                raise ConfigError(
                    f"{source}: {key}.width = {modality.width} is of vectors, but"
                    f' {key}.objective.kind = "next_token"'
                )
            continue
        if objective.kind == "diffusion" and objective.times != "logit_normal":
            raise ConfigError(
                f'{source}: {key}.objective.times = "{objective.times}" is for flow_matching;'
                " diffusion draws one of 1000 steps"
            )
        if parallel.modality_parallel_size > 1:
            raise ConfigError(
                f"{source}: parallel.modality_parallel_size = {parallel.modality_parallel_size}:"
                f' {key}.objective.kind = "{objective.kind}" works only without modality'
                " parallelism; allowed: 1"
            )


def _check_checkpoint(config: Config, source: str) -> None:
    every, interval = config.checkpoint.keep_every_steps, config.checkpoint.interval_steps
    if every % interval:
        raise ConfigError(
            f"{source}: checkpoint.keep_every_steps = {every} is not a multiple of"
            f" checkpoint.interval_steps = {interval}; nearest legal:"
            f" {nearest_multiples(every, interval)}, or 0 to keep none for good"
        )
