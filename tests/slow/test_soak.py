"""Hours in minutes: training that is killed again and again, generation and reading that go on and on."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from linattn.core.config import to_data
from linattn.data import prepare
from linattn.generate import generate, read
from linattn.models import BasedConfig, build_model, model_state_bytes
from linattn.train import AdamWConfig, Cosine, TrainConfig

pytestmark = pytest.mark.slow

TINY = BasedConfig(
    d_model=64, n_layers=3, n_heads=4, linear_layers=(1,), window_layers=(2,), d_hidden=128, window=33, vocab_size=257
)
KILLS = 5
TRAIN = """
import json, sys, torch
torch.set_num_threads(1)
from linattn.core.config import from_data
from linattn.train import TrainConfig, train
train(from_data(TrainConfig, json.load(open(sys.argv[1]))))
"""


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.fixture
def config(tmp_path):
    words = random.Random(0)
    text = " ".join("".join(words.choices("abcdefgh", k=words.randint(1, 9))) for _ in range(40_000))
    (tmp_path / "text.txt").write_text(text)
    prepare([tmp_path / "text.txt"], tmp_path / "shards", validation_fraction=0.05)
    return TrainConfig(
        model=TINY,
        data=str(tmp_path / "shards"),
        out=str(tmp_path / "whole"),
        batch=4,
        length=64,
        steps=400,
        optimizer=AdamWConfig(lr=3e-3),
        schedule=Cosine(warmup_steps=20),
        precision="fp32",
        device="cpu",
        eval_every=100,
        eval_batches=2,
        save_every=25,
        keep_checkpoints=2,
        log_every=5,
    )


def start(config, path):
    path.write_text(json.dumps(to_data(config)))
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(path)], stdout=subprocess.DEVNULL)


def has_begun(process, log, size):
    """Wait until the run writes to its log, or ends."""
    deadline = time.monotonic() + 120
    while process.poll() is None and (log.stat().st_size if log.exists() else 0) <= size:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def untimed(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [(line.get("step"), line.get("loss"), line.get("val_loss")) for line in lines]


def test_a_run_killed_at_random_moments_ends_as_the_run_that_never_was(config, tmp_path):
    moments, kills = random.Random(1), 0
    assert start(config, tmp_path / "whole.json").wait() == 0
    killed = replace(config, out=str(tmp_path / "killed"))
    log = tmp_path / "killed" / "metrics.jsonl"
    code = None
    while code != 0:
        size = log.stat().st_size if log.exists() else 0
        process = start(killed, tmp_path / "killed.json")
        if kills < KILLS:
            has_begun(process, log, size)
            time.sleep(moments.uniform(0, 1.5))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
    assert kills >= 3
    assert untimed(killed.out) == untimed(config.out)
    names = sorted(p.name for p in (tmp_path / "whole" / "step-00000400").glob("*.safetensors"))
    assert names
    for name in names:
        ours, theirs = (Path(c.out) / "step-00000400" / name for c in (killed, config))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_tens_of_thousands_of_tokens_are_written_in_constant_memory():
    torch.manual_seed(0)
    model, sizes = build_model(TINY).eval(), []

    def watch(row, token):
        sizes.append(resident_bytes())

    (result,) = generate(model, [[72, 105]], max_new_tokens=20_000, on_token=watch, return_state=True)
    assert len(result.tokens) == 20_000 and result.state is not None
    assert model_state_bytes(result.state) == model_state_bytes(model.identity(1))
    # The list of tokens and of these sizes is 1.3 MB; a cache of keys and values would be 20 MB.
    assert max(sizes[-1000:]) - max(sizes[1000:2000]) < 8e6


def test_a_million_tokens_are_read_in_constant_memory():
    torch.manual_seed(0)
    model, sizes, tokens = build_model(TINY).eval(), [], 1_200_000
    numbers = np.random.default_rng(0)
    stream = (numbers.integers(0, 256, 10_000) for _ in range(tokens // 10_000))
    reading = read(model, stream, chunk=2048, nll=True, progress=lambda count, speed: sizes.append(resident_bytes()))
    assert reading.tokens == tokens == int(reading.state.tokens)
    assert model_state_bytes(reading.state) == model_state_bytes(model.identity(1))
    assert reading.scored == tokens - 1 and 5 < reading.nats_per_token < 7
    assert max(sizes[-50:]) - max(sizes[20:70]) < 16e6
    assert reading.end_speed > reading.start_speed / 2
