"""Configuration values that a resumed run takes from its checkpoint."""

from __future__ import annotations

from mot_megatron.checkpoint.find import CheckpointInfo, read_config_text
from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.errors import ConfigError


def read_saved_config(checkpoint: CheckpointInfo) -> Config:
    """Return the resolved configuration of the run that saved a checkpoint.

    Raises:
        ConfigError: This version of the program does not accept it.
    """
    return parse_config(read_config_text(checkpoint), f"{checkpoint.path}/config.toml")


def check_frozen(config: Config, saved: Config) -> None:
    """Check that the checkpoint has optimizer state for all that ``config`` trains.

    Raises:
        ConfigError: A tower is trained, but was frozen when the checkpoint was saved.
    """
    frozen = dict(zip(saved.model.tower_names, saved.model.frozen_towers, strict=True))
    for name, now in zip(config.model.tower_names, config.model.frozen_towers, strict=True):
        if frozen.get(name) and not now:
            raise ConfigError(
                f"model.towers.{name}.frozen = false, but the tower was frozen in the checkpoint to"
                " resume from, which has no optimizer state for its weights; allowed: true, or a"
                " new run with run.initialize_from, which begins all optimizer state anew"
            )


def keep_warmup(config: Config, saved: Config) -> Config:
    """Return ``config`` with the number of warm-up steps in ``saved``, unless it sets one itself.

    By default, the warm-up is a fraction of ``training.train_steps``, so a finished run that is
    given more steps would otherwise warm up a second time.
    """
    if config.optimizer.lr_warmup_steps is not None:
        return config
    optimizer = config.optimizer.model_copy(update={"lr_warmup_steps": saved.num_warmup_steps})
    kept = config.model_copy(update={"optimizer": optimizer})
    return kept if kept.num_warmup_steps != config.num_warmup_steps else config
