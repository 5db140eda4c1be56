"""Prefill and greedy decoding against the parallel pass."""

import pytest
import torch
from small_models import DTYPES, KINDS, PREFIX, PROMPTS, all_logits, greedy, make_model, some_ids

from linattn.core.numerics import relative_error
from linattn.generate import GREEDY, generate, prefill, read
from linattn.models import map_model_state


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
