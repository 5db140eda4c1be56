"""linattn.generate: decoding says what the whole forward pass says, whoever shares the batch, however it is cut."""

import json
import math
import resource
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

import linattn.generate.snapshot as snapshot_module
from linattn.core.numerics import relative_error
from linattn.data import ByteTokenizer
from linattn.generate import (
    GREEDY,
    SamplingConfig,
    StopFilter,
    ask,
    generate,
    generate_short,
    generate_text,
    load_snapshot,
    model_hash,
    pad_left,
    prefill,
    probabilities,
    read,
    read_twice,
    row_generators,
    sample,
    save_snapshot,
    seen_tokens,
    weights_hash,
)
from linattn.models import (
    BasedConfig,
    Decoder,
    JRTConfig,
    TransformerConfig,
    TransNormerConfig,
    map_model_state,
    model_state_bytes,
)

VOCAB = 257
PREFIX = 12
BYTES = ByteTokenizer()
_BASED: dict = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 2,
    "feature_dim": 4,
    "window": 8,
    "linear_layers": (1,),
    "window_layers": (2,),
    "d_hidden": 48,
    "vocab_size": VOCAB,
}
CONFIGS = {
    "based": BasedConfig(**_BASED),
    "jrt": JRTConfig(**_BASED, prefix_length=PREFIX),
    "transnormer": TransNormerConfig(
        d_model=32, n_layers=2, n_heads=2, head_dim=8, d_hidden=48, vocab_size=VOCAB, scale_embedding=False
    ),
    "transformer": TransformerConfig(d_model=32, n_layers=2, n_heads=2, d_hidden=48, vocab_size=VOCAB),
}
KINDS = list(CONFIGS)
DTYPES = [torch.float32, torch.float64]
_MODELS = {}


def make_model(kind, dtype=torch.float32, seed=0):
    """A small model with weights large enough, and a head free enough, that greedy text wanders."""
    key = kind, dtype, seed
    if key not in _MODELS:
        torch.manual_seed(seed)
        config = replace(CONFIGS[kind].decoder(), init_std=0.25, init_depth_scaled=False, tie_embeddings=False)
        _MODELS[key] = Decoder(config).to(dtype)
    return _MODELS[key]


def some_ids(length, seed=0):
    return torch.randint(VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [some_ids(5, 1), some_ids(1, 2), some_ids(37, 3), some_ids(PREFIX, 4), some_ids(PREFIX + 1, 5)]


@torch.no_grad()
def all_logits(model, ids, prompt_length):
    """Logits [T, V] of one parallel pass over everything; the prompt's first tokens are the prefix, if there is one."""
    longest = model.config.prefix_length
    prefix = torch.tensor([min(prompt_length, longest)]) if longest else None
    return model(torch.tensor([ids]), prefix_lengths=prefix).logits[0]


def greedy(model, prompts, new=12, **options):
    return [r.tokens for r in generate(model, prompts, max_new_tokens=new, sampling=GREEDY, **options)]


# ---- prefill and greedy decode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_the_parallel_pass(kind, dtype):
    model = make_model(kind, dtype)
    batch = greedy(model, PROMPTS)
    assert batch == [greedy(model, [prompt])[0] for prompt in PROMPTS]
    for prompt, written in zip(PROMPTS, batch, strict=True):
        logits = all_logits(model, prompt + written, len(prompt))
        assert written == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    # A model that repeats one token would pass all this with a broken state.
    assert all(len(set(written)) > 6 for written in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_of_a_batch_is_each_prompt_alone(kind):
    model = make_model(kind)
    logits, state = prefill(model, PROMPTS, chunk=64)
    assert state.tokens.tolist() == [len(p) for p in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        want = all_logits(model, prompt, len(prompt))[-1]
        assert relative_error(logits[row], want) < 1e-5
        assert relative_error(prefill(model, [prompt]).logits[0], want) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_chunks_is_prefill_at_once(kind, dtype, chunk):
    model = make_model(kind, dtype)
    whole, parts = prefill(model, PROMPTS), prefill(model, PROMPTS, chunk=chunk)
    assert relative_error(parts.logits, whole.logits, keep=(0,)) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert parts.state.tokens.tolist() == whole.state.tokens.tolist()
    assert greedy(model, PROMPTS, chunk=chunk) == greedy(model, PROMPTS)


@pytest.mark.parametrize("kind", ["based", "jrt"])
def test_prefill_with_pads_anywhere_is_prefill_without(kind):
    model = make_model(kind)
    want = prefill(model, PROMPTS).logits
    longest = max(len(p) for p in PROMPTS)
    for side in ("left", "right", "middle"):
        tokens = torch.full((len(PROMPTS), longest), 99)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, prompt in enumerate(PROMPTS):
            free = longest - len(prompt)
            places = torch.arange(len(prompt)) + (free if side == "left" else 0)
            if side == "middle":
                places[len(prompt) // 2 :] += free
            tokens[row, places], mask[row, places] = torch.tensor(prompt), True
        assert relative_error(prefill(model, tokens, mask=mask, chunk=7).logits, want, keep=(0,)) < 1e-5


def test_prefill_never_cuts_a_prefix_and_never_reads_more_than_a_chunk_otherwise():
    model, calls = make_model("jrt"), []
    forward = model.forward
    model.forward = lambda tokens, **kw: calls.append((tokens.shape[1], kw["prefix_lengths"])) or forward(tokens, **kw)
    try:
        prefill(model, [some_ids(30)], chunk=5)
    finally:
        del model.forward
    assert [n for n, _ in calls] == [PREFIX, 5, 5, 5, 3]
    assert calls[0][1].tolist() == [PREFIX] and all(p is None for _, p in calls[1:])


def test_prefix_lengths_are_obeyed():
    model, prompt = make_model("jrt"), some_ids(20)
    plain = model(torch.tensor([prompt])).logits[0, -1]
    assert relative_error(prefill(model, [prompt], prefix_lengths=[0]).logits[0], plain) < 1e-5
    assert relative_error(prefill(model, [prompt]).logits[0], plain) > 1e-2
    some = model(torch.tensor([prompt]), prefix_lengths=torch.tensor([7])).logits[0, -1]
    assert relative_error(prefill(model, [prompt], prefix_lengths=[7], chunk=3).logits[0], some) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_text_goes_on_from_the_state_that_generation_returns(kind):
    model, prompt, more = make_model(kind, torch.float64), some_ids(20), [3, 4]
    first = generate(model, [prompt, some_ids(3)], max_new_tokens=6, sampling=GREEDY, return_state=True)
    assert first[0].state.tokens.tolist() == [26]
    on = generate(model, [more], max_new_tokens=6, sampling=GREEDY, state=first[0].state)[0]
    logits = all_logits(model, prompt + first[0].tokens + more + on.tokens, len(prompt))
    assert on.tokens == logits[27:-1].argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_one_state_serves_many_prompts(kind):
    model, context = make_model(kind), some_ids(30)
    state = read(model, torch.tensor(context)).state
    before = map_model_state(torch.clone, state)
    tails = [[1, 2, 3], [4], [5, 6]]
    want = [greedy(model, [tail], state=state)[0] for tail in tails]
    assert greedy(model, tails, state=state) == want
    map_model_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) or a, state, before)
    assert len({tuple(w) for w in want}) == 3


def test_rows_end_by_themselves():
    model = make_model("based")
    free = greedy(model, PROMPTS)
    eos, stop = free[0][3], free[2][5]
    tokens = []
    results = generate(
        model,
        PROMPTS,
        max_new_tokens=12,
        sampling=GREEDY,
        eos_id=eos,
        stop_ids=[stop],
        on_token=lambda row, token: tokens.append((row, token)),
        return_state=True,
    )
    for row, (result, all_of_it) in enumerate(zip(results, free, strict=True)):
        ends = [i for i, t in enumerate(all_of_it) if t in (eos, stop)]
        reason = "length" if not ends else "eos" if all_of_it[ends[0]] == eos else "stop"
        assert (result.tokens, result.finish_reason) == (all_of_it[: (ends or [12])[0]], reason)
        assert [t for r, t in tokens if r == row] == result.tokens
        assert result.state.tokens.tolist() == [len(PROMPTS[row]) + len(result.tokens)]
        # The state is that of the row's own text: idling left it alone.
        want = prefill(model, [PROMPTS[row] + result.tokens]).state
        for got_layer, want_layer in zip(result.state.layers, want.layers, strict=True):
            for got, wanted in zip(got_layer, want_layer, strict=True):
                assert relative_error(got.double(), wanted.double()) < 1e-4
    assert {r.finish_reason for r in results} == {"eos", "stop", "length"}


def test_a_callback_ends_a_row():
    model = make_model("based")
    free = greedy(model, PROMPTS)
    results = generate(
        model, PROMPTS, max_new_tokens=12, sampling=GREEDY, on_token=lambda row, token: row == 1 and token == free[1][2]
    )
    assert results[1].tokens == free[1][:3] and results[1].finish_reason == "stop"
    assert results[2].tokens == free[2] and results[2].finish_reason == "length"


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 999]], {}, "prompt 1 holds token id 999 at place 1, .* 0 to 256; encode"),
        ([[-1]], {}, "token id -1"),
        ([[10**30]], {}, "not a list of token ids"),
        ([[1.5]], {}, "not a list of token ids"),
        ([["a"]], {}, "not a list of token ids"),
        (torch.ones(3, dtype=torch.int64), {}, r"must be \[B, T\]"),
        ([[1]], {"mask": torch.ones(1, 1)}, "lists of ids need no pads"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"chunk": 0}, "chunk=0"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 rows"),
        ([[1]], {"prefix_lengths": [1]}, "no prefix layers"),
    ],
)
def test_bad_prompts_are_refused_with_the_fix(prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate(make_model("based"), prompts, **options)


def test_bad_prefixes_and_states_are_refused():
    model = make_model("jrt")
    state = prefill(model, [[1], [2]]).state
    with pytest.raises(ValueError, match=r"prefix_lengths\[0\] is 4; it must be 0 to 3"):
        prefill(model, [[1, 2, 3]], prefix_lengths=[4])
    with pytest.raises(ValueError, match="2 prefix_lengths for 1 prompts"):
        prefill(model, [[1, 2, 3]], prefix_lengths=[1, 1])
    with pytest.raises(ValueError, match="belong to the start of a text"):
        prefill(model, [[1], [2]], prefix_lengths=[1, 1], state=state)
    with pytest.raises(ValueError, match="the state has 2 rows and there are 3 prompts"):
        generate(model, [[1], [2], [3]], state=state)


# ---- sampling


def of(values):
    """Logits [1, V] of probabilities."""
    return torch.tensor([values], dtype=torch.float64).log()


def test_sampling_without_filters_is_the_softmax():
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probabilities(logits, SamplingConfig()), logits.double().softmax(-1))
    got = probabilities(logits, SamplingConfig(temperature=0.5))
    torch.testing.assert_close(got, (2 * logits.double()).softmax(-1))


@pytest.mark.parametrize(
    "values, options, want",
    [
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ([0.2, 0.4, 0.2, 0.2], {"top_k": 2}, [0.2, 0.4, 0.2, 0.2]),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 0.3}, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 1e-9}, [0, 1, 0, 0]),
        ([0.2, 0.4, 0.2, 0.2], {"top_p": 0.5}, [0.2, 0.4, 0.2, 0.2]),
        ([0.1, 0.4, 0.2, 0.3], {"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ([0.1, 0.4, 0.2, 0.3], {"min_p": 1.0}, [0, 1, 0, 0]),
        # top-p is of what top-k left, where the first has 4/7.
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 0.55}, [0, 4 / 7, 0, 3 / 7]),
        # Temperature comes first: squared, the probabilities are 1 16 4 9 of 30.
        ([0.1, 0.4, 0.2, 0.3], {"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], {"temperature": 0.5, "min_p": 0.5}, [0, 16 / 25, 0, 9 / 25]),
        ([0.1, 0.4, 0.2, 0.3], {"temperature": 0.0, "top_k": 3}, [0, 1, 0, 0]),
        ([0.3, 0.1, 0.3, 0.3], {"temperature": 0.0}, [1, 0, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], {"temperature": 1e-300}, [0, 1, 0, 0]),
        ([0.0, 0.4, 0.6, 0.0], {"temperature": 2.0}, [0, 0.4**0.5, 0.6**0.5, 0]),
    ],
)
def test_sampling_filters_give_these_probabilities(values, options, want):
    want = torch.tensor([want], dtype=torch.float64)
    got = probabilities(of(values), SamplingConfig(**options))
    torch.testing.assert_close(got, want / want.sum())


@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_sampling_top_p_of_a_large_vocabulary(spread):
    """Flat, where most tokens are needed, and peaked, where few are."""
    logits = spread * torch.randn(2, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, got = logits.softmax(-1), probabilities(logits, SamplingConfig(top_p=0.8))
    for row, kept in zip(p, got > 0, strict=True):
        assert row[kept].min() > row[~kept].max()
        assert 0 <= row[kept].sum() - 0.8 < row[kept].min()
    assert (int((got > 0).sum(1).min()) > 1024) == (spread < 1)


def test_sampling_penalizes_what_was_seen_before_the_temperature():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]])
    seen = seen_tokens([[0, 1, 3, 3, 260], []], 4)
    assert seen.tolist() == [[True, True, False, True], [False] * 4]
    config = SamplingConfig(repetition_penalty=2.0, temperature=0.5)
    want = (torch.tensor([[1.0, -4.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]], dtype=torch.float64) / 0.5).softmax(-1)
    torch.testing.assert_close(probabilities(logits, config, seen), want)
    assert sample(logits, replace(config, temperature=0.0, repetition_penalty=3.0), seen=seen).tolist() == [2, 0]


def test_sampling_draws_from_its_probabilities():
    config = SamplingConfig(temperature=1.3, top_k=6, top_p=0.95, min_p=0.02)
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1))
    p, n = probabilities(logits, config)[0], 20_000
    counts = torch.bincount(sample(logits.expand(n, -1), config, row_generators(range(n))), minlength=9).double()
    assert (counts[p == 0] == 0).all() and (p == 0).any()
    kept = p > 0
    chi_square = ((counts - n * p)[kept].square() / (n * p)[kept]).sum()
    assert chi_square < 30  # 5 degrees of freedom or fewer: beyond 30 once in 70,000 times; the seeds are fixed


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_sampling_never_draws_a_forbidden_token(draw, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(draw, dtype=torch.float64))
    for values in ([0, 0.3, 0.7, 0], [0, 0, 1, 0], [0, 1 / 3, 0, 1 / 3, 1 / 3, 0]):
        token = int(sample(of(values), SamplingConfig(), row_generators([0])))
        allowed = [i for i, v in enumerate(values) if v]
        assert token == (allowed[0] if draw == 0 else allowed[-1])


@pytest.mark.parametrize(
    "logits, words",
    [
        (torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), "row 1 hold NaN"),
        (torch.tensor([[math.inf, 1.0]]), "row 0 hold inf"),
        (torch.tensor([[-math.inf, -math.inf]]), "all logits of row 0 are -inf"),
        (torch.zeros(3), r"must be \[B, V\]"),
        (torch.zeros(1, 0), r"must be \[B, V\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_refuses_logits_that_are_none(logits, words, temperature):
    with pytest.raises(ValueError, match=words):
        sample(logits, SamplingConfig(temperature=temperature), row_generators([0, 1]))


def test_sampling_needs_a_generator_a_row_and_seen_of_its_shape():
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        sample(torch.zeros(2, 3), SamplingConfig(), row_generators([0]))
    with pytest.raises(ValueError, match="must agree"):
        sample(torch.zeros(2, 3), GREEDY, seen=torch.zeros(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"seed": -1},
    ],
)
def test_sampling_config_refuses_values_with_the_fix(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}={value} must be "):
        SamplingConfig(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_decide_and_companions_do_not(kind):
    model, config = make_model(kind), SamplingConfig(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=5)
    batch = generate(model, PROMPTS, max_new_tokens=10, sampling=config)
    assert [r.seed for r in batch] == [5, 6, 7, 8, 9]
    assert [r.tokens for r in generate(model, PROMPTS, max_new_tokens=10, sampling=config)] == [r.tokens for r in batch]
    for row in (0, 2, 4):
        alone = generate(model, [PROMPTS[row]], max_new_tokens=10, sampling=config, seeds=[5 + row])[0]
        assert alone.tokens == batch[row].tokens
    turned = generate(model, PROMPTS[::-1], max_new_tokens=10, sampling=config, seeds=[9, 8, 7, 6, 5])
    assert [r.tokens for r in turned[::-1]] == [r.tokens for r in batch]
    same_prompt = generate(model, PROMPTS[:1] * 3, max_new_tokens=10, sampling=config)
    assert len({tuple(r.tokens) for r in same_prompt}) == 3


def test_a_row_draws_the_same_after_its_companions_have_ended():
    model, config = make_model("based"), SamplingConfig(temperature=0.8, repetition_penalty=1.5, seed=5)
    free = [r.tokens for r in generate(model, PROMPTS, max_new_tokens=20, sampling=config)]
    ends = free[0][2]
    cut = [r.tokens for r in generate(model, PROMPTS, max_new_tokens=20, sampling=config, eos_id=ends)]
    assert cut == [row[: row.index(ends)] if ends in row else row for row in free]
    assert cut[0] != free[0] and cut[-1] == free[-1]


def test_the_penalty_counts_the_prompt_and_what_was_written():
    model = make_model("based")
    config = SamplingConfig(temperature=0.0, repetition_penalty=1e6)
    prompt = some_ids(20)
    written = generate(model, [prompt], max_new_tokens=30, sampling=config)[0].tokens
    logits = all_logits(model, prompt + written, len(prompt))[len(prompt) - 1 : -1]
    for n, token in enumerate(written):
        seen = seen_tokens([prompt + written[:n]], VOCAB)
        assert token == sample(logits[n][None], config, seen=seen).item()
        assert token not in prompt + written[:n]


# ---- text, stop strings, streaming


class Script:
    """Stands in for a model: makes `generate_text` write the given tokens. Row i writes scripts[i]."""

    def __init__(self, monkeypatch, scripts):
        import linattn.generate.engine as engine

        self.scripts, self.place = scripts, [0] * len(scripts)
        self.model = make_model("based")
        monkeypatch.setattr(engine, "prefill", self.prefill)
        monkeypatch.setattr(self.model, "step_", self.step_)
        monkeypatch.setattr(self.model, "put_", lambda pool, slots, state: None)

    def logits(self, rows):
        logits = torch.zeros(len(rows), VOCAB)
        for i, row in enumerate(rows):
            if row >= 0:
                logits[i, self.scripts[row][self.place[row]]] = 9.0
                self.place[row] += 1
        return logits

    def prefill(self, model, rows, **options):
        return self.logits(range(len(rows))), None

    def step_(self, tokens, pool, slots):
        return self.logits(slots.tolist())


def scripted(monkeypatch, texts, **options):
    """Results and streamed pieces of rows that write these texts byte by byte, then end the document."""
    script = Script(monkeypatch, [[*BYTES.encode(t), BYTES.eos] if isinstance(t, str) else t for t in texts])
    pieces = [[] for _ in texts]
    results = generate_text(
        script.model,
        BYTES,
        ["x"] * len(texts),
        sampling=GREEDY,
        on_text=lambda row, piece: pieces[row].append(piece),
        **options,
    )
    assert all("".join(p) == r.text for p, r in zip(pieces, results, strict=True))
    assert all(piece for p in pieces for piece in p)
    return results, pieces


def test_stop_strings_across_tokens_end_the_text_and_are_never_streamed(monkeypatch):
    texts = ["a line\n\nrest", "no end\n", "END", "almost EN then ENDED", "néant\n\n"]
    results, pieces = scripted(monkeypatch, texts, stop=("\n\n", "END"))
    assert [r.text for r in results] == ["a line", "no end\n", "", "almost EN then ", "néant"]
    assert [r.finish_reason for r in results] == ["stop", "eos", "stop", "stop", "stop"]
    assert results[0].tokens == BYTES.encode("a line\n\n")
    # "EN" may become "END", and is shown once it has not.
    assert pieces[3][:8] == [*"almost ", "EN "] and pieces[2] == []


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(monkeypatch):
    texts = ["naïve café – 猫 🐈 end", "🐈"]
    results, pieces = scripted(monkeypatch, texts)
    assert [r.text for r in results] == texts
    assert "🐈" in pieces[0] and "猫" in pieces[0] and pieces[1] == ["🐈"]
    # Cut by the length inside a character: its bytes are shown as what they are, damage, once nothing more can come.
    results, pieces = scripted(monkeypatch, ["ab🐈"], max_new_tokens=4)
    assert results[0].text == "ab\ufffd" and results[0].finish_reason == "length" and pieces[0][:2] == ["a", "b"]


def test_a_stop_string_may_be_of_characters_of_many_bytes(monkeypatch):
    results, _ = scripted(monkeypatch, ["ça va。もう", "。", "e\u3001"], stop=["。"])
    assert [r.text for r in results] == ["ça va", "", "e\u3001"]


def test_the_end_of_document_token_can_be_ignored(monkeypatch):
    results, _ = scripted(monkeypatch, [[97, 256, 98, 99]], stop_at_eos=False, max_new_tokens=4)
    assert results[0].text == "abc" and results[0].finish_reason == "length"


@pytest.mark.parametrize("seed", range(20))
def test_stop_filter_does_not_depend_on_where_pieces_end(seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab"), 40))
    stop = ["".join(rng.choice(list("ab"), n)) for n in rng.integers(3, 7, 3)]
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    want = text[: min(ends)[1]] if ends else text
    for size in (1, 2, 5, 40):
        filtered, shown = StopFilter(stop), ""
        for start in range(0, 40, size):
            shown += filtered.push(text[start : start + size])
            assert want.startswith(shown)
        assert shown + filtered.flush() == want and filtered.stopped == bool(ends)


def test_text_is_the_tokens_of_the_model():
    model = make_model("based")
    prompts = ["Call me", "It is a truth universally"]
    config = SamplingConfig(seed=3)
    results = generate_text(model, BYTES, prompts, sampling=config, max_new_tokens=30, return_state=True)
    ids = generate(model, [BYTES.encode(p) for p in prompts], sampling=config, max_new_tokens=30, eos_id=BYTES.eos)
    assert [r.tokens for r in results] == [r.tokens for r in ids]
    assert [r.text for r in results] == [BYTES.decode(r.tokens) for r in ids]
    assert results[0].state.tokens.tolist() == [len(prompts[0]) + len(results[0].tokens)]


def test_bad_text_arguments_are_refused():
    model = make_model("based")
    for prompts, options, words in (
        ("abc", {}, "prompts must be a list"),
        (["a", ""], {}, "prompt 1 is empty"),
        (["a"], {"stop": "\n"}, "stop must be a list"),
        (["a"], {"stop": [""]}, "a stop string is empty"),
        (["a"], {"short": "pad"}, "is for prefix models"),
        (["a"], {"short": "pat"}, "not one of"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_text(model, BYTES, prompts, **options)
    small = Decoder(replace(BasedConfig(**_BASED | {"vocab_size": 100}).decoder()))
    with pytest.raises(ValueError, match="prompt 0 holds token id 255 .* 0 to 99; encode the text with the tokenizer"):
        generate(small, [[1, 255]])


# ---- prompting


def test_read_twice_writes_the_five_orders():
    texts = {
        "CQ": "C. Q:",
        "QCQ": "Information about Q. C. Q:",
        "CCQ": "C.\nC. Q:",
        "CQCQ": "C. Information about Q.\nC. Q:",
        "QCCQ": "Information about Q. C.\nC. Q:",
    }
    for order, text in texts.items():
        assert read_twice("C.", "Q:", order=order) == text
    published = "Information about Applicant. Made by Acme.\nMade by Acme. Applicant:"
    assert read_twice("Made by Acme.", "Applicant:", opening="Information about Applicant.") == published
    with pytest.raises(ValueError, match="'QQ' is not one of"):
        read_twice("C", "Q", order="QQ")
    with pytest.raises(ValueError, match="must hold text"):
        read_twice("", "Q")


def test_prefix_pad_is_the_prompt_behind_real_pads():
    model, short = make_model("jrt"), [some_ids(4), some_ids(PREFIX + 3)]
    assert pad_left([7, 8], 5, 32) == [32, 32, 32, 7, 8] and pad_left([1, 2, 3], 2, 32) == [1, 2, 3]
    got = generate_short(model, short, short="pad", pad_id=32, max_new_tokens=8, sampling=GREEDY)
    want = greedy(model, [[32] * (PREFIX - 4) + short[0], short[1]], new=8)
    assert [r.tokens for r in got] == want
    assert want[0] != greedy(model, short, new=8)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_iterate_reads_all_again_until_the_prefix_is_full(dtype):
    model, prompts = make_model("jrt", dtype), [some_ids(4), some_ids(PREFIX - 1), some_ids(PREFIX + 6)]
    results = generate_short(model, prompts, short="iterate", max_new_tokens=14, sampling=GREEDY, return_state=True)
    for prompt, result in zip(prompts, results, strict=True):
        text = list(prompt)
        for token in result.tokens:
            assert token == all_logits(model, text, len(text))[-1].argmax()
            text.append(token)
        want = read(model, text).state
        assert result.state.tokens.tolist() == [len(text)]
        for got_layer, want_layer in zip(result.state.layers, want.layers, strict=True):
            for got, wanted in zip(got_layer, want_layer, strict=True):
                assert relative_error(got.double(), wanted.double()) < 1e-4
    assert results[0].tokens != greedy(model, prompts, new=14)[0]
    assert results[2].tokens == greedy(model, prompts, new=14)[2]


def test_prefix_iterate_draws_as_generate_does():
    model, config = make_model("jrt"), SamplingConfig(seed=2)
    prompts = [some_ids(PREFIX + 6, 1), some_ids(PREFIX, 2)]
    seen = []
    got = generate_short(
        model,
        prompts,
        short="iterate",
        sampling=config,
        max_new_tokens=9,
        on_token=lambda row, token: seen.append((row, token)),
    )
    assert [r.tokens for r in got] == [r.tokens for r in generate(model, prompts, sampling=config, max_new_tokens=9)]
    assert [t for row, t in seen if row == 1] == got[1].tokens


def test_prefix_strategies_of_ask_are_these_prompts():
    model = make_model("jrt")
    items = [("The sky is blue.", "The sky:"), ("Ab.", "A?")]

    def answers(order, short):
        prompts = [read_twice(c, q, order=order) for c, q in items]
        options = {"max_new_tokens": 8, "sampling": GREEDY, "stop": ("\n",), "short": short}
        return [r.tokens for r in generate_text(model, BYTES, prompts, **options)]

    for strategy, order, short in (
        ("exact", "CQ", "exact"),
        ("pad", "CQ", "pad"),
        ("read-twice", "QCCQ", "pad"),
        ("iterate", "CQ", "iterate"),
    ):
        got = [r.tokens for r in ask(model, BYTES, items, strategy=strategy, max_new_tokens=8)]
        assert got == answers(order, short)
    twice = ask(make_model("based"), BYTES, items, order="QCCQ", max_new_tokens=8)
    assert len(twice) == 2
    with pytest.raises(ValueError, match="'twice' is not one of"):
        ask(model, BYTES, items, strategy="twice")
    with pytest.raises(ValueError, match="for prefix models"):
        ask(make_model("based"), BYTES, items, strategy="iterate")


def test_prefix_strategies_refuse_what_they_cannot_do():
    model = make_model("jrt")
    state = prefill(model, [[1]]).state
    for options, words in (
        ({"short": "pad"}, "needs pad_id"),
        ({"short": "pad", "pad_id": 32, "state": state}, "with state"),
        ({"short": "iterate", "prefix_lengths": [1]}, "with prefix_lengths"),
        ({"short": "iterate", "max_new_tokens": 0}, "max_new_tokens=0"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_short(model, [[1, 2]], **options)
    with pytest.raises(TypeError, match="unknown"):
        generate_short(model, [[1, 2]], short="iterate", unknown=1)


# ---- read


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_read_is_one_forward_pass(kind, dtype):
    model, ids = make_model(kind, dtype), some_ids(200)
    longest = model.config.prefix_length
    prefix = torch.tensor([longest]) if longest else None
    with torch.no_grad():
        out = model(torch.tensor([ids]), prefix_lengths=prefix, return_state=True)
    first = max(longest, 1)
    losses = torch.nn.functional.cross_entropy(
        out.logits[0, first - 1 : -1].double(), torch.tensor(ids[first:]), reduction="none"
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for chunk in (1, 7, 64, 200, 1000):
        reading = read(model, torch.tensor(ids), chunk=chunk, nll=True)
        assert (reading.tokens, reading.scored) == (200, 200 - first)
        assert abs(reading.nll - float(losses.sum())) < tolerance * float(losses.sum())
        assert abs(reading.perplexity - math.exp(float(losses.mean()))) < 1e-3
        assert reading.state.tokens.tolist() == [200]
        for got_layer, want_layer in zip(reading.state.layers, out.state.layers, strict=True):
            for got, want in zip(got_layer, want_layer, strict=True):
                assert relative_error(got.double(), want.double()) < 100 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_read_takes_every_kind_of_stream(kind):
    model, ids = make_model(kind), some_ids(50)
    want = read(model, torch.tensor(ids), chunk=16, nll=True)
    streams = (
        np.array(ids, dtype=np.uint16),
        ids,
        iter(ids),
        (np.array(ids[i : i + 7], dtype=np.uint16) for i in range(0, 50, 7)),
        [torch.tensor(ids[:20]), torch.tensor(ids[20:21]), torch.tensor(ids[21:])],
        [ids[:3], ids[3:]],
    )
    for stream in streams:
        got = read(model, stream, chunk=16, nll=True)
        assert got.nll == want.nll and got.tokens == 50
        map_model_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) or a, got.state, want.state)


@pytest.mark.parametrize("kind", ["based", "jrt", "transnormer"])
def test_read_is_of_constant_size_and_goes_on(kind):
    model, ids = make_model(kind), some_ids(300)
    sizes = {model_state_bytes(read(model, ids[:n], chunk=32).state) for n in (1, 33, 300)}
    assert len(sizes) == 1
    seen = []
    half = read(model, ids[:130], chunk=32)
    rest = read(model, ids[130:], chunk=32, state=half.state, progress=lambda n, speed: seen.append((n, speed)))
    whole = read(model, ids, chunk=32)
    assert [n for n, _ in seen] == [32, 64, 96, 128, 160, 170] and all(speed > 0 for _, speed in seen)
    assert rest.start_speed > 0 and rest.end_speed > 0 and rest.seconds > 0 and rest.nll is None
    assert rest.state.tokens.tolist() == [300]
    for got_layer, want_layer in zip(rest.state.layers, whole.state.layers, strict=True):
        for got, want in zip(got_layer, want_layer, strict=True):
            assert relative_error(got.double(), want.double()) < 1e-4


def test_read_never_holds_more_than_a_chunk_of_the_stream():
    model, taken, calls = make_model("based"), [], []

    def stream():
        for i in range(100):
            taken.append(i)
            yield torch.tensor(some_ids(16, i))

    read(model, stream(), chunk=16, progress=lambda n, speed: calls.append((n, len(taken))))
    assert calls == [(16 * i, i) for i in range(1, 101)]


def test_read_gives_a_prefix_whole_and_then_chunks():
    counts = []
    read(make_model("jrt"), some_ids(30), chunk=5, progress=lambda n, speed: counts.append(n))
    assert counts == [PREFIX, PREFIX + 5, PREFIX + 10, PREFIX + 15, 30]


def test_read_refuses_what_it_cannot_read():
    model = make_model("based")
    for stream, options, words in (
        ([], {}, "holds no token"),
        (torch.ones(1, 3, dtype=torch.int64), {}, r"one row of ids \[T\], got \[1, 3\]"),
        ([1, 2, 300], {}, "token id 300"),
        (np.ones(3), {}, "token ids are integers"),
        (torch.ones(3), {}, "token ids are integers"),
        ([1], {"chunk": 0}, "chunk=0"),
        ([1], {"state": prefill(model, [[1], [2]]).state}, "2 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            read(model, stream, **options)
    with pytest.raises(ValueError, match="no token was scored"):
        _ = read(model, [1, 2]).perplexity
    with pytest.raises(ValueError, match="no token was scored"):
        _ = read(model, [1], nll=True).perplexity


# ---- snapshots


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_snapshot_goes_on_bit_by_bit(kind, dtype, tmp_path):
    model = make_model(kind, dtype)
    state = prefill(model, PROMPTS).state
    save_snapshot(tmp_path / "a.state", model, state, tokenizer_hash=BYTES.hash, metadata={"title": "Emma ✓"})
    loaded = load_snapshot(tmp_path / "a.state", model, tokenizer_hash=BYTES.hash)
    assert loaded.metadata == {"title": "Emma ✓"} and loaded.tokenizer_hash == BYTES.hash
    assert [type(layer) for layer in loaded.state.layers] == [type(layer) for layer in state.layers]
    map_model_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) or a, loaded.state, state)
    more = [[1, 2, 3]] * len(PROMPTS)
    want, got = prefill(model, more, state=state), prefill(model, more, state=loaded.state)
    assert torch.equal(got.logits, want.logits)
    assert greedy(model, more, state=loaded.state) == greedy(model, more, state=state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_snapshot_of_one_row_of_a_batch_and_of_a_shared_state(tmp_path):
    model = make_model("transformer")
    result = generate(model, PROMPTS, max_new_tokens=3, sampling=GREEDY, return_state=True)[2]
    save_snapshot(tmp_path / "row.state", model, result.state)
    assert load_snapshot(tmp_path / "row.state", model).state.tokens.tolist() == [40]
    shared = map_model_state(lambda leaf: leaf.expand(3, *leaf.shape[1:]), result.state)
    save_snapshot(tmp_path / "shared.state", model, shared)
    assert load_snapshot(tmp_path / "shared.state", model, "any hash").state.tokens.tolist() == [40] * 3


@pytest.fixture
def saved(tmp_path):
    """A snapshot of the small Based model after PROMPTS."""
    path = tmp_path / "a.state"
    save_snapshot(path, make_model("based"), prefill(make_model("based"), PROMPTS).state, tokenizer_hash=BYTES.hash)
    return path


def split(path):
    """The header of a safetensors file as data, and what follows it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path, header, data):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_snapshot_of_another_model_names_both_hashes(saved):
    model, wider = make_model("based"), make_model("jrt")
    with pytest.raises(
        ValueError, match=f"model hash is {model_hash(model)}, .* has {model_hash(wider)}: another arch"
    ):
        load_snapshot(saved, wider)
    other = make_model("based", seed=1)
    assert model_hash(other) == model_hash(model)
    words = f"weights hash is {weights_hash(model)}, .* has {weights_hash(other)}: the same model with other weights"
    with pytest.raises(ValueError, match=words):
        load_snapshot(saved, other)
    with pytest.raises(ValueError, match=f"tokenizer hash is {BYTES.hash}, .* has 0123: other ids"):
        load_snapshot(saved, model, tokenizer_hash="0123")
    with pytest.raises(ValueError, match="weights of torch.float32, and the model given here has torch.float64"):
        load_snapshot(saved, make_model("based", torch.float64))


def test_weights_hash_sees_one_step_of_training():
    model = Decoder(replace(CONFIGS["based"].decoder()))
    before = weights_hash(model), model_hash(model)
    with torch.no_grad():
        model.blocks[1].mixer.proj_q.weight.mul_(1.001)
    assert weights_hash(model) != before[0] and model_hash(model) == before[1]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_snapshot_cut_short_is_refused_before_anything_is_read(saved, keep, monkeypatch):
    raw = saved.read_bytes()
    saved.write_bytes(raw[:keep])
    monkeypatch.setattr(snapshot_module, "load_file", lambda *a, **k: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match=f"{saved.name}: (cut short|not a safetensors file)"):
        load_snapshot(saved, make_model("based"))


def test_snapshot_that_is_damaged_is_refused_by_its_header(saved, tmp_path, monkeypatch):
    model, (header, data) = make_model("based"), split(saved)
    monkeypatch.setattr(snapshot_module, "load_file", lambda *a, **k: pytest.fail("tensors were read"))

    def refuses(change, words, data=data):
        edited = json.loads(json.dumps(header))
        change(edited)
        join(saved, edited, data)
        with pytest.raises(ValueError, match=words):
            load_snapshot(saved, model)

    def swap(name, **changes):
        return lambda h: h[name].update(changes)

    shape = header["layers.1.S"]["shape"]
    refuses(swap("layers.1.S", shape=[shape[0], shape[2], shape[1], shape[3]]), r"layers.1.S is \[5, 15, 2, 16\]")
    refuses(swap("layers.1.S", shape=[2**40, 2**20, 1, 1]), "contradicts itself")
    refuses(swap("layers.1.S", dtype="I32"), "layers.1.S is torch.int32")
    refuses(swap("layers.1.S", dtype="X8"), "not one of safetensors")
    refuses(swap("tokens", shape=[1, 5]), r"tokens must be \[N\]")
    refuses(lambda h: h.update({"layers.9.S": h.pop("layers.1.S")}), "missing are .*layers.1.S.* unknown are .*9.S")
    refuses(lambda h: h["__metadata__"].update(format="other"), "not a snapshot")
    refuses(lambda h: h["__metadata__"].update(version="7"), "format 7, and this version of linattn reads 1")
    refuses(lambda h: None, "longer than its header says", data=data + b"x")
    saved.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all ")
    with pytest.raises(ValueError, match="not one of safetensors"):
        load_snapshot(saved, model)
    saved.write_bytes(b"some text that is no safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_snapshot(saved, model)
    with pytest.raises(ValueError, match="no such snapshot"):
        load_snapshot(tmp_path / "none.state", model)


@pytest.mark.parametrize(
    "kind, leaf", [("based", "layers.2.count"), ("transformer", "layers.0.count"), ("based", "tokens")]
)
def test_snapshot_with_counts_beyond_its_tensors_is_refused(kind, leaf, tmp_path):
    model, path = make_model(kind), tmp_path / "a.state"
    save_snapshot(path, model, prefill(model, PROMPTS).state)
    header, data = split(path)
    start, end = header[leaf]["data_offsets"]
    join(path, header, data[:start] + b"\xff" * (end - start) + data[end:])
    with pytest.raises(ValueError, match="counts do not fit"):
        load_snapshot(path, model)


def test_snapshot_that_cannot_be_written_leaves_the_old_one_whole(saved):
    model, before = make_model("based"), saved.read_bytes()
    state = prefill(model, PROMPTS).state
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="could not be written .* untouched. It needs [0-9,]+ bytes: free some space"):
            save_snapshot(saved, model, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["a.state"]


def test_snapshot_replaces_a_file_and_does_not_write_into_it(saved):
    model, before = make_model("based"), saved.read_bytes()
    with saved.open("rb") as reader:
        save_snapshot(saved, model, prefill(model, [[1, 2, 3]]).state)
        assert reader.read() == before
    assert load_snapshot(saved, model).state.tokens.tolist() == [3]


def test_snapshot_refuses_to_save_what_it_could_not_load(tmp_path):
    model = make_model("based")
    state = prefill(model, [[1, 2]]).state
    with pytest.raises(ValueError, match="the state to save: not a state of this model"):
        save_snapshot(tmp_path / "a", make_model("transformer"), state)
    with pytest.raises(ValueError, match="there is no folder"):
        save_snapshot(tmp_path / "none" / "a", model, state)
    with pytest.raises(ValueError, match="text by text"):
        save_snapshot(tmp_path / "a", model, state, metadata={"n": 3})
    assert not list(tmp_path.iterdir())
