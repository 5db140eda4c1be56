"""Tiny random models of every architecture, in memory and on disk."""

from importlib.util import find_spec

import pytest
from hf_tiny import CONFIGS, make

# Without transformers the converters' tests remain.
collect_ignore_glob = [] if find_spec("transformers") else ["test_hf_*.py"]


@pytest.fixture(scope="session", params=CONFIGS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="session")
def jrt():
    return make("jrt")


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / type(model.config.model_config()).__name__
    model.save_pretrained(path)
    return path
