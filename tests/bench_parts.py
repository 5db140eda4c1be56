"""Small cases of every op, an H200's ceilings, and a record."""

import torch

from linattn.bench.floor import Ceilings
from linattn.bench.record import Record

H200 = Ceilings(4.30e12, {torch.float32: 50e12, torch.bfloat16: 673e12})
"""What one H200 was measured at: copy bandwidth and an 8192^3 bf16 product."""
TINY = {
    "taylor": "b1-h2-t96-f4-v8",
    "prefix": "b1-h2-t96-f4-v8-m48",
    "lightning": "b1-h2-t96-d8",
    "window": "b1-h2-t96-d8-w9",
    "shortconv": "b1-t96-d8-w3-silu-gate",
    "softmax": "b1-h2-t96-d8",
}


def a_record(**changes):
    values = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "floor_ms", "best_ms"), 1.25)
    words = {
        "date": "2026-01-02T03:04:05Z",
        "commit": "0123456789ab",
        "gpu": "a GPU, with a comma",
        "driver": "1",
        "torch": "2",
        "triton": "3",
        "op": "taylor",
        "case": "b1-h2-t96-f4-v8",
        "pass_": "fwd",
        "impl": "linattn",
        "gate": "ok",
        "command": "linattn bench 'two words' \"quoted\"",
        "dtype": "bfloat16",
    }
    return Record(**{**values, **words, "runs": 7, "peak_bytes": 12345, **changes})
