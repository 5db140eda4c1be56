"""Taylor attention's decoding kernels without a GPU: steps through the interpreter, and compiled ahead of time.

The interpreter has no bfloat16 arithmetic and cuts where it should round, so kernels run in float32 here.
"""

import dataclasses
import os
from functools import partial

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's kernels would take the place of the GPU's", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton itself is first imported
pytest.importorskip("triton")

from ahead_of_time import SHARED, Build, usage

from linattn.core import laws
from linattn.core.dispatch import Backend, anything
from linattn.core.laws import Subject
from linattn.core.numerics import relative_error
from linattn.mixers import taylor
from linattn.mixers.taylor import chunked, operators, pools, triton_step_deferred
from linattn.mixers.taylor import triton_step as kernels
from linattn.mixers.taylor.cases import SMALL, TaylorCase
from linattn.mixers.taylor.chunked import TaylorState, n_features

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

CASES = (
    *(dataclasses.replace(case, value_dim=min(case.value_dim, 24)) for case in SMALL),
    TaylorCase(2, 130, 6, 3, 7, "an odd feature dim, three queries a State", k_heads=1, v_heads=2, q_heads=6),
    TaylorCase(2, 130, 2, 24, 8, "a feature dim that is no power of two"),
)
DIMS = ((2, 1), (3, 7), (4, 5), (5, 16), (8, 64), (16, 112), (24, 40), (32, 256), (64, 24))
DEFERRED = ((CASES[0], 2, False), (CASES[3], 3, True), (CASES[5], 8, False), (CASES[6], 3, True))
"""A case, the tokens between two foldings, and whether a copy of S is kept."""


def deferred_mixer(recent, copy):
    """The mixer over deferred pools; a copy is kept in float32, which changes nothing but where S is read."""

    def new_pool(state, slots, capacity=None):
        pool = pools.new_deferred_pool(state, slots, torch.float32, recent=recent)
        return pool._replace(copy=pool.S.clone()) if copy else pool

    return dataclasses.replace(
        taylor.MIXER,
        new_pool=new_pool,
        step_=lambda inputs, pool, slots, **kw: step_deferred_(**inputs, pool=pool, slots=slots, **kw),
        take=pools.take_deferred,
        put_=pools.put_deferred_,
    )


def step_deferred_(q, k, v, pool, slots, normalize, backend=None):
    return triton_step_deferred.step_deferred_(q, k, v, *pool, slots, q.shape[-1] ** -0.5, normalize)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(
        taylor, "BACKENDS", (Backend("triton", anything, chunked.forward, partial(operators.step_by, "triton")),)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode_is_the_fold(interpreted, case):
    assert laws.decode_is_the_fold(Subject(taylor.MIXER, case, "triton", torch.float32), 9, 2) == []


@pytest.mark.parametrize("case, recent, copy", DEFERRED, ids=lambda x: getattr(x, "name", x))
def test_decode_over_a_deferred_pool_is_the_fold(interpreted, case, recent, copy):
    assert laws.decode_is_the_fold(Subject(deferred_mixer(recent, copy), case, "triton", torch.float32), 10, 2) == []


@pytest.mark.parametrize("recent", (2, 3, 8))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_definition_of_deferral_is_the_fold(monkeypatch, dtype, recent):
    mixer = dataclasses.replace(
        deferred_mixer(recent, False),
        new_pool=lambda state, slots, capacity: pools.new_deferred_pool(state, slots, dtype, recent=recent),
        step_=lambda inputs, pool, slots, **kw: pools.taylor_step_deferred_(**inputs, pool=pool, slots=slots, **kw),
    )
    for case in CASES:
        assert laws.decode_is_the_fold(Subject(mixer, case, "torch", dtype), 20) == []


def draw(F, V, heads=2, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, n, generator=generator) for n in (F, F, V)]


def a_state(F, V, rows, heads=2):
    k, v = torch.randn(2, rows, 20, heads, max(F, V), generator=torch.Generator().manual_seed(9))
    return chunked.summarize(k[..., :F], v[..., :V])


@pytest.mark.parametrize("programs", (1, 1 << 20, None), ids=("few", "many", "one shift a tile"))
@pytest.mark.parametrize("F, V", DIMS)
def test_every_walk_reads_and_writes_the_same(F, V, programs):
    """Every shape of tile that `walk_for` chooses, and one shift a tile: one step from a State, in float64's terms."""
    walk = (1, 1, 1) if programs is None else kernels.walk_for(programs, F, V, False)
    q, k, v = draw(F, V)
    slots, state = torch.tensor([2, 0, 1], dtype=torch.int32), a_state(F, V, 4)
    want_pool = TaylorState(*(leaf.double() for leaf in state))
    want = chunked.step_(q.double(), k.double(), v.double(), want_pool, slots, scale=0.3, normalize=True)
    pool = TaylorState(*(leaf.clone() for leaf in state))
    y = kernels.step_(q, k, v, *pool, slots, 0.3, True, walk)
    found = [relative_error(a, b, (0, 1)) for a, b in zip((y, *pool), (want, *want_pool), strict=True)]
    assert max(found) < 2e-6, found


@pytest.mark.parametrize("F, V", [(16, 112), (32, 256), (2, 1), (64, 256), (4, 16)])
@pytest.mark.parametrize("programs", (1, 16, 257, 1 << 20))
@pytest.mark.parametrize("deferred", (False, True))
def test_no_two_threads_hold_one_entry(deferred, programs, F, V):
    """Two that did would race: one reads the entry that the other has already added to."""
    shifts, warps, _ = kernels.walk_for(programs, F, V, deferred)
    BF, BV, depth = kernels.blocks_of(F, V)
    assert shifts * BF * BV >= 32 * warps
    assert shifts <= depth and BF >= F and BV >= V


@pytest.mark.parametrize("F", (2, 3, 4, 5, 7, 8, 15, 16, 24, 31, 32))
def test_the_walk_meets_every_feature_once(F):
    """Rows are poisoned by what is added to them twice, and stay zero where nothing is added."""
    q, k, v = draw(F, 1, heads=1, rows=1)
    pool = TaylorState(torch.zeros(2, 1, n_features(F), 1), torch.zeros(2, 1, n_features(F)))
    kernels.step_(q, k, torch.ones_like(v), *pool, torch.zeros(1, dtype=torch.int32), 1.0, False, (2, 1, 1))
    phi = chunked.features(k)[0, 0]
    torch.testing.assert_close(pool.S[0, 0, :, 0], phi, rtol=1e-6, atol=0)
    torch.testing.assert_close(pool.z[0, 0], phi, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recent, copy", [(0, False), (3, False), (3, True)])
def test_slots_that_no_row_names_are_neither_read_nor_written(recent, copy):
    """Poisoned with NaN; so are the places of tokens that have not come yet. Rows are idle, or out of the pool."""
    q, k, v = draw(8, 5, rows=4)
    state, slots = a_state(8, 5, 2), torch.tensor([-1, 3, 1, 99], dtype=torch.int32)
    if recent:
        pool = pools.new_deferred_pool(state, 5, torch.float32, recent=recent)
        pool = pool._replace(copy=pool.S.clone()) if copy else pool
    else:
        pool = taylor.new_pool(state, 5)
    leaves = [leaf for leaf in pool if leaf is not None]
    for leaf in leaves:
        leaf.fill_(float("nan") if leaf.is_floating_point() else 2**31 - 1)
    (pools.put_deferred_ if recent else taylor.put_)(pool, slots[1:3], state)
    before = [leaf.clone() for leaf in leaves]
    for _ in range(4):
        step = triton_step_deferred.step_deferred_ if recent else kernels.step_
        y = step(q, k, v, *pool, slots, 0.3, True)
        assert torch.isfinite(y).all()
        assert torch.equal(y[[0, 3]], torch.zeros(2, 2, 5))
    idle = [0, 2, 4, 5]
    for leaf, old in zip(leaves, before, strict=True):
        assert torch.equal(leaf[idle].nan_to_num(7), old[idle].nan_to_num(7))
    got = (pools.take_deferred if recent else taylor.take)(pool, slots[1:3])
    phi = chunked.features(k[1:3])
    assert relative_error(got.S, state.S + 4 * phi[..., None] * v[1:3, :, None]) < 1e-6
    assert relative_error(got.z, state.z + 4 * phi) < 1e-6


def test_slots_fold_at_their_own_time():
    """Counts differ from slot to slot; a fold empties one and leaves the other waiting."""
    q, k, v = draw(4, 5, rows=2)
    pool = pools.new_deferred_pool(a_state(4, 5, 1), 3, torch.float32, recent=3)
    alone, both = torch.tensor([-1, 1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    waiting = []
    for slots in (alone, both, both, both):
        before = pool.S.clone()
        triton_step_deferred.step_deferred_(q, k, v, *pool, slots, 0.3, True)
        waiting.append((pool.count[0].tolist(), pool.count[1].tolist(), bool((pool.S[:2] != before[:2]).any())))
    assert waiting == [([0, 0], [1, 1], False), ([1, 1], [2, 2], False), ([2, 2], [0, 0], True), ([0, 0], [1, 1], True)]


def test_strided_inputs_are_read_in_place():
    packed = torch.randn(3, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    views = [packed[:, :, n] for n in range(3)]
    slots, state = torch.tensor([0, 1, 2], dtype=torch.int32), a_state(8, 8, 4)
    a, b = (TaylorState(*(leaf.clone() for leaf in state)) for _ in range(2))
    y = kernels.step_(*views, *a, slots, 0.3, True)
    assert torch.equal(y, kernels.step_(*(x.contiguous() for x in views), *b, slots, 0.3, True))
    assert torch.equal(a.S, b.S)


def test_the_16_bit_copy_after_10_000_tokens():
    """Read error against float64, relative to the output's rms, of the last 16 steps: S in fp32 and its bf16 copy."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 10_016, 2, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 10_016, 2, 16, generator=generator)
    state = chunked.summarize(k[:, :10_000], v[:, :10_000])
    exact = TaylorState(*chunked.summarize(k[:, :10_000].double(), v[:, :10_000].double()))
    slots = torch.zeros(1, dtype=torch.int32)
    errors = {}
    for copy in (False, True):
        pool = pools.new_deferred_pool(state, 1, torch.float32, copy=copy)
        truth = pools.new_deferred_pool(exact, 1, torch.float64)
        pools.put_deferred_(pool, slots, state)
        pools.put_deferred_(truth, slots, exact)
        got, want = (
            torch.stack(
                [
                    pools.taylor_step_deferred_(*(x[:, t].to(dtype) for x in (q, k, v)), p, slots, backend="torch")
                    for t in range(10_000, 10_016)
                ]
            )
            for p, dtype in ((pool, torch.float32), (truth, torch.float64))
        )
        errors[copy] = relative_error(got, want)
    assert errors[False] < 2e-5
    assert 5e-4 < errors[True] < 2.5e-3, errors


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"recent": 1}, "at least 2"),
        ({"dtype": torch.float64}, "States of torch.float64, got torch.float32"),
    ],
)
def test_pools_that_cannot_be(change, reason):
    with pytest.raises(ValueError, match=reason):
        pools.new_deferred_pool(a_state(4, 5, 1), **{"slots": 2, "dtype": torch.float32, **change})


def test_steps_that_do_not_fit_their_pool():
    q, k, v = draw(4, 5)
    slots, pool = torch.zeros(3, dtype=torch.int32) - 1, pools.new_deferred_pool(a_state(4, 5, 1), 2, torch.float32)
    with pytest.raises(ValueError, match="pool.recent_k of torch.bfloat16"):
        pools.taylor_step_deferred_(q.bfloat16(), k.bfloat16(), v.bfloat16(), pool, slots)
    with pytest.raises(ValueError, match="pool.S of shape"):
        pools.taylor_step_deferred_(q, k, v[..., :4], pool, slots)
    with pytest.raises(ValueError, match="made by new_pool"):
        pools.taylor_step_deferred_(q, k, v, a_state(4, 5, 3), slots)


def build(kernel, F, V, programs, readers):
    copy = "copy" if kernel == "copy" else ""
    types = {
        "fp32": "scale",
        "*bf16": f"q k v out recent_k recent_v {copy}",
        "*fp32": "S z" if copy else "S z copy",
        "*i32": "slots count",
    }
    BF, BV, depth = kernels.blocks_of(F, V)
    shifts, warps, stages = kernels.walk_for(programs, F, V, kernel != "step")
    constants = {"F": F, "V": V, "BF": BF, "BV": BV, "S_P": V, "SHIFTS": shifts, "DEPTH": depth, "WARPS": warps}
    constants |= {"Q_GROUP": 1, "K_GROUP": 1, "V_GROUP": 1, "READERS": readers, "READERS_BLOCK": readers}
    constants |= {"NORMALIZE": True, "STAGES": stages, "C": 8, "C_BLOCK": 8, "COPY": kernel == "copy"}
    name = "triton_step._step" if kernel == "step" else "triton_step_deferred._step_deferred"
    return Build(f"linattn.mixers.taylor.{name}", warps, constants, types)


FEW, MANY = 16, 16_384
BUILT = {
    80: [(16, 112, FEW, 1), (16, 64, MANY, 1)],
    89: [(16, 112, MANY, 1), (16, 64, FEW, 1)],
    90: [(F, V, n, 1) for F, V in ((16, 64), (16, 112)) for n in (FEW, MANY)]
    + [(8, 64, MANY, 1), (32, 128, MANY, 1), (24, 256, FEW, 1), (16, 64, MANY, 4)],
}
"""Feature dim, value dim, programs, output heads that read one State."""


@pytest.mark.parametrize("kernel", ("step", "deferred", "copy"))
@pytest.mark.parametrize("capability", (80, 89, 90))
def test_compiles_ahead_of_time(capability, kernel, record_property):
    """For GPUs that are not here; next to nothing may spill (bytes a thread)."""
    names = [f"f{F}-v{V}-programs{n}-readers{readers}" for F, V, n, readers in BUILT[capability]]
    builds = [build(kernel, *shape) for shape in BUILT[capability]]
    built = usage(capability, dict(zip(names, builds, strict=True)))
    for name, found in built.items():
        record_property(name, str(found))
    assert len(built) == len(BUILT[capability])
    assert max(found["shared"] for found in built.values()) <= SHARED[capability]
    assert {name: found for name, found in built.items() if found["spilled"] > 64} == {}
