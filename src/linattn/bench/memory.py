"""Memory of one call: the most that its tensors held at a time, and what forward keeps for backward.

On a GPU this is the allocator's own count. On a CPU tensors are followed from operator to operator: exact for what
operators return, blind to what one keeps inside, and of no effect on what runs.

    pytest tests/test_bench.py -k memory
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most bytes that live at a time during the call, beyond those that lived before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        call()
    return live.peak


def kept_bytes(forward: Callable[[], Any], inputs: Iterable[Tensor]) -> int:
    """Bytes that ``forward`` keeps for backward, each storage once, those of ``inputs`` not counted."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(kept.values())


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == "cpu":
                self._count(x.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[Any]) -> None:
        # A view of an input that lived before the call is not new.
        if storage in self._seen or storage in given:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size
