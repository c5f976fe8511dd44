"""Rules about mixtures of experts, which rules.py checks with all others."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig
from mot_megatron.errors import ConfigError
from mot_megatron.legal_values import divisors, nearest, nearest_multiples


def check_experts(config: Config, source: str) -> None:
    """Check the experts of all towers against the layout.

    Args:
        config: The configuration.
        source: Name of the configuration for messages.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    model, parallel = config.model, config.parallel
    unknown = sorted(set(model.towers) - set(model.tower_names))
    if unknown:
        raise ConfigError(
            f"{source}: model.towers.{unknown[0]} is not a tower of model.modalities; allowed:"
            f" {', '.join(model.tower_names)}"
        )
    for name, experts in zip(model.tower_names, model.experts_of_towers, strict=True):
        if experts is not None:
            _check_mixture(config, experts, f"{source}: model.towers.{name}.experts")
    size = parallel.expert_model_parallel_size
    if not model.has_experts:
        if size > 1:
            raise ConfigError(
                f"{source}: parallel.expert_model_parallel_size = {size}, but no tower has"
                " experts; allowed without model.towers.NAME.experts: 1"
            )
        return
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"{source}: parallel.tensor_model_parallel_size ="
            f" {parallel.tensor_model_parallel_size} with experts needs"
            " parallel.sequence_parallel = true"
        )
    if not model.untied.feed_forward and model.num_towers > 1:
        raise ConfigError(
            f"{source}: model.untied.feed_forward = false shares one feed-forward network among"
            " the towers, so none of them can have experts; allowed: true, or a single tower"
        )
    _check_grouped_matmul(config, source)


def _check_grouped_matmul(config: Config, source: str) -> None:
    """Check what torch's grouped matmul needs: matrices and rows aligned to 16 bytes."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    multiple = 8 if config.training.precision == "bf16" else 4
    hidden_unit, why = multiple, ""
    if any(
        experts.causal_router and experts.num_moe_experts % 2
        for experts in model.experts_of_towers
        if experts is not None
    ):
        # The experts may follow the causal router's output matrix of E h / 2 numbers in a flat
        # buffer, without padding.
        hidden_unit, why = 2 * multiple, "; twice as many with a causal router of odd experts"
    for key, columns, unit, more in (
        ("model.hidden_size", model.hidden_size, hidden_unit, why),
        ("model.ffn_hidden_size", model.feed_forward_size, multiple * tensor, ""),
    ):
        if columns % unit:
            raise ConfigError(
                f"{source}: {key} = {columns} with experts is not divisible by {unit}"
                f" ({multiple} numbers of training.precision = {config.training.precision} on each"
                f" tensor-parallel rank{more}); nearest legal: {nearest_multiples(columns, unit)}"
            )


def _check_mixture(config: Config, experts: ExpertsConfig, key: str) -> None:
    size = config.parallel.expert_model_parallel_size
    number = experts.num_moe_experts
    if number % size:
        raise ConfigError(
            f"{key}.num_moe_experts = {number} is not divisible by"
            f" parallel.expert_model_parallel_size = {size}; nearest legal"
            f" parallel.expert_model_parallel_size: {nearest(divisors(number), size)}"
        )
    if experts.routing == "expert_choice":
        _check_expert_choice(experts, key)
        _check_capacity(config, experts.experts_per_token, 1, number, key)
        return
    each = experts.topk or 1
    if each > number:
        raise ConfigError(
            f"{key}.topk = {experts.topk} is above num_moe_experts = {number}; allowed: 1 to"
            f" {number}"
        )
    if experts.causal_router:
        raise ConfigError(
            f'{key}.causal_router = true needs routing = "expert_choice"; with top-k, tokens'
            " choose without later ones, and generation ignores capacity_factor"
        )
    if experts.capacity_factor is not None:
        _check_capacity(config, experts.capacity_factor, each, number, key)


def _check_expert_choice(experts: ExpertsConfig, key: str) -> None:
    number, factor = experts.num_moe_experts, experts.experts_per_token
    for name, value in (
        ("topk", experts.topk),
        ("aux_loss_coefficient", experts.aux_loss_coefficient),
    ):
        if value:
            raise ConfigError(f'{key}.{name} = {value} needs routing = "topk", not "expert_choice"')
    if factor > number:
        raise ConfigError(
            f"{key}.capacity_factor = {factor:g} is above num_moe_experts = {number}, but a token"
            f" cannot use more experts than there are; allowed: at most {number}"
        )


def _check_capacity(config: Config, factor: float, each: int, number: int, key: str) -> None:
    """Check that an expert can take at least one token of a micro-batch.

    Args:
        config: The configuration.
        factor: Capacity of an expert, as a multiple of an equal share of the assignments.
        each: Assignments per token.
        number: E, the number of experts.
        key: Dotted key of the experts, for the message.
    """
    tokens = config.data.seq_length * config.training.micro_batch_size
    # Compare with the quotient: a rounded product could reject the value that the message allows.
    if factor < number / (tokens * each):
        least = Context(prec=6, rounding=ROUND_CEILING).divide(number, tokens * each)
        raise ConfigError(
            f"{key}.capacity_factor = {factor:g} leaves each of {number} experts less than one of"
            f" a micro-batch's {tokens} tokens; allowed: at least {float(least):g}"
        )
