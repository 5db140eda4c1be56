"""Where there is no GPU, Triton interprets its kernels; it reads that wish once, when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
