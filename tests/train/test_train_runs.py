"""What a run learns and leaves behind: metrics, what is shown, folders."""

import functools
import io
import itertools
import math
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_runs import BASED, JRT_MODEL, lines_of, run_quietly, some_text

from linattn.data import TokenShards, prepare
from linattn.models import TransformerConfig, TransNormerConfig
from linattn.train import (
    JRT,
    WSD,
    Cosine,
    NextToken,
    evaluate,
    export,
    load_model,
    load_model_tokenizer,
    loop,
    metrics,
    train,
)
from linattn.train.display import Display
from linattn.train.evaluate import spelled_bytes


def test_metrics_file_drops_what_comes_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"step": 3, "loss": 2}\n{"step": 4, "lo')
    log = metrics.JsonLog(tmp_path, 2)
    log.write(3, {"loss": 7.0})
    log.close()
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"step": 3, "loss": 7.0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_are_means_over_tokens():
    window = {}
    metrics.add_sums(window, {"next_token": 30.0}, {"next_token": 10}, 12, 0.5)
    metrics.add_sums(window, {"next_token": 10.0}, {"next_token": 30}, 36, 1.5)
    found = metrics.summarise(window, bytes_per_target=2.0)
    assert found == pytest.approx({"loss": 1.0, "bits_per_byte": 0.5 / math.log(2), "tokens_per_second": 24.0})


def test_loggers_are_told_and_a_missing_one_is_named(config, monkeypatch):
    said = []
    fake = types.SimpleNamespace(
        init=lambda **kw: said.append(("init", kw["name"], kw["config"]["steps"])),
        log=lambda values, step: said.append((step, values.get("loss"))),
        finish=lambda: said.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_quietly(replace(config, steps=4, loggers=("wandb",)))
    assert said[0] == ("init", "run", 4)
    assert said[-1] == "finish"
    logged = [line for line in lines_of(config.out) if "loss" in line]
    assert [s for s in said[1:-1] if s[1] is not None] == [(line["step"], line["loss"]) for line in logged]
    said.clear()
    writer = types.SimpleNamespace(add_scalar=lambda *a: said.append(a), close=lambda: said.append("close"))
    board = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: said.append((folder, purge_step)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    run_quietly(replace(config, steps=5, loggers=("tensorboard",)))
    assert said[0] == (config.out + "/tensorboard", 5)  # goes on after step 4
    assert ("loss", lines_of(config.out)[-2]["loss"], 5) in said
    assert said[-1] == "close"
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"loggers has 'trackio', which is not installed: `pip install trackio`"):
        run_quietly(replace(config, out=config.out + "2", loggers=("trackio",)))


def test_display_is_live_on_a_terminal_and_plain_elsewhere(config):
    plain, live = io.StringIO(), io.StringIO()
    train(replace(config, steps=4), display=Display(Console(file=plain, width=200)))
    terminal = Console(file=live, width=200, force_terminal=True)
    train(replace(config, steps=4, out=config.out + "2"), display=Display(terminal))
    lines = plain.getvalue().splitlines()
    assert re.fullmatch(r"step 3/4  loss \d\.\d{4}  lr \S+  [\d,]+ tokens/s  ETA 0:00  peak \d\.\d\d GiB", lines[1])
    assert re.fullmatch(r"step 4/4  validation loss \S+  perplexity \S+  \S+ bits per byte", lines[-1])
    assert "\x1b" not in plain.getvalue()
    for part in ("step 4/4", "tokens/s", "ETA", "peak", "\x1b["):
        assert part in live.getvalue()


def test_a_run_learns_and_leaves_what_it_says(config):
    found = run_quietly(replace(config, steps=40, log_every=1, eval_every=0))
    lines = lines_of(config.out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(257), abs=0.3)
    assert losses[-1] < losses[0] - 1.5
    assert lines[-1] == {"step": 40, **{k: found[k] for k in ("val_loss", "val_perplexity", "val_bits_per_byte")}}
    assert found["step"] == 40
    assert found["tokens"] == 40 * 4 * 24
    model, model_config = load_model(config.out)
    assert model_config == BASED
    shards = TokenShards(config.data, "validation")
    again = evaluate(model, BASED, shards, load_model_tokenizer(config.out), length=24, batch=4, limit=2)
    assert again.bits_per_byte == pytest.approx(found["val_bits_per_byte"], rel=1e-6)
    assert run_quietly(replace(config, steps=40, log_every=1, eval_every=0)) == found  # nothing left to do
    assert lines_of(config.out) == lines


@pytest.mark.parametrize(
    "model, objective",
    [
        (JRT_MODEL, JRT()),
        (JRT_MODEL, JRT(paper_targets=True, reset_documents=True)),
        (TransNormerConfig(d_model=16, n_layers=2, n_heads=2, head_dim=8, d_hidden=16, vocab_size=257), NextToken()),
        (TransformerConfig(d_model=16, n_layers=2, n_heads=2, d_hidden=16, vocab_size=257), NextToken()),
    ],
    ids=["jrt", "jrt-packed", "transnormer", "transformer"],
)
def test_every_model_learns(config, model, objective):
    changes = {"schedule": WSD(warmup_steps=2), "eval_every": 0, "save_every": 0, "log_every": 1}
    found = run_quietly(replace(config, model=model, objective=objective, steps=30, **changes))
    lines = lines_of(config.out)
    assert found["val_loss"] < lines[0]["loss"] - 1.0
    masked = [line["masked_loss"] for line in lines if "masked_loss" in line]
    assert len(masked) == (30 if isinstance(objective, JRT) else 0)
    assert masked == [] or sum(masked[-5:]) < sum(masked[:5])


def test_a_compiled_run_is_the_same_run(config, monkeypatch):
    """Through dynamo alone: generating C++ for a model this small takes a minute and tests nothing of ours."""
    config = replace(config, steps=2, log_every=1, eval_every=0)
    run_quietly(config)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run_quietly(replace(config, out=config.out + "2", compile=True))
    for a, b in zip(lines_of(config.out), lines_of(config.out + "2"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_run_in_bf16_learns_too(config):
    found = run_quietly(replace(config, precision="bf16", steps=30, batch=2))
    assert found["val_loss"] < 4.5
    assert {t.dtype for t in load_file(Path(config.out) / "step-00000030" / "model.safetensors").values()} == {
        torch.float32
    }


def test_a_run_stops_at_its_budget_of_seconds(config, monkeypatch):
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: 0.25 * next(ticks))  # an update reads it twice
    monkeypatch.setattr(loop, "time", clock)
    schedule = Cosine(warmup_steps=0, min_lr=0.0)
    config = replace(config, steps=1_000_000, max_seconds=5.0, schedule=schedule, log_every=1, save_every=0)
    found = run_quietly(config)
    assert (found["step"], found["seconds"]) == (20, 5.0)
    rates = [line["lr"] for line in lines_of(config.out) if "lr" in line]
    assert rates == pytest.approx([1.5e-3 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])


def test_a_run_without_validation_text(config, tmp_path):
    (tmp_path / "a.txt").write_text(some_text(300))
    prepare([tmp_path / "a.txt"], tmp_path / "shards", validation_fraction=0)
    found = run_quietly(replace(config, data=str(tmp_path / "shards"), steps=4))
    assert set(found) == {"step", "tokens", "seconds"}


def test_a_run_with_a_tokenizer_of_its_own_takes_it_along(config, tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    text = some_text(3000)
    made.train_from_iterator([text], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(text)
    meta = prepare([tmp_path / "a.txt"], tmp_path / "shards", tokenizer=tmp_path / "tokenizer.json")
    config = replace(config, data=str(tmp_path / "shards"), steps=4, model=replace(BASED, vocab_size=400))
    run_quietly(config)
    shutil.rmtree(tmp_path / "shards")
    export(config.out, tmp_path / "model")
    tokenizer = load_model_tokenizer(tmp_path / "model")
    assert tokenizer.hash == meta.tokenizer.hash
    ids = tokenizer.encode(text[:300])
    assert len(ids) < 250
    targets = torch.tensor([[*ids, tokenizer.eos, -100]])
    assert spelled_bytes(tokenizer, targets) == len(text[:300].encode())
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"single_word": false', '"single_word": true'))
    with pytest.raises(ValueError, match="the model was trained with"):
        load_model_tokenizer(tmp_path / "model")


def test_a_run_refuses_text_that_the_model_cannot_read(config, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small .* 257 ids; give at least that"):
        run_quietly(replace(config, model=replace(BASED, vocab_size=200)))
    with pytest.raises(ValueError, match="holds no meta.json"):
        run_quietly(replace(config, data=str(tmp_path / "nothing")))
