"""Lightning attention beyond the laws: slopes, cost, refusals, the layer. Command: pytest tests/test_lightning.py"""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linattn.core.laws import Subject, parity
from linattn.core.numerics import relative_error
from linattn.core.pool import new_pool, put_, take
from linattn.core.shapes import Segment
from linattn.mixers.lightning import (
    MIXER,
    LightningState,
    alibi_slopes,
    chunked,
    lightning_attention,
    lightning_step_,
    minimax_log_decay,
    paper_log_decay,
    tnl_log_decay,
)
from linattn.mixers.lightning.cases import REAL, SMALL
from linattn.mixers.lightning.layer import LightningConfig
from linattn.mixers.lightning.reference import lightning_reference

STRONG = torch.tensor([-0.917, -0.5, -2.0, -8.0, -60.0], dtype=torch.float64)


def draw(T, H=2, D=4, V=3, B=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, T, H, D), (B, T, H, V)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def segment(B, T, start=0):
    return Segment(torch.arange(start, start + T).expand(B, T))


def recurrence(q, k, v, log_decay):
    S, outputs = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = log_decay.exp()[:, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None] @ S).squeeze(2))
    return torch.stack(outputs, 1), S


# Slopes ------------------------------------------------------------------------------------------------------------


def test_slopes_of_alibi_are_the_published_ones():
    eight = alibi_slopes(8)
    assert eight.dtype == torch.float64
    assert eight.tolist() == [2.0**-n for n in range(1, 9)]
    for heads, first, last in (
        (16, [0.707107, 0.5, 0.353553, 0.25], 0.00390625),
        (32, [0.840896, 0.707107, 0.594604, 0.5], 0.00390625),
        (64, [0.917004, 0.840896, 0.771105, 0.707107], 0.00390625),
    ):
        slopes = alibi_slopes(heads)
        torch.testing.assert_close(slopes[:4], torch.tensor(first, dtype=torch.float64), atol=1e-6, rtol=0)
        assert len(slopes) == heads and slopes[-1].item() == last


def test_slopes_of_alibi_for_no_power_of_two():
    twenty, forty = alibi_slopes(20), alibi_slopes(40)
    assert torch.equal(twenty[:16], alibi_slopes(16)) and torch.equal(forty[:32], alibi_slopes(32))
    want = torch.tensor([0.840896, 0.594604, 0.420448, 0.297302], dtype=torch.float64)
    torch.testing.assert_close(twenty[16:], want, atol=1e-6, rtol=0)
    assert torch.equal(forty[32:], alibi_slopes(64)[0::2][:8])
    assert forty[-1].item() == pytest.approx(0.272627, abs=1e-6)


def test_slopes_of_tnl_scale_with_depth():
    slopes = alibi_slopes(8)
    for layer, factor in ((0, 1.00001), (12, 1 - 12 / 23 + 1e-5), (23, 1e-5)):
        torch.testing.assert_close(tnl_log_decay(8, layer, 24), -slopes * factor, atol=0, rtol=1e-11)
    torch.testing.assert_close(tnl_log_decay(8, 0, 1), -slopes * 1.00001, atol=0, rtol=1e-12)


def test_slopes_of_the_paper_and_of_minimax():
    paper = paper_log_decay(8, 6, 24)
    torch.testing.assert_close(paper, -torch.arange(8, dtype=torch.float64) * 0.75, atol=1e-14, rtol=0)
    torch.testing.assert_close(minimax_log_decay(64, 0, 80), tnl_log_decay(64, 0, 80), atol=0, rtol=1e-9)
    want = -torch.tensor([0.757858, 0.574349], dtype=torch.float64) * 1.00001
    torch.testing.assert_close(minimax_log_decay(20, 0, 32)[:2], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("formula", [tnl_log_decay, paper_log_decay, minimax_log_decay])
def test_slopes_never_grow_and_refuse_other_layers(formula):
    for layers in (1, 2, 24):
        assert all((formula(12, layer, layers) <= 0).all() for layer in range(layers))
    for heads, layer, layers in ((8, 24, 24), (8, -1, 24), (0, 0, 24)):
        with pytest.raises(ValueError):
            formula(heads, layer, layers)


# The op --------------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_recurrence():
    q, k, v = draw(70, H=5)
    o, (_, S) = lightning_reference(q, k, v, STRONG)
    want, state = recurrence(q, k, v, STRONG)
    assert relative_error(o, want) < 1e-14 and relative_error(S, state) < 1e-14


def test_strong_decay_at_every_length():
    H = len(STRONG)
    worst = {}
    for T in range(1, 131):
        q, k, v = draw(T, H=H, seed=T)
        S = torch.randn(1, H, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
        results = []
        for op in (lightning_attention, lightning_reference):
            leaves = [x.clone().requires_grad_() for x in (q, k, v, STRONG, torch.full((1, H), -3.0).double(), S)]
            o, (total, state) = op(*leaves[:4], initial_state=LightningState(*leaves[4:]))
            loss = o.square().sum() + state.square().sum() + total.sum()
            names = ("o", "total", "S", "dq", "dk", "dv", "dlog_decay", "dtotal0", "dS0")
            results.append(dict(zip(names, (o, total, state, *torch.autograd.grad(loss, leaves)), strict=True)))
        for name, got in results[0].items():
            worst[name] = max(worst.get(name, 0.0), relative_error(got, results[1][name]))
    assert {name: error for name, error in worst.items() if error > 1e-13} == {}


def test_decays_of_many_segments_stay_finite():
    q, k, v = draw(300, H=5, dtype=torch.float32)
    log_decay = (STRONG * 100).float().requires_grad_()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, state = lightning_attention(*leaves, log_decay)
    grads = torch.autograd.grad(o.sum() + state.S.sum(), [*leaves, log_decay])
    assert all(torch.isfinite(x).all() for x in (o, *state, *grads))


def test_mixed_exponents_are_caught():
    """The State read with q's exponents from 0 and written with k's from m-1: what some published kernels do."""

    def planted(inputs, initial_state=None, **kw):
        kw["backend"] = "torch"
        first = {n: x[:, :64] if n != "log_decay" else x for n, x in inputs.items()}
        rest = {n: x[:, 64:] if n != "log_decay" else x for n, x in inputs.items()}
        o1, between = lightning_attention(**first, initial_state=initial_state, **kw)
        undecayed = between.S / inputs["log_decay"].exp()[:, None, None]
        o2, _ = lightning_attention(**rest, initial_state=between._replace(S=undecayed), **kw)
        return torch.cat([o1, o2], 1), lightning_attention(**inputs, initial_state=initial_state, **kw)[1]

    bug = replace(MIXER, forward=planted)
    for case in SMALL:
        wrong = parity(Subject(bug, case))
        assert any(w.startswith("y ") for w in wrong) is bool((case.log_decay() != 0).any())
        assert not any(w.startswith("state.") for w in wrong)
        assert parity(Subject(MIXER, case)) == []


def test_a_step_at_300_tokens_and_after():
    q, k, v = draw(420, H=4, B=2, dtype=torch.float32)
    log_decay = tnl_log_decay(4, 23, 24).float()
    want, _ = lightning_reference(*(x.double() for x in (q, k, v, log_decay)))
    _, state = lightning_attention(q[:, :300], k[:, :300], v[:, :300], log_decay)
    pool = new_pool(state, 3)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    put_(pool, slots, state)
    got = torch.stack([lightning_step_(q[:, t], k[:, t], v[:, t], log_decay, pool, slots) for t in range(300, 420)], 1)
    assert relative_error(got, want[:, 300:], (0, 2)) < 2e-6
    torch.testing.assert_close(take(pool, slots).log_decay, (log_decay * 420).expand(2, -1), rtol=1e-5, atol=0)


def test_slow_decays_do_not_drift_over_many_steps():
    """Rounding exp(log_decay) to fp32 would put the State of the last layer off by 3e-5 after 1,000 tokens."""
    q, k, v = draw(1000, H=4, dtype=torch.float32)
    log_decay = tnl_log_decay(4, 23, 24).float()
    _, (_, want) = lightning_reference(*(x.double() for x in (q, k, v, log_decay)))
    pool, slots = new_pool(chunked.identity(1, 4, 4, 3, q), 1), torch.tensor([0], dtype=torch.int32)
    for t in range(1000):
        lightning_step_(q[:, t], k[:, t], v[:, t], log_decay, pool, slots)
    assert relative_error(take(pool, slots).S, want, (0, 1)) < 2e-6


def test_scale_is_on_q():
    q, k, v = draw(9)
    log_decay = -alibi_slopes(2)
    o, state = lightning_attention(q, k, v, log_decay, scale=0.3)
    want, same = lightning_attention(q, k, v, log_decay)
    torch.testing.assert_close(o, 0.3 * want)
    assert torch.equal(state.S, same.S)


def test_gradgrad():
    leaves = [x.requires_grad_() for x in (*draw(3, H=1, D=2, V=2), torch.tensor([-0.3], dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: lightning_attention(*x)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda *x: lightning_attention(*x)[0], leaves)


def test_cost_and_memory_are_linear():
    def cost(T):
        q, k, v = (x.requires_grad_() for x in draw(T, H=1, D=8, V=8, dtype=torch.float32))
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            lightning_attention(q, k, v, torch.tensor([-0.1]), return_state=False)[0].sum().backward()
        return counter.get_total_flops(), sum(kept.values())

    (flops, kept), (flops_4, kept_4) = cost(2048), cost(8192)
    assert flops_4 <= 4.01 * flops and kept_4 <= 4.01 * kept


@pytest.mark.parametrize("packed", [False, True])
def test_it_compiles_to_one_graph(packed):
    q, k, v = draw(150, dtype=torch.float32)
    cu = torch.tensor([0, 20, 20, 150], dtype=torch.int32) if packed else None
    log_decay = torch.tensor([-0.1, -1.0], requires_grad=True)
    state = chunked.identity(3 if packed else 1, 2, 4, 3, q)

    def op(q, k, v, log_decay, state):
        return lightning_attention(q, k, v, log_decay, initial_state=state, cu_seqlens=cu)

    want, got = (
        op(q, k, v, log_decay, state),
        torch.compile(op, fullgraph=True, backend="eager")(q, k, v, log_decay, state),
    )
    torch.testing.assert_close(got, want)


def test_slopes_of_peers_are_refused():
    q, k, v = draw(4)
    with pytest.raises(ValueError, match="slopes.*negate"):
        lightning_attention(q, k, v, alibi_slopes(2))
    for value in (-math.inf, math.nan):
        with pytest.raises(ValueError, match="finite"):
            lightning_attention(q, k, v, torch.tensor([-0.5, value]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_decay": torch.zeros(2, dtype=torch.bfloat16)}, "bfloat16"),
        ({"log_decay": torch.zeros(2, 1)}, "shape"),
        ({"log_decay": torch.zeros(3)}, "3"),
        ({"log_decay": torch.zeros(4)}, "4 entries"),
        ({"log_decay": torch.zeros(1)}, r"k has 2 heads, which does not divide the 1 entries of log_decay \(q 2"),
        ({"log_decay": torch.zeros(0)}, "log_decay"),
        ({"log_decay": -0.5}, "log_decay must be a tensor .*, got -0.5"),
        ({"log_decay": torch.zeros(2, device="meta")}, "meta"),
        ({"v": torch.zeros(1, 4, 2, 3)}, "dtype"),
        ({"backend": "abacus"}, "abacus"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "4 tokens"),
        ({"initial_state": LightningState(torch.zeros(1, 2).double(), torch.zeros(1, 2, 4, 4))}, "initial_state.S"),
        ({"initial_state": LightningState(torch.zeros(2, 2), torch.zeros(1, 2, 4, 3))}, "initial_state.log_decay"),
    ],
)
def test_refusals_name_the_value(change, message):
    q, k, v = draw(4)
    with pytest.raises(ValueError, match=message):
        lightning_attention(**{"q": q, "k": k, "v": v, "log_decay": torch.zeros(2)} | change)


def test_names_of_cases_differ():
    names = [case.name for case in (*SMALL, *REAL)]
    assert len(set(names)) == len(names) and "b4-h32-t8192-d128" in names


# The layer -----------------------------------------------------------------------------------------------------------

FORMS = [
    LightningConfig(n_heads=3, head_dim=4),
    LightningConfig(n_heads=3, head_dim=4, lrpe=True),
    LightningConfig(n_heads=2, head_dim=4, form="tnl3", gate_dim=3, slopes="minimax"),
    LightningConfig(n_heads=2, head_dim=4, slopes="paper", learn_decay=True),
]


def layer_of(config, dtype=torch.float64, d_model=10, layer=1, n_layers=4):
    torch.manual_seed(0)
    return config.build(d_model, layer, n_layers).to(dtype)


def norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def silu(x):
    return x / (1 + (-x).exp())


def test_the_tnl_form_is_the_published_one():
    layer = layer_of(FORMS[0])
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    q, k, v, u = (x @ layer.qkvu_proj.weight.T).split(12, -1)
    q, k, v = (h.view(2, 7, 3, 4) for h in (silu(q), silu(k), v))
    o, _ = recurrence(q, k, v, tnl_log_decay(3, 1, 4))
    want = (norm(o.reshape(2, 7, 12)) * u) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x, None, segment(2, 7))[0], want)
    assert set(layer.state_dict()) == {"qkvu_proj.weight", "out_proj.weight"}


def test_the_tnl3_form_is_the_published_one():
    layer = layer_of(FORMS[2])
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    q, k, v = (silu(h).view(2, 7, 2, 4) for h in (x @ layer.qkv_proj.weight.T).split(8, -1))
    o, _ = recurrence(q, k, v, minimax_log_decay(2, 1, 4))
    gate = (x @ layer.output_gate[0].weight.T @ layer.output_gate[1].weight.T).sigmoid()
    want = (gate * norm(o.reshape(2, 7, 8))) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x, None, segment(2, 7))[0], want)
    keys = {"qkv_proj.weight", "output_gate.0.weight", "output_gate.1.weight", "out_proj.weight"}
    assert set(layer.state_dict()) == keys


def test_lrpe_doubles_the_keys_and_is_relative():
    layer = layer_of(FORMS[1])
    assert layer.lrpe.theta.shape == (3, 1, 4) and "lrpe.theta" in layer.state_dict()
    assert layer.identity(2).S.shape == (2, 3, 8, 4)
    x = torch.randn(1, 9, 10, dtype=torch.float64)
    near, far = (layer(x, None, segment(1, 9, start))[0] for start in (0, 1_000_000))
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_layer_steps_as_it_reads(config):
    layer = layer_of(config)
    x = torch.randn(2, 12, 10, dtype=torch.float64)
    want, end = layer(x, None, segment(2, 12))
    y, state = layer(x[:, :5], layer.identity(2), segment(2, 5))
    pool, slots = layer.mixer.new_pool(state, 4), torch.tensor([3, 1], dtype=torch.int32)
    layer.mixer.put_(pool, slots, state)
    steps = [layer.step_(x[:, t], pool, slots, torch.full((2,), t)) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat([y, torch.stack(steps, 1)], 1), want)
    torch.testing.assert_close(layer.mixer.take(pool, slots), end)


def test_decays_survive_casts_moves_and_the_meta_device():
    config = LightningConfig(n_heads=4, head_dim=4)
    want = tnl_log_decay(4, 1, 4)
    assert torch.equal(layer_of(config, torch.bfloat16).log_decay, want.float())
    assert torch.equal(layer_of(config, torch.bfloat16).double().log_decay, want)
    with torch.device("meta"):
        layer = config.build(10, 1, 4)
    assert layer.log_decay.is_meta
    assert torch.equal(layer.to_empty(device="cpu").log_decay, want.float())
    with torch.device("meta"):
        layer = config.build(10, 1, 4)
    layer.load_state_dict(config.build(10, 1, 4).state_dict(), assign=True)
    layer.reset_buffers()
    assert torch.equal(layer.log_decay, want.float())


def test_a_learned_decay_learns_and_stays_a_decay():
    layer = layer_of(FORMS[3])
    assert "log_slope" in layer.state_dict()
    torch.testing.assert_close(layer.log_decay, paper_log_decay(2, 1, 4), atol=1.1e-9, rtol=1e-6)
    y, _ = layer(torch.randn(1, 20, 10, dtype=torch.float64), None, segment(1, 20), return_state=False)
    y.square().sum().backward()
    assert (layer.log_slope.grad != 0).all()
    with torch.no_grad():
        layer.log_slope += 5
    assert (layer.log_decay <= 0).all()


def test_layer_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="tnl4"):
        LightningConfig(form="tnl4").build(10, 0, 1)  # pyright: ignore[reportArgumentType]
