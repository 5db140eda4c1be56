"""The tiny models that the tests of linattn.hf share. 257 tokens: bytes and the end of a document."""

import torch

from linattn.models import BasedConfig, JRTConfig, TransformerConfig, TransNormerConfig

SIZES = {"d_model": 32, "n_heads": 2, "d_hidden": 48, "vocab_size": 257}
BASED = {"feature_dim": 4, "window": 9, "linear_layers": (1,), "window_layers": (2,)}
CONFIGS = {
    "based": BasedConfig(**SIZES, **BASED, n_layers=3),
    "jrt": JRTConfig(**SIZES, **BASED, n_layers=3, prefix_length=8),
    "transnormer": TransNormerConfig(**SIZES, n_layers=2, head_dim=16),
    "transformer": TransformerConfig(**SIZES, n_layers=2),
}
GREEDY = {"do_sample": False, "pad_token_id": 256}


def make(name, scale=8.0):
    """A model whose blocks weigh ``scale`` times as much as fresh ones, so that what it writes is not one token."""
    import linattn.hf  # not above: where transformers is missing, what needs no model is still collected

    torch.manual_seed(0)
    model = linattn.hf.LinattnForCausalLM(linattn.hf.LinattnConfig(model=CONFIGS[name])).eval()
    with torch.no_grad():
        for key, parameter in model.model.blocks.named_parameters():
            parameter.mul_(10 * scale if key == "1.mixer.out_proj.weight" else scale)  # the linear layer is heard
    return model


def prompts(rows=2, tokens=12, seed=1):
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """Rows of ids as input_ids and attention_mask, pads (256) on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), 256), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
