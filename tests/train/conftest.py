"""The text and the configuration of small runs."""

import json
import random

import pytest
import torch
from small_runs import some_config, some_text

from linattn.data import prepare


@pytest.fixture(scope="session")
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


@pytest.fixture(autouse=True)
def one_thread():
    """The subprocess of a test and the test itself must add in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
