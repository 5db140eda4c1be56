"""What is particular to the short convolution: Conv1d's function, one rounding, its layer, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from linattn.core.mixer import map_state
from linattn.core.numerics import relative_error
from linattn.core.shapes import Segment
from linattn.mixers.shortconv import MIXER, combine, short_conv, short_conv_step_, summarize
from linattn.mixers.shortconv.layer import ShortConvConfig
from linattn.mixers.shortconv.reference import short_conv_reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
def test_it_is_conv1d(taps):
    x, weight, bias = draw(2, 50, 6), draw(6, taps, seed=1), draw(6, seed=2)
    padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
    want = F.conv1d(padded, weight[:, None], bias, groups=6).transpose(1, 2)
    assert relative_error(short_conv(x, weight, bias)[0], want, (0, 2)) < 1e-14
    gate = draw(2, 50, 6, seed=3)
    got, _ = short_conv(x, weight, bias, gate=gate, activation="silu")
    assert relative_error(got, F.silu(want) * gate, (0, 2)) < 1e-14


def test_the_last_tap_is_the_current_token():
    x = torch.tensor([1.0, 10.0, 100.0])[None, :, None]
    assert short_conv(x, torch.tensor([[2.0, 3.0, 5.0]]))[0].flatten().tolist() == [5, 53, 532]


def test_16_bit_inputs_are_rounded_once():
    x, weight, gate = draw(1, 200, 6).bfloat16(), draw(6, 3, seed=1).bfloat16(), draw(1, 200, 6, seed=2).bfloat16()
    got, state = short_conv(x, weight, gate=gate, activation="silu")
    want, _ = short_conv(x.float(), weight.float(), gate=gate.float(), activation="silu")
    assert torch.equal(got, want.bfloat16())
    assert state.x.dtype == torch.bfloat16
    mixed, _ = short_conv(x, weight.float(), gate=gate, activation="silu")
    assert torch.equal(mixed, got)


@pytest.mark.parametrize("block", [1, 2, 7, 100])
def test_blocks_of_any_size_are_one_text(block, monkeypatch):
    from linattn.mixers.shortconv import chunked

    x, weight, gate = draw(2, 50, 6), draw(6, 4, seed=1), draw(2, 50, 6, seed=2)
    want, _ = short_conv_reference(x, weight, gate=gate, activation="silu")
    monkeypatch.setattr(chunked, "BLOCK_NUMBERS", block * 12)
    assert relative_error(short_conv(x, weight, gate=gate, activation="silu")[0], want, (0, 2)) < 1e-14


@pytest.mark.parametrize("taps", [1, 3])
def test_300_steps_are_the_text(taps):
    x, weight, gate = draw(2, 320, 5), draw(5, taps, seed=1), draw(2, 320, 5, seed=2)
    want, final = short_conv_reference(x, weight, gate=gate, activation="silu")
    pool = MIXER.new_pool(MIXER.identity({"x": x, "weight": weight}, 2), 3)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    steps = [
        short_conv_step_(x[:, t], weight, pool=pool, slots=slots, gate=gate[:, t], activation="silu")
        for t in range(320)
    ]
    assert relative_error(torch.stack(steps, 1), want, (0, 1)) < 1e-13
    for got, wanted in zip(MIXER.take(pool, slots), final, strict=True):
        assert torch.equal(got, wanted)


def test_combine_takes_any_leading_axes():
    x = draw(6, 2, 5)
    texts = [summarize(x[i : i + 1, : i % 3], 4) for i in range(6)]
    together = map_state(lambda *leaves: torch.stack(leaves).unflatten(0, (2, 3)), *texts)
    got = combine(together, map_state(lambda leaf: leaf.flip(0, 1), together))
    for i in range(6):
        want = combine(texts[i], texts[5 - i])
        for leaf, wanted in zip(map_state(lambda y: y.flatten(0, 1), got), want, strict=True):
            assert torch.equal(leaf[i], wanted)


def test_the_state_is_a_copy():
    _, state = short_conv(draw(1, 300, 5), draw(5, 3))
    assert state.x.untyped_storage().nbytes() == 2 * 5 * 8
    assert short_conv(draw(1, 300, 5), draw(5, 3), return_state=False)[1] is None


def test_no_tokens_are_no_outputs():
    x, weight = draw(2, 0, 5), draw(5, 3)
    before = summarize(draw(2, 9, 5), 3)
    y, state = short_conv(x, weight, gate=x, initial_state=before)
    assert y.shape == (2, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_it_compiles_in_one_graph(packed):
    x, weight, gate = draw(1, 150, 5), draw(5, 3, seed=1), draw(1, 150, 5, seed=2)
    cu = torch.tensor([0, 40, 40, 150], dtype=torch.int32) if packed else None
    compiled = torch.compile(short_conv, fullgraph=True, backend="eager")
    y, state = compiled(x, weight, gate=gate, activation="silu", cu_seqlens=cu)
    want, final = short_conv(x, weight, gate=gate, activation="silu", cu_seqlens=cu)
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))


def test_gradients_of_gradients():
    x, weight, gate = (t.requires_grad_() for t in (draw(1, 4, 2), draw(2, 3, seed=1), draw(1, 4, 2, seed=2)))

    def op(x, weight, gate):
        return short_conv(x, weight, gate=gate, activation="silu", return_state=False)[0]

    assert torch.autograd.gradgradcheck(op, (x, weight, gate))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": draw(10, 5)}, r"x must be floating point \[B, T, D\], got torch.float64 \[10, 5\]"),
        ({"x": torch.zeros(1, 10, 5, dtype=torch.int64)}, "x must be floating point"),
        ({"weight": draw(5, 1, 3)}, r"weight must be \[5, w\], got \[5, 1, 3\]; a Conv1d's \[D, 1, w\] needs"),
        ({"weight": draw(4, 3)}, r"weight must be \[5, w\], got \[4, 3\]"),
        ({"weight": draw(5, 0)}, r"weight must be \[5, w\], got \[5, 0\]"),
        ({"bias": draw(4)}, r"bias must be \[5\], got \[4\]"),
        ({"gate": draw(1, 9, 5)}, r"gate must be x's shape \[1, 10, 5\], got \[1, 9, 5\]"),
        ({"gate": draw(1, 10, 5).float()}, "gate must be of x's dtype torch.float64, got torch.float32"),
        ({"activation": "gelu"}, "activation must be one of .*, got 'gelu'"),
        ({"weight": draw(5, 3).to("meta")}, "weight is on meta, x on cpu"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "must run from 0 to the 10 tokens given, got 0 to 9"),
        ({"initial_state": summarize(draw(1, 9, 5), 4)}, r"initial_state.x must be \[1, 2, 5\], got \[1, 3, 5\]"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**{"x": draw(1, 10, 5), "weight": draw(5, 3), **change})


def test_wrong_pools():
    pool, slots = MIXER.new_pool(summarize(draw(1, 9, 5), 4), 2), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"need pool.x of shape \[3, 2, 5\], got \[3, 3, 5\]"):
        short_conv_step_(draw(1, 5), draw(5, 3), pool=pool, slots=slots)


def layer_of(**changes):
    torch.manual_seed(0)
    return ShortConvConfig(**changes).build(6, 0, 4)


def test_the_layer_is_baseconv():
    layer, x = layer_of().double(), draw(2, 30, 6)
    u, gate = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).split(12, -1)
    conv = F.conv1d(u.transpose(1, 2), layer.conv.weight[:, None], padding=2, groups=12)[..., :30].transpose(1, 2)
    want = F.linear(F.silu(conv) * gate, layer.out_proj.weight, layer.out_proj.bias)
    y, _ = layer(x, None, Segment(torch.arange(30).expand(2, 30)))
    assert relative_error(y, want, (0, 1)) < 1e-13


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_layer_step_by_step_is_the_layer(kernel):
    layer, x = layer_of(kernel=kernel).double(), draw(2, 40, 6)
    positions = torch.arange(40).expand(2, 40)
    with torch.no_grad():
        want, final = layer(x, None, Segment(positions))
        first, state = layer(x[:, :15], layer.identity(2), Segment(positions[:, :15]))
        pool, slots = layer.mixer.new_pool(state, 2), torch.tensor([1, 0], dtype=torch.int32)
        layer.mixer.put_(pool, slots, state)
        rest = [layer.step_(x[:, t], pool, slots, positions[:, t]) for t in range(15, 40)]
    assert relative_error(torch.cat([first, torch.stack(rest, 1)], 1), want, (0, 1)) < 1e-12
    for got, wanted in zip(layer.mixer.take(pool, slots), final, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_layer_has_the_published_parameters():
    layer = layer_of()
    assert {n: list(p.shape) for n, p in layer.named_parameters()} == {
        "in_proj.weight": [24, 6],
        "in_proj.bias": [24],
        "conv.weight": [12, 3],
        "out_proj.weight": [6, 12],
        "out_proj.bias": [6],
    }
    with pytest.raises(ValueError, match="even, at least 2, got 3"):
        layer_of(expand=3)
    with pytest.raises(ValueError, match="ShortConvConfig.kernel is 0; it must be at least 1"):
        layer_of(kernel=0)


def test_filters_start_as_those_of_conv1d():
    conv = ShortConvConfig().build(512, 0, 1).conv
    bound, theirs = 3**-0.5, torch.nn.Conv1d(1024, 1024, 3, groups=1024).weight
    for weight in (conv.weight.detach(), theirs.detach()):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(float(weight.std()) / (bound / 3**0.5) - 1) < 0.05
    before = conv.weight.detach().clone()
    conv.reset_parameters()
    assert not torch.equal(conv.weight, before)


def test_a_nan_reaches_no_gradient_of_another_document():
    x, weight = draw(1, 300, 5), draw(5, 4)
    cu = torch.tensor([0, 90, 90, 250, 300], dtype=torch.int32)
    spoiled = x.index_fill(1, torch.arange(90, 250), float("nan")).requires_grad_()
    y, _ = short_conv(spoiled, weight, gate=spoiled, activation="silu", cu_seqlens=cu)
    others = torch.cat([torch.arange(90), torch.arange(250, 300)])
    (gradient,) = torch.autograd.grad(y[:, others].sum(), spoiled)
    assert torch.isfinite(gradient[:, others]).all()
