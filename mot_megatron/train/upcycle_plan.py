"""Plan which source tensor each new tensor copies, and whether the copies compute the same.

A new tower copies the weights of one source tower. If it has experts, they are copies either of the
feed-forward network of a tower without experts, and the routers are new, or of the experts of a
tower with the same number of experts, including its routers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mot_megatron.config import Config, ParallelConfig
from mot_megatron.config_model import ExpertsConfig, ModelConfig, UntiedConfig
from mot_megatron.errors import ConfigError
from mot_megatron.model.inventory import held_parameters
from mot_megatron.model.sharding import name_of_expert
from mot_megatron.rules import check_tokens_only

_ALIKE = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "feed_forward_size",
    "vocab_size": "vocab_size",
    "norm_placement": "norm_placement",
    "norm_eps": "norm_eps",
    "qk_norm": "qk_norm",
    "add_qkv_bias": "add_qkv_bias",
    "rotary_base": "rotary_base",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
}
"""Keys of the model that must be equal, and the attributes with their values."""
_PLACE = re.compile(r"(?P<component>.+)\.(?:shared|towers\.(?P<tower>\d+))\.(?P<weight>.+)")
_OF_EXPERT = re.compile(r"experts\.\d+\.(?P<matrix>.+)")


@dataclass(frozen=True)
class FirstForward:
    """Whether a tower computes the same as its source tower before the first step.

    This is for equal inputs. Attention mixes the towers, so a different output of one changes the
    inputs of all.
    """

    tower: str
    source: str
    equal: bool
    reason: str

    def __str__(self) -> str:
        verdict = "compute the same as" if self.equal else "do not compute the same as"
        return (
            f"tower {self.tower}: its weights {verdict} tower {self.source} of the source:"
            f" {self.reason}"
        )


@dataclass(frozen=True)
class TensorPlan:
    """The origin of each tensor of the new model, by global name."""

    copied: dict[str, str] = field(default_factory=dict)
    """New name -> old name."""
    drawn: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """New name -> shape of tensors to initialize randomly, which are new routers."""


def source_towers(
    source: ModelConfig, target: ModelConfig, wanted: Mapping[str, str]
) -> dict[str, str]:
    """Return the source tower that each target tower copies, by name.

    A tower that is not in ``wanted`` copies the only tower of the source, or the tower of the same
    name.

    Raises:
        ConfigError: ``wanted`` contains an unknown tower, or a target tower has no source.
    """
    for origin, names, allowed in (
        ("the configuration of the new run (--config)", wanted.keys(), target.tower_names),
        ("the source model (--checkpoint)", wanted.values(), source.tower_names),
    ):
        unknown = sorted(set(names) - set(allowed))
        if unknown:
            raise ConfigError(
                f"--map names tower {unknown[0]!r}, which {origin} does not have; allowed:"
                f" {', '.join(allowed)}"
            )
    chosen = {}
    for name in target.tower_names:
        same = name if name in source.tower_names else None
        chosen[name] = wanted.get(name) or (
            source.tower_names[0] if source.num_towers == 1 else same
        )
        if chosen[name] is None:
            raise ConfigError(
                f"tower {name} of the new run: the source has no tower of this name; set the tower"
                f" to copy with --map {name}=OLD; allowed: {', '.join(source.tower_names)}"
            )
    return chosen


def check_upcycling(source: ModelConfig, target: ModelConfig, towers: Mapping[str, str]) -> None:
    """Check that the target can be made from copies of the source.

    Args:
        source: Resolved model of the source.
        target: Resolved model of the new run.
        towers: Source tower of each target tower.

    Raises:
        ConfigError: Shapes differ, or weights would have to be merged or experts removed.
    """
    for model in (source, target):
        check_tokens_only(model, "upcycling")
    for key, attribute in _ALIKE.items():
        old, new = getattr(source, attribute), getattr(target, attribute)
        if old != new:
            raise ConfigError(
                f"model.{key} = {new}, but the source has {old}; weights are copied unchanged, so"
                " both must be equal"
            )
    for key in UntiedConfig.model_fields:
        merged = getattr(source.untied, key) and not getattr(target.untied, key)
        if merged and source.num_towers > 1:
            raise ConfigError(
                f"model.untied.{key} = false, but the towers of the source have separate weights,"
                " which cannot be merged; allowed: true"
            )
    for name, old_name in towers.items():
        new, old = _experts(target, name), _experts(source, old_name)
        if old is None:
            continue
        if new is None or new.num_moe_experts != old.num_moe_experts:
            raise ConfigError(
                f"tower {name} has {_number(new)}, but tower {old_name} of the source has"
                f" {_number(old)}; the number of experts cannot change; allowed:"
                f" model.towers.{name}.experts.num_moe_experts = {old.num_moe_experts}"
            )


def first_forwards(
    source: ModelConfig, target: ModelConfig, towers: Mapping[str, str]
) -> list[FirstForward]:
    """Return for each tower whether it computes the same as its source tower, and why."""
    forwards = []
    for name, old_name in towers.items():
        old, new = _experts(source, old_name), _experts(target, name)
        if new is None:
            verdict = True, "a copy"
        elif old is None:
            verdict = _of_copied_network(target, new)
        else:
            pools = _modalities(source, old_name), _modalities(target, name)
            verdict = _of_copied_experts(old, new, same_pool=pools[0] == pools[1])
        forwards.append(FirstForward(name, old_name, *verdict))
    return forwards


def whole_model(
    source: ModelConfig,
    target: ModelConfig,
    towers: Mapping[str, str],
    forwards: Sequence[FirstForward],
) -> str:
    """Return a line that says whether the new model computes the same as the source.

    Args:
        source: Resolved model of the source.
        target: Resolved model of the new run, with the same modalities.
        towers: See ``source_towers``.
        forwards: See ``first_forwards``.
    """
    reasons = []
    differing = [forward.tower for forward in forwards if not forward.equal]
    if differing:
        reasons.append(
            f"attention propagates the difference in tower {', '.join(differing)} to all towers"
        )
    for modality, settings in target.modalities.items():
        copied, before = towers[settings.tower], source.modalities[modality].tower
        if copied != before:
            reasons.append(f"{modality} tokens were processed by tower {before}, not {copied}")
    if reasons:
        return f"whole model: first forward pass differs from the source's: {'; '.join(reasons)}"
    return "whole model: first forward pass equals the source's, to 1e-6 of the largest logit"


def _of_copied_experts(
    old: ExpertsConfig, new: ExpertsConfig, *, same_pool: bool
) -> tuple[bool, str]:
    before, now = (
        (
            experts.routing,
            experts.experts_per_token,
            experts.gate,
            experts.routing == "topk" and experts.capacity_factor,
        )
        for experts in (old, new)
    )
    if before != now:
        return False, "experts and routers copied, but routing settings differ"
    # Expert choice and capacity dropping depend on all tokens of the tower.
    if new.sees_the_future and not same_pool:
        return False, "experts and routers copied, but they choose among different tokens"
    return True, "experts and routers copied"


def _of_copied_network(target: ModelConfig, new: ExpertsConfig) -> tuple[bool, str]:
    number, each = new.num_moe_experts, new.experts_per_token
    copies = f"{number} experts that are copies"
    if _weights_sum_to_one(new):
        return True, f"{copies}, with gates that sum to one"
    # The logits of a new router are near zero.
    factor = each * (0.5 if new.gate == "sigmoid" else 1 / number)
    reason = f"{copies}, but with gates that sum to about {factor:.3g}"
    if new.routing == "expert_choice":
        reason += f" on average (c = {each:g}), and to 0 for tokens that no expert takes"
    if target.norm_placement == "post":
        reason += "; the norm after them cancels any factor except 0, up to norm_eps"
    return False, reason


def _weights_sum_to_one(experts: ExpertsConfig) -> bool:
    """Return whether the gate weights of each token sum to 1 for any router output."""
    takes_all = experts.experts_per_token == experts.num_moe_experts
    if experts.routing == "expert_choice":
        return takes_all and experts.gate == "softmax"
    if experts.capacity_factor is not None and not (takes_all and experts.capacity_factor >= 1):
        return False
    # With several experts per token, sigmoid gates are divided by their sum.
    return takes_all if experts.gate == "softmax" else experts.experts_per_token > 1


def plan_tensors(source: Config, target: Config, towers: Mapping[str, str]) -> TensorPlan:
    """Return what to copy; call ``check_upcycling`` with the same arguments first."""
    known = {name for name, _, _ in _tensors(source)}
    old_towers = source.model.tower_names
    plan = TensorPlan()
    for name, tower, shape in _tensors(target):
        old_tower = old_towers.index(towers[target.model.tower_names[tower]])
        old_name = next((old for old in _old_names(name, old_tower) if old in known), None)
        if old_name is not None:
            plan.copied[name] = old_name
        else:
            assert ".router." in name, name
            plan.drawn[name] = shape
    return plan


def _tensors(config: Config) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield name, tower and shape of all tensors.

    The tower of shared tensors is 0. The shape of an expert is that of all experts stacked; it is
    not used, since experts are always copied.
    """
    whole, model = config.model_copy(update={"parallel": ParallelConfig()}), config.model
    for parameter in held_parameters(whole, 0, range(model.num_towers)):
        tower = max(parameter.tower, 0)
        names = [parameter.name]
        if parameter.experts:
            experts = model.experts_of_towers[tower]
            assert experts is not None
            names = [name_of_expert(parameter.name, e) for e in range(experts.num_moe_experts)]
        for name in names:
            yield name, tower, parameter.shape


def _old_names(name: str, old_tower: int) -> Iterator[str]:
    """Yield possible names of a tensor in the source, the most likely first."""
    found = _PLACE.fullmatch(name)
    if found is None:
        yield name
        return
    weights = [found["weight"]]
    expert = _OF_EXPERT.fullmatch(found["weight"])
    if expert is not None:
        weights.append(f"{expert['matrix']}.linear.weight")
    for weight in weights:
        yield f"{found['component']}.towers.{old_tower}.{weight}"
        yield f"{found['component']}.shared.{weight}"


def _experts(model: ModelConfig, tower: str) -> ExpertsConfig | None:
    return model.experts_of_towers[model.tower_names.index(tower)]


def _modalities(model: ModelConfig, tower: str) -> set[str]:
    return {name for name, settings in model.modalities.items() if settings.tower == tower}


def _number(experts: ExpertsConfig | None) -> str:
    return "no experts" if experts is None else f"{experts.num_moe_experts} experts"
