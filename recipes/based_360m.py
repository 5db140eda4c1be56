"""Based 360M on 10.5B tokens of the Pile, as published (arXiv 2402.18668).

linattn prepare pile/*.jsonl --out data/pile --tokenizer gpt2/tokenizer.json
python recipes/based_360m.py
"""

import sys

from linattn.models import based_360m
from linattn.train import AdamWConfig, Cosine, NextToken, TrainConfig

config = TrainConfig(
    model=based_360m(),
    data="data/pile",
    out="runs/based-360m",
    objective=NextToken(reset_documents=False),  # as published; True keeps packed documents apart
    optimizer=AdamWConfig(lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1),
    schedule=Cosine(warmup_steps=200, warmup_from=1e-6, min_lr=8e-5),
    batch=256,  # x 2048 = 524,288 tokens an update
    micro_batch=8,
    length=2048,
    steps=20_000,
    clip=1.0,
    seed=1111,
    precision="bf16",
)

if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["train", __file__, *sys.argv[1:]]))
