"""Rotary position embedding (RoFormer, section 3.4); it pairs element i with i + head_dim / 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryAngles:
    """Cosines and sines of the angles of every position, [t, 1, head_dim] each."""

    cosine: torch.Tensor
    sine: torch.Tensor

    @classmethod
    def of(
        cls, positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
    ) -> RotaryAngles:
        """Compute the angles of ``positions`` [t], in fp32 or wider, and cast them to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
        angles = positions[:, None].to(wide) * base**-exponents
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate [t, heads, head_dim] by the angles of its rows."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat((-second, first), dim=-1) * self.sine
