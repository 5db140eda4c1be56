"""Based (arXiv 2402.18668): gated short convolutions, every fifth layer Taylor attention, the next a short window.

Sizes and constants: the published configurations based-360m and based-1b.
"""

from __future__ import annotations

from dataclasses import dataclass

from linattn.core.config import require_positive
from linattn.mixers.shortconv.layer import ShortConvConfig
from linattn.mixers.taylor.layer import TaylorConfig
from linattn.mixers.window.layer import WindowConfig
from linattn.models.decoder import DecoderConfig


@dataclass(frozen=True)
class BasedConfig:
    """Based's dials. The defaults are the 360M model: 362,620,928 parameters."""

    d_model: int = 1024
    """Width of the residual stream."""
    n_layers: int = 27
    """Blocks, each a mixer and an MLP."""
    n_heads: int = 16
    """Heads of the Taylor and window layers."""
    feature_dim: int = 16
    """Dim of q and k before the Taylor map: the first of the two dials of recall against state size."""
    window: int = 129
    """Keys a window layer sees, itself included: the second dial. The published code's window_size 256 sees 129."""
    linear_layers: tuple[int, ...] = (1, 6, 11, 16, 21)
    """Layers, from 0, that are Taylor attention."""
    window_layers: tuple[int, ...] = (2, 7, 12, 17, 22)
    """Layers, from 0, that are window attention. All others are gated short convolutions."""
    d_hidden: int = 2048
    """Width of the SwiGLU."""
    conv_expand: int = 4
    """A short convolution's in_proj is conv_expand * d_model wide; half of it gates the other."""
    conv_kernel: int = 3
    """Taps of the short convolution."""
    normalize: bool = True
    """Whether Taylor attention divides by the sum of weights."""
    vocab_size: int = 50257
    """Token ids; the table is padded to a multiple of 8."""

    def __post_init__(self) -> None:
        require_positive(self)

    def linear(self) -> TaylorConfig:
        """The linear attention layer."""
        return TaylorConfig(self.n_heads, self.feature_dim, self.normalize)

    def decoder(self) -> DecoderConfig:
        """The skeleton's configuration."""
        check_schedule(self.n_layers, linear_layers=self.linear_layers, window_layers=self.window_layers)
        conv = ShortConvConfig(expand=self.conv_expand, kernel=self.conv_kernel)
        window = WindowConfig(n_heads=self.n_heads, window=self.window)
        kinds = {**dict.fromkeys(self.linear_layers, self.linear()), **dict.fromkeys(self.window_layers, window)}
        return DecoderConfig(
            d_model=self.d_model,
            mixers=tuple(kinds.get(i, conv) for i in range(self.n_layers)),
            d_hidden=self.d_hidden,
            vocab_size=self.vocab_size,
        )


def check_schedule(n_layers: int, **layers: tuple[int, ...]) -> None:
    """Refuse layer lists that overlap or leave 0 .. n_layers - 1."""
    seen: dict[int, str] = {}
    for name, indices in layers.items():
        for i in indices:
            if not 0 <= i < n_layers:
                raise ValueError(f"{name} names layer {i}, but the model has layers 0 to {n_layers - 1}")
            if i in seen:
                raise ValueError(f"layer {i} stands in {seen[i]} and again in {name}")
            seen[i] = name


def based_360m() -> BasedConfig:
    """based-360m: 27 layers, 362,620,928 parameters."""
    return BasedConfig()


def based_1b() -> BasedConfig:
    """based-1b ("1.3B"): 36 layers, 1,349,453,056 parameters."""
    return BasedConfig(
        d_model=1792,
        n_layers=36,
        linear_layers=(1, 6, 11, 16, 21, 27, 33),
        window_layers=(2, 7, 12, 17, 22, 28, 34),
        d_hidden=3584,
    )


__all__ = ["BasedConfig", "based_1b", "based_360m", "check_schedule"]
