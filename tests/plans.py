"""Whether a mixer's plans (`plan_of` of its triton.py) are kept under all that their launches are prepared for."""

import torch


def changed_by_others(plan_of, run, calls):
    """Which calls (keywords of ``run``) give other tensors with plans that are kept than with ones of their own."""
    alone = []
    for call in calls:
        plan_of.cache_clear()
        alone.append(run(**call))
    plan_of.cache_clear()
    return [i for i, call in enumerate(calls) if not _same(run(**call), alone[i])]


def _same(got, want):
    return all(x is y if y is None else torch.equal(x, y) for x, y in zip(got, want, strict=True))
