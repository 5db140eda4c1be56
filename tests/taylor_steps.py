"""What the tests of Taylor attention's steps share, on CPU and GPU: inputs, States, pools of every variant."""

import torch

from linattn.mixers import taylor
from linattn.mixers.taylor import TaylorState, chunked, pools

VARIANTS = ("plain", "deferred", "copy")


def draw(dtype, F, V, heads, rows, tokens=1, seed=0, device="cpu"):
    """q, k, v [tokens, rows, heads, dim]."""
    generator = torch.Generator(device).manual_seed(seed)
    dims = zip(heads, (F, F, V), strict=True)
    return [torch.randn(tokens, rows, h, n, device=device, generator=generator).to(dtype) for h, n in dims]


def a_state(F, V, heads, rows, tokens=40, device="cpu"):
    _, k, v = draw(torch.float32, F, V, (1, heads, heads), rows, tokens, 9, device)
    return chunked.summarize(k.transpose(0, 1), v.transpose(0, 1))


def pool_of(variant, state, slots, dtype, recent=3):
    if variant == "plain":
        return taylor.new_pool(state, slots)
    return pools.new_deferred_pool(state, slots, dtype, recent=recent, copy=variant == "copy")


def put(pool, slots, state):
    (taylor.put_ if isinstance(pool, TaylorState) else pools.put_deferred_)(pool, slots, state)


def taken(pool, slots):
    return (taylor.take if isinstance(pool, TaylorState) else pools.take_deferred)(pool, slots)
