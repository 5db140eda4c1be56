"""Trainer, PEFT, gradient checkpointing and torch.compile."""

import pytest
import torch
from hf_tiny import CONFIGS, GREEDY, make, prompts
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from linattn.hf import LinattnCache, LinattnConfig, LinattnForCausalLM


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


def fresh(name):
    torch.manual_seed(0)
    return LinattnForCausalLM(LinattnConfig(model=CONFIGS[name]))


def rows(count=16, tokens=12):
    return [{"input_ids": row, "labels": row} for row in prompts(count, tokens)]


def train(model, folder, steps, resume=False, collator=None, eval_dataset=None, **options):
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, args, train_dataset=rows(), data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    if eval_dataset is not None:
        return trainer.evaluate(eval_dataset)["eval_loss"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_trainer_learns_and_resumes_where_it_was(name, tmp_path):
    whole = fresh(name)
    losses = train(whole, tmp_path / "whole", 6)
    assert losses[-1] < losses[0] - 0.05
    train(fresh(name), tmp_path / "cut", 2)
    again = fresh(name)
    train(again, tmp_path / "cut", 6, resume=True)
    assert same_weights(again, whole)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert same_weights(loaded, whole)


def test_the_trainer_evaluates(name, tmp_path):
    model, held_out = fresh(name), rows(4)
    loss = train(model, tmp_path, 1, eval_dataset=held_out)
    ids = prompts(4)
    with torch.no_grad():
        assert loss == pytest.approx(model.eval()(ids, labels=ids).loss.item(), abs=1e-5)


def test_accumulated_steps_weigh_every_token_the_same():
    ids = prompts(4)
    labels = ids.clone()
    labels[:2, 3:] = -100
    model = fresh("based").eval()
    whole = model(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = sum(model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count).loss for i in (0, 2))
    torch.testing.assert_close(parts, whole)


def test_the_flattening_collator_trains_documents_apart(tmp_path):
    model = fresh("based")
    collator = DataCollatorWithFlattening()
    batch = collator([{"input_ids": row.tolist()} for row in prompts(3, 6)])
    loss = model(**batch).loss
    ids = prompts(3, 6)
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    losses = train(fresh("based"), tmp_path, 2, collator=collator)
    assert len(losses) == 2


def test_checkpointed_gradients_are_the_gradients(name):
    ids = prompts()
    grads = []
    for checkpointing in (False, True):
        model = fresh(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.gradient_checkpointing is checkpointing
        model(ids, labels=ids, prefix_length=0).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        model.gradient_checkpointing_disable()
        assert not model.gradient_checkpointing
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="checkpoint every block"):
        model.gradient_checkpointing_enable(every_n_layers=2)


def test_lora_trains_merges_and_loads(name, tmp_path):
    base = make(name)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = model(prompts(), prefix_length=0).logits
    train(model, tmp_path / "run", 2)
    model.eval()
    with torch.no_grad():
        after = model(prompts(), prefix_length=0).logits
        assert (after - before).abs().max() > 1e-3
        text = model.generate(input_ids=prompts(), max_new_tokens=4, **GREEDY)
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(loaded(prompts(), prefix_length=0).logits, after)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(prompts(), prefix_length=0).logits, after, rtol=0, atol=1e-4)
    assert type(merged) is LinattnForCausalLM
    assert torch.equal(merged.generate(prompts(), max_new_tokens=4, **GREEDY), text)


def test_lora_with_gradient_checkpointing(tmp_path):
    base = fresh("based")
    base.gradient_checkpointing_enable()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}
    train(model, tmp_path, 1)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert base.gradient_checkpointing


def test_compiled_calls_are_the_calls(name):
    """Prefill and a step in one graph each; the backend is eager, the tracing real."""
    torch._dynamo.reset()
    model = make(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    ids = prompts()
    caches, results = [], []
    with torch.no_grad():
        for m in (model, compiled):
            out = m(ids, past_key_values=LinattnCache())
            caches.append(out.past_key_values)
            results.append((out.logits, m(ids[:, :1], past_key_values=out.past_key_values).logits))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    assert [cache.get_seq_length() for cache in caches] == [13, 13]


def test_a_compiled_call_is_as_exact_about_pads():
    torch._dynamo.reset()
    model = make("based")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    ids, mask = prompts(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        want, got = (m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (model, compiled))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_generate_runs_on_a_compiled_forward():
    torch._dynamo.reset()
    model = make("based")
    want = model.generate(prompts(), max_new_tokens=3, **GREEDY)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(prompts(), max_new_tokens=3, **GREEDY), want)
