"""Training: schedules, decay groups, objectives against hand-written ones, checkpoints, and runs that are interrupted.

pytest tests/test_train.py
"""

import errno
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from linattn.core import files
from linattn.core.config import from_data, to_data
from linattn.data import Loader, TokenShards, prepare
from linattn.models import BasedConfig, JRTConfig, TransformerConfig, TransNormerConfig, build_model
from linattn.train import (
    JRT,
    WSD,
    AdamWConfig,
    Cosine,
    NextToken,
    TrainConfig,
    TrainingStopped,
    checkpoint,
    evaluate,
    export,
    load_model,
    load_model_tokenizer,
    loop,
    metrics,
    train,
    weights,
)
from linattn.train.display import Display
from linattn.train.evaluate import spelled_bytes
from linattn.train.feed import Feed
from linattn.train.objective import pose, term_sums
from linattn.train.optim import decay_groups, make_optimizer
from linattn.train.schedule import learning_rate, run_fraction

BASED = BasedConfig(
    d_model=16,
    n_layers=3,
    n_heads=2,
    feature_dim=4,
    window=5,
    linear_layers=(1,),
    window_layers=(2,),
    d_hidden=24,
    vocab_size=257,
)
JRT_MODEL = JRTConfig(
    d_model=16,
    n_layers=3,
    n_heads=2,
    feature_dim=4,
    window=5,
    linear_layers=(1,),
    window_layers=(2,),
    d_hidden=24,
    vocab_size=257,
    prefix_length=8,
)
TIMED = ("tokens_per_second", "seconds", "peak_memory")


def some_text(words, seed=0):
    """Sentences of made-up words, some with letters of two bytes."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijéö", k=rng.randint(1, 7))) for _ in range(50)]
    return " ".join(rng.choice(vocabulary) for _ in range(words))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Byte shards of 60 documents of 5 to 150 words, a fifth of the text held out."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(1)
    lines = [json.dumps({"text": some_text(rng.randint(5, 150), seed)}) for seed in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([folder / "text.jsonl"], folder / "shards", validation_fraction=0.2)
    return folder / "shards"


@pytest.fixture
def config(data, tmp_path):
    return some_config(data, tmp_path / "run")


def some_config(data, out):
    return TrainConfig(
        model=BASED,
        data=str(data),
        out=str(out),
        batch=4,
        length=24,
        steps=12,
        optimizer=AdamWConfig(lr=3e-3),
        schedule=Cosine(warmup_steps=3),
        precision="fp32",
        device="cpu",
        loss_chunk=None,
        eval_every=4,
        eval_batches=2,
        save_every=4,
        keep_checkpoints=0,
        log_every=3,
        seed=5,
    )


@pytest.fixture(autouse=True)
def one_thread():
    """The subprocess of a test and the test itself must add in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet():
    return Display(Console(file=io.StringIO()))


def run_quietly(config, resume="auto"):
    return train(config, resume, quiet())


def lines_of(out):
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def nll(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum").detach().item()


def same_files(a, b):
    """Whether two checkpoints hold the same bytes of weights, moments and carried state."""
    names = sorted(p.name for p in Path(a).glob("*.safetensors"))
    assert names == sorted(p.name for p in Path(b).glob("*.safetensors"))
    return all((Path(a) / n).read_bytes() == (Path(b) / n).read_bytes() for n in names)


def opened(config, dtype=torch.float64):
    """A run before its first update, in float64, and its feed."""
    run, _ = loop._open_run(config, "auto")
    run.model.to(dtype)
    return run, Feed(config, run.shards)


# configuration


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, r"batch=0 must be at least 1"),
        ({"micro_batch": 3}, r"batch=4 is not a multiple of micro_batch=3; try micro_batch=1"),
        ({"max_seconds": 0.0}, r"max_seconds=0.0 must be a number above 0"),
        ({"clip": -1.0}, r"clip=-1.0"),
        ({"keep_checkpoints": -1}, r"keep_checkpoints=-1"),
        ({"precision": "fp16"}, r"precision='fp16' is not one of"),
        ({"loggers": ("mlflow",)}, r"loggers holds 'mlflow'"),
        ({"objective": JRT()}, r"objective=JRT does not train a BasedConfig; use NextToken"),
        ({"model": JRT_MODEL}, r"objective=NextToken does not train a JRTConfig; use JRT"),
        ({"model": JRT_MODEL, "objective": JRT(), "stateful": True}, r"stateful=True continues a text"),
        ({"optimizer": AdamWConfig(lr=1e-5)}, r"schedule.min_lr=8e-05 is above optimizer.lr=1e-05"),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_value(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AdamWConfig(lr=0.0), "optimizer.lr=0.0"),
        (lambda: AdamWConfig(betas=(0.9, 1.0)), "optimizer.betas"),
        (lambda: AdamWConfig(weight_decay=-0.1), "optimizer.weight_decay=-0.1"),
        (lambda: Cosine(warmup_steps=-1), "schedule.warmup_steps=-1"),
        (lambda: WSD(decay=0.0), "schedule.decay=0.0"),
        (lambda: JRT(mask_rate=1.5), "objective.mask_rate=1.5"),
        (lambda: JRT(mask_weight=-1.0), "objective.mask_weight=-1.0"),
    ],
)
def test_a_wrong_part_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_configuration_goes_through_data(config):
    other = replace(config, model=JRT_MODEL, objective=JRT(), schedule=WSD(shape="linear"), max_seconds=3.0)
    for c in (config, other):
        assert from_data(TrainConfig, json.loads(json.dumps(to_data(c)))) == c


# schedule


def test_schedule_of_the_published_run():
    rate = [learning_rate(Cosine(), 8e-4, step, 20_000) for step in (0, 100, 200, 10_100, 20_000)]
    assert rate == pytest.approx([1e-6, 4.005e-4, 8e-4, 4.4e-4, 8e-5], rel=1e-12)
    eighth = 8e-5 + 7.2e-4 * 0.5 * (1 + math.cos(math.pi * 0.125))
    assert learning_rate(Cosine(), 8e-4, 200 + 19_800 // 8, 20_000) == pytest.approx(eighth, rel=1e-12)


def test_schedule_of_wsd():
    def rate(step, shape):
        return learning_rate(WSD(warmup_steps=10, warmup_from=0.0, decay=0.2, shape=shape, min_lr=0.1), 1.1, step, 100)

    for shape in ("linear", "sqrt", "cosine"):
        assert [rate(s, shape) for s in (0, 5, 10, 50, 80)] == pytest.approx([0, 0.55, 1.1, 1.1, 1.1])
        assert rate(100, shape) == pytest.approx(0.1)
    assert rate(85, "linear") == pytest.approx(0.1 + 0.75)
    assert rate(85, "sqrt") == pytest.approx(0.1 + 0.5)
    assert rate(85, "cosine") == pytest.approx(0.1 + (2 + math.sqrt(2)) / 4)


def test_schedule_goes_by_whichever_of_steps_and_seconds_is_further():
    assert run_fraction(30, 100, 8.0, 10.0) == 0.8
    assert run_fraction(90, 100, 8.0, 10.0) == 0.9
    assert run_fraction(90, 100, 8.0, None) == 0.9
    assert run_fraction(1, 100, 20.0, 10.0) == 1.0
    by_steps = learning_rate(Cosine(warmup_steps=0), 1e-3, 80, 100)
    assert learning_rate(Cosine(warmup_steps=0), 1e-3, 3, 100, 0.8) == by_steps
    assert learning_rate(Cosine(warmup_steps=10, warmup_from=0.0), 1e-3, 5, 100, 0.9) == 5e-4  # still warming up


# optimizer

NORMS = [*(f"blocks.{i}.{n}_norm.weight" for i in range(3) for n in ("mixer", "mlp")), "norm.weight"]
MATRICES = [
    "blocks.0.mixer.in_proj.weight",
    "blocks.0.mixer.out_proj.weight",
    "blocks.1.mixer.proj_q.weight",
    "blocks.1.mixer.proj_k.weight",
    "blocks.1.mixer.proj_v.weight",
    "blocks.1.mixer.out_proj.weight",
    "blocks.2.mixer.Wqkv.weight",
    "blocks.2.mixer.out_proj.weight",
    *(f"blocks.{i}.mlp.{n}.weight" for i in range(3) for n in ("fc1", "fc2")),
]
PLAIN = ["embedding.weight", "blocks.0.mixer.in_proj.bias", "blocks.0.mixer.out_proj.bias"]


@pytest.mark.parametrize(
    "config, decayed, plain",
    [
        (AdamWConfig(), [*MATRICES, *NORMS, "blocks.0.mixer.conv.weight"], PLAIN),
        (AdamWConfig(decay_norms=False), [*MATRICES, "blocks.0.mixer.conv.weight"], PLAIN + NORMS),
        (AdamWConfig(decay_conv=False), MATRICES + NORMS, [*PLAIN, "blocks.0.mixer.conv.weight"]),
        (
            AdamWConfig(decay_embeddings=True, decay_biases=True),
            [*MATRICES, *NORMS, "blocks.0.mixer.conv.weight", *PLAIN],
            [],
        ),
    ],
)
def test_decay_groups_by_name(config, decayed, plain):
    model = build_model(BASED)
    found = decay_groups(model, config)
    assert [sorted(names) for names in found] == [sorted(decayed), sorted(plain)]
    groups = make_optimizer(model, config).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    got = {g["weight_decay"]: sorted(names[id(p)] for p in g["params"]) for g in groups}
    assert got == {k: v for k, v in ((0.1, sorted(decayed)), (0.0, sorted(plain))) if v}


def test_angles_of_lrpe_do_not_decay_and_an_own_head_does():
    model = build_model(TransNormerConfig(d_model=16, n_layers=2, n_heads=2, head_dim=8, d_hidden=16, vocab_size=257))
    decayed, plain = decay_groups(model, AdamWConfig(decay_embeddings=True))
    assert [n for n in plain if "theta" in n] == plain
    assert len(plain) == 1
    assert "embedding.weight" in decayed


# objectives


def jrt_loss_by_hand(model, batch, hidden, prefix, weight, paper):
    """JRT's loss of token rows one by one, from logits; ``hidden`` are the positions behind the mask, row by row."""
    next_losses, masked_losses = [], []
    for row, after, places in zip(batch.tokens, batch.targets, hidden, strict=True):
        seen = row.clone()
        seen[places] = JRT_MODEL.mask_id
        logits = model(seen[None], prefix_lengths=torch.tensor([prefix])).logits[0]
        nll = -logits.log_softmax(-1)
        first = prefix if paper else prefix - 1
        next_losses += [nll[t, after[t]] for t in range(first, len(seen)) if after[t] != -100]
        masked_losses += [nll[t, row[t]] for t in places]
    return torch.stack(next_losses).mean() + weight * torch.stack(masked_losses).mean()


@pytest.mark.parametrize("paper", [False, True])
def test_jrt_objective_against_one_written_out(config, data, paper):
    objective = JRT(mask_rate=0.4, mask_weight=0.3, paper_targets=paper)
    config = replace(config, model=JRT_MODEL, objective=objective, length=20, micro_batch=2, clip=0.0)
    run, feed = opened(config)
    shards = TokenShards(data, "train")
    batch = Loader(shards, length=20, batch=4, seed=5, packed=False).at(8)
    micros = feed.at(8)
    hidden = [(row == JRT_MODEL.mask_id).nonzero()[:, 0].tolist() for m in micros for row in m.problem.tokens]
    assert all(places == [p for p in places if p < 8] for places in hidden)
    assert sum(map(len, hidden)) > 3
    want = jrt_loss_by_hand(run.model, batch, hidden, 8, 0.3, paper)
    want.backward()
    grads = {n: p.grad.clone() for n, p in run.model.named_parameters()}
    run.optimizer.zero_grad()
    got = loop._gradients(run, run.model, micros)
    assert sum(got.micro_losses) == pytest.approx(want.item(), rel=1e-12)
    first = 8 if paper else 7
    assert got.counts["next_token"] == int((batch.targets[:, first:] != -100).sum())
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-12)


def test_jrt_objective_restores_the_target_at_the_last_prefix_position(data):
    batch = Loader(TokenShards(data, "train"), length=20, batch=4, packed=False).at(0)
    for paper, first in ((False, 7), (True, 8)):
        term = pose(JRT(paper_targets=paper), batch, JRT_MODEL, 0, range(4)).terms[0]
        asked = torch.full_like(batch.targets, -100)
        asked[:, term.rows] = term.targets
        assert (asked[:, :first] == -100).all()
        assert torch.equal(asked[:, first:], batch.targets[:, first:])


def test_jrt_objective_packed_gives_each_document_half_of_itself(data):
    batch = Loader(TokenShards(data, "train"), length=120, batch=32, packed=True).at(0)
    longer = replace(JRT_MODEL, prefix_length=30)
    problem = pose(JRT(mask_rate=1.0, reset_documents=True), batch, longer, 0, range(32))
    bounds = batch.cu_seqlens.tolist()
    seen, targets = batch.tokens.flatten(), batch.targets.flatten()
    tokens = seen.clone()
    after, masked = torch.full_like(targets, -100), torch.full_like(targets, -100)
    halves = []
    for a, b in itertools.pairwise(bounds):
        half = min((b - a) // 2, 30)
        halves.append(half)
        tokens[a : a + half] = JRT_MODEL.mask_id
        masked[a : a + half] = seen[a : a + half]
        start = max(a, a + half - 1)
        after[start:b] = targets[start:b]
    assert len({h for h in halves if h}) > 2
    assert max(halves) == 30
    assert problem.prefix_lengths.tolist() == halves
    assert torch.equal(problem.tokens[0], tokens)
    assert torch.equal(problem.terms[0].targets[0], after)
    assert torch.equal(problem.terms[1].targets[0], masked)


def test_jrt_masks_depend_on_seed_and_sample_alone(data):
    loader = Loader(TokenShards(data, "train"), length=20, batch=4, packed=False)
    batch, half = loader.at(0), Loader(TokenShards(data, "train"), length=20, batch=2, packed=False).at(2)
    whole = pose(JRT(), batch, JRT_MODEL, 7, range(4)).tokens
    assert torch.equal(whole[2:], pose(JRT(), half, JRT_MODEL, 7, range(2, 4)).tokens)
    assert not torch.equal(whole, pose(JRT(), batch, JRT_MODEL, 8, range(4)).tokens)
    assert not torch.equal(whole == 263, pose(JRT(), batch, JRT_MODEL, 7, range(4, 8)).tokens == 263)
    assert torch.equal(pose(JRT(), batch, JRT_MODEL, 7, []).tokens, batch.tokens)
    many = Loader(TokenShards(data, "train"), length=20, batch=64, packed=False).at(0)
    rate = (pose(JRT(), many, JRT_MODEL, 7, range(64)).tokens == 263)[:, :8].double().mean()
    assert 0.10 < rate < 0.20


def test_next_token_objective_keeps_documents_apart(config, data):
    run, feed = opened(replace(config, length=100))
    problem = feed.at(0)[0].problem
    with torch.no_grad():
        sums, _ = term_sums(run.model, problem)
    want, bounds = 0.0, problem.cu_seqlens.tolist()
    for a, b in itertools.pairwise(bounds):
        if b > a:
            logits = run.model(problem.tokens[:, a:b]).logits[0]
            want += nll(logits, problem.terms[0].targets[0, a:b])
    assert len([1 for a, b in itertools.pairwise(bounds) if b > a]) > 4  # more pieces than rows
    assert sums["next_token"].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", ["packed", "rows", "jrt", "jrt packed", "stateful"])
def test_gradient_accumulation_is_the_big_batch(config, kind):
    changes = {
        "packed": {},
        "rows": {"objective": NextToken(reset_documents=False)},
        "jrt": {"model": JRT_MODEL, "objective": JRT(mask_rate=0.5)},
        "jrt packed": {"model": JRT_MODEL, "objective": JRT(mask_rate=0.5, reset_documents=True)},
        "stateful": {"stateful": True},
    }
    config = replace(config, length=60, **changes[kind])
    found = {}
    for micro in (4, 2, 1):
        run, feed = opened(replace(config, micro_batch=micro))
        if kind == "stateful":
            run.carried = loop.empty_carried(run.model, 4)
            run.carried = loop._gradients(run, run.model, feed.at(0)).carried  # so that something is carried
            run.optimizer.zero_grad()
        result = loop._gradients(run, run.model, feed.at(feed.advance))
        found[micro] = result, {n: p.grad for n, p in run.model.named_parameters()}
    want, grads = found[4]
    assert want.norm > 1.0  # so that clipping is at work too
    for micro in (2, 1):
        got, others = found[micro]
        assert got.counts == want.counts
        assert got.norm == pytest.approx(want.norm, rel=1e-10)
        for name, grad in grads.items():
            torch.testing.assert_close(others[name], grad, rtol=1e-8, atol=1e-12)


def test_checkpointed_blocks_and_chunked_loss_change_nothing(config):
    found = []
    for changes in ({}, {"checkpoint_blocks": True, "loss_chunk": 7}):
        run, feed = opened(replace(config, **changes))
        loop._gradients(run, run.model, feed.at(0))
        found.append({n: p.grad for n, p in run.model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-14)


# stateful training


def test_stateful_updates_read_the_text_as_one(config, tmp_path):
    # Documents that end inside a window of 16, and (15 letters and the end) just where one does.
    documents = [some_text(n, seed) for seed, n in enumerate([3, 9, 2, 14, 1, 5, 30, 4])] + 4 * ["fifteen letters"]
    rng = random.Random(3)
    documents = [d[: len(d) // 2 * 2 + 1] for d in rng.sample(documents, len(documents))] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    prepare([tmp_path / "a.jsonl"], tmp_path / "shards", validation_fraction=0)
    config = replace(config, data=str(tmp_path / "shards"), batch=2, length=16, stateful=True)
    run, feed = opened(config)
    updates = (run.shards.tokens - 1) // 16 // 2
    run.carried = loop.empty_carried(run.model, 2)
    got, fresh, inside = 0.0, 0, 0
    for position in range(updates + 2):  # two more: from the beginning again
        (micro,) = feed.at(position)
        fresh += int(micro.links.fresh.sum())
        inside += int((micro.links.first != micro.links.last).sum())
        result = loop._gradients(run, run.model, [micro])
        run.carried = result.carried
        got += result.sums["next_token"]
    assert all(not leaf.requires_grad for leaf in checkpoint.state_tensors(run.carried).values())
    assert fresh > 4
    assert inside > 4
    want = 0.0
    for row in range(2):
        for start, length in ((row * updates * 16, updates * 16), (row * updates * 16, 32)):
            want += nats_of_documents(run.model, run.shards, start, length)
    assert got == pytest.approx(want, rel=1e-10)


def test_stateful_updates_without_resets_read_on_over_documents(config):
    config = replace(config, batch=2, length=16, stateful=True, objective=NextToken(reset_documents=False))
    for micro in (2, 1):
        run, feed = opened(replace(config, micro_batch=micro))
        run.carried = loop.empty_carried(run.model, 2)
        got, part = 0.0, (run.shards.tokens - 1) // 16 // 2 * 16
        for position in range(40):
            result = loop._gradients(run, run.model, feed.at(position))
            run.carried = result.carried
            got += result.sums["next_token"]
        offsets, want = run.shards.document_offsets, 0.0
        for start in (0, part):
            ids = run.shards.read(start, 40 * 16 + 1)
            inner = [o - start - 1 for o in offsets.tolist() if start < o <= start + 40 * 16]
            assert inner
            targets = ids[1:].clone()
            targets[inner] = -100  # what follows a document's end is asked of no one
            want += nll(run.model(ids[None, :-1]).logits[0], targets)
        assert got == pytest.approx(want, rel=1e-10)


def nats_of_documents(model, shards, start, length):
    """The sum of losses of a stretch of text, each document in it read alone and whole."""
    offsets = shards.document_offsets.tolist()
    cuts = [start, *(o for o in offsets if start < o < start + length), start + length]
    total = 0.0
    for a, b in itertools.pairwise(cuts):
        ids = shards.read(a, b - a + (b not in offsets))  # the token after a document's last is another's
        total += nll(model(ids[None]).logits[0, : len(ids) - 1], ids[1:])
    return total


def test_stateful_training_refuses_a_state_that_grows(config):
    model = TransformerConfig(d_model=16, n_layers=1, n_heads=2, d_hidden=16, vocab_size=257)
    with pytest.raises(ValueError, match="stateful=True needs a State of constant size"):
        run_quietly(replace(config, model=model, stateful=True))


# evaluation


def test_evaluation_scores_every_target_once_and_counts_bytes(config, data):
    model = build_model(BASED).double()
    shards = TokenShards(data, "validation")
    tokenizer = shards.load_tokenizer()
    found = evaluate(model, BASED, shards, tokenizer, length=40, batch=3)
    nats = tokens = size = 0
    offsets = shards.document_offsets.tolist()
    for start in range(0, shards.tokens - 1, 40):
        stop = min(start + 40, shards.tokens)
        cuts = [start, *(o for o in offsets if start < o < stop), stop]
        for a, b in itertools.pairwise(cuts):
            ids = shards.read(a, b - a + (b < shards.tokens and b not in offsets))
            if len(ids) > 1:
                logits = model(ids[None, :-1]).logits[0]
                nats += nll(logits, ids[1:])
                tokens += len(ids) - 1
                size += int((ids[1:] < 256).sum())
    assert (found.tokens, found.bytes) == (tokens, size)
    assert tokens == shards.tokens - shards.documents
    assert size == shards.bytes - shards.documents  # every byte but each document's first
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size)
    part = evaluate(model, BASED, shards, tokenizer, length=40, batch=3, limit=2)
    assert part.tokens < tokens
    assert evaluate(model, BASED, shards, tokenizer, length=40, batch=3, stop=lambda: True) is None


def test_evaluation_of_a_prefix_model_hides_nothing(data):
    model = build_model(JRT_MODEL).double()
    shards = TokenShards(data, "validation")
    found = evaluate(model, JRT_MODEL, shards, shards.load_tokenizer(), length=20, batch=1, limit=1)
    ids = shards.read(0, 21)
    logits = model(ids[None, :20], prefix_lengths=torch.tensor([8])).logits[0]
    assert found.nats == pytest.approx(nll(logits[7:], ids[8:]), rel=1e-12)
    assert found.tokens == 13


# metrics and display


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


# runs


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


# resuming


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The configuration of a run that is never stopped, and its folder. Tests copy what they change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = some_config(data, tmp_path_factory.mktemp("whole") / "run")
    run_quietly(config)
    torch.set_num_threads(threads)
    return config, Path(config.out)


def test_resume_after_kill_9_is_bit_equal(whole, tmp_path):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(json.dumps(to_data(config)))
    script = """
        import json, sys, time, torch
        torch.set_num_threads(1)
        from linattn.core.config import from_data
        from linattn.train import TrainConfig, loop, train
        step = loop._gradients
        def slow(*args):
            time.sleep(0.1)  # so that the signal comes in mid-run
            return step(*args)
        loop._gradients = slow
        train(from_data(TrainConfig, json.load(open(sys.argv[1]))))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "config.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 6' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = weights.checkpoints(tmp_path / "killed")
    assert [p.name for p in left] == ["step-00000004"]
    run_quietly(config)
    assert lines_of(config.out) == lines_of(folder)
    for step in (8, 12):
        assert same_files(tmp_path / "killed" / f"step-{step:08d}", folder / f"step-{step:08d}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_is_bit_equal(whole, tmp_path, number, monkeypatch):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "stopped"))
    step = loop._gradients

    def interrupted(run, *args):
        if run.progress.step == 4:
            os.kill(os.getpid(), number)
        return step(run, *args)

    monkeypatch.setattr(loop, "_gradients", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=r"Stopped by (Ctrl-C|SIGTERM) after step 5 of 12") as stopped:
        run_quietly(config)
    assert stopped.value.exit_code == 1
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert [p.name for p in weights.checkpoints(Path(config.out))] == ["step-00000004", "step-00000005"]
    run_quietly(config)
    assert lines_of(config.out) == lines_of(folder)
    assert same_files(Path(config.out) / "step-00000012", folder / "step-00000012")


def test_a_run_that_went_on_elsewhere_names_the_command_that_goes_on(whole, tmp_path, monkeypatch):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "elsewhere"))
    step = loop._gradients

    def interrupted(run, *args):
        if run.progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *args)

    monkeypatch.setattr(loop, "_gradients", interrupted)
    first = str(folder / "step-00000004")
    with pytest.raises(TrainingStopped, match="and the same command with --resume auto goes on from there"):
        run_quietly(config, resume=first)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="already holds step-00000007"):
        run_quietly(config, resume=first)
    run_quietly(config, resume="auto")
    assert same_files(Path(config.out) / "step-00000012", folder / "step-00000012")


def test_signal_during_evaluation_is_heard_and_the_evaluation_made_up(whole, tmp_path, monkeypatch):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "stopped"))
    measure = loop.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return measure(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(TrainingStopped, match="after step 4 of 12"):
        run_quietly(config)
    monkeypatch.undo()
    run_quietly(config)
    assert lines_of(config.out) == lines_of(folder)


def test_a_run_in_another_thread_leaves_signals_alone(config):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(run_quietly, replace(config, steps=4)).result()["step"] == 4


def test_stateful_resume_is_bit_equal(config, tmp_path):
    config = replace(config, stateful=True, micro_batch=2)
    whole, stopped = replace(config, out=str(tmp_path / "a")), replace(config, out=str(tmp_path / "b"))
    run_quietly(whole)
    run_quietly(replace(stopped, out=str(tmp_path / "c")))
    run_quietly(stopped, resume=str(tmp_path / "c" / "step-00000004"))
    assert (tmp_path / "a" / "step-00000012" / "state.safetensors").exists()
    assert same_files(tmp_path / "a" / "step-00000012", tmp_path / "b" / "step-00000012")


def test_resume_may_change_the_length_of_the_run_but_not_what_the_position_means(whole, tmp_path):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "run"))
    shutil.copytree(folder, config.out)
    assert run_quietly(replace(config, steps=14))["step"] == 14
    for change, message in (
        ({"length": 16}, "was trained with length=24, not length=16"),
        ({"seed": 6}, "seed=5, not seed=6"),
        ({"model": replace(BASED, window=7)}, r"model=BasedConfig\(window=5\), not model=BasedConfig\(window=7\)"),
        ({"objective": NextToken(reset_documents=False)}, "reset_documents=True"),
    ):
        with pytest.raises(ValueError, match=message):
            run_quietly(replace(config, **change))
    (tmp_path / "a.txt").write_text(some_text(500))
    prepare([tmp_path / "a.txt"], tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other text"):
        run_quietly(replace(config, data=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="already holds step-00000014"):
        run_quietly(config, resume="never")
    with pytest.raises(ValueError, match=r"holds no train.json"):
        run_quietly(config, resume=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"already holds step-00000014; .* give another out to go on from .*step-00000008"
    ):
        run_quietly(config, resume=str(tmp_path / "run" / "step-00000008"))


# checkpoints


def test_checkpoint_holds_what_it_says_and_old_ones_go(config):
    run_quietly(replace(config, keep_checkpoints=2))
    folder = Path(config.out)
    assert [p.name for p in weights.checkpoints(folder)] == ["step-00000008", "step-00000012"]
    names = {p.name for p in (folder / "step-00000012").iterdir()}
    assert names == {"model.safetensors", "config.json", "optimizer.safetensors", "train.json", "run.yaml"}
    moments = load_file(folder / "step-00000012" / "optimizer.safetensors")
    parameters = load_file(folder / "step-00000012" / "model.safetensors")
    assert set(moments) == {f"{n}.{m}" for n in parameters for m in ("exp_avg", "exp_avg_sq", "step")}
    assert {float(v) for n, v in moments.items() if n.endswith(".step")} == {12.0}
    record = json.loads((folder / "step-00000012" / "train.json").read_text())
    assert record["progress"]["position"] == 12 * 4
    assert record["versions"]["torch"] == str(torch.__version__)


def test_disk_full_leaves_the_checkpoint_before_whole(config, monkeypatch):
    saved, write = [], checkpoint.write_tensors

    def full(path, tensors):
        saved.append(path)
        if len(saved) > 3:  # in mid-checkpoint: its weights are written, its optimizer is not
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    monkeypatch.setattr(weights, "write_tensors", full)
    message = r"checkpoint of step 8 could not be written .*No space left.*step-00000004 is whole. Free some space"
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)
    monkeypatch.undo()
    assert [p.name for p in Path(config.out).glob("*step-*")] == ["step-00000004"]
    load_model(config.out)
    assert run_quietly(config)["step"] == 12


def test_disk_full_is_an_os_error_from_safetensors_too(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            weights.write_tensors(tmp_path / "a", {"a": torch.zeros(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_can_be_read_by_whom_the_umask_allows(tmp_path):
    weights.write_tensors(tmp_path / "a", {"a": torch.zeros(5)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_checkpoint_holds_the_random_numbers(config):
    run, _ = loop._open_run(config, "auto")
    Path(config.out).mkdir()
    path = checkpoint.save_checkpoint(run)
    want = torch.rand(3)
    torch.manual_seed(99)
    checkpoint.load_checkpoint(path, run)
    assert torch.equal(torch.rand(3), want)


def test_checkpoint_of_one_step_can_be_written_twice(config):
    run, _ = loop._open_run(config, "auto")
    Path(config.out).mkdir()
    path = checkpoint.save_checkpoint(run)
    with torch.no_grad():
        run.model.norm.weight.fill_(2.0)
    assert checkpoint.save_checkpoint(run) == path
    assert float(load_file(path / "model.safetensors")["norm.weight"].mean()) == 2.0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def poison(monkeypatch, step, micros=2):
    """Make the loss of the last micro-batch of update ``step`` no number, once."""
    sums, calls = loop.term_sums, itertools.count(1)

    def poisoned(*args):
        found, state = sums(*args)
        if next(calls) == micros * step:
            found["next_token"] = found["next_token"] * math.nan
        return found, state

    monkeypatch.setattr(loop, "term_sums", poisoned)


@pytest.mark.parametrize("step, samples", [(6, "22 to 23"), (5, "18 to 19"), (1, "2 to 3")])
@pytest.mark.parametrize("stateful", [False, True])
def test_nan_saves_the_run_before_the_update_and_the_same_command_goes_on(config, monkeypatch, step, samples, stateful):
    config = replace(config, micro_batch=2, stateful=stateful)
    poison(monkeypatch, step)
    path = Path(config.out) / f"step-{step - 1:08d}"
    where = f"rows 2 to 3 of stream position {step - 1}" if stateful else rf"samples {samples} \(seed 5\)"
    message = (
        rf"loss is nan at step {step}, on {where}. Lower optimizer.lr, .* then the same command goes on from {path}"
    )
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)
    monkeypatch.undo()
    assert weights.checkpoints(Path(config.out))[-1] == path
    assert not list(Path(config.out).glob("nan*"))
    run_quietly(config)
    whole = replace(config, out=config.out + "2")
    run_quietly(whole)
    assert lines_of(config.out) == lines_of(whole.out)
    assert same_files(Path(config.out) / "step-00000012", Path(whole.out) / "step-00000012")


def test_nan_again_after_going_on_leaves_the_checkpoint_alone(config, monkeypatch):
    poison(monkeypatch, 6, micros=1)
    with pytest.raises(TrainingStopped, match="at step 6"):
        run_quietly(config)
    monkeypatch.undo()
    poison(monkeypatch, 1, micros=1)  # the first update of what goes on from there
    monkeypatch.setattr(loop, "save_checkpoint", lambda run: pytest.fail("there already"))
    with pytest.raises(TrainingStopped, match=r"at step 6, on samples 20 to 23 .*goes on from .*step-00000005"):
        run_quietly(config)


def test_nan_on_a_full_disk_names_the_nan_first(config, monkeypatch):
    poison(monkeypatch, 6, micros=1)
    save = loop.save_checkpoint

    def full(run):
        if run.progress.step == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(run)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    message = r"^The loss is nan at step 6, on .* step 5 could not be written .*No space.*step-00000004 is whole.*lower"
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)


def test_nan_in_a_gradient_alone_stops_too(config, monkeypatch):
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    with pytest.raises(TrainingStopped, match="gradient norm is inf at step 1, on samples 0 to 3 "):
        run_quietly(replace(config, micro_batch=2))


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_a_line_of_metrics_stops_with_what_is_whole(config, monkeypatch):
    write = metrics.JsonLog.write

    def full(log, step, values):
        if step == 6:
            log._file.write(b'{"step": 6, "lo')
            log._file.close()
            log._file = types.SimpleNamespace(write=full_disk, close=full_disk)
        write(log, step, values)

    monkeypatch.setattr(metrics.JsonLog, "write", full)
    message = (
        r"metrics of step 6 could not be written .*No space.*metrics.jsonl.*step-00000004 is whole. Free some space"
    )
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)
    monkeypatch.undo()
    whole = replace(config, out=config.out + "2")
    assert run_quietly(config)["step"] == run_quietly(whole)["step"] == 12
    assert lines_of(config.out) == lines_of(whole.out)


@pytest.mark.parametrize("at", ["checkpoint", "metrics"])
def test_a_full_disk_at_the_start_leaves_the_run_as_it_was(config, monkeypatch, at):
    run_quietly(replace(config, steps=4))
    before = {name: (Path(config.out) / name).read_text() for name in ("run.yaml", "metrics.jsonl")}
    monkeypatch.setattr(files.os, "fsync", full_disk)
    other = {"checkpoint": files.write_text, "metrics": lambda path, text: None}[at]
    monkeypatch.setattr(checkpoint, "write_text", other)
    name = {"checkpoint": "run.yaml", "metrics": "metrics.jsonl"}[at]
    with pytest.raises(TrainingStopped, match=rf"run's folder .*No space.*{name}.*step-00000004 is whole. Free some"):
        run_quietly(config)
    assert {name: (Path(config.out) / name).read_text() for name in before} == before
    assert not list(Path(config.out).glob("*.partial"))


def test_a_logger_that_cannot_be_closed_is_told_unless_something_else_ended_the_run(config, monkeypatch):
    close = metrics.JsonLog.close
    monkeypatch.setattr(metrics.JsonLog, "close", lambda log: full_disk(close(log)))
    with pytest.raises(TrainingStopped, match=r"last metrics could not be written .*step-00000004 is whole"):
        run_quietly(replace(config, steps=4))
    poison(monkeypatch, 2, micros=1)
    with pytest.raises(TrainingStopped, match="loss is nan at step 2"):
        run_quietly(replace(config, out=config.out + "2"))


def test_write_text_leaves_what_was_there(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a", "é")
    assert (tmp_path / "a").read_bytes() == "é".encode()
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"):
        files.write_text(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "é"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(rng={}), r"rng.cpu is missing"),
        (lambda r: r["rng"].update(cpu=r["rng"]["cpu"][:40]), r"rng.cpu has 30 bytes, a generator's state has"),
        (lambda r: r["rng"].update(cpu="%%%"), r"rng.cpu is missing or no base64"),
        (lambda r: r["rng"].update(cpu=7), r"rng.cpu is missing or no base64"),
        (lambda r: r["rng"].update(cpu="/" * len(r["rng"]["cpu"][:-2]) + "=="), r"rng"),
        (lambda r: r["progress"].update(position=-1), r"progress.position=-1 must be"),
        (lambda r: r["progress"].update(step=-3), r"progress.step=-3 must be"),
        (lambda r: r["progress"].update(tokens=-3), r"progress.tokens=-3 must be"),
        (lambda r: r["progress"].update(seconds=math.nan), r"progress.seconds=nan must be"),
        (lambda r: r["progress"].update(window={"next_token": "x"}), r"progress.window.next_token='x' is no number"),
        (lambda r: r["config"].update(batch=0), r"batch=0 must be at least 1"),
        (lambda r: r.pop("progress"), r"Record needs \['progress'\]"),
    ],
)
def test_a_damaged_record_is_one_clear_error(config, change, message):
    run_quietly(replace(config, steps=4))
    path = Path(config.out) / "step-00000004" / "train.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as error:
        run_quietly(config)
    assert str(path) in str(error.value)


# weights


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
