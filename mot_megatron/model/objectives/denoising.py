"""Denoising: vectors with noise enter the stream, and what separates them from data is predicted.

Both flow matching and diffusion are squared errors of a linear projection; they differ in the
inputs and targets, which the data path computes.

Letters: g slots, n rows of the modality, w its width, h hidden size, M modalities, tp
tensor-parallel size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mot_megatron.config_model import ModelConfig
from mot_megatron.model.initialization import mark_zero
from mot_megatron.model.inventory import FREQUENCIES
from mot_megatron.model.micro_batch import LatentRows
from mot_megatron.model.objectives.base import Objective
from mot_megatron.model.sharding import ParameterSharding, set_sharding
from mot_megatron.model.towers import ParallelLinears

_LONGEST_PERIOD = 10_000.0
_TIME_UNITS = 1000.0
"""Times from 0 to 1 are embedded as the steps of a diffusion process."""


@dataclass(frozen=True)
class Denoising(Objective):
    """Squared error of a modality's vectors."""

    modality: int
    width: int
    """w."""
    hidden_size: int

    @classmethod
    def all_of(cls, model: ModelConfig) -> dict[str, Denoising]:
        """Return the objective of each modality of vectors, by name.

        Raises:
            ConfigError: A width is not resolved.
        """
        return {
            name: cls(list(model.modalities).index(name), width, model.hidden_size)
            for name, width in model.widths.items()
        }

    def entry(self, linears: ParallelLinears) -> LatentEntry:
        """Build the module that makes rows [n, h] of vectors and times."""
        del linears
        return LatentEntry(self)

    def exit(self, linears: ParallelLinears) -> LatentExit:
        """Build the module that predicts vectors and sums their errors."""
        del linears
        return LatentExit(self)


class LatentEntry(nn.Module):
    """Rows of a modality of vectors: a projection of the vector plus an embedding of its time.

    All tensor-parallel ranks hold the whole weights and compute all rows.
    """

    def __init__(self, objective: Denoising) -> None:
        super().__init__()
        hidden = objective.hidden_size
        self.vector = _matrix(hidden, objective.width)
        self.time_hidden = _matrix(hidden, 2 * FREQUENCIES)
        self.time = _matrix(hidden, hidden)

    def forward(self, rows: LatentRows) -> torch.Tensor:
        """Return [n, h]."""
        dtype = self.vector.dtype
        waves = time_waves(rows.times).to(dtype)
        times = F.linear(F.silu(F.linear(waves, self.time_hidden)), self.time)
        return F.linear(rows.inputs.to(dtype), self.vector) + times


class LatentExit(nn.Module):
    """Predictions of a modality of vectors; they begin as zeros."""

    def __init__(self, objective: Denoising) -> None:
        super().__init__()
        self.modality = objective.modality
        self.vector = _matrix(objective.width, objective.hidden_size)
        mark_zero(self.vector)

    def forward(
        self, x: torch.Tensor, rows: LatentRows, loss_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of errors, and the detached sums to report, [M] fp64.

        Args:
            x: [n, h], the rows of the modality after the final norm.
            rows: Their targets.
            loss_weights: Of the modalities, [M] fp32.
        """
        predicted = F.linear(x, self.vector).float()
        errors = (predicted - rows.targets).square().mean(-1).double()
        total = errors.sum()
        sums = torch.zeros_like(loss_weights, dtype=torch.float64)
        sums[self.modality] = total.detach()
        return (loss_weights[self.modality] * total).float(), sums


def time_waves(times: torch.Tensor) -> torch.Tensor:
    """Return sines and cosines of times [n] at geometrically spaced frequencies, [n, 128] fp32."""
    # In fp64, because angles are up to 1000 radians, which fp32 rounds by up to 3e-5.
    steps = torch.arange(FREQUENCIES, dtype=torch.float64, device=times.device) / FREQUENCIES
    angles = _TIME_UNITS * times.double()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * steps)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def _matrix(rows: int, columns: int) -> nn.Parameter:
    """Return a weight that is not split; ``initialize_parameters`` fills it."""
    weight = nn.Parameter(torch.zeros(rows, columns))
    set_sharding(weight, ParameterSharding((rows, columns)))
    return weight
