"""The models whose speed is measured: published ones, attention like a TransNormerLLM, Based through fla's kernels.

And what a record of one means: its case, tokens per second, model FLOPs utilisation.

    pytest tests/test_bench_models.py -k subject
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linattn.bench.record import Record
from linattn.mixers.taylor import layer as taylor_layer
from linattn.models import PUBLISHED, ModelConfig, TransformerConfig, TransNormerConfig
from linattn.models.costs import model_costs

LIKE = "attention_like_"
"""Before a TransNormerLLM's name: attention of its width, depth and vocabulary, with as many parameters."""
FLA = "+fla-"
"""After a Based model's name: the same model through fla's kernel of that name."""
TRAIN_SUBJECTS = (
    *(prefix + name for name in ("transnormer_385m", "transnormer_1b", "transnormer_3b") for prefix in ("", LIKE)),
    "based_360m",
    f"based_360m{FLA}parallel_based",
    f"based_360m{FLA}fused_chunk_based",
    "transformer_360m",
)
PREFILL_SUBJECTS = ("based_1b", "jrt_1b", "transformer_1b_fast")
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12}
"""Dense bf16 of the data sheet, which model FLOPs utilisation is taken of; the SXM's, 80GB HBM3 included."""
Kind = Literal["train", "prefill"]


def subject_config(name: str) -> ModelConfig:
    """The configuration of a subject: a published model, attention like one, or a Based model through fla's kernel.

    Raises:
        ValueError: a name that is none of them.
    """
    plain = name.split(FLA)[0]
    if plain.startswith(LIKE):
        like = subject_config(plain.removeprefix(LIKE))
        if isinstance(like, TransNormerConfig):
            return attention_like(like)
    elif plain in PUBLISHED:
        return PUBLISHED[plain]()
    raise ValueError(f"unknown model {name!r}; choose from {sorted({*PUBLISHED, *TRAIN_SUBJECTS})}")


def attention_like(config: TransNormerConfig) -> TransformerConfig:
    """Attention of a TransNormerLLM's width, depth, heads and vocabulary.

    Its MLP is wider by d_model / 3, rounded to 64: what the gate's projection holds there.
    """
    wider = 64 * round((config.d_hidden + config.d_model / 3) / 64)
    return TransformerConfig(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_hidden=max(wider, config.d_hidden),
        vocab_size=config.vocab_size,
    )


@cache
def model_flops(config: ModelConfig, length: int, kind: Kind) -> float:
    """FLOPs a token, nothing recomputed: weights, and the mixers' States or half a text of keys; training 3 times."""
    costs = model_costs(config.decoder(), tokens=length // 2)
    weights = costs.weight_flops
    if kind == "prefill":  # the head runs on one token of a text
        decoder = config.decoder()
        weights -= 2 * decoder.d_model * decoder.vocab_size
    return (3 if kind == "train" else 1) * (weights + costs.state_flops)


def implementation(name: str, config: ModelConfig) -> str:
    """Whose kernels a subject runs through: linattn's, fla's by name, or torch's FlashAttention-2."""
    if FLA in name:
        return f"fla {name.split(FLA)[1]}"
    return "sdpa-flash" if isinstance(config, TransformerConfig) else "linattn"


def tokens_per_s(record: Record) -> float:
    """Of a record of `bench_models`."""
    _, batch, length = read_case(record.case)
    return batch * length / record.p50_ms * 1e3


def utilisation(record: Record, config: ModelConfig) -> float:
    """Model FLOPs a second over the data sheet's dense bf16; NaN where the GPU is not in `PEAK_FLOPS`."""
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if record.gpu.startswith(gpu)), math.nan)
    kind: Kind = "train" if record.op == "train" else "prefill"
    return tokens_per_s(record) * model_flops(config, read_case(record.case)[2], kind) / peak


def read_case(case: str) -> tuple[str, int, int]:
    """(model, B, T) of a case such as based_360m-b32-t2048."""
    name, _, rest = case.rpartition("-b")
    batch, length = rest.split("-t")
    return name, int(batch), int(length.split("-")[0])


@contextmanager
def kernels_of(name: str, config: ModelConfig, device: str) -> Iterator[None]:
    """The kernels that a subject is to run through, in here only."""
    with ExitStack() as stack:
        if isinstance(config, TransformerConfig) and torch.device(device).type == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        if FLA in name:
            stack.enter_context(taylor_by_fla(name.split(FLA)[1]))
        yield


@contextmanager
def taylor_by_fla(function: str) -> Iterator[None]:
    """Inside, Taylor layers call fla's kernel of this name: no State, no packing, all texts from the start."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, normalize: bool = True, **options: Any) -> tuple[Tensor, None]:
        import fla.ops.based as based  # pyright: ignore[reportMissingImports]

        for option in ("initial_state", "cu_seqlens"):
            if options.get(option) is not None:
                raise ValueError(f"fla's {function} takes no {option}")
        return getattr(based, function)(q, k, v, use_norm=normalize), None

    ours = taylor_layer.taylor_attention
    taylor_layer.taylor_attention = attention
    try:
        yield
    finally:
        taylor_layer.taylor_attention = ours
