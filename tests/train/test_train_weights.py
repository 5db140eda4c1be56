"""Weights on disk: what is refused, and what a model is loaded with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import run_quietly

from linattn.models import TransNormerConfig, build_model
from linattn.train import checkpoint, export, load_model, load_model_tokenizer, loop


@pytest.fixture
def saved(config):
    """A checkpoint's folder."""
    run, _ = loop._open_run(config, "auto")
    Path(config.out).mkdir()
    return checkpoint.save_checkpoint(run)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("norm.weight"), r"lacks 1 tensors \(norm.weight\)"),
        (lambda t: t.update(extra=torch.zeros(3)), r"has 1 tensors \(extra\), which the model lacks"),
        (lambda t: t.update({"norm.weight": torch.ones(17)}), r"norm.weight has shape \[17\], .* needs \[16\]"),
        (lambda t: t.update({"norm.weight": torch.ones(16, dtype=torch.int64)}), r"norm.weight is I64"),
        (lambda t: t.update({"norm.weight": torch.ones(16).bfloat16()}), r"norm.weight is .*one dtype"),
    ],
)
def test_weights_that_do_not_fit_are_named_before_anything_is_allocated(saved, change, message, monkeypatch):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_weights_cut_short_are_refused(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut short or no safetensors file"):
        load_model(saved)
    path.write_bytes(whole)
    (saved / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        load_model(saved)


def test_configuration_of_a_model_cannot_set_what_it_lacks(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"window"', '"windw"'))
    with pytest.raises(ValueError, match=r"no field 'windw'; did you mean 'window'"):
        load_model(saved)


def test_an_optimizer_file_that_does_not_fit_is_refused(config, saved):
    path = saved / "optimizer.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "norm.weight.exp_avg": torch.zeros(15)}, path)
    with pytest.raises(ValueError, match=r"norm.weight.exp_avg has shape \[15\]"):
        run_quietly(config)


def test_load_model_gives_the_weights_in_the_dtype_asked_for(saved, config):
    run, _ = loop._open_run(replace(config, out=config.out + "2"), "auto")
    model, _ = load_model(saved)
    assert not model.training
    for (name, a), (_, b) in zip(model.named_parameters(), run.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    half, _ = load_model(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.norm.weight, model.norm.weight.bfloat16())


def test_load_model_keeps_what_is_not_in_the_file(config):
    """TransNormerLLM's decays are no weights: they must survive the way over the meta device."""
    small = TransNormerConfig(d_model=16, n_layers=2, n_heads=2, head_dim=8, d_hidden=16, vocab_size=257)
    run, _ = loop._open_run(replace(config, model=small), "auto")
    Path(config.out).mkdir()
    model, _ = load_model(checkpoint.save_checkpoint(run))
    tokens = torch.arange(50)[None]
    assert torch.equal(model(tokens).logits, run.model(tokens).logits)
    assert torch.equal(model(tokens).logits, build_like(small, model)(tokens).logits)


def build_like(config, model):
    other = build_model(config)
    other.load_state_dict(model.state_dict())
    return other


def test_load_model_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model.safetensors .* give a run or a checkpoint"):
        load_model(tmp_path)


def test_export_is_the_model_alone(saved, tmp_path):
    export(saved, tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    a, b = load_model(saved)[0], load_model(tmp_path / "model")[0]
    tokens = torch.arange(20)[None]
    assert torch.equal(a(tokens).logits, b(tokens).logits)
    assert load_model_tokenizer(tmp_path / "model").name == "bytes"
    with pytest.raises(ValueError, match="exists"):
        export(saved, tmp_path / "model")


def test_first_weights_are_the_seeds(config):
    a, b = (loop.new_model(config, torch.device("cpu")) for _ in range(2))
    c = loop.new_model(replace(config, seed=6), torch.device("cpu"))
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(a.embedding.weight, c.embedding.weight)
    assert float(a.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    with safe_open(checkpoint.save_checkpoint(loop._open_run(config, "auto")[0]) / "model.safetensors", "pt") as f:
        assert sorted(f.keys()) == sorted(a.state_dict())
