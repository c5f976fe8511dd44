"""config.json of the supported architectures, from and to this program's configuration of a model.

Letters: K towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig, ModelConfig
from mot_megatron.data.corpus import CorpusDescription
from mot_megatron.data.structure import BEGIN_DOCUMENT, END_DOCUMENT

MODELLING_FILE = "modeling_mot.py"
MIXTURE = "mixture_of_transformers"
"""The model type of this program's own modelling file."""
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    MIXTURE: "MixtureOfTransformersForCausalLM",
}
"""Model types and the classes that compute them."""


def model_type_of(model: ModelConfig) -> str:
    """Return the architecture that computes the same as ``model``.

    Those of the transformers library are dense and pre-norm: Llama, Qwen2 with biases and Qwen3
    with norms of queries and keys. Any other model uses the modelling file of this program.
    """
    if model.num_towers > 1 or model.has_experts or model.norm_placement != "pre":
        return MIXTURE
    dense = {(False, False): "llama", (False, True): "qwen2", (True, False): "qwen3"}
    return dense.get((model.qk_norm, model.add_qkv_bias), MIXTURE)


def config_json(config: Config, description: CorpusDescription, dtype: str) -> dict[str, Any]:
    """Return config.json of a model.

    Args:
        config: Resolved configuration of the run.
        description: Of the corpus.
        dtype: Type of the weights, as in "float32".
    """
    model, kind = config.model, model_type_of(config.model)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": model.num_vocabulary_rows,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.feed_forward_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_std,
        "max_position_embeddings": config.data.seq_length,
        **token_ids(description),
    }
    if kind == MIXTURE:
        return {**common, **_mixture(model, description)}
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    # Version 5 of transformers reads the table, earlier ones the number.
    dense = {"hidden_act": "silu", "rope_theta": model.rotary_base, "rope_parameters": rope}
    if kind == "llama":
        dense["mlp_bias"] = False
    if kind != "qwen2":
        dense["attention_bias"] = False
    return {**common, **dense}


def token_ids(description: CorpusDescription) -> dict[str, int]:
    """Return the ids of the tokens that begin, end and pad documents, if the corpus has them."""
    special = description.special_tokens
    ids = {
        "bos_token_id": special.get(BEGIN_DOCUMENT),
        "eos_token_id": special.get(END_DOCUMENT),
        "pad_token_id": description.pad_token,
    }
    return {key: id_ for key, id_ in ids.items() if id_ is not None}


def _mixture(model: ModelConfig, description: CorpusDescription) -> dict[str, Any]:
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    stem, prefix = MODELLING_FILE.removesuffix(".py"), "MixtureOfTransformers"
    return {
        "auto_map": {auto: f"{stem}.{prefix}{own}" for auto, own in classes.items()},
        "rotary_base": model.rotary_base,
        "norm_placement": model.norm_placement,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.add_qkv_bias,
        "towers": list(model.tower_names),
        "tower_of_modality": {name: modality.tower for name, modality in model.modalities.items()},
        "tower_starts": _tower_starts(model.towers_of_modalities, description),
        "untied": model.untied.model_dump(),
        "experts": [_experts(experts) for experts in model.experts_of_towers],
        "route_causally": model.can_be_causal,
    }


def _tower_starts(towers: Sequence[int], description: CorpusDescription) -> list[list[int]]:
    """Return pairs of a first id and the tower from there on.

    Rows of the vocabulary after the corpus's last id belong to the tower of the last modality; no
    token has their ids.
    """
    of_id = np.array(towers)[description.modality_of_id]
    starts = np.flatnonzero(np.diff(of_id, prepend=-1))
    return [[int(first), int(of_id[first])] for first in starts]


def _experts(experts: ExpertsConfig | None) -> Mapping[str, Any] | None:
    if experts is None:
        return None
    per_token = experts.experts_per_token
    return {
        "num_experts": experts.num_moe_experts,
        "routing": experts.routing,
        "experts_per_token": int(per_token) if experts.routing == "topk" else per_token,
        "gate": experts.gate,
        "capacity_factor": experts.capacity_factor,
        "causal_router": experts.causal_router,
    }
