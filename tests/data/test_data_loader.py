"""The order of windows: the permutation, the loader, validation and streams."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import EOS, make_shards

from linattn.data import Loader, StreamLoader, validation_batches
from linattn.data.permute import permute


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4097])
def test_permutation_is_a_bijection(n):
    image = permute(np.arange(n), n, seed=3, epoch=1)
    assert sorted(image.tolist()) == list(range(n))


@settings(max_examples=50)
@given(n=st.integers(1, 1 << 62), seed=st.integers(), epoch=st.integers(0, 10**6), data=st.data())
def test_permutation_is_injective_and_in_range_at_any_size(n, seed, epoch, data):
    picked = data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=20))
    image = permute(np.array(picked), n, seed, epoch).tolist()
    assert all(0 <= i < n for i in image)
    assert len(set(image)) == len(picked)
    assert image == [int(permute(np.array([i]), n, seed, epoch)[0]) for i in picked]


def test_permutation_looks_random():
    n, trials = 6, 6000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, seed, 0)] += 1
    # Each cell is binomial with mean 1000 and standard deviation 29; six of those.
    assert np.abs(counts - trials / n).max() < 6 * 29
    image = permute(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    neighbours = np.diff(image)
    assert (neighbours == 1).mean() < 0.002
    assert (image == permute(np.arange(10_000), 10_000, 0, 1)).mean() < 0.002
    assert (image == permute(np.arange(10_000), 10_000, 1, 0)).mean() < 0.002


def test_permutation_refuses_what_is_outside():
    with pytest.raises(ValueError, match="n=3"):
        permute(np.array([3]), 3, 0, 0)
    with pytest.raises(ValueError, match="n=0"):
        permute(np.array([], dtype=np.int64), 0, 0, 0)


def same(a, b):
    assert type(a) is type(b)
    for field, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), field


def first_rows(loader, batches):
    return torch.cat([next(loader).tokens for _ in range(batches)])


def test_an_epoch_is_every_window_once_in_another_order_each(shards):
    length, batch = 8, 4
    loader = Loader(shards, length=length, batch=batch, seed=5)
    stream = shards.read(0, shards.tokens)
    windows = stream[: loader.windows * length].view(-1, length)
    assert loader.windows == (shards.tokens - 1) // length
    rows = first_rows(loader, math.ceil(2 * loader.windows / batch))
    one, two = rows[: loader.windows], rows[loader.windows : 2 * loader.windows]
    for epoch in (one, two):
        assert sorted(epoch.tolist()) == sorted(windows.tolist())
    assert not torch.equal(one, windows)
    assert not torch.equal(one, two)
    assert not torch.equal(one, first_rows(Loader(shards, length=length, batch=1, seed=6), loader.windows))
    ordered = Loader(shards, length=length, batch=1, shuffle=False)
    assert torch.equal(first_rows(ordered, loader.windows), windows)
    assert ordered.epoch == 1.0


def test_resuming_from_one_integer_is_exact(shards):
    options = {"length": 16, "batch": 4, "seed": 11}
    straight = Loader(shards, **options)
    batches = [next(straight) for _ in range(40)]
    assert straight.position == 160 > 2 * straight.windows
    for k in (0, 1, 17, 39):
        resumed = Loader(shards, **options, position=4 * k)
        for want in batches[k : k + 3]:
            same(next(resumed), want)
    straight.position = 4 * 5
    same(next(straight), batches[5])
    same(straight.at(4 * 7), batches[7])
    assert straight.position == 4 * 6


def test_ranks_share_one_global_order(shards):
    options = {"length": 16, "batch": 8, "seed": 2}
    alone = Loader(shards, **options)
    want = [next(alone) for _ in range(12)]
    for world in (1, 2, 4, 8):
        ranks = [Loader(shards, **options, rank=r, world=world) for r in range(world)]
        for whole in want:
            parts = [next(loader) for loader in ranks]
            assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
            assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
            assert torch.equal(torch.cat([p.positions for p in parts], 1), whole.positions)
        assert {loader.position for loader in ranks} == {alone.position}
        assert len({p.cu_seqlens.shape for p in parts}) == 1


def test_a_run_resumes_at_another_world_size(shards):
    options = {"length": 16, "batch": 4, "seed": 2}
    straight = first_rows(Loader(shards, **options), 6)
    two = [Loader(shards, **options, rank=r, world=2) for r in range(2)]
    rows = [torch.cat([next(loader).tokens for loader in two]) for _ in range(3)]
    four = [Loader(shards, **options, rank=r, world=4, position=two[0].position) for r in range(4)]
    rows += [torch.cat([next(loader).tokens for loader in four]) for _ in range(3)]
    assert torch.equal(torch.cat(rows), straight)


def check_packing(shards, tokens, targets, cu_seqlens, starts):
    """Every rule of packing, token by token, from the stream and its offsets. Returns the pieces' bounds."""
    stream, offsets = shards.read(0, shards.tokens), set(shards.document_offsets.tolist())
    size, length = tokens.shape
    bounds = set()
    for row, start in enumerate(starts):
        bounds.add(row * length)
        for t in range(length):
            p = start + t
            if p in offsets:
                bounds.add(row * length + t)
            real = p + 1 < shards.tokens and p + 1 not in offsets
            assert tokens[row, t] == (stream[p] if p < shards.tokens else 0)
            assert targets[row, t] == (stream[p + 1] if real else -100)
    bounds = [*sorted(bounds), size * length]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[: len(bounds)].tolist() == bounds
    assert set(cu_seqlens[len(bounds) :].tolist()) <= {size * length}
    return bounds


@pytest.mark.parametrize("length", [1, 5, 64])
def test_documents_are_isolated(shards, length):
    loader = Loader(shards, length=length, batch=3, seed=1, shuffle=False)
    for step in range(loader.windows):
        starts = [(step * 3 + r) % loader.windows * length for r in range(3)]
        batch = next(loader)
        bounds = check_packing(shards, batch.tokens, batch.targets, batch.cu_seqlens, starts)
        assert batch.cu_seqlens.shape == (loader.max_documents + 1,)
        positions = [t for a, b in pairwise(bounds) for t in range(b - a)]
        assert batch.positions.tolist() == [positions]
        # No piece holds tokens of two documents: an end-of-document token only ever stands last.
        flat = batch.tokens.view(-1)
        for a, b in pairwise(bounds):
            assert EOS not in flat[a : b - 1]


def test_default_max_documents_is_reached_but_never_exceeded(tmp_path):
    shards = make_shards(tmp_path, ["a" * 200, *"bcdefghij", "k" * 200])
    loader = Loader(shards, length=20, batch=2, seed=0)
    fullest = 0
    for _ in range(400):
        batch = next(loader)
        assert batch.cu_seqlens.shape == (loader.max_documents + 1,)
        fullest = max(fullest, len(set(batch.cu_seqlens.tolist())) - 1)
    assert fullest <= loader.max_documents <= 2 * 11
    # Two documents of 201 tokens leave nine of 2: rows 10 (from token 200) holds 10 more starts.
    alone = Loader(shards, length=20, batch=1, shuffle=False, position=10)
    assert len(set(next(alone).cu_seqlens.tolist())) - 1 == alone.max_documents


def test_a_batch_larger_than_the_split_repeats_windows(tmp_path):
    shards = make_shards(tmp_path, ["ab", "cd", "ef", "gh"])
    loader = Loader(shards, length=4, batch=7, seed=0)
    assert loader.windows == 2
    for _ in range(5):
        assert next(loader).cu_seqlens.shape == (loader.max_documents + 1,)


def test_max_documents_doubles_when_exceeded(shards):
    loader = Loader(shards, length=400, batch=2, max_documents=3)
    batch = next(loader)
    real = len(set(batch.cu_seqlens.tolist())) - 1
    assert real > 6
    size = len(batch.cu_seqlens) - 1
    assert size % 3 == 0 and math.log2(size // 3).is_integer() and size // 2 < real <= size
    with pytest.raises(ValueError, match="max_documents=1 is fewer than the 2 rows"):
        Loader(shards, length=4, batch=2, max_documents=1)


def test_unpacked_rows(shards):
    packed, plain = (next(Loader(shards, length=50, batch=2, packed=p)) for p in (True, False))
    assert plain.cu_seqlens is None
    assert plain.positions.tolist() == [[*range(50), *range(50)]]
    assert torch.equal(plain.targets, packed.targets)


def test_loader_refusals(shards):
    for options, words in (
        ({"length": 10**6, "batch": 1}, r"train has \d+ tokens and this needs 1000001"),
        ({"length": 0, "batch": 1}, "length=0"),
        ({"length": 4, "batch": 3, "world": 2}, "batch=3 .* multiple of world=2"),
        ({"length": 4, "batch": 0}, "batch=0"),
        ({"length": 4, "batch": 2, "rank": 2, "world": 2}, "rank=2"),
        ({"length": 4, "batch": 2, "position": -1}, "position=-1"),
        ({"length": 1 << 20, "batch": 1 << 11}, "int32"),
    ):
        for kind in (Loader, StreamLoader):
            with pytest.raises(ValueError, match=words if kind is Loader or "needs" not in words else "needs"):
                kind(shards, **options)


@pytest.mark.parametrize("length, batch, world", [(1, 4, 2), (7, 4, 1), (7, 4, 4), (64, 2, 2), (5000, 2, 1)])
def test_validation_covers_every_target_once(shards, length, batch, world):
    ranks = [list(validation_batches(shards, length=length, batch=batch, rank=r, world=world)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert len({b.tokens.shape for r in ranks for b in r}) == 1
    assert len({b.cu_seqlens.shape for r in ranks for b in r}) == 1
    local = batch // world
    for step in range(len(ranks[0])):
        for rank, batches in enumerate(ranks):
            b = batches[step]
            starts = [(step * batch + rank * local + r) * length for r in range(local)]
            in_offsets = [s for s in starts if s >= shards.tokens]
            if not in_offsets:
                check_packing(shards, b.tokens, b.targets, b.cu_seqlens, starts)
    rows = torch.cat([ranks[r][s].targets for s in range(len(ranks[0])) for r in range(world)])
    targets = rows.reshape(-1)[rows.reshape(-1) != -100]
    stream = shards.read(0, shards.tokens)
    first = torch.zeros(shards.tokens, dtype=torch.bool)
    first[torch.from_numpy(shards.document_offsets[:-1])] = True
    assert torch.equal(targets, stream[~first])
    assert len(targets) == shards.tokens - shards.documents


def test_validation_padding_is_a_document_of_its_own(tmp_path):
    shards = make_shards(tmp_path, ["abcde"])
    (batch,) = validation_batches(shards, length=4, batch=3)
    assert batch.tokens.tolist() == [[97, 98, 99, 100], [101, EOS, 0, 0], [0, 0, 0, 0]]
    assert batch.targets.tolist() == [[98, 99, 100, 101], [EOS, -100, -100, -100], [-100] * 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8, 12]


def test_validation_refuses_before_the_first_batch(shards):
    with pytest.raises(ValueError, match="multiple of world=2"):
        validation_batches(shards, length=4, batch=3, world=2)


def test_streams_read_each_part_in_order(shards):
    length, batch = 6, 4
    loader = StreamLoader(shards, length=length, batch=batch)
    steps = [next(loader) for _ in range(loader.steps)]
    assert loader.position == loader.steps
    rows = torch.cat([s.tokens for s in steps], 1)
    assert torch.equal(rows.reshape(-1), shards.read(0, batch * loader.steps * length))
    assert shards.tokens - rows.numel() <= batch * length
    same(next(loader), steps[0])


def test_stream_steps_say_what_to_carry(shards):
    length, batch = 6, 3
    loader = StreamLoader(shards, length=length, batch=batch)
    offsets = set(shards.document_offsets.tolist())
    part, expected = loader.steps * length, [0] * batch
    carried = 0
    for step in range(loader.steps):
        b = next(loader)
        starts = [r * part + step * length for r in range(batch)]
        bounds = check_packing(shards, b.tokens, b.targets, b.cu_seqlens, starts)
        assert b.fresh.tolist() == [step == 0 or s in offsets for s in starts]
        carried += int((~b.fresh).sum())
        positions = b.positions.view(batch, length)
        for r, s in enumerate(starts):
            assert bounds[b.first[r]] == r * length
            assert bounds[b.last[r] + 1] == (r + 1) * length
            for t in range(length):
                expected[r] = 0 if s + t in offsets or (step, t) == (0, 0) else expected[r] + 1
                assert positions[r, t] == expected[r]
        assert b.cu_seqlens.shape == (loader.max_documents + 1,)
    assert carried > loader.steps


def test_unpacked_streams_start_anew_where_a_part_does_and_nowhere_else(shards):
    length, batch = 6, 3
    packed = StreamLoader(shards, length=length, batch=batch)
    loader = StreamLoader(shards, length=length, batch=batch, packed=False)
    assert (loader.steps, loader.max_documents) == (packed.steps, batch)
    for step in range(loader.steps + 1):
        b, other = next(loader), next(packed)
        assert torch.equal(b.tokens, other.tokens)
        assert torch.equal(b.targets, other.targets)
        assert b.cu_seqlens.tolist() == [r * length for r in range(batch + 1)]
        assert b.first.tolist() == b.last.tolist() == list(range(batch))
        assert b.fresh.tolist() == [step % loader.steps == 0] * batch
        begin = step % loader.steps * length
        assert b.positions.view(batch, length).tolist() == [list(range(begin, begin + length))] * batch


def test_streams_resume_and_share_rows_among_ranks(shards):
    options = {"length": 6, "batch": 4}
    alone = StreamLoader(shards, **options)
    steps = [next(alone) for _ in range(9)]
    same(next(StreamLoader(shards, **options, position=7)), steps[7])
    for world in (2, 4):
        ranks = [StreamLoader(shards, **options, rank=r, world=world, position=4) for r in range(world)]
        for want in steps[4:]:
            parts = [next(loader) for loader in ranks]
            for field in ("tokens", "targets", "fresh"):
                assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(want, field))
            assert torch.equal(torch.cat([p.positions for p in parts], 1), want.positions)
            assert len({p.cu_seqlens.shape for p in parts}) == 1
