"""Bugs are planted in mixers, and a law must catch each. A law that catches nothing is no law.

Command: pytest tests/test_contract_bites.py
"""

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from contract import mixer_module, small_cases
from linattn.core import chunks
from linattn.core.laws import LAWS, Subject, broken_laws, parity
from linattn.core.mixer import map_state
from linattn.mixers.taylor import chunked as taylor_chunked


def subject(mixer, case=0, **changes):
    return Subject(replace(mixer_module(mixer).MIXER, **changes), small_cases(mixer)[case])


def forward_of(mixer):
    return mixer_module(mixer).MIXER.forward


def on_inputs(mixer, change):
    """The mixer, wrong in what it is given."""

    def forward(inputs, **options):
        return forward_of(mixer)(change(dict(inputs)), **options)

    return subject(mixer, forward=forward)


def on_outputs(mixer, change):
    """The mixer, wrong in what it returns."""

    def forward(inputs, **options):
        return change(*forward_of(mixer)(inputs, **options))

    return subject(mixer, forward=forward)


def ignored(option):
    def forward(inputs, **options):
        return forward_of("taylor")(inputs, **{**options, option: None})

    return subject("taylor", forward=forward)


def swap_first_heads(y, state):
    return y[:, :, [1, 0, *range(2, y.shape[2])]], state


def shifted(inputs):
    return inputs | {"k": inputs["k"].roll(-1, 1), "v": inputs["v"].roll(-1, 1)}


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


WRAPPED = {
    "heads swapped in the output": lambda: on_outputs("taylor", swap_first_heads),
    "head 0 written to head 1": lambda: on_outputs("taylor", lambda y, s: (y[:, :, [0, 0, 2]], s)),
    "time and heads transposed in the values": lambda: on_inputs("taylor", lambda i: i | {"v": i["v"].flip(2)}),
    "reads the next token": lambda: on_inputs("taylor", shifted),
    "initial state ignored": lambda: ignored("initial_state"),
    "document boundaries ignored": lambda: ignored("cu_seqlens"),
    "gradient of k is zero": lambda: on_inputs("taylor", lambda i: i | {"k": NoGradient.apply(i["k"])}),
    "gradient of v has the wrong sign": lambda: on_inputs("taylor", lambda i: i | {"v": 2 * i["v"].detach() - i["v"]}),
    "final state has no gradient": lambda: on_outputs("taylor", lambda y, s: (y, map_state(torch.Tensor.detach, s))),
    "state rounded to bf16": lambda: on_outputs(
        "taylor", lambda y, s: (y, None if s is None else map_state(lambda x: x.bfloat16().to(x), s))
    ),
    "scale forgotten": lambda: on_inputs("taylor", lambda i: {**i, "scale": 1.0}),
    "normaliser left out": lambda: on_inputs("taylor", lambda i: {**i, "normalize": False}),
    "combine forgets the earlier": lambda: subject("taylor", combine=lambda a, b: b),
    "combine adds twice": lambda: subject("taylor", combine=lambda a, b: map_state(lambda x, y: x + 2 * y, a, b)),
    "one nan in a returned state": lambda: on_outputs(
        "taylor", lambda y, s: (y, s._replace(z=s.z + torch.empty_like(s.z) * 0))
    ),
    "not repeatable": lambda: on_outputs("taylor", lambda y, s: (y + 1e-14 * torch.randn_like(y), s)),
    "step does not write its state": lambda: subject(
        "taylor", step_=lambda inputs, pool, slots, **kw: taylor_step(inputs, map_state(torch.clone, pool), slots)
    ),
    "step writes every slot": lambda: subject("taylor", step_=step_on_all),
    "idle rows write to slot 0": lambda: subject(
        "taylor", step_=lambda inputs, pool, slots, **kw: taylor_step(inputs, pool, slots.clamp(min=0))
    ),
    "one lambda lost between chunks": lambda: subject(
        "lightning",
        combine=lambda a, b: type(a)(
            a.log_decay + b.log_decay, b.S + a.S * (b.log_decay * 0.99).exp()[..., None, None]
        ),
    ),
    "decay of the wrong head": lambda: on_inputs("lightning", lambda i: i | {"log_decay": i["log_decay"].roll(1)}),
    "log_decay without gradient": lambda: on_inputs("lightning", lambda i: i | {"log_decay": i["log_decay"].detach()}),
    "window one key too wide": lambda: on_inputs("window", lambda i: i | {"window": i["window"] + 1}),
    "filter flipped in time": lambda: on_inputs("shortconv", lambda i: i | {"weight": i["weight"].flip(1)}),
    "prefix lengths ignored": lambda: replace_case(
        on_inputs("prefix", lambda i: {n: x for n, x in i.items() if n != "prefix_lengths"}), "prefix", 1
    ),
}


class Bent(torch.autograd.Function):
    """Its argument, with nine tenths of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.9 * gradient


def bent(mixer, name, path):
    """The mixer, with nine tenths of what one input's gradient has through the output, or through the State."""

    def forward(inputs, **options):
        right, wrong = (forward_of(mixer)(x, **options) for x in (inputs, inputs | {name: Bent.apply(inputs[name])}))
        return (wrong[0], right[1]) if path == "y" else (right[0], wrong[1])

    return subject(mixer, forward=forward)


def replace_case(s, mixer, case):
    return s._replace(case=small_cases(mixer)[case])


def taylor_step(inputs, pool, slots):
    return mixer_module("taylor").MIXER.step_(inputs, pool, slots)


def step_on_all(inputs, pool, slots, **kw):
    y = taylor_step(inputs, pool, slots)
    pool.S.mul_(1 + 1e-9)
    return y


@functools.cache
def broken_by(name):
    return broken_laws(WRAPPED[name]()).keys()


@pytest.mark.parametrize("name", WRAPPED)
def test_a_law_catches(name):
    assert len(broken_by(name)) > 0


MAPS = taylor_chunked._feature_maps
SUMMARIZE = taylor_chunked._summarize_chunks
FOLD = taylor_chunked._fold


def no_second_order(dim, like):
    left, right = MAPS(dim, like)
    return left * (torch.arange(left.shape[1]) <= dim), right


def leaking_pads(maps, k, v, mask):
    real = torch.ones_like(v[..., :1]) if mask is None else mask[..., None]
    k, v = (torch.cat([x[..., :1], x[..., 1:] * real], -1) for x in (k, v))
    return SUMMARIZE(maps, k, v, None)


def rounded_sums(maps, k, v, mask):
    return map_state(lambda x: x.bfloat16().to(x.dtype), SUMMARIZE(maps, k, v, mask))


def carry_lost(before, added):
    return FOLD(map_state(torch.zeros_like, before), added)


PATCHED = {
    "second order dropped": (taylor_chunked, "_feature_maps", no_second_order),
    "pads leak through phi(0)": (taylor_chunked, "_summarize_chunks", leaking_pads),
    "bf16 accumulator": (taylor_chunked, "_summarize_chunks", rounded_sums),
    "the carry between blocks lost": (taylor_chunked, "_fold", carry_lost),
    "resets not applied": (chunks, "select", lambda condition, x, y: y),
}


@pytest.mark.parametrize("name", PATCHED)
def test_a_law_catches_inside_the_backend(name):
    module, attribute, planted = PATCHED[name]
    with mock.patch.object(module, attribute, planted):
        assert broken_laws(subject("taylor")) != {}


def test_every_law_has_caught_something():
    assert set().union(*map(broken_by, WRAPPED)) == LAWS.keys()


def test_fp32_catches_what_rounds():
    """A bf16 sum passes in bf16's own tolerance; fp32's catches it."""
    with mock.patch.object(taylor_chunked, "_summarize_chunks", rounded_sums):
        assert "parity" in broken_laws(subject("taylor")._replace(dtype=torch.float32))


@pytest.mark.parametrize("path", ("y", "the State"))
@pytest.mark.parametrize("name", ("k", "v"))
@pytest.mark.parametrize("mixer", ("taylor", "prefix", "lightning", "softmax"))
def test_16_bits_catch_a_tenth_of_a_gradient_s_smaller_part(mixer, name, path):
    """What comes through y and through the State differ tenfold: their sum is off by no more than bf16 allows."""
    wrong = parity(bent(mixer, name, path)._replace(dtype=torch.bfloat16))
    assert [w.split(" is off")[0] for w in wrong if "through" in w] == [f"gradient of {name} through {path}"]
