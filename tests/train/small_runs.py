"""Small runs, and what is read of them."""

import io
import json
import random
from pathlib import Path

from rich.console import Console

from linattn.models import BasedConfig, JRTConfig
from linattn.train import AdamWConfig, Cosine, TrainConfig, train
from linattn.train.display import Display

_SIZES: dict = {
    "d_model": 16,
    "n_layers": 3,
    "n_heads": 2,
    "feature_dim": 4,
    "window": 5,
    "linear_layers": (1,),
    "window_layers": (2,),
    "d_hidden": 24,
    "vocab_size": 257,
}
BASED = BasedConfig(**_SIZES)
JRT_MODEL = JRTConfig(**_SIZES, prefix_length=8)
TIMED = ("tokens_per_second", "seconds", "peak_memory")


def some_text(words, seed=0):
    """Sentences of made-up words, some with letters of two bytes."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijéö", k=rng.randint(1, 7))) for _ in range(50)]
    return " ".join(rng.choice(vocabulary) for _ in range(words))


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


def quiet():
    return Display(Console(file=io.StringIO()))


def run_quietly(config, resume="auto"):
    return train(config, resume, quiet())


def lines_of(out):
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def same_files(a, b):
    """Whether two checkpoints hold the same bytes of weights, moments and carried state."""
    names = sorted(p.name for p in Path(a).glob("*.safetensors"))
    assert names == sorted(p.name for p in Path(b).glob("*.safetensors"))
    return all((Path(a) / n).read_bytes() == (Path(b) / n).read_bytes() for n in names)
