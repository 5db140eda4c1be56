"""Where there is no GPU, Triton interprets its kernels; it reads that wish once, when it is first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    """Where the libraries of emulated CUDA kernels are kept: one folder for all of a run's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    return folder
