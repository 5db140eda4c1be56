"""Each recipe builds, at its published size, and reads back what it wrote; debug_cpu learns.

pytest tests/test_recipes.py
"""

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from linattn.core.config import from_data, to_data
from linattn.data import TokenShards, bundled_text, prepare
from linattn.models import build_model
from linattn.train import TrainConfig, train

FOLDER = Path(__file__).parents[1] / "recipes"
PARAMETERS = {
    "based_1b": 1_349_453_056,
    "based_360m": 362_620_928,
    "jrt_360m": 356_578_304,
    "transformer_360m": 359_810_048,
    "transnormer_385m": 384_918_528,
}
"""Facts of the published models; transnormer_385m with GPT-2's vocabulary in place of its own."""

RECIPES = [FOLDER / f"{name}.py" for name in (*PARAMETERS, "debug_cpu")]


def load(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_builds_and_reads_back(path):
    config = load(path)
    assert isinstance(config, TrainConfig)
    data = to_data(config)
    assert from_data(TrainConfig, json.loads(json.dumps(data))) == config
    assert from_data(TrainConfig, yaml.safe_load(yaml.safe_dump(data))) == config
    with torch.device("meta"):
        model = build_model(config.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(path.stem, count)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_hyper_parameters(name):
    config = load(FOLDER / f"{name}.py")
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.eps) == (8e-4, (0.9, 0.95), 0.1, 1e-8)
    assert (schedule.warmup_from, schedule.min_lr) == (1e-6, 8e-5)
    assert schedule.warmup_steps * 100 == config.steps
    assert (config.batch, config.length, config.clip, config.seed, config.precision) == (256, 2048, 1.0, 1111, "bf16")
    assert config.steps == (60_000 if name == "jrt_360m" else 20_000)


def test_debug_cpu_learns_more_than_letter_counts(tmp_path):
    text = bundled_text("austen")[200_000:600_000]
    (tmp_path / "text.txt").write_text(text)
    prepare([tmp_path / "text.txt"], tmp_path / "data", validation_fraction=0.02)
    config = replace(
        load(FOLDER / "debug_cpu.py"),
        data=str(tmp_path / "data"),
        out=str(tmp_path / "run"),
        steps=60,
        max_seconds=None,
        batch=4,
        micro_batch=None,
        length=128,
        eval_length=128,
        precision="fp32",
    )
    found = train(config)
    held_out = TokenShards(tmp_path / "data", "validation")
    ids = held_out.read(0, held_out.tokens).tolist()
    counts = Counter(ids)
    unigram = -sum(n * math.log(n / len(ids)) for n in counts.values()) / len(ids)  # told the held-out text itself
    assert found["val_loss"] < unigram - 0.1
    assert found["step"] == 60
