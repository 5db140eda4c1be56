"""Small models of every kind, and prompts for them."""

from dataclasses import replace

import torch

from linattn.data import ByteTokenizer
from linattn.generate import GREEDY, generate
from linattn.models import BasedConfig, Decoder, JRTConfig, TransformerConfig, TransNormerConfig

VOCAB = 257
PREFIX = 12
BYTES = ByteTokenizer()
_BASED: dict = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 2,
    "feature_dim": 4,
    "window": 8,
    "linear_layers": (1,),
    "window_layers": (2,),
    "d_hidden": 48,
    "vocab_size": VOCAB,
}
CONFIGS = {
    "based": BasedConfig(**_BASED),
    "jrt": JRTConfig(**_BASED, prefix_length=PREFIX),
    "transnormer": TransNormerConfig(
        d_model=32, n_layers=2, n_heads=2, head_dim=8, d_hidden=48, vocab_size=VOCAB, scale_embedding=False
    ),
    "transformer": TransformerConfig(d_model=32, n_layers=2, n_heads=2, d_hidden=48, vocab_size=VOCAB),
}
KINDS = list(CONFIGS)
DTYPES = [torch.float32, torch.float64]
_MODELS = {}


def make_model(kind, dtype=torch.float32, seed=0):
    """A small model with weights large enough, and a head free enough, that greedy text wanders."""
    key = kind, dtype, seed
    if key not in _MODELS:
        torch.manual_seed(seed)
        config = replace(CONFIGS[kind].decoder(), init_std=0.25, init_depth_scaled=False, tie_embeddings=False)
        _MODELS[key] = Decoder(config).to(dtype)
    return _MODELS[key]


def some_ids(length, seed=0):
    return torch.randint(VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [some_ids(5, 1), some_ids(1, 2), some_ids(37, 3), some_ids(PREFIX, 4), some_ids(PREFIX + 1, 5)]


@torch.no_grad()
def all_logits(model, ids, prompt_length):
    """Logits [T, V] of one parallel pass over everything; the prompt's first tokens are the prefix, if there is one."""
    longest = model.config.prefix_length
    prefix = torch.tensor([min(prompt_length, longest)]) if longest else None
    return model(torch.tensor([ids]), prefix_lengths=prefix).logits[0]


def greedy(model, prompts, new=12, **options):
    return [r.tokens for r in generate(model, prompts, max_new_tokens=new, sampling=GREEDY, **options)]
