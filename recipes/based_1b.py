"""Based 1.3B on 10.5B tokens of the Pile, as published (arXiv 2402.18668): the 360M run with another model.

linattn prepare pile/*.jsonl --out data/pile --tokenizer gpt2/tokenizer.json
python recipes/based_1b.py
"""

import sys

from linattn.models import based_1b
from linattn.train import AdamWConfig, Cosine, NextToken, TrainConfig

config = TrainConfig(
    model=based_1b(),
    data="data/pile",
    out="runs/based-1b",
    objective=NextToken(reset_documents=False),  # as published; True keeps packed documents apart
    optimizer=AdamWConfig(lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1),
    schedule=Cosine(warmup_steps=200, warmup_from=1e-6, min_lr=8e-5),
    batch=256,
    micro_batch=4,
    length=2048,
    steps=20_000,  # 100,000 with 1,000 of warm-up is the 50B-token model
    clip=1.0,
    seed=1111,
    precision="bf16",
)

if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["train", __file__, *sys.argv[1:]]))
