"""Vectors in place of tokens, and the hidden states: what transformers' other causal models take and give."""

import copy
import threading
from itertools import pairwise

import pytest
import torch
from hf_tiny import CONFIGS, GREEDY, left_padded, make, prompts
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from linattn.hf import LinattnCache


def vectors(model, ids):
    with torch.no_grad():
        return model.get_input_embeddings()(ids)


@pytest.fixture(scope="module")
def scaled():
    """A model whose embedding multiplies by sqrt(d_model), as TransNormerLLM's 1B."""
    from linattn.hf import LinattnConfig, LinattnForCausalLM
    from linattn.models import TransNormerConfig

    dials = TransNormerConfig(
        d_model=32, n_heads=2, head_dim=16, n_layers=2, d_hidden=48, vocab_size=257, scale_embedding=True
    )
    torch.manual_seed(0)
    return LinattnForCausalLM(LinattnConfig(model=dials)).eval()


# ---- vectors


def test_the_embeddings_of_tokens_are_the_tokens(model):
    ids = prompts()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=vectors(model, ids)).logits, model(ids).logits)


def test_vectors_of_a_model_that_scales_its_embedding_are_scaled_already(scaled):
    ids = prompts()
    with torch.no_grad():
        assert torch.equal(scaled(inputs_embeds=vectors(scaled, ids)).logits, scaled(ids).logits)


def test_vectors_that_are_no_tokens_are_read_too(model):
    ids = prompts()
    given = vectors(model, ids)
    given[0, 3] += 0.5
    with torch.no_grad():
        moved, plain = model(inputs_embeds=given).logits, model(ids).logits
    assert torch.equal(moved[0, :3], plain[0, :3]) and torch.equal(moved[1], plain[1])
    assert (moved[0, 3] - plain[0, 3]).abs().max() > 1e-2 and (moved[0, 4:] - plain[0, 4:]).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "middle", "right"])
def test_padded_vectors_are_their_rows_alone(model, side):
    ids, mask = prompts(), torch.ones(2, 12, dtype=torch.long)
    mask[1, {"left": slice(0, 4), "middle": slice(4, 8), "right": slice(8, 12)}[side]] = 0
    given = vectors(model, ids)
    given[mask == 0] = 7.0
    with torch.no_grad():
        logits = model(inputs_embeds=given, attention_mask=mask).logits[mask.bool()]
        assert torch.equal(logits, model(ids, attention_mask=mask).logits[mask.bool()])


def test_packed_vectors_are_packed_tokens(model):
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": prompts(1, n)[0].tolist()} for n in (5, 7)])
    ids, positions = batch["input_ids"], batch["position_ids"]
    with torch.no_grad():
        packed = model(inputs_embeds=vectors(model, ids), position_ids=positions, use_cache=False).logits
        assert torch.equal(packed, model(ids, position_ids=positions, use_cache=False).logits)


def test_vectors_go_on_from_a_cache(model):
    ids = prompts()
    with torch.no_grad():
        caches = LinattnCache(), LinattnCache()
        for cache in caches:
            model(ids[:, :7], past_key_values=cache)
        by_vectors = model(inputs_embeds=vectors(model, ids[:, 7:]), past_key_values=caches[0]).logits
        assert torch.equal(by_vectors, model(ids[:, 7:], past_key_values=caches[1]).logits)
    assert caches[0].get_seq_length() == 12


def test_gradients_reach_the_vectors_recomputed_or_not(model):
    model = copy.deepcopy(model).train()
    gradients = []
    for recompute in (False, True):
        given = vectors(model, prompts()).requires_grad_()
        if recompute:
            model.gradient_checkpointing_enable()
        out = model(inputs_embeds=given, labels=prompts(), output_hidden_states=True, prefix_length=0)
        (out.loss + out.hidden_states[1].square().mean()).backward()
        gradients.append(given.grad)
    assert gradients[0].abs().amax(2)[:, :-1].min() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_generate_from_vectors_writes_what_it_writes_from_tokens(model):
    batch = left_padded([prompts()[0], prompts()[1, :5]])
    given, mask = vectors(model, batch["input_ids"]), batch["attention_mask"]
    options = {"max_new_tokens": 8, **GREEDY}
    text = model.generate(**batch, **options)
    assert torch.equal(model.generate(inputs_embeds=given, attention_mask=mask, **options), text[:, 12:])
    both = model.generate(batch["input_ids"], inputs_embeds=given, attention_mask=mask, **options)
    assert torch.equal(both, text)
    beams = {**options, "num_beams": 3}
    from_vectors = model.generate(inputs_embeds=given, attention_mask=mask, **beams)
    assert torch.equal(from_vectors, model.generate(**batch, **beams)[:, 12:])


@pytest.mark.parametrize("chunk", [8, 11, 64])
@pytest.mark.parametrize("with_ids", [False, True])
def test_generate_reads_vectors_in_chunks(model, chunk, with_ids):
    ids = prompts()
    given = {"inputs_embeds": vectors(model, ids), **({"input_ids": ids} if with_ids else {})}
    text = model.generate(**given, prefill_chunk_size=chunk, max_new_tokens=8, **GREEDY)
    assert torch.equal(text[:, -8:], model.generate(ids, max_new_tokens=8, **GREEDY)[:, 12:])


def test_generate_goes_on_from_a_cache_with_the_vectors_of_all(model):
    ids = prompts(1, 14)
    with torch.no_grad():
        read = model(ids[:, :9], past_key_values=LinattnCache()).past_key_values
    wanted = model.generate(ids, past_key_values=copy.deepcopy(read), max_new_tokens=6, **GREEDY)[:, 14:]
    for chunk in (None, 3):
        cache = copy.deepcopy(read)
        options = {"past_key_values": cache, "prefill_chunk_size": chunk, "max_new_tokens": 6, **GREEDY}
        assert torch.equal(model.generate(inputs_embeds=vectors(model, ids), **options), wanted)
        assert cache.get_seq_length() == 14 + 5


def test_vectors_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"vectors \[B, T, 32\].*got torch.float32 \[1, 2, 31\]"):
        model(inputs_embeds=torch.zeros(1, 2, 31))
    with pytest.raises(ValueError, match=r"vectors \[B, T, 32\].*got torch.int64 \[1, 2\]"):
        model(inputs_embeds=prompts(1, 2))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(prompts(), inputs_embeds=vectors(model, prompts()))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()


def test_a_call_that_fails_leaves_the_model_as_it_was(model, monkeypatch):
    given = vectors(model, prompts())
    with torch.no_grad():
        plain = model(prompts()).logits
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(inputs_embeds=given, attention_mask=torch.ones(2, 5))
    monkeypatch.setattr(model.model.blocks[-1], "forward", _broken)
    with pytest.raises(RuntimeError, match="planted"):
        model(inputs_embeds=given, output_hidden_states=True)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(model(prompts()).logits, plain)


def _broken(*args):
    raise RuntimeError("planted")


def test_a_call_of_another_thread_reads_its_own_tokens():
    model, ids = make("based"), prompts()
    with torch.no_grad():
        plain = model(ids).logits
    others = []

    def read_meanwhile(*unused):
        def other():
            with torch.no_grad():
                others.append(model.model(ids).logits)

        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.model.blocks[0].register_forward_pre_hook(read_meanwhile)
    with torch.no_grad():
        out = model(inputs_embeds=torch.zeros(2, 12, 32), output_hidden_states=True)
    handle.remove()
    assert torch.equal(others[0], plain) and len(out.hidden_states) == 4


# ---- hidden states


def test_hidden_states_are_the_embedding_each_block_and_the_final_norm(model):
    ids = prompts()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    states = out.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert {tuple(x.shape) for x in states} == {(2, 12, 32)}
    assert torch.equal(states[0], vectors(model, ids))
    with torch.no_grad():
        assert torch.equal(model.model.logits(states[-1]), out.logits)
        assert torch.equal(out.logits, model(ids).logits)
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(states))
    assert model(ids).hidden_states is None


def test_hidden_states_are_the_same_however_the_text_is_read(model):
    ids, mask = prompts(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4], mask[1, 5:8] = 0, 0
    options = {"output_hidden_states": True, "prefix_length": 0}
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, **options).hidden_states
        for row in (0, 1):
            real = mask[row].bool()
            for got, want in zip(padded, model(ids[row][real][None], **options).hidden_states, strict=True):
                torch.testing.assert_close(got[row][real], want[0], rtol=0, atol=1e-5)
        positions = torch.cat([torch.arange(5), torch.arange(7), torch.arange(12)]).view(2, 12)
        packed = model(ids, position_ids=positions, use_cache=False, **options).hidden_states
        for got, want in zip(packed, model(ids[:1, 5:], **options).hidden_states, strict=True):
            torch.testing.assert_close(got[:1, 5:], want, rtol=0, atol=1e-5)


def test_generate_returns_hidden_states_a_step(model):
    options = {"max_new_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    out = model.generate(prompts(), **options)
    assert [step[-1].shape[1] for step in out.hidden_states] == [12, 1, 1]
    assert {len(step) for step in out.hidden_states} == {model.config.num_hidden_layers + 1}
    chunked = model.generate(inputs_embeds=vectors(model, prompts()), prefill_chunk_size=8, **options)
    assert torch.equal(chunked.sequences, out.sequences[:, 12:])
    for got, want in zip(chunked.hidden_states[0], out.hidden_states[0], strict=True):  # the last chunk's
        torch.testing.assert_close(got, want[:, 8:], rtol=1e-5, atol=1e-5)


def test_the_configuration_can_ask_for_hidden_states(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True)
    with torch.no_grad():
        assert model(prompts()).hidden_states is not None
        assert model(prompts(), output_hidden_states=False).hidden_states is None
        assert len(model(prompts(), return_dict=False, use_cache=False)) == 2


def test_hidden_states_of_16_bit_weights_are_the_fp32_stream():
    model = make("transnormer").to(torch.bfloat16)
    with torch.no_grad():
        states = model(prompts(), output_hidden_states=True).hidden_states
    assert {x.dtype for x in states} == {torch.float32}


# ---- torch.compile: the backends are eager, the tracing real


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compiled_call_on_vectors_with_hidden_states_is_one_graph(name):
    torch._dynamo.reset()
    model = make(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    given, results = vectors(model, prompts()), []
    with torch.no_grad():
        for m in (model, compiled):
            out = m(inputs_embeds=given, past_key_values=LinattnCache(), output_hidden_states=True)
            step = m(inputs_embeds=given[:, :1], past_key_values=out.past_key_values, output_hidden_states=True)
            results.append((out.logits, *out.hidden_states, step.logits, *step.hidden_states))
    assert len(results[1]) == 2 * (model.config.num_hidden_layers + 2)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_a_compiled_call_on_padded_tokens_with_hidden_states_is_one_graph():
    torch._dynamo.reset()
    model = make("based")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        want, got = ([x[mask.bool()] for x in m(prompts(), **options).hidden_states] for m in (model, compiled))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_gradients_reach_the_vectors_of_a_compiled_call():
    torch._dynamo.reset()
    model = make("based")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    gradients = []
    for m in (model, compiled):
        given = vectors(model, prompts()).requires_grad_()
        out = m(inputs_embeds=given, labels=prompts(), use_cache=False, output_hidden_states=True)
        (out.loss + out.hidden_states[1].square().mean()).backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)
