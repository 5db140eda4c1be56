"""Taylor attention's kernels beside the definition in float64, output by output, for the tests of every backend."""

from itertools import pairwise

import torch

from linattn.core.laws import poisoned_memory
from linattn.core.numerics import relative_error, scale_floor
from linattn.mixers.taylor import chunked
from linattn.mixers.taylor.reference import taylor_reference

SEED = 0.02
"""Of the State's gradients: at 1 they would hide what y's, divided by some 100 tokens' weights, is in dk and dv."""
STATES = ("S", "z", "dS0", "dz0")


def draw(T, F, V, dtype, heads, documents, rows=1, device="cpu", std=1.0, before=20):
    """q, k, v, the initial S and z (those of ``before`` tokens), and the gradients of y, S and z.

    std: of q and k.
    """
    generator = torch.Generator(device).manual_seed(1000 * V + T)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    n_state = max(heads[1:])
    q, k, v = (normal(rows, T, h, n) for h, n in zip(heads, (F, F, V), strict=True))
    earlier = std * normal(documents, before, n_state, F)
    S0, z0 = chunked.summarize(earlier.to(dtype), normal(documents, before, n_state, V).to(dtype))
    do, dS, dz = (normal(*shape) for shape in ((rows, T, max(heads), V), S0.shape, z0.shape))
    inputs = ((std * q).to(dtype), (std * k).to(dtype), v.to(dtype), S0.float(), z0.float())
    return inputs, (do.to(dtype), SEED * dS, SEED * dz)


def definition(inputs, cu, **settings):
    """y, S and z of the quadratic definition, document by document."""
    q, k, v, S0, z0 = inputs
    if cu is None:
        y, (S, z) = taylor_reference(q, k, v, initial_state=None if S0 is None else (S0, z0), **settings)
        return y, S, z
    parts = []
    for n, (a, b) in enumerate(pairwise(cu)):
        before = None if S0 is None else (S0[n : n + 1], z0[n : n + 1])
        parts.append(taylor_reference(*(x[:, a:b] for x in (q, k, v)), initial_state=before, **settings))
    return torch.cat([y for y, _ in parts], 1), *(torch.cat([state[i] for _, state in parts]) for i in range(2))


def wanted(inputs, gradients, cu=None, **settings):
    """By name: y, S, z and the gradients of q, k, v and of the initial S0 and z0 where there is one."""
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    outputs = definition(leaves, cu, **settings)
    loss = sum((x * g.double()).sum() for x, g in zip(outputs, gradients, strict=True) if g is not None)
    given = [x for x in leaves if x is not None]
    found = torch.autograd.grad(loss, given, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]
    names = ("y", "S", "z", "dq", "dk", "dv", "dS0", "dz0")
    return {n: x.detach() for n, x in zip(names, (*outputs, *found), strict=False)}


def run(sweeps, inputs, gradients, cu=None, *, scale=0.25, normalize=True, segments=None, tile=None, backward=True):
    """What `wanted` names, by the backend's launches, with fresh memory full of NaN."""
    from linattn.mixers.taylor import triton as kernels

    q, k, v, S0, z0 = inputs
    offsets = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=q.device)
    how = (offsets, sweeps, tile, segments)
    with poisoned_memory():
        o, S, z, share = kernels.forward(q, k, v, scale, normalize, S0, z0, offsets, True, *how[1:])
        got = {"y": o, "S": S, "z": z}
        if backward:
            found = kernels.backward(*gradients, q, k, v, o, share, scale, normalize, S0, z0, *how)
            got |= dict(zip(("dq", "dk", "dv", "dS0", "dz0"), found, strict=True))
    return got if S0 is not None else {n: x for n, x in got.items() if n not in ("dS0", "dz0")}


def off(got, want, cu=None):
    """By name, the largest relative error over each head of each row or document."""
    return {n: max(relative_error(*unit) for unit in _units(n, x, want[n], cu)) for n, x in got.items()}


def _units(name, got, want, cu):
    # A document of few tokens is held to the whole's scale.
    floor = scale_floor(want) * (1 if cu is None else 10)
    if cu is None or name in STATES:
        yield got, want, (0, 1) if name in STATES else (0, 2), floor
        return
    for a, b in pairwise(cu):
        yield got[:, a:b], want[:, a:b], (2,), floor


def errors(
    sweeps,
    T,
    V,
    dtype,
    heads=(1, 1, 1),
    *,
    F=16,
    cu=None,
    rows=1,
    initial=True,
    given=(True, True, True),
    device="cpu",
    scale=0.25,
    normalize=True,
    std=1.0,
    before=20,
    **how,
):
    """How far each output of a backend is from float64. given: which of y, S and z has a gradient."""
    documents = rows if cu is None else len(cu) - 1
    inputs, gradients = draw(T, F, V, dtype, heads, documents, rows, device, std, before)
    inputs = inputs if initial else (*inputs[:3], None, None)
    gradients = [g if wish else None for g, wish in zip(gradients, given, strict=True)]
    want = wanted(inputs, gradients, cu, scale=scale, normalize=normalize)
    return off(run(sweeps, inputs, gradients, cu, scale=scale, normalize=normalize, **how), want, cu)


def above(limits, found):
    """The errors that are larger than their limits, as multiples of those; ``limits[""]`` is that of all unnamed."""
    times = {n: error / limits.get(n, limits[""]) for n, error in found.items()}
    return {n: round(x, 2) for n, x in times.items() if not x <= 1}
