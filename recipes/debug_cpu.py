"""A Based of 0.9M parameters on bytes, for a CPU: what `linattn demo` trains in 150 seconds on two cores.

linattn prepare bundled:austen --out data/austen
python recipes/debug_cpu.py
"""

import sys

from linattn.models import BasedConfig
from linattn.train import AdamWConfig, Cosine, NextToken, TrainConfig

config = TrainConfig(
    model=BasedConfig(
        d_model=128,
        n_layers=5,
        n_heads=4,
        feature_dim=16,
        window=64,
        linear_layers=(1,),
        window_layers=(2,),
        d_hidden=256,
        vocab_size=257,
    ),
    data="data/austen",
    out="runs/debug-cpu",
    objective=NextToken(reset_documents=False),
    optimizer=AdamWConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
    schedule=Cosine(warmup_steps=40, warmup_from=3e-5, min_lr=1.5e-4),
    batch=4,
    length=256,
    steps=4000,  # a faster machine stops here, after one epoch
    max_seconds=150.0,
    precision="fp32",
    loss_chunk=None,
    eval_every=0,
    eval_length=1024,
    save_every=0,
    log_every=100,
)

if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["train", __file__, *sys.argv[1:]]))
