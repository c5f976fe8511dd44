"""Micro-batches with a given share of tokens per modality, so that no shape depends on data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mot_megatron.config import Config
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.budget import tower_budgets
from mot_megatron.errors import ConfigError
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.planning.activations import Rows
from mot_megatron.planning.placing import place_towers, tokens_of_towers
from mot_megatron.rules import check_tokens_only
from mot_megatron.train.session import build_placed_groups, grouping_plan


class SyntheticBatches:
    """An endless source of one micro-batch; every sequence is one document.

    The tokens of the modalities follow each other in blocks of one block per modality, as text,
    picture and sound do in a document.
    """

    def __init__(self, config: Config, groups: ProcessGroups, shares: Sequence[float]) -> None:
        """Build the micro-batch of this rank.

        Args:
            config: Resolved configuration.
            groups: Process groups of this rank.
            shares: Share of the tokens of each modality, M of them, with the sum 1.

        Raises:
            ConfigError: A modality consists of vectors.
        """
        check_tokens_only(config.model, "this command")
        model, length = config.model, config.data.seq_length
        plan = grouping_plan(config, groups)
        batches = 1 if plan.shard is None else plan.batches_per_group
        kinds = np.tile(_modalities(config, shares), (batches, 1))
        sequences = len(kinds)
        # The ids 0, 1, ... stand for the modalities.
        modality_of_id = np.zeros(model.num_vocabulary_rows, dtype=np.int8)
        modality_of_id[: len(shares)] = np.arange(len(shares))
        self._micro_batch = build_micro_batch(
            kinds,
            np.zeros((sequences, length), dtype=np.int64),
            modality_of_id,
            plan.towers_of_modalities,
            num_towers=plan.num_towers,
            slot_multiple=plan.slot_multiple,
            shard=plan.shard,
        )
        self.rows = Rows(self._micro_batch.tower_slots, config.training.micro_batch_size * length)
        """Rows of the micro-batch on this rank."""

    def next_micro_batch(self) -> MicroBatch:
        """Return the micro-batch."""
        return self._micro_batch


def _modalities(config: Config, shares: Sequence[float]) -> np.ndarray:
    """Return the modality of every position of a micro-batch, [b, s]."""
    sequences, length = config.training.micro_batch_size, config.data.seq_length
    if config.data.packing != "budget":
        return np.tile(np.repeat(np.arange(len(shares)), tokens_of(shares, length)), (sequences, 1))
    # Budgets are those of towers, in whole tokens of a micro-batch.
    of_towers = np.zeros((1, config.model.num_towers), dtype=np.int64)
    towers = np.asarray(config.model.towers_of_modalities)
    parts = np.rint(np.asarray(shares) * 2**40).astype(np.int64)
    np.add.at(of_towers[0], towers, parts)
    found = []
    for tower, budget in enumerate(tower_budgets(of_towers, sequences * length)):
        its = np.flatnonzero(towers == tower)
        if len(its) and budget:
            within = parts[its] / parts[its].sum()
            found.append(np.repeat(its, tokens_of(within.tolist(), budget)))
    return np.concatenate(found).reshape(sequences, length)


def build_groups(config: Config, shares: Sequence[float], device: torch.device) -> ProcessGroups:
    """Build the process groups of a configuration for synthetic batches. Collective."""
    counts = tokens_of(shares, config.data.seq_length)
    tokens = dict(zip(config.model.modalities, counts, strict=True))
    placement = place_towers(config, tokens_of_towers(config.model, tokens))
    return build_placed_groups(config, placement, device)


def tokens_of(shares: Sequence[float], length: int) -> list[int]:
    """Divide a sequence among the modalities; the last gets what rounding leaves."""
    bounds = np.rint(np.cumsum([0.0, *shares[:-1]]) * length).astype(int)
    return np.diff([*bounds, length]).tolist()


def parse_shares(names: Sequence[str], given: Sequence[str]) -> list[float]:
    """Read shares given as NAME=NUMBER; without any, all modalities have equal shares.

    Raises:
        ConfigError: A name or number is invalid, or the shares do not sum to 1.
    """
    if not given:
        return [1 / len(names)] * len(names)
    shares: dict[str, float] = {}
    for item in given:
        name, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in names or not 0 <= value <= 1:
            raise ConfigError(
                f"--share {item}: expected NAME=NUMBER, with one of {', '.join(names)} and a number"
                " from 0 to 1"
            )
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"--share: the shares sum to {sum(shares.values()):g}, expected 1")
    return [shares.get(name, 0.0) for name in names]
