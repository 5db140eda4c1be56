"""JRT-RNN 360M on 31.5B tokens of the Pile (arXiv 2407.05483), with one target more than published.

linattn prepare pile/*.jsonl --out data/pile --tokenizer gpt2/tokenizer.json
python recipes/jrt_360m.py
"""

import sys

from linattn.models import jrt_360m
from linattn.train import JRT, AdamWConfig, Cosine, TrainConfig

config = TrainConfig(
    model=jrt_360m(),  # prefix of 1,024 tokens: half of a sequence
    data="data/pile",
    out="runs/jrt-360m",
    objective=JRT(
        mask_rate=0.15,
        mask_weight=0.25,
        paper_targets=False,  # True leaves token 1,024 unpredicted, as published
        reset_documents=False,
    ),
    optimizer=AdamWConfig(lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1),
    schedule=Cosine(warmup_steps=600, warmup_from=1e-6, min_lr=8e-5),
    batch=256,
    micro_batch=8,
    length=2048,
    steps=60_000,
    clip=1.0,
    seed=1111,
    precision="bf16",
)

if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["train", __file__, *sys.argv[1:]]))
