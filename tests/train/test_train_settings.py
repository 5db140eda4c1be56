"""Training's configuration, schedules, and which weights decay."""

import json
import math
import re
from dataclasses import replace

import pytest
from small_runs import BASED, JRT_MODEL

from linattn.core.config import from_data, to_data
from linattn.models import TransNormerConfig, build_model
from linattn.train import JRT, WSD, AdamWConfig, Cosine, TrainConfig
from linattn.train.optim import decay_groups, make_optimizer
from linattn.train.schedule import learning_rate, run_fraction


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
