"""The models that a Mixture-of-Transformers is compared with, made from its configuration.

All have the same FLOPs per token, apart from those of routers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig, ModalityConfig, TowerConfig
from mot_megatron.errors import ConfigError

MODEL, TWIN = "model", "dense twin"
MIXTURE, HYBRID = "MoE-4x", "hybrid"
DENSE_TOWER, TEXT = "dense", "text"
_FOUR_EXPERTS = ExpertsConfig(num_moe_experts=4)
"""As in the paper (arXiv 2411.04996, section 3.1): expert choice, one expert per token."""


def dense_twin(config: Config) -> Config:
    """Return the same model with one plain tower, held by every data-parallel rank."""
    model, parallel = config.model, config.parallel
    modalities = {
        name: ModalityConfig(tower=DENSE_TOWER, loss_weight=modality.loss_weight)
        for name, modality in model.modalities.items()
    }
    plain = {
        "modality_parallel_size": 1,
        "placement": "auto",
        "attention_exchange": "sequence",
        "expert_model_parallel_size": 1,
    }
    return config.model_copy(
        update={
            "model": model.model_copy(update={"modalities": modalities, "towers": {}}),
            "parallel": parallel.model_copy(update=plain),
        }
    )


def mixture_of_experts(config: Config) -> Config:
    """Return the dense twin with four experts in every layer."""
    return _with_experts(dense_twin(config), DENSE_TOWER)


def hybrid(config: Config) -> Config:
    """Return the same model with four experts in every layer of the text's tower.

    Raises:
        ConfigError: No modality is named text, or its tower has experts already.
    """
    modality = config.model.modalities.get(TEXT)
    if modality is None:
        names = ", ".join(config.model.modalities)
        raise ConfigError(f"the hybrid has experts for text, but the modalities are {names}")
    if config.model.experts_of_towers[config.model.tower_names.index(modality.tower)]:
        raise ConfigError(f"model.towers.{modality.tower}.experts: the model is a hybrid already")
    return _with_experts(config, modality.tower)


def _with_experts(config: Config, tower: str) -> Config:
    plain = config.model.towers.get(tower, TowerConfig())
    towers = {**config.model.towers, tower: plain.model_copy(update={"experts": _FOUR_EXPERTS})}
    return config.model_copy(update={"model": config.model.model_copy(update={"towers": towers})})


ARMS: Mapping[str, tuple[str, Callable[[Config], Config]]] = {
    "dense": (TWIN, dense_twin),
    "moe-4x": (MIXTURE, mixture_of_experts),
    "hybrid": (HYBRID, hybrid),
}
"""By the name in a command: the name in reports, and how the configuration is made."""


def arms_of(config: Config, names: str) -> dict[str, Config]:
    """Return the configuration, and those of the arms named, separated by commas.

    Raises:
        ConfigError: A name is unknown, or a model cannot be made.
    """
    found = {MODEL: config}
    for name in filter(None, names.split(",")):
        if name not in ARMS:
            raise ConfigError(f"--arms {names}: no arm {name!r}; allowed: {', '.join(ARMS)}")
        title, make = ARMS[name]
        found[title] = make(config)
    return found
