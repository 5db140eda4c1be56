"""Objectives against hand-written ones, training that carries its State, and evaluation."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from small_runs import BASED, JRT_MODEL, run_quietly, some_text
from torch.nn import functional as F

from linattn.data import Loader, TokenShards, prepare
from linattn.models import TransformerConfig, build_model
from linattn.train import JRT, NextToken, checkpoint, evaluate, loop
from linattn.train.feed import Feed
from linattn.train.objective import pose, term_sums


def nll(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum").detach().item()


def opened(config, dtype=torch.float64):
    """A run before its first update, in float64, and its feed."""
    run, _ = loop._open_run(config, "auto")
    run.model.to(dtype)
    return run, Feed(config, run.shards)


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
