"""A Based model of bytes that is built in no time, and its checkpoint."""

import torch

from linattn.data import ByteTokenizer
from linattn.data.meta import TokenizerMeta
from linattn.models import BasedConfig, build_model
from linattn.train.weights import ModelCard, write_model

BYTES = ByteTokenizer()
DIALS = BasedConfig(
    d_model=32,
    n_layers=3,
    n_heads=2,
    feature_dim=4,
    window=8,
    linear_layers=(1,),
    window_layers=(2,),
    d_hidden=48,
    vocab_size=257,
)


def write_checkpoint(folder):
    """A checkpoint as training writes it, of random weights, which are always the same."""
    torch.manual_seed(0)
    made = TokenizerMeta("bytes", BYTES.name, BYTES.hash, 257, eos=256, eos_token=None)
    write_model(build_model(DIALS), ModelCard(DIALS, made), folder, BYTES)
    return folder
