"""What every `step_` refuses: tokens, slots and pools that do not fit one another. A refused step writes nothing."""

from functools import partial

import pytest
import torch

from linattn.core import chunks
from linattn.core.mixer import Mixer, map_state
from linattn.core.shapes import checked
from linattn.mixers import lightning, prefix, shortconv, softmax, taylor, window

MIXERS = {m.MIXER.name: m.MIXER for m in (lightning, prefix, shortconv, softmax, taylor, window)}
ATTENTION = [name for name in MIXERS if name != "shortconv"]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(name, batch=2, length=4, dtype=torch.float32):
    """Arguments of the op: 4 query heads and 2 of everything else where there are heads."""
    if name == "shortconv":
        x, gate = draw(batch, length, 5, dtype=dtype), draw(batch, length, 5, dtype=dtype, seed=1)
        return {"x": x, "weight": draw(5, 3, dtype=dtype), "gate": gate}
    own = {
        "q": draw(batch, length, 4, 4, dtype=dtype),
        "k": draw(batch, length, 2, 4, dtype=dtype, seed=1),
        "v": draw(batch, length, 2, 3, dtype=dtype, seed=2),
    }
    extra = {"window": {"window": 3}, "lightning": {"log_decay": torch.tensor([-0.1, -0.2])}}
    return own | extra.get(name, {})


def room(name, dtype=torch.float32):
    """The mixer, its arguments for one token, and a pool of 3 slots of which 0 and 1 have read 4 tokens."""
    mixer: Mixer = MIXERS[name]
    given = inputs(name, dtype=dtype)
    _, state = mixer.forward(given)
    pool = mixer.new_pool(state, 3, capacity=9)
    mixer.put_(pool, slots(0, 1), state)
    return mixer, {n: x[:, 0] if "T" in mixer.axes.get(n, "") else x for n, x in given.items()}, pool


def slots(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def refused(name, token, pool, where, message):
    mixer = MIXERS[name]
    before = map_state(torch.clone, pool)
    with pytest.raises(ValueError, match=message):
        mixer.step_(token, pool, where)
    assert all(torch.equal(a, b) for a, b in zip(before, pool, strict=True))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("where", [slots(2, 0), slots(-1, 2), slots(-1, -1), slots(1, 0, dtype=torch.int64)], ids=str)
def test_slots_that_fit(name, where):
    mixer, token, pool = room(name)
    assert mixer.step_(token, pool, where).isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    "where, message",
    [
        (slots(0, -2), r"slots must be -1 \(idle\) or 0 to 2, the pool's 3, got \[0, -2\]"),
        (slots(0, 3), r"0 to 2, the pool's 3, got \[0, 3\]"),
        (slots(40, 0), r"0 to 2, the pool's 3, got \[40, 0\]"),
        (slots(1, 1), r"no two rows may share a slot, got \[1, 1\]"),
        (slots(1), r"int32 or int64 \[2\], one a row, got torch.int32 \[1\]"),
        (slots(0, 1)[:, None], r"int32 or int64 \[2\], one a row, got torch.int32 \[2, 1\]"),
        (slots(0, 1).float(), r"int32 or int64 \[2\], one a row, got torch.float32 \[2\]"),
        (slots(0, 1).to("meta"), "slots are on meta, the inputs on cpu"),
        ([0, 1], r"slots must be an int32 tensor, got \[0, 1\]"),
    ],
)
def test_slots_that_do_not_fit(name, where, message):
    _, token, pool = room(name)
    refused(name, token, pool, where, message)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": draw(2, 1, 4, 4)}, r"q must be \[B, H, D\], one token a row, got \[2, 1, 4, 4\]"),
        ({"v": draw(6)}, r"v must be \[B, H, D\], one token a row, got \[6\]"),
        ({"k": draw(1, 2, 4)}, "must share B, dtype and device"),
        ({"k": draw(2, 2, 4, dtype=torch.bfloat16)}, "must share B, dtype and device.*k is .* torch.bfloat16"),
        ({"v": draw(2, 2, 3).to("meta")}, "must share B, dtype and device.*meta"),
        ({"q": draw(2, 4, 4).long()}, "floating point, got torch.int64"),
        ({"k": draw(2, 2, 5)}, "one head dim, got 4 and 5"),
        ({"q": draw(2, 4, 5), "k": draw(2, 2, 5)}, r"need pool\.\w+ of shape"),
        ({"v": draw(2, 2, 8)}, r"need pool\.\w+ of shape .*, got"),
        ({"q": draw(2, 3, 4)}, "head"),
        ({"q": draw(2, 0, 4)}, "head"),
        ({"scale": "x"}, "scale must be a float, got 'x'"),
    ],
)
def test_tokens_that_do_not_fit(name, change, message):
    _, token, pool = room(name)
    refused(name, token | change, pool, slots(0, 1), message)


@pytest.mark.parametrize("name", ["taylor", "prefix", "window", "softmax"])
def test_one_head_is_not_broadcast_over_a_pool_of_two(name):
    _, token, pool = room(name)
    change = {"k": draw(2, 1, 4), "v": draw(2, 1, 3)}
    refused(name, token | change, pool, slots(0, 1), r"need pool\.\w+ of shape .*, got .*sizes")


def test_heads_of_the_decay_are_those_of_the_pool():
    _, token, pool = room("lightning")
    one = {"k": draw(2, 1, 4), "v": draw(2, 1, 3), "log_decay": torch.tensor([-0.1])}
    refused("lightning", token | one, pool, slots(0, 1), r"need pool.S of shape \[4, 1, 4, 3\], got \[4, 2, 4, 3\]")
    refused("lightning", token | {"log_decay": torch.tensor([-0.1])}, pool, slots(0, 1), "the 1 entries of log_decay")
    refused("lightning", token | {"log_decay": -torch.ones(8)}, pool, slots(0, 1), "log_decay has 8 entries")
    refused("lightning", token | {"log_decay": -0.1}, pool, slots(0, 1), "must be a tensor.*got -0.1")
    refused("lightning", token | {"log_decay": torch.ones(2)}, pool, slots(0, 1), "negate them")


def test_channels_that_do_not_fit():
    _, token, pool = room("shortconv")
    step = partial(refused, "shortconv", pool=pool, where=slots(0, 1))
    step(token | {"x": draw(2, 1, 5)}, message=r"x must be \[B, D\], one token a row, got \[2, 1, 5\]")
    step(token | {"gate": draw(1, 5)}, message="must share B, dtype and device")
    step(token | {"gate": draw(2, 5).double()}, message="must share B, dtype and device")
    step(token | {"weight": draw(5, 4)}, message=r"need pool.x of shape \[4, 3, 5\], got \[4, 2, 5\]")
    step({"x": draw(2, 6), "weight": draw(6, 3)}, message=r"need pool.x of shape \[4, 2, 6\], got \[4, 2, 5\]")


@pytest.mark.parametrize("name", MIXERS)
def test_pools_of_another_kind(name):
    _, token, pool = room(name)
    mixer = MIXERS[name]
    with pytest.raises(ValueError, match="made by new_pool, got tuple"):
        mixer.step_(token, tuple(pool), slots(0, 1))
    wide = map_state(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, pool)
    refused(name, token, wide, slots(0, 1), r"need pool\.\w+ of torch.float32 on cpu, got torch.float64")


@pytest.mark.parametrize("name", MIXERS)
def test_a_pool_of_16_bit_inputs_is_as_wide_as_its_sums(name):
    mixer, token, pool = room(name, torch.bfloat16)
    assert mixer.step_(token, pool, slots(1, -1)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MIXERS)
def test_values_are_not_looked_at_in_a_trace(name):
    mixer, token, pool = room(name)
    other = map_state(torch.clone, pool)
    step = torch.compile(mixer.step_, fullgraph=name != "softmax", backend="eager")
    torch.testing.assert_close(step(token, pool, slots(0, 2)), mixer.step_(token, other, slots(0, 2)))


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "softmax"])
def test_compiles_with_dynamic_shapes(name):
    mixer, token, pool = room(name)
    other = map_state(torch.clone, pool)
    step = torch.compile(mixer.step_, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(step(token, pool, slots(0, 2)), mixer.step_(token, other, slots(0, 2)))


@pytest.mark.parametrize("name", MIXERS)
def test_no_rows_are_no_outputs(name):
    """Forward and decoding of a batch of 0, and the State of nobody."""
    mixer, token, pool = room(name)
    y, state = mixer.forward(inputs(name, batch=0))
    assert y.shape[:2] == (0, 4) and all(leaf.shape[0] == 0 for leaf in state)
    y, state = mixer.forward(inputs(name, batch=0), initial_state=state)
    assert y.shape[:2] == (0, 4) and all(leaf.shape[0] == 0 for leaf in state)
    assert all(leaf.shape[0] == 0 for leaf in mixer.summarize(inputs(name, batch=0)))
    nobody = {n: x[:0] if "T" in mixer.axes.get(n, "") else x for n, x in token.items()}
    assert mixer.step_(nobody, pool, slots()).shape[0] == 0


@pytest.mark.parametrize("name", MIXERS)
def test_initial_states_have_the_dtype_of_the_op(name):
    mixer = MIXERS[name]
    _, state = mixer.forward(inputs(name))
    wide = map_state(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, state)
    with pytest.raises(ValueError, match=r"must be torch.float32 .*, got torch.float64: convert it with \.to"):
        mixer.forward(inputs(name), initial_state=wide)
    _, state = mixer.forward(inputs(name, dtype=torch.bfloat16))
    mixer.forward(inputs(name, dtype=torch.bfloat16), initial_state=state)


@pytest.mark.parametrize("name, most", [("window", 2), ("softmax", 4), ("shortconv", 2)])
def test_counts_of_initial_states(name, most):
    mixer = MIXERS[name]
    _, state = mixer.forward(inputs(name))
    mixer.forward(inputs(name), initial_state=state._replace(count=slots(0, most)))
    for count, message in (
        (slots(0, most + 1), rf"count must lie in 0 to {most}, its rows, got \[0, {most + 1}\]"),
        (slots(-1, 0), rf"count must lie in 0 to {most}, its rows, got \[-1, 0\]"),
        (slots(1, 1, dtype=torch.int64), "count must be torch.int32 .*, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message), checked():
            mixer.forward(inputs(name), initial_state=state._replace(count=count))


@pytest.mark.parametrize("name", MIXERS)
def test_offsets_are_a_tensor(name):
    with pytest.raises(ValueError, match=r"cu_seqlens must be an int32 tensor .*, got \[0, 4\]"):
        MIXERS[name].forward(inputs(name, batch=1), cu_seqlens=[0, 4])


@pytest.mark.parametrize("name", ATTENTION)
def test_scales_are_numbers(name):
    with pytest.raises(ValueError, match="scale must be a float, got 'x'"):
        MIXERS[name].forward(inputs(name) | {"scale": "x"})


@pytest.mark.parametrize("name", ["taylor", "lightning", "prefix", "window"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_leaves_the_sums_alone(name, compiled):
    """Products under autocast return 16 bits, and a State would be summed from rounded chunks."""
    mixer, given = MIXERS[name], inputs(name, batch=1)

    def run():
        return mixer.forward(given)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = (torch.compile(run, fullgraph=True, backend="eager") if compiled else run)()
    want, final = run()
    for got, right in zip((y, *state), (want, *final), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("name", ["taylor", "lightning", "prefix"])
@pytest.mark.parametrize("offsets", [None, [0, 70, 400, 700]])
def test_blocks_do_not_show(name, offsets, monkeypatch):
    """One block of six chunks is six blocks of one chunk."""
    given = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs(name, 1, 700).items()}
    packed = None if offsets is None else torch.tensor(offsets)
    whole, final = MIXERS[name].forward(given, cu_seqlens=packed)
    monkeypatch.setattr(chunks, "BLOCK_ROWS", 1)
    pieces, state = MIXERS[name].forward(given, cu_seqlens=packed)
    for got, want in zip((pieces, *state), (whole, *final), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
