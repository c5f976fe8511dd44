"""Encoder and decoder of VQGAN (Esser et al., arXiv 2012.09841), with the names of its weights.

The shape of a network follows from the names and shapes of its weights, so that no description of
it is needed: levels, residual blocks per level, channels, and the levels with attention.

Shapes: n pictures, c channels, [h, w] pixels of a level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

_NORM_GROUPS, _NORM_EPS = 32, 1e-6
Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each weight by its name below the encoder or the decoder."""


class _ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a projection of x if widths differ."""

    def __init__(self, width_in: int, width_out: int, shortcut: str | None) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut_name = shortcut
        if shortcut is not None:
            size = 3 if shortcut == "conv_shortcut" else 1
            self.add_module(shortcut, nn.Conv2d(width_in, width_out, size, padding=size // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut_name is None else self.get_submodule(self.shortcut_name)(x))


class _Attention(nn.Module):
    """x + attention of all pixels with one head, through 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(width, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        # [n, c, h, w] -> [n, h * w, c]
        q, k, v = (self.get_submodule(name)(y).flatten(2).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.get_submodule("proj_out")(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class _Resampling(nn.Module):
    """Halve or double height and width."""

    def __init__(self, width: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.conv = nn.Conv2d(width, width, 3, 2 if halve else 1, 0 if halve else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.halve:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # as the published networks pad
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks, each with attention at some levels, and a resampling at most levels."""

    def __init__(self, shapes: Shapes, resampling: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _residual_block(_below(shapes, f"block.{index}"))
            for index in range(_count(shapes, "block"))
        )
        self.attn = nn.ModuleList(
            _Attention(shapes[f"attn.{index}.norm.weight"][0])
            for index in range(_count(shapes, "attn"))
        )
        self.resampling = resampling
        self.resamples = f"{resampling}.conv.weight" in shapes
        if self.resamples:
            width = shapes[f"{resampling}.conv.weight"][0]
            self.add_module(resampling, _Resampling(width, halve=resampling == "downsample"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.get_submodule(self.resampling)(x) if self.resamples else x


class _Middle(nn.Module):
    """Two residual blocks around an attention."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.block_1 = _residual_block(_below(shapes, "block_1"))
        self.attn_1 = _Attention(shapes["attn_1.norm.weight"][0])
        self.block_2 = _residual_block(_below(shapes, "block_2"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[n, 3, h f, w f] in -1..1 -> [n, c, h, w], with f = 2^(levels - 1)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv_in = _convolution(shapes, "conv_in")
        self.down = nn.ModuleList(
            _Level(_below(shapes, f"down.{index}"), "downsample")
            for index in range(_count(shapes, "down"))
        )
        self.mid = _Middle(_below(shapes, "mid"))
        self.norm_out = _norm(shapes["norm_out.weight"][0])
        self.conv_out = _convolution(shapes, "conv_out")

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return 2 ** sum(level.resamples for level in self.down if isinstance(level, _Level))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the vectors before quantization."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[n, c, h, w] -> [n, 3, h f, w f]."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv_in = _convolution(shapes, "conv_in")
        self.mid = _Middle(_below(shapes, "mid"))
        self.up = nn.ModuleList(
            _Level(_below(shapes, f"up.{index}"), "upsample")
            for index in range(_count(shapes, "up"))
        )
        self.norm_out = _norm(shapes["norm_out.weight"][0])
        self.conv_out = _convolution(shapes, "conv_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the pictures."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):  # level 0 has the most pixels
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NORM_GROUPS, width, _NORM_EPS)


def _convolution(shapes: Shapes, name: str) -> nn.Conv2d:
    width_out, width_in, size, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(width_in, width_out, size, padding=size // 2)


def _residual_block(shapes: Shapes) -> _ResidualBlock:
    width_out, width_in = shapes["conv1.weight"][:2]
    shortcuts = [name for name in ("nin_shortcut", "conv_shortcut") if f"{name}.weight" in shapes]
    return _ResidualBlock(width_in, width_out, shortcuts[0] if shortcuts else None)


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {
        name.removeprefix(prefix + "."): shape
        for name, shape in shapes.items()
        if name.startswith(prefix + ".")
    }


def _count(shapes: Shapes, name: str) -> int:
    found = {match[1] for each in shapes if (match := re.match(rf"{name}\.(\d+)\.", each))}
    return len(found)
