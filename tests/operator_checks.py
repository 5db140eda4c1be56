"""How a mixer's operators behave where torch looks on, for the tests of every mixer that has kernels.

A call takes the tensors in ``given`` and returns its outputs; the loss is the sum of their squares.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linattn.core.numerics import relative_error


class _Seen(TorchDispatchMode):
    """Notes the library's operators and lets everything pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == "linattn" else []
        return func(*args, **(kwargs or {}))


def results(call, given):
    """The outputs, and the gradients of all that is given."""
    outputs = call(*given)
    return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), given)]


def watched(call, given):
    """Which operators a mode sees, and for each result whether it is the same as unwatched."""
    alone = results(call, given)
    with _Seen() as seen:
        found = results(call, given)
    return seen.names, [torch.equal(x, y) for x, y in zip(alone, found, strict=True)]


def reached(call, given, only):
    """Where a gradient arrives when one tensor alone asks for it, and whether the first output is the same."""
    want = call(*given)[0]
    output = call(*[x if i == only else x.detach() for i, x in enumerate(given)])[0]
    output.square().sum().backward()
    return [i for i, x in enumerate(given) if x.grad is not None], torch.equal(output, want)


def differentiate_twice(call, given):
    (gradient,) = torch.autograd.grad(call(*given)[0].square().sum(), given[0], create_graph=True)
    gradient.sum().backward()


def compiled_errors(call, given):
    """How far each result is off when the call is compiled whole."""
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    return [relative_error(x, y) for x, y in zip(results(compiled, given), results(call, given), strict=True)]
