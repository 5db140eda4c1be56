"""Positions as rotations: RoPE for the attention layers, and the angles that LRPE shares with it.

Angles are float64 until they are reduced to one turn, and only then float32. Computed in float32 they are off by 0.04
radians at position 1,000,000, and the angle between two tokens of one 128-token window by 0.05. Nothing here stores a
table: the frequencies are rebuilt from Python numbers in each call, so that no cast and no `to_empty` can spoil them.

    pytest tests/test_nn_positions.py -k rotary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linattn.core.numerics import sum_dtype


def rotary_frequencies(
    head_dim: int, base: float = 10000.0, fraction: float = 1.0, device: torch.device | str | None = None
) -> Tensor:
    """The frequencies ``base^(-2i / R)``, i = 0, 1, ..., of a head that rotates R = int(head_dim * fraction) features.

    An odd R gives (R + 1) / 2 frequencies and so rotates R + 1 features: the published 1.3B attention baseline has
    heads of 70, fraction 0.5, hence R = 35, 18 frequencies and 36 rotated features.

    Returns:
        float64 [F] in radians per token, F = ceil(R / 2).

    Raises:
        ValueError: the fraction is outside (0, 1], or there are fewer than R = 1 or more than head_dim features to
            rotate.

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2; the fraction as in GPT-NeoX.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"rotary fraction is {fraction}; it must be above 0 and at most 1")
    rotary_dim = int(head_dim * fraction)
    rotated = 2 * math.ceil(rotary_dim / 2)
    if not 0 < rotated <= head_dim:
        raise ValueError(
            f"head_dim {head_dim} with fraction {fraction} would rotate {rotated} features; "
            f"choose a head_dim and fraction that rotate 2 to {head_dim - head_dim % 2}"
        )
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    return base**-exponents


def rotary_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``position * frequency``.

    Args:
        positions: integers [..., T].
        frequencies: float64 [F], radians per token.
        dtype: of the result; float64 for float64 models.

    Returns:
        cos and sin, each [..., T, F].

    Raises:
        ValueError: positions are not integers (above 256 bfloat16 holds no odd one), or frequencies not float64.
    """
    check_positions(positions)
    if frequencies.dtype != torch.float64:
        raise ValueError(f"frequencies are {frequencies.dtype}; pass the float64 of rotary_frequencies")
    angle = _one_turn(positions.to(torch.float64)[..., None] * frequencies, dtype)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2F features of every head; the rest pass through.

    Feature i is paired with feature i + F (half-split, GPT-NeoX), not with its neighbour.

    Args:
        x: [B, T, H, D], or [B, H, D] for one token a row.
        cos, sin: [B, T, F] or [T, F], or [B, F] for one token a row.

    Returns:
        x's shape and dtype; the rotation is computed in float32 (float64 if x is).

    Raises:
        ValueError: 2F > D.
    """
    n, dim = cos.shape[-1], x.shape[-1]
    if 2 * n > dim:
        raise ValueError(f"{n} frequencies rotate {2 * n} features; x {list(x.shape)} has {dim}")
    dtype = sum_dtype(x.dtype)
    cos, sin = cos[..., None, :].to(dtype), sin[..., None, :].to(dtype)
    a, b = x[..., :n].to(dtype), x[..., n : 2 * n].to(dtype)
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    return turned if 2 * n == dim else torch.cat((turned, x[..., 2 * n :]), dim=-1)


class Rotary(nn.Module):
    """RoPE on queries and keys: `rotary_frequencies`, `rotary_angles` and `apply_rotary` as one module.

    It has no parameters and no buffers. Based rotates all of a head in its sliding-window layers, the attention
    baseline half of it; a wrong head_dim or fraction is a ValueError at once.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, fraction: float = 1.0) -> None:
        super().__init__()
        rotary_frequencies(head_dim, base, fraction, device="meta")  # refuses a wrong pair here, not in forward
        self.head_dim = head_dim
        self.base = base
        self.fraction = fraction

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cos and sin [..., T, F] of positions int64 [..., T], on the positions' device."""
        frequencies = rotary_frequencies(self.head_dim, self.base, self.fraction, positions.device)
        return rotary_angles(positions, frequencies, dtype)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [B, T, H, D] and k [B, T, H_k, D] by positions int64 [B, T] or [T]; each keeps its dtype."""
        cos, sin = self.angles(positions, sum_dtype(q.dtype))
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.head_dim}, base={self.base}, fraction={self.fraction}"


def check_positions(positions: Tensor) -> None:
    """ValueError unless positions are integers."""
    if positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"positions are {positions.dtype}; pass int64, as torch.arange gives")


def _one_turn(angle: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 angle in ``dtype``, less whole turns: in [-pi, pi] float32 is within 2e-7. Float64 needs no help."""
    if dtype == torch.float64:
        return angle
    turns = (angle.detach() / (2 * math.pi)).round()
    return (angle - turns * (2 * math.pi)).to(dtype)
