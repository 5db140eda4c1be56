"""JRT-RNN's prefix in transformers: what takes one, what takes none, and what is refused."""

import pytest
import torch
from hf_tiny import GREEDY, left_padded, make, prompts

from linattn.generate import GREEDY as OUR_GREEDY
from linattn.generate import generate as our_generate
from linattn.hf import LinattnCache, modeling


def ours(jrt, ids, prefix, n=6):
    prefixes = torch.full((ids.shape[0],), prefix)
    results = our_generate(jrt.model, ids, max_new_tokens=n, sampling=OUR_GREEDY, prefix_lengths=prefixes)
    return [result.tokens for result in results]


@pytest.mark.parametrize("tokens", [12, 5], ids=["longer than the prefix", "shorter"])
def test_generate_takes_all_of_the_prefix_that_the_prompt_has(jrt, tokens):
    ids = prompts(2, tokens)
    for use_cache in (True, False):
        text = jrt.generate(ids, max_new_tokens=6, use_cache=use_cache, **GREEDY)[:, tokens:]
        assert text.tolist() == ours(jrt, ids, min(8, tokens))
    assert ours(jrt, ids, min(8, tokens)) != ours(jrt, ids, 0)


@pytest.mark.parametrize("prefix", [0, 3, torch.tensor([3, 3])], ids=["0", "3", "a tensor"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prefix_length_is_an_ordinary_keyword(jrt, prefix, beams):
    ids = prompts()
    options = {"prefix_length": prefix, "num_beams": beams, "max_new_tokens": 6, **GREEDY}
    text = jrt.generate(ids, **options)
    assert torch.equal(text, jrt.generate(ids, use_cache=False, **options))
    assert (text[:, 12:].tolist() == ours(jrt, ids, int(torch.as_tensor(prefix).max()))) == (beams == 1)


def test_rows_of_a_batch_have_prefixes_of_their_own(jrt):
    batch = left_padded([prompts()[0], prompts()[1, :5]])
    text = jrt.generate(**batch, max_new_tokens=6, **GREEDY)[:, 12:]
    assert text.tolist() == ours(jrt, prompts()[:1], 8) + ours(jrt, prompts()[1:, :5], 5)
    chosen = jrt.generate(**batch, prefix_length=torch.tensor([2, 4]), max_new_tokens=6, **GREEDY)[:, 12:]
    assert chosen.tolist() == ours(jrt, prompts()[:1], 2) + ours(jrt, prompts()[1:, :5], 4)


def test_a_call_with_an_empty_cache_takes_the_prefix_and_any_other_none(jrt):
    ids = prompts()
    with torch.no_grad():
        prefill = jrt(ids, past_key_values=LinattnCache()).logits
        torch.testing.assert_close(prefill, jrt(ids, prefix_length=8).logits, rtol=0, atol=1e-6)
        plain = jrt(ids).logits
        torch.testing.assert_close(plain, jrt(ids, prefix_length=0).logits, rtol=0, atol=1e-6)
    assert (prefill - plain).abs().max() > 1e-2


def test_a_call_without_a_prefix_says_so_once(jrt, caplog):
    modeling.logger.warning_once.cache_clear()
    for _ in range(3):
        jrt(prompts())
    said = [record.message for record in caplog.records if "prefix_length" in record.message]
    assert len(said) == 1
    assert "reads the text causally" in said[0]


def test_scoring_never_shows_a_continuation_to_itself(jrt):
    """What lm-eval's loglikelihood does: one call on context and continuation, logits of every place."""
    ids = prompts(1, 12)
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 256
    with torch.no_grad():
        assert torch.equal(jrt(ids).logits[:, :6], jrt(other).logits[:, :6])
        # The context alone as the prefix: more is known, and still nothing of what comes.
        context = jrt(ids, prefix_length=6).logits, jrt(other, prefix_length=6).logits
        assert torch.equal(context[0][:, :6], context[1][:, :6])
        leak = jrt(ids, prefix_length=8).logits, jrt(other, prefix_length=8).logits
    assert (leak[0][:, :6] - leak[1][:, :6]).abs().max() > 1e-3


def test_a_first_chunk_shorter_than_the_prefix_is_refused(jrt):
    with pytest.raises(ValueError, match="read in one piece: .* prefill_chunk_size of at least 8"):
        jrt.generate(prompts(), prefill_chunk_size=7, max_new_tokens=2, **GREEDY)
    batch = left_padded([prompts()[0], prompts()[1, :9]])  # three pads: the first eight columns hold five tokens
    with pytest.raises(ValueError, match="read in one piece"):
        jrt.generate(**batch, prefill_chunk_size=8, max_new_tokens=2, **GREEDY)
    chunked = jrt.generate(prompts(), prefill_chunk_size=4, prefix_length=4, max_new_tokens=6, **GREEDY)
    assert chunked[:, 12:].tolist() == ours(jrt, prompts(), 4)


@pytest.mark.parametrize(
    "prefix, message",
    [
        (9, "0 to 8"),
        (-1, "0 to 8"),
        (torch.tensor([1, 2, 3]), r"int64 \[2\]"),
        (torch.tensor([1.0, 2.0]), r"int64 \[2\]"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(jrt, prefix, message):
    with pytest.raises(ValueError, match=message):
        jrt(prompts(), prefix_length=prefix)


def test_a_prefix_after_a_cache_or_in_another_model_is_refused(jrt):
    with torch.no_grad():
        cache = jrt(prompts(), past_key_values=LinattnCache()).past_key_values
        with pytest.raises(ValueError, match="goes on from a cache"):
            jrt(prompts(2, 3), past_key_values=cache, prefix_length=2)
        with pytest.raises(ValueError, match="belongs to the start of a text"):
            jrt.generate(prompts(2, 14), past_key_values=cache, prefix_length=2, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="no prefix layers"):
        make("based")(prompts(), prefix_length=2)


def test_packed_documents_have_prefixes_of_their_own(jrt):
    ids = prompts(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = jrt(ids, position_ids=positions, prefix_length=torch.tensor([3, 6])).logits[0]
        alone = [jrt(ids[:, :5], prefix_length=3).logits[0], jrt(ids[:, 5:], prefix_length=6).logits[0]]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
