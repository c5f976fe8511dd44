"""Sample the next token among the legal ones, with temperature, top-k and top-p.

Random numbers are drawn in advance on the CPU, one row per sample, so that all ranks make the same
choice and a sample does not depend on the number of other samples.

Letters: n samples, V vocabulary rows, l legal ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from mot_megatron.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw from the model's distribution.

    Raises:
        ConfigError: A value is not legal.
    """

    temperature: float = 1.0
    """Divisor of the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample among this many most likely tokens; None for all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens whose probabilities sum to this."""
    seed: int = 0
    num_samples: int = 1
    max_tokens: int = 256
    """Maximum length of an item of a modality whose items vary in length."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "num_samples": (self.num_samples >= 1, "1 or more"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
        }
        for name, (legal, allowed) in rules.items():
            if not legal:
                raise ConfigError(f"{name} = {getattr(self, name)}, expected {allowed}")


def draw_uniforms(seed: int, num_samples: int, num_tokens: int) -> torch.Tensor:
    """Return random numbers in [0, 1), [num_samples, num_tokens] float64.

    Row i depends only on ``seed`` and i, and a longer row begins with the shorter one.
    """
    rows = []
    for sample in range(num_samples):
        digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        # One call per number, because torch fills long and short tensors in different orders.
        numbers = [
            torch.rand((), generator=generator, dtype=torch.float64) for _ in range(num_tokens)
        ]
        rows.append(torch.stack(numbers))
    return torch.stack(rows)


def choose_tokens(
    logits: torch.Tensor,
    legal_ids: torch.Tensor,
    settings: SamplingSettings,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Choose one legal token per sample.

    Args:
        logits: [n, V] on any device and in any precision.
        legal_ids: [l] int64 ids on the same device; no other id is chosen.
        settings: Temperature, top-k and top-p; top-p applies after top-k and temperature.
        uniforms: [n] float64 on the CPU in [0, 1), unused at temperature 0.

    Returns:
        [n] int64 ids on the CPU; among equal logits, the id listed first ranks highest.

    Raises:
        TrainingError: A logit is not finite, for example because training has diverged.
    """
    scores = logits.index_select(-1, legal_ids).double().cpu()
    if not torch.isfinite(scores).all():
        raise TrainingError(
            "the model's logits are not finite: its weights contain NaN, infinite or huge values"
        )
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    picks = torch.zeros(scores.shape[0], 1, dtype=torch.int64)
    if settings.temperature > 0:
        ranked = ranked[:, : settings.top_k]
        # Subtract first, so that a tiny temperature cannot make finite logits infinite.
        scaled = (ranked - ranked[:, :1]) / settings.temperature
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
        # Keep a token if the probabilities before it sum to less than top_p; the first always is.
        last = (cumulative[:, :-1] < settings.top_p).sum(dim=-1, keepdim=True)
        target = uniforms[:, None] * cumulative.gather(-1, last)
        picks = torch.minimum((cumulative <= target).sum(dim=-1, keepdim=True), last)
    return legal_ids.cpu()[order.gather(-1, picks)[:, 0]]
