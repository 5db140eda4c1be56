"""Reading a stream of any length into a State."""

import math

import numpy as np
import pytest
import torch
from small_models import DTYPES, KINDS, PREFIX, make_model, some_ids

from linattn.core.numerics import relative_error
from linattn.generate import prefill, read
from linattn.models import map_model_state, model_state_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_read_is_one_forward_pass(kind, dtype):
    model, ids = make_model(kind, dtype), some_ids(200)
    longest = model.config.prefix_length
    prefix = torch.tensor([longest]) if longest else None
    with torch.no_grad():
        out = model(torch.tensor([ids]), prefix_lengths=prefix, return_state=True)
    first = max(longest, 1)
    losses = torch.nn.functional.cross_entropy(
        out.logits[0, first - 1 : -1].double(), torch.tensor(ids[first:]), reduction="none"
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for chunk in (1, 7, 64, 200, 1000):
        reading = read(model, torch.tensor(ids), chunk=chunk, nll=True)
        assert (reading.tokens, reading.scored) == (200, 200 - first)
        assert abs(reading.nll - float(losses.sum())) < tolerance * float(losses.sum())
        assert abs(reading.perplexity - math.exp(float(losses.mean()))) < 1e-3
        assert reading.state.tokens.tolist() == [200]
        for got_layer, want_layer in zip(reading.state.layers, out.state.layers, strict=True):
            for got, want in zip(got_layer, want_layer, strict=True):
                assert relative_error(got.double(), want.double()) < 100 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_read_takes_every_kind_of_stream(kind):
    model, ids = make_model(kind), some_ids(50)
    want = read(model, torch.tensor(ids), chunk=16, nll=True)
    streams = (
        np.array(ids, dtype=np.uint16),
        ids,
        iter(ids),
        (np.array(ids[i : i + 7], dtype=np.uint16) for i in range(0, 50, 7)),
        [torch.tensor(ids[:20]), torch.tensor(ids[20:21]), torch.tensor(ids[21:])],
        [ids[:3], ids[3:]],
    )
    for stream in streams:
        got = read(model, stream, chunk=16, nll=True)
        assert got.nll == want.nll and got.tokens == 50
        map_model_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) or a, got.state, want.state)


@pytest.mark.parametrize("kind", ["based", "jrt", "transnormer"])
def test_read_is_of_constant_size_and_goes_on(kind):
    model, ids = make_model(kind), some_ids(300)
    sizes = {model_state_bytes(read(model, ids[:n], chunk=32).state) for n in (1, 33, 300)}
    assert len(sizes) == 1
    seen = []
    half = read(model, ids[:130], chunk=32)
    rest = read(model, ids[130:], chunk=32, state=half.state, progress=lambda n, speed: seen.append((n, speed)))
    whole = read(model, ids, chunk=32)
    assert [n for n, _ in seen] == [32, 64, 96, 128, 160, 170] and all(speed > 0 for _, speed in seen)
    assert rest.start_speed > 0 and rest.end_speed > 0 and rest.seconds > 0 and rest.nll is None
    assert rest.state.tokens.tolist() == [300]
    for got_layer, want_layer in zip(rest.state.layers, whole.state.layers, strict=True):
        for got, want in zip(got_layer, want_layer, strict=True):
            assert relative_error(got.double(), want.double()) < 1e-4


def test_read_never_holds_more_than_a_chunk_of_the_stream():
    model, taken, calls = make_model("based"), [], []

    def stream():
        for i in range(100):
            taken.append(i)
            yield torch.tensor(some_ids(16, i))

    read(model, stream(), chunk=16, progress=lambda n, speed: calls.append((n, len(taken))))
    assert calls == [(16 * i, i) for i in range(1, 101)]


def test_read_gives_a_prefix_whole_and_then_chunks():
    counts = []
    read(make_model("jrt"), some_ids(30), chunk=5, progress=lambda n, speed: counts.append(n))
    assert counts == [PREFIX, PREFIX + 5, PREFIX + 10, PREFIX + 15, 30]


def test_read_refuses_what_it_cannot_read():
    model = make_model("based")
    for stream, options, words in (
        ([], {}, "holds no token"),
        (torch.ones(1, 3, dtype=torch.int64), {}, r"one row of ids \[T\], got \[1, 3\]"),
        ([1, 2, 300], {}, "token id 300"),
        (np.ones(3), {}, "token ids are integers"),
        (torch.ones(3), {}, "token ids are integers"),
        ([1], {"chunk": 0}, "chunk=0"),
        ([1], {"state": prefill(model, [[1], [2]]).state}, "2 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            read(model, stream, **options)
    with pytest.raises(ValueError, match="no token was scored"):
        _ = read(model, [1, 2]).perplexity
    with pytest.raises(ValueError, match="no token was scored"):
        _ = read(model, [1], nll=True).perplexity
