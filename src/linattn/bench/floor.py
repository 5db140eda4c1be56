"""Floors: the least time that a machine can need for so many bytes and FLOPs, from ceilings measured on that machine.

A floor counts each input read once and each output written once. It is not a prediction.

    pytest tests/test_bench_floor.py -k floor
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from linattn.bench.timing import time_call


class Costs(NamedTuple):
    """What one call must move through memory, and compute."""

    bytes: float
    flops: float


class Ceilings(NamedTuple):
    """What a machine can do: bytes/s of a large copy, read plus written, and FLOP/s of a large product by dtype."""

    bytes_per_s: float
    flops_per_s: Mapping[torch.dtype, float]

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s for operands of ``dtype``: fp16 counts as bf16, and a dtype that was not measured as float32."""
        wanted = torch.bfloat16 if dtype == torch.float16 else dtype
        return self.flops_per_s.get(wanted, self.flops_per_s[torch.float32])


def floor_ms(costs: Costs, ceilings: Ceilings, dtype: torch.dtype) -> float:
    """max(bytes / bandwidth, FLOPs / rate) in milliseconds: memory and arithmetic may overlap."""
    return max(costs.bytes / ceilings.bytes_per_s, costs.flops / ceilings.rate(dtype)) * 1e3


@functools.cache
def measure_ceilings(device: str) -> Ceilings:
    """Measure this machine, once a process: with the threads that torch has now, on random data (zeros are faster)."""
    rates = {dtype: _matmul_flops_per_s(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Ceilings(copy_bytes_per_s(device), rates)


@functools.cache
def copy_bytes_per_s(device: str) -> float:
    """Bytes read plus written by the fastest of seven large copies: 256 MiB on a CPU, 4 GiB on a GPU, read once."""
    cpu = torch.device(device).type == "cpu"
    source = torch.empty(2**26 if cpu else 2**30, device=device).normal_()
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), device=device, repeats=7)
    return 2 * source.numel() * source.element_size() / timing.best_ms * 1e3


def _matmul_flops_per_s(device: str, dtype: torch.dtype) -> float:
    n = 1024 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / time_call(lambda: a @ b, device=device, repeats=7).best_ms * 1e3
