"""`generate` on every architecture: whatever way a prompt is read, the text is the same."""

import copy

import pytest
import torch
from hf_tiny import GREEDY, left_padded, prompts
from transformers import DynamicCache, TextIteratorStreamer, TextStreamer, pipeline, set_seed

from linattn.data import load_tokenizer
from linattn.generate import GREEDY as OUR_GREEDY
from linattn.generate import generate as our_generate
from linattn.hf import LinattnCache
from linattn.hf.tokenizer import hf_tokenizer

LENGTHS = (12, 5, 1, 9, 12, 7, 3, 10)


def written(model, ids, n=8, **options):
    return model.generate(ids, max_new_tokens=n, **{**GREEDY, **options})[:, ids.shape[1] :]


def rows_of_unequal_length():
    return [row[:n] for row, n in zip(prompts(8), LENGTHS, strict=True)]


def test_greedy_with_a_cache_without_one_and_by_our_engine_is_one_text(model):
    ids = prompts()
    text = written(model, ids)
    assert text.unique().numel() > 4
    assert torch.equal(text, written(model, ids, use_cache=False))
    ours = our_generate(model.model, ids, max_new_tokens=8, sampling=OUR_GREEDY)
    assert text.tolist() == [result.tokens for result in ours]


def test_sampling_draws_the_same_with_and_without_a_cache(model):
    texts = []
    for use_cache in (True, False):
        set_seed(0)
        texts.append(written(model, prompts(), do_sample=True, top_k=50, num_return_sequences=3, use_cache=use_cache))
    assert texts[0].shape == (6, 8)
    assert torch.equal(*texts)
    assert not torch.equal(texts[0][0], texts[0][1])


@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search_with_and_without_a_cache_is_one_text(model, returned):
    options = {"num_beams": 3, "num_return_sequences": returned}
    text = written(model, prompts(), **options)
    assert text.shape[0] == 2 * returned
    assert torch.equal(text, written(model, prompts(), use_cache=False, **options))


def test_a_left_padded_row_is_that_row_alone(model):
    rows = rows_of_unequal_length()
    batch = left_padded(rows)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    together = model.generate(**batch, **options)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], **options)
        assert torch.equal(together.sequences[i, 12:], alone.sequences[0, len(row) :])
        logits = torch.stack([step[i] for step in together.logits]), torch.stack([s[0] for s in alone.logits])
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_batch_1_and_batch_8_agree(model):
    ids = prompts(8)
    assert torch.equal(written(model, ids), torch.cat([written(model, row[None]) for row in ids]))
    with torch.no_grad():
        one_by_one = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(model(ids).logits, one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [8, 9, 11, 64])
def test_prefill_in_chunks_is_prefill(model, chunk):
    ids = prompts()
    assert torch.equal(written(model, ids), written(model, ids, prefill_chunk_size=chunk))


def test_a_row_whose_first_chunk_is_all_pads_is_that_row_alone(model):
    batch = left_padded([prompts()[0], prompts()[1, :3]])
    options = {"prefill_chunk_size": 8, "max_new_tokens": 6, **GREEDY}
    if model.config.prefix_length:  # its prefix must not be cut: three tokens of it lie in the second chunk
        batch["prefix_length"] = 0
    expected = model.generate(**batch, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("again", [False, True], ids=["new tokens only", "whole history"])
def test_a_second_turn_goes_on_from_the_returned_cache(model, again, chunk):
    first, question = prompts(1, 10), prompts(1, 5, seed=2)
    turn = model.generate(first, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    cache = turn.past_key_values
    assert cache.get_seq_length() == 15
    history = torch.cat([turn.sequences, question], 1)
    whole = written(model, history, 6)
    ids = history if again else history[:, cache.get_seq_length() :]
    mask = torch.ones_like(history)
    options = {"max_new_tokens": 6, "prefill_chunk_size": chunk, **GREEDY}
    second = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(second[:, ids.shape[1] :], whole)


def test_a_cache_can_be_copied_and_asked_twice(model):
    document, question = prompts(1, 10), prompts(1, 4, seed=3)
    with torch.no_grad():
        cache = model(document, past_key_values=LinattnCache()).past_key_values
    ids = torch.cat([document, question], 1)
    answers = [
        model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=5, **GREEDY)[:, 14:] for _ in range(2)
    ]
    assert cache.get_seq_length() == 10
    assert torch.equal(*answers)
    assert torch.equal(answers[0], written(model, ids, 5))


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_every_cache_implementation_is_ours(model, kind):
    out = model.generate(prompts(), max_new_tokens=4, cache_implementation=kind, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, LinattnCache)
    assert torch.equal(out.sequences[:, 12:], written(model, prompts(), 4))


def test_what_a_state_cannot_do_is_refused(model):
    ids = prompts()
    with pytest.raises(ValueError, match="not quantized"):
        written(model, ids, cache_implementation="quantized")
    with pytest.raises(ValueError, match="DynamicCache; linattn models keep States"):
        written(model, ids, past_key_values=DynamicCache())
    for assisted in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="cannot be rolled back: a State cannot forget"):
            written(model, ids[:1], **assisted)


def test_streamers_get_the_text(model, capsys):
    tokenizer = hf_tokenizer(load_tokenizer("bytes"))
    inputs = tokenizer("Call me", return_tensors="pt")
    ids = written(model, inputs["input_ids"], 8, min_new_tokens=8)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, streamer=streamer, max_new_tokens=8, min_new_tokens=8, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(ids[0])
    model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=8, min_new_tokens=8, **GREEDY)
    whole = tokenizer.decode(inputs["input_ids"][0]) + tokenizer.decode(ids[0])
    assert capsys.readouterr().out.strip() == whole.strip()


def test_a_batched_pipeline_writes_what_single_calls_write(folder):
    tokenizer = hf_tokenizer(load_tokenizer("bytes"))
    from transformers import AutoModelForCausalLM

    pipe = pipeline("text-generation", AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, device="cpu")
    texts = ["Call me Ishmael.", "Some", "years ago"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    batched = [out[0]["generated_text"] for out in pipe(texts, batch_size=3, **options)]
    assert batched == [pipe(text, **options)[0]["generated_text"] for text in texts]
