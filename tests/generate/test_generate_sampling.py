"""Sampling: its probabilities, filters and penalties, and what decides a draw."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import KINDS, PROMPTS, VOCAB, all_logits, make_model, some_ids

from linattn.generate import GREEDY, SamplingConfig, generate, probabilities, row_generators, sample, seen_tokens


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
