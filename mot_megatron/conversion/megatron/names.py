"""Names of a dense GPTModel's tensors in checkpoints of megatron-core.

Of a layer, a name is ``decoder.layers.N.REST``. Files usually have one tensor per REST instead,
``decoder.layers.REST``, whose first dimension is the layer.

The projections q, k and v are one tensor in both programs, ordered by key-value group. So are
SwiGLU's first two matrices; here they have a dimension of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mot_megatron.config import Config, ParallelConfig
from mot_megatron.config_model import ModelConfig
from mot_megatron.conversion.huggingface.names import Correspondence
from mot_megatron.errors import CheckpointError
from mot_megatron.model.inventory import held_parameters
from mot_megatron.rules import check_tokens_only

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LAYERS = "decoder.layers."
Q_NORM = "self_attention.q_layernorm.weight"
QKV, QKV_BIAS = "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"
GATE_UP, DOWN = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_OUTER = {
    "embedding.lookup.weight": EMBEDDING,
    "head.linear.weight": HEAD,
    "final_norm.weight": "decoder.final_layernorm.weight",
}
_IN_LAYER = {
    "attention_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention.qkv.linear.weight": QKV,
    "attention.qkv.linear.bias": QKV_BIAS,
    "attention.q_norm.weight": Q_NORM,
    "attention.k_norm.weight": "self_attention.k_layernorm.weight",
    "attention.output_projection.linear.weight": "self_attention.linear_proj.weight",
    "feed_forward_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "feed_forward.gate_up.linear.weight": GATE_UP,
    "feed_forward.down.linear.weight": DOWN,
}
_LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_PLACE = re.compile(r"\.(?:shared|towers\.0)\.")


def check_dense(model: ModelConfig) -> None:
    """Check that a GPTModel can compute what the model computes.

    Raises:
        CheckpointError: It cannot: the model has several towers, experts, or norms after layers.
        ConfigError: A modality consists of vectors.
    """
    check_tokens_only(model, "this export")
    reason = None
    if model.num_towers > 1:
        reason = f"the model has {model.num_towers} towers"
    elif model.has_experts:
        reason = "the model has experts, which this command does not convert"
    elif model.norm_placement != "pre":
        reason = f"model.norm_placement = {model.norm_placement}; allowed: pre"
    if reason is not None:
        raise CheckpointError(
            f"megatron-core's GPTModel here is one dense tower with pre-norms, but {reason}; mot"
            " checkpoint to-hf exports any model"
        )


def correspondences(config: Config) -> Iterator[Correspondence]:
    """Yield all tensors of a resolved dense model, in the order of its layers."""
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    for parameter in held_parameters(alone, 0, range(config.model.num_towers)):
        shape = parameter.sharding.global_shape
        plain = _PLACE.sub(".", parameter.name)
        layer = _LAYER.fullmatch(plain)
        name = _OUTER.get(plain)
        if layer is not None:
            name = f"{LAYERS}{layer['layer']}.{_IN_LAYER[layer['rest']]}"
        assert name is not None, plain
        kind = "flat" if name.endswith(GATE_UP) else "whole"
        yield Correspondence(parameter.name, shape, (name,), kind)


def stacked_name(name: str) -> tuple[str, int | None]:
    """Return the name without its layer, and the layer; None outside of layers."""
    if not name.startswith(LAYERS):
        return name, None
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    return LAYERS + rest, int(layer)
