"""What the tests of the plain modules share: random tensors (float64 unless asked otherwise), a tolerance, counts."""

import torch

F64 = torch.float64
EXACT = 1e-12  # relative, float64


def normal(*shape, seed=0, dtype=F64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype).requires_grad_(grad)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def flat(out):
    return torch.cat([t.flatten() for t in (out if isinstance(out, tuple) else (out,))])
