"""TransNormerLLM 385M (arXiv 2307.14995) in the run of Based and its baseline, so that the three can be compared.

The paper gives this size but not its learning rate or batch; the vocabulary is GPT-2's here, not the paper's 64,000.

linattn prepare pile/*.jsonl --out data/pile --tokenizer gpt2/tokenizer.json
python recipes/transnormer_385m.py
"""

import sys
from dataclasses import replace

from linattn.models import transnormer_385m
from linattn.train import AdamWConfig, Cosine, NextToken, TrainConfig

config = TrainConfig(
    model=replace(transnormer_385m(), vocab_size=50_257),
    data="data/pile",
    out="runs/transnormer-385m",
    objective=NextToken(reset_documents=False),
    optimizer=AdamWConfig(lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1),
    schedule=Cosine(warmup_steps=200, warmup_from=1e-6, min_lr=8e-5),
    batch=256,
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
