"""Which tensors of a Hugging Face checkpoint each of this program's tensors consists of.

The names are those that Llama and Qwen use. With towers, a component's name is followed by its
place: ``model.layers.0.self_attn.q_proj.towers.1.weight``, or ``.shared`` if the towers share it.
This program keeps a layer's q, k and v projections in one tensor, ordered by key-value group, and
SwiGLU's first two matrices in another; in these formats all of them are separate.

Letters: h hidden size, d head size, f feed-forward width, G key-value groups, q queries per group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mot_megatron.config import Config, ParallelConfig
from mot_megatron.config_model import ModelConfig
from mot_megatron.model.inventory import held_parameters
from mot_megatron.model.sharding import SHARED, name_of_expert

_IN_LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<component>.+)")
_PLACED = re.compile(r"(?P<component>.+?)\.(?:shared|towers\.\d+)\.(?P<weight>.+)")
_EXPERT = re.compile(r"experts\.(?P<expert>\d+)\.(?P<matrix>.+)")


@dataclass(frozen=True)
class Naming:
    """How a format names tensors."""

    prefix: str
    """Before all names."""
    place: Callable[[int], str]
    """Returns what follows a component's name, given the tower, or SHARED."""


DENSE = Naming("", lambda _: "")
"""Of models with one tower."""
TOWERS = Naming("", lambda tower: ".shared" if tower == SHARED else f".towers.{tower}")
"""Of this program's own modelling file."""
BAGEL = Naming("language_model.", lambda tower: "_moe_gen" if tower == 1 else "")
"""Of BAGEL, whose tower 0 understands and whose tower 1 generates."""


@dataclass(frozen=True)
class Correspondence:
    """A tensor of this program and the tensors that it is split into."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, ...]
    """Its shape in checkpoints."""
    split_into: tuple[str, ...]
    """Names in the other format."""
    kind: Literal["whole", "flat", "qkv", "gate_up"] = "whole"
    """flat: one tensor, with the first two dimensions as one."""
    group_width: tuple[int, ...] = ()
    """Heads of q, k and v in a key-value group, for kind "qkv"."""
    num_groups: int = 1
    """G, for kind "qkv"."""

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the parts, without computing their values."""
        return tuple(
            tuple(part.shape) for part in self.split(torch.empty(self.shape, device="meta"))
        )

    def split(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split a tensor of this program into the other format's, as views where possible."""
        if self.kind == "whole":
            return (whole,)
        if self.kind == "flat":
            return (whole.flatten(0, 1),)
        if self.kind == "gate_up":
            return tuple(whole.unbind(0))
        columns = whole.shape[1:]
        by_group = whole.view(self.num_groups, sum(self.group_width), -1, *columns)
        return tuple(part.reshape(-1, *columns) for part in by_group.split(self.group_width, dim=1))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the other format's tensors into this program's: the inverse of ``split``."""
        if self.kind in ("whole", "flat"):
            return parts[0].view(self.shape)
        if self.kind == "gate_up":
            return torch.stack(tuple(parts))
        columns = self.shape[1:]
        by_group = [
            part.reshape(self.num_groups, width, -1, *columns)
            for part, width in zip(parts, self.group_width, strict=True)
        ]
        return torch.cat(by_group, dim=1).view(self.shape)


def correspondences(config: Config, naming: Naming) -> Iterator[Correspondence]:
    """Yield all tensors of a resolved model, in the order of its layers."""
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    for parameter in held_parameters(alone, 0, range(config.model.num_towers)):
        names = [parameter.name]
        if parameter.experts:
            names = [name_of_expert(parameter.name, e) for e in range(parameter.experts)]
        shape = parameter.sharding.global_shape
        for name in names:
            yield _of_tensor(config.model, name, shape, parameter.tower, naming)


def _of_tensor(
    model: ModelConfig, name: str, shape: tuple[int, ...], tower: int, naming: Naming
) -> Correspondence:
    outer = _OUTER.get(name)
    if outer is not None:
        return Correspondence(name, shape, (naming.prefix + outer,))
    in_layer = _IN_LAYER.fullmatch(name)
    placed = _PLACED.fullmatch(in_layer["component"] if in_layer else name)
    assert placed is not None, name
    layer = f"{naming.prefix}model." + (f"layers.{in_layer['layer']}." if in_layer else "")
    component, weight, place = placed["component"], placed["weight"], naming.place(tower)
    modules = _MODULES[model.norm_placement][component]
    if component == "attention.qkv":
        leaf = weight.removeprefix("linear.")
        heads, groups = model.num_attention_heads, model.num_key_value_heads
        return Correspondence(
            name,
            shape,
            tuple(f"{layer}{module}{place}.{leaf}" for module in modules),
            "qkv",
            (heads // groups, 1, 1),
            groups,
        )
    leaves = _leaves(component, weight)
    names = tuple(f"{layer}{modules[0]}{place}.{leaf}" for leaf in leaves)
    if len(leaves) == 1:
        return Correspondence(name, shape, names)
    return Correspondence(name, shape, names, "gate_up")


def _leaves(component: str, weight: str) -> tuple[str, ...]:
    """Return the names within a tower's module."""
    if component != "feed_forward":
        return ("weight",)
    expert = _EXPERT.fullmatch(weight)
    if expert is not None:
        return tuple(f"experts.{expert['expert']}.{leaf}" for leaf in _NETWORK[expert["matrix"]])
    return _NETWORK[weight.removesuffix(".linear.weight")]


_OUTER = {
    "embedding.lookup.weight": "model.embed_tokens.weight",
    "head.linear.weight": "lm_head.weight",
}
_EITHER = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.output_projection": ("self_attn.o_proj",),
    "feed_forward": ("mlp",),
    "final_norm": ("norm",),
}
_MODULES = {
    "pre": {
        **_EITHER,
        "attention_norm": ("input_layernorm",),
        "feed_forward_norm": ("post_attention_layernorm",),
    },
    "post": {
        **_EITHER,
        "attention_norm": ("post_attention_layernorm",),
        "feed_forward_norm": ("post_feedforward_layernorm",),
    },
}
"""By norm placement, the modules that a component is split into."""
_NETWORK = {
    "gate_up": ("gate_proj.weight", "up_proj.weight"),
    "down": ("down_proj.weight",),
    "router.weight": ("gate.weight",),
    "router.causal.hidden": ("causal_gate.hidden.weight",),
    "router.causal.output": ("causal_gate.output.weight",),
}
"""Weights of a feed-forward network, and the tensors that they are split into."""
