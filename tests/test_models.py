"""The decoder: published sizes, padding anywhere, packing, decoding, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from linattn.core.config import config_hash, from_data, to_data
from linattn.core.numerics import relative_error
from linattn.core.shapes import Segment
from linattn.models import (
    PUBLISHED,
    BasedConfig,
    JRTConfig,
    ModelConfig,
    TransformerConfig,
    TransNormerConfig,
    build_model,
    map_model_state,
    model_state_bytes,
)

SIZES = {
    "based_360m": 362_620_928,
    "based_1b": 1_349_453_056,
    "jrt_360m": 356.6e6,
    "jrt_1b": 1.375e9,
    "transformer_360m": 359.8e6,
    "transformer_1b": 1.304e9,
    "transformer_1b_fast": 1.3e9,
    "transnormer_385m": 399.0e6,
    "transnormer_1b": 1.0203e9,
    "transnormer_3b": 2.911e9,
    "transnormer_7b": 6.8e9,
    "tnl3_15b": 14.83e9,
}


def tiny(kind):
    """Every kind of layer, in two heads and 32 channels."""
    schedule = {"linear_layers": (1, 3), "window_layers": (2,)}
    common = {"d_model": 32, "n_heads": 2, "vocab_size": 50, "d_hidden": 48}
    if kind == "based":
        return BasedConfig(n_layers=4, feature_dim=4, window=5, **schedule, **common)
    if kind == "jrt":
        return JRTConfig(n_layers=4, feature_dim=4, window=5, prefix_length=12, **schedule, **common)
    if kind == "transformer":
        return TransformerConfig(n_layers=3, **common)
    if kind == "transformer-gqa":
        return TransformerConfig(n_layers=2, n_kv_heads=1, **common)
    form = "tnl3" if kind == "tnl3" else "tnl"
    return TransNormerConfig(n_layers=3, head_dim=16, form=form, gate_dim=4, **common)


KINDS = ("based", "jrt", "transnormer", "tnl3", "transformer", "transformer-gqa")


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    model = build_model(tiny(request.param)).double()
    with torch.no_grad():  # published initial weights are small: larger ones make a wrong state show
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    return model


def draw(*shape, seed=1):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def prefix(model, *lengths):
    return {"prefix_lengths": torch.tensor(lengths)} if model.config.prefix_length else {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(PUBLISHED[name]()).parameters())
    # To the digits that were published; exactly where the count itself was, or follows from a file's size.
    within = {"transformer_1b_fast": 0.03, "transnormer_7b": 0.01, "based_360m": 0, "based_1b": 0}.get(name, 0.0007)
    assert abs(count - SIZES[name]) <= within * SIZES[name], f"{count:,}"


def test_transnormer_7b_fills_its_published_file():
    """27.347 GB of fp32."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(PUBLISHED["transnormer_7b"]()).parameters())
    assert round(count * 4 / 1e9, 3) == 27.347


@pytest.mark.parametrize("kind", KINDS)
def test_configs_survive_json(kind):
    config = tiny(kind)
    again = from_data(ModelConfig, to_data(config))
    assert again == config and type(again) is type(config)
    assert config_hash(again) == config_hash(config)
    deeper = type(config)(**{**{f: getattr(config, f) for f in config.__dataclass_fields__}, "d_hidden": 64})
    assert config_hash(deeper) != config_hash(config)


def test_configs_from_outside_are_checked():
    data = to_data(tiny("based"))
    with pytest.raises(ValueError, match=r"no field 'feature_dims'; did you mean 'feature_dim'\?"):
        from_data(ModelConfig, {**data, "feature_dims": 3})
    with pytest.raises(ValueError, match=r"config.d_model: expected int, got str 'x'"):
        from_data(ModelConfig, {**data, "d_model": "x"})
    with pytest.raises(ValueError, match="type 'Evil' is not one of"):
        from_data(ModelConfig, {**data, "type": "Evil"})


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(model, side):
    """Law 13: rows of 9, 14 and 1 tokens, padded to 14 anywhere, against each alone."""
    lengths, T = (9, 14, 1), 14
    rows = [draw(1, n, seed=n) for n in lengths]
    tokens, mask = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.bool)
    for i, n in enumerate(lengths):
        places = {"left": range(T - n, T), "right": range(n), "middle": [*range(n // 2), *range(T - n + n // 2, T)]}
        tokens[i, places[side]], mask[i, places[side]] = rows[i][0], True
    tokens[~mask] = 49
    out = model(tokens, mask=mask, return_state=True, **prefix(model, 6, 12, 1))
    last = model(tokens, mask=mask, logits="last", **prefix(model, 6, 12, 1)).logits
    for i, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = model(row, return_state=True, **prefix(model, (6, 12, 1)[i]))
        assert relative_error(out.logits[i, mask[i]], alone.logits[0]) < 1e-12
        assert relative_error(last[i], alone.logits[0, -1]) < 1e-12
        state = map_model_state(lambda leaf, i=i: leaf[i : i + 1], out.state)
        assert state.tokens.tolist() == [n]
        follow = draw(1, 5, seed=9)
        got, want = (model(follow, state=s).logits for s in (state, alone.state))
        assert relative_error(got, want) < 1e-12


def test_padding_in_a_later_chunk(model):
    """The same with a state before: rows go on at their own positions."""
    first = draw(2, 7)
    state = model(first, return_state=True, **prefix(model, 3, 7)).state
    tokens, mask = draw(2, 6, seed=3), torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    out = model(tokens, state=state, mask=mask, return_state=True)
    assert out.state.tokens.tolist() == [13, 11]
    alone = model(tokens[1:, 2:], state=map_model_state(lambda leaf: leaf[1:], state))
    assert relative_error(out.logits[1, 2:], alone.logits[0]) < 1e-12


def test_packed_documents_are_alone(model):
    lengths = (5, 0, 11, 1)
    rows = [draw(1, n, seed=n) for n in lengths]
    cu = torch.tensor([0, 5, 5, 16, 17], dtype=torch.int32)
    out = model(torch.cat(rows, 1), cu_seqlens=cu, return_state=True, **prefix(model, 2, 0, 11, 1))
    for i in (0, 2, 3):  # document 1 is empty
        alone = model(rows[i], **prefix(model, (2, 0, 11, 1)[i]))
        assert relative_error(out.logits[:, cu[i] : cu[i + 1]], alone.logits) < 1e-12
    assert out.state.tokens.tolist() == list(lengths)


def test_a_text_in_pieces_is_the_text(model):
    tokens = draw(2, 40)
    whole = model(tokens, **prefix(model, 4, 8)).logits
    pieces, state = [], None
    for a, b in ((0, 13), (13, 14), (14, 40)):
        out = model(tokens[:, a:b], state=state, return_state=True, **(prefix(model, 4, 8) if state is None else {}))
        pieces.append(out.logits)
        state = out.state
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-12


def test_decoding_is_the_fold(model):
    tokens = draw(2, 30)
    want = model(tokens, **prefix(model, 4, 8)).logits
    state = model(tokens[:, :10], return_state=True, **prefix(model, 4, 8)).state
    pool = model.new_pool(4, capacity=30)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    model.put_(pool, slots, state)
    batch = torch.tensor([2, -1, 0], dtype=torch.int32)
    for t in range(10, 30):
        got = model.step_(torch.stack([tokens[0, t], tokens[0, 0], tokens[1, t]]), pool, batch)
        assert relative_error(got[[0, 2]], want[:, t]) < 1e-12
    assert model.take(pool, slots).tokens.tolist() == [30, 30]


def test_a_step_takes_one_token_a_row(model):
    pool, batch = model.new_pool(2, capacity=8), torch.tensor([0, 1], dtype=torch.int32)
    for wrong in (torch.randn(2, model.config.d_model), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"tokens must be int64 of shape \[B\], got"):
            model.step_(wrong, pool, batch)


PLACES = {
    "plain": {},
    "mask": {"mask": torch.tensor([[True] * 12, [False] * 3 + [True] * 4 + [False] * 3 + [True] * 2])},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 24], dtype=torch.int32)},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("logits", ["all", "last"])
def test_the_embeddings_of_tokens_are_the_tokens(model, place, logits):
    """Bitwise: outputs, and every leaf of the state; from nothing, and after a state."""
    options = {**PLACES[place], "logits": logits, "return_state": True}
    tokens = draw(1, 24) if place == "packed" else draw(2, 12)
    first = prefix(model, *((4, 0, 9) if place == "packed" else (4, 6)))
    want, got = (model(x, **options, **first) for x in (tokens, model.embedding(tokens)))
    for _ in range(2):
        assert torch.equal(got.hidden, want.hidden)
        assert torch.equal(got.logits.nan_to_num(), want.logits.nan_to_num())
        same = []
        map_model_state(lambda a, b, same=same: same.append(torch.equal(a, b)), got.state, want.state)
        assert all(same) and len(same) > len(model.blocks)
        want, got = (model(x, state=want.state, **options) for x in (tokens, model.embedding(tokens)))


def test_embeddings_of_a_model_that_scales_are_scaled_already():
    config = TransNormerConfig(n_layers=2, d_model=32, n_heads=2, head_dim=16, d_hidden=48, vocab_size=50)
    model = build_model(replace(config, scale_embedding=True))
    tokens = draw(2, 9)
    assert model.embedding.scale == 32**0.5
    assert torch.equal(model(model.embedding(tokens)).logits, model(tokens).logits)
    assert relative_error(model(model.embedding.weight[tokens]).logits, model(tokens).logits) > 1e-2


def test_embeddings_keep_their_precision_and_nothing_is_written_to_them():
    """fp32 vectors are not rounded to 16-bit weights, and 16-bit ones widen: the stream is fp32."""
    model = build_model(tiny("transnormer")).bfloat16()
    rounded = model.embedding(draw(1, 9)).detach()
    fine = rounded.float() * (1 + 2**-12)
    for given in (rounded, fine):
        kept = given.clone()
        states = model(given, return_hidden_states=True).hidden_states
        assert {x.dtype for x in states} == {torch.float32}
        assert torch.equal(states[0], kept.float()) and torch.equal(given, kept)


def test_hidden_states_are_what_each_block_reads_and_the_norm_gives(model):
    """Block by block: each reads the one before, the final norm the last block's, the head the norm's."""
    tokens = draw(2, 11)
    out = model(tokens, return_hidden_states=True, **prefix(model, 3, 8))
    states = out.hidden_states
    assert len(states) == len(model.blocks) + 1
    assert {tuple(x.shape) for x in states} == {(2, 11, 32)}
    segment = Segment(torch.arange(11).expand(2, 11), None, prefix(model, 3, 8).get("prefix_lengths"))
    x = model.embedding(tokens)
    for block, state in zip(model.blocks, states, strict=False):
        assert torch.equal(state, x)
        x, _ = block(x, None, segment, False, torch.float64)
    assert torch.equal(states[-1], model.norm(x)) and torch.equal(out.logits, model.logits(states[-1]))


def test_hidden_states_are_kept_only_when_asked_for(model):
    tokens = draw(2, 11)
    plain, asked = model(tokens, return_state=True), model(tokens, return_state=True, return_hidden_states=True)
    assert plain.hidden_states is None and asked.hidden_states[-1] is asked.hidden
    assert torch.equal(asked.logits, plain.logits)


def test_hidden_states_of_padded_and_packed_rows_are_the_rows_alone(model):
    tokens, mask = draw(2, 12), PLACES["mask"]["mask"]
    keep = {"return_hidden_states": True, "logits": "last"}
    padded = model(tokens, mask=mask, **keep, **prefix(model, 4, 6)).hidden_states
    ragged, cu = tokens[mask][None], torch.tensor([0, 12, 18], dtype=torch.int32)
    packed = model(ragged, cu_seqlens=cu, **keep, **prefix(model, 4, 6)).hidden_states
    assert {tuple(x.shape) for x in padded} == {(2, 12, 32)} and {tuple(x.shape) for x in packed} == {(1, 18, 32)}
    for row, length in ((0, 4), (1, 6)):
        alone = model(tokens[row, mask[row]][None], **keep, **prefix(model, length)).hidden_states
        for x, y, want in zip(padded, packed, alone, strict=True):
            assert relative_error(x[row, mask[row]], want[0]) < 1e-12
            assert relative_error(y[0, cu[row] : cu[row + 1]], want[0]) < 1e-12


def test_gradients_reach_embeddings_and_come_from_hidden_states(model):
    gradients = []
    for recompute in (False, True):
        model.checkpoint_blocks = recompute
        given = model.embedding(draw(2, 12)).detach().requires_grad_()
        out = model(given, return_hidden_states=True)
        (out.logits.logsumexp(-1).mean() + out.hidden_states[1].square().mean()).backward()
        gradients.append(given.grad)
    assert gradients[0].abs().amax(2).min() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
    given = given.detach().requires_grad_()
    model(given, return_hidden_states=True).logits.logsumexp(-1).mean().backward()
    assert relative_error(given.grad, gradients[0]) > 1e-3


def test_the_state_is_constant_but_for_the_baseline(model):
    sizes = [model_state_bytes(model(draw(1, n), return_state=True).state) for n in (20, 60)]
    constant = not isinstance(model.blocks[0].mixer.mixer.name, str) or model.blocks[0].mixer.mixer.name != "softmax"
    assert (sizes[0] == sizes[1]) == constant


def test_checkpointed_blocks_have_the_same_gradients(model):
    tokens = draw(2, 12)
    gradients = []
    for recompute in (False, True):
        model.checkpoint_blocks = recompute
        model.zero_grad()
        hidden = model(tokens[:, :-1], logits="none").hidden
        model.loss(hidden, tokens[:, 1:], chunk=5).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_every_parameter_is_trained(model):
    tokens = draw(2, 12)
    out = model(tokens[:, :-1], **prefix(model, 6, 6))
    torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_meta_then_reset_is_a_fresh_model():
    config = tiny("transnormer")
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    torch.manual_seed(3)
    model.reset_parameters()
    torch.manual_seed(3)
    fresh = build_model(config)
    fresh.reset_parameters()
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
    torch.manual_seed(4)
    fresh.reset_parameters()
    torch.manual_seed(4)
    model.reset_parameters()
    tokens = draw(1, 8)
    torch.testing.assert_close(model(tokens).logits, fresh(tokens).logits, rtol=0, atol=0)


def test_published_initialisation():
    torch.manual_seed(0)
    config = BasedConfig(d_model=256, n_layers=4, linear_layers=(1,), window_layers=(2,), n_heads=4, d_hidden=512)
    model = build_model(config)
    deep = 0.02 / (2 * 4) ** 0.5
    named = dict(model.named_parameters())
    scaled = {n for n in named if n.endswith(("out_proj.weight", "fc2.weight"))}
    biases = {n for n in named if n.endswith("bias")}
    plain = {n for n in named if n.endswith(("proj_q.weight", "Wqkv.weight", "in_proj.weight", "fc1.weight"))}
    plain.add("embedding.weight")
    assert [len(s) for s in (scaled, biases, plain)] == [8, 4, 9]
    for names, std in ((scaled, deep), (plain, 0.02)):
        wrong = {n: named[n].std().item() for n in names if abs(named[n].std().item() / std - 1) >= 0.05}
        assert wrong == {}
    assert all(named[n].abs().max() == 0 for n in biases)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_other_dtypes(model, dtype, tolerance):
    tokens = draw(1, 20)
    want = model(tokens).logits
    got = model.to(dtype)(tokens).logits
    assert got.dtype == dtype
    assert relative_error(got, want) < tolerance


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    model = build_model(tiny("based"))
    tokens = draw(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_embeddings_and_hidden_states_compile_as_one_graph():
    torch.manual_seed(0)
    model = build_model(tiny("based"))
    given = model.embedding(draw(2, 16)).detach()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want, got = (m(given, return_hidden_states=True).hidden_states for m in (model, compiled))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": torch.tensor([[3, 99]])}, "token id 99 is outside 0 to 49"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask must be \[1, 2\]"),
        ({"prefix_lengths": torch.tensor([1])}, "this model has no prefix layers"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "must run from 0 to the 2 tokens given"),
        ({"tokens": torch.tensor([1, 2])}, r"int64 of shape \[B, T\], got torch.int64 \[2\]"),
        ({"tokens": torch.tensor([[1.0]])}, "int64 of shape"),
        ({"tokens": torch.ones(1, 2, 31)}, r"embeddings \[B, T, 32\] as model.embedding.*float32 \[1, 2, 31\]"),
        ({"tokens": torch.ones(2, 32)}, r"embeddings \[B, T, 32\].*float32 \[2, 32\]"),
        ({"tokens": torch.ones(1, 2, 32, dtype=torch.int64)}, r"int64 of shape \[B, T\], got torch.int64 \[1, 2, 32\]"),
        ({"tokens": torch.ones(1, 0, 32)}, r"at least one token, got shape \[1, 0, 32\]"),
        ({"tokens": torch.ones(1, 2, 32), "mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask must be \[1, 2\]"),
        ({"logits": "bogus"}, "'all', 'last' or 'none', got 'bogus'"),
    ],
)
def test_wrong_calls(options, message):
    model = build_model(tiny("based"))
    with pytest.raises(ValueError, match=message):
        model(**{"tokens": torch.tensor([[1, 2]]), **options})


def test_wrong_states():
    model, other = build_model(tiny("based")), build_model(tiny("transformer"))
    two = model(draw(2, 3), return_state=True).state
    with pytest.raises(ValueError, match=r"must have 1 rows, one a document, got \[2\]"):
        model(draw(1, 3), state=two)
    with pytest.raises(ValueError, match="it has 3 layers, not 4"):
        model(draw(2, 3), state=other(draw(2, 3), return_state=True).state)
    with pytest.raises(ValueError, match=r"prefix_lengths must lie in 0 to 12, got \[13\]"):
        build_model(tiny("jrt"))(draw(1, 20), prefix_lengths=torch.tensor([13]))


def test_a_row_of_pads_has_no_last_token(model):
    mask = torch.tensor([[True, True], [False, False]])
    last = model(draw(2, 2), mask=mask, logits="last").logits
    assert torch.isfinite(last[0]).all() and torch.isnan(last[1]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"linear_layers": (1, 9)}, "linear_layers names layer 9, but the model has layers 0 to 3"),
        ({"window_layers": (1,)}, "layer 1 stands in linear_layers and again in window_layers"),
        ({"n_heads": 3}, "not a multiple of n_heads 3"),
        ({"n_heads": 0}, "BasedConfig.n_heads is 0; it must be at least 1"),
        ({"feature_dim": 0}, "BasedConfig.feature_dim is 0"),
    ],
)
def test_wrong_configs(change, message):
    config = {"n_layers": 4, "d_model": 32, "n_heads": 2, "linear_layers": (1, 3), "window_layers": (2,)}
    with pytest.raises(ValueError, match=message):
        build_model(BasedConfig(**{**config, **change}))
