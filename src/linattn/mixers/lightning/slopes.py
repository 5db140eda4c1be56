"""How fast each head forgets: the decays of published lightning attention models, as log_decay <= 0 per token.

Peers pass slopes, which are positive: log_decay = -slope. Everything here is float64 [n_heads] on the CPU and cast
where it is used, because a decay rounded to 16 bits is off by more than a factor after a few thousand tokens.

    pytest tests/test_lightning.py -k slopes
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(n_heads: int) -> Tensor:
    """ALiBi's slopes, positive float64 [n_heads]: 2^(-8 (h + 1) / H), h = 0 .. H-1, for H a power of two.

    Otherwise the slopes of the largest power of two P below, then every other one of the slopes of 2P. Head 0 forgets
    fastest. Source: Press et al. 2021 (arXiv 2108.12409), section 3, and their published code for other H.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    power = 1 << (n_heads.bit_length() - 1)
    exponents = [8 * (h + 1) / power for h in range(power)]
    exponents += [4 * (2 * h + 1) / power for h in range(n_heads - power)]
    return 2.0 ** -torch.tensor(exponents, dtype=torch.float64)


def tnl_log_decay(n_heads: int, layer: int, n_layers: int) -> Tensor:
    """TransNormerLLM: -alibi_slopes * (1 - l / (L - 1) + 1e-5), layer l = 0 .. L-1. What its weights were trained with.

    The last layer keeps 1e-5 of its slope: half-lives of millions of tokens. One layer has the factor of a first
    layer, 1 + 1e-5, where the formula would divide by zero.

    Returns:
        float64 [n_heads]. Raises ValueError for a layer that is not in the model.
    """
    _check_layer(layer, n_layers)
    return -alibi_slopes(n_heads) * (1 - layer / max(n_layers - 1, 1) + 1e-5)


def paper_log_decay(n_heads: int, layer: int, n_layers: int) -> Tensor:
    """Lightning Attention-2 as printed: -(8 h / H) (1 - l / L), heads h = 0 .. H-1, layers l = 0 .. L-1.

    Head 0 never forgets and head H-1 of the first layer loses a factor of exp(8 (H-1) / H), about 3,000, a token. No
    published weights use it. Source: arXiv 2401.04658, equation 10, which does not say where h begins; 0 here.

    Returns:
        float64 [n_heads]. Raises ValueError for a layer that is not in the model.
    """
    _check_layer(layer, n_layers)
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    return torch.arange(n_heads, dtype=torch.float64) * (-8 / n_heads * (1 - layer / n_layers))


def minimax_log_decay(n_heads: int, layer: int, n_layers: int) -> Tensor:
    """MiniMax-01: -2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5), whatever H; layers l = 0 .. L-1 of the model.

    It differs from `tnl_log_decay` where H is no power of two, and by 1e-5 of a factor everywhere.

    Returns:
        float64 [n_heads]. Raises ValueError for a layer that is not in the model.
    """
    _check_layer(layer, n_layers)
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    slopes = 2.0 ** (torch.arange(1, n_heads + 1, dtype=torch.float64) * (-8 / n_heads))
    return -slopes * (1 - layer / (n_layers - 1 + 1e-5) + 1e-5)


def _check_layer(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is not one of the {n_layers} layers 0 .. {n_layers - 1}")
