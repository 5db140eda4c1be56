"""Prefill, decode by the state, sampling, prompting, and states on disk."""

from linattn.generate.engine import GenerationResult, Prefill, generate, prefill
from linattn.generate.prompting import Order, PrefixStrategy, ShortPrompt, generate_short, pad_left, read_twice
from linattn.generate.reading import Reading, read
from linattn.generate.sampling import (
    DEFAULT,
    GREEDY,
    SamplingConfig,
    probabilities,
    row_generators,
    sample,
    seen_tokens,
)
from linattn.generate.snapshot import Snapshot, load_snapshot, model_hash, save_snapshot, weights_hash
from linattn.generate.text import StopFilter, TextResult, ask, generate_text

__all__ = [
    "DEFAULT",
    "GREEDY",
    "GenerationResult",
    "Order",
    "Prefill",
    "PrefixStrategy",
    "Reading",
    "SamplingConfig",
    "ShortPrompt",
    "Snapshot",
    "StopFilter",
    "TextResult",
    "ask",
    "generate",
    "generate_short",
    "generate_text",
    "load_snapshot",
    "model_hash",
    "pad_left",
    "prefill",
    "probabilities",
    "read",
    "read_twice",
    "row_generators",
    "sample",
    "save_snapshot",
    "seen_tokens",
    "weights_hash",
]
