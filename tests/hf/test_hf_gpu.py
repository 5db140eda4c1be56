"""The promises of `generate` on a GPU, where the kernels run: padding, caches, chunks, 16-bit weights."""

import pytest
import torch
from hf_tiny import GREEDY, left_padded, prompts

from linattn.hf import LinattnConfig, LinattnForCausalLM
from linattn.models import BasedConfig, JRTConfig, TransformerConfig, TransNormerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
DEVICE = "cuda"
SIZES = {"d_model": 256, "n_heads": 4, "d_hidden": 512, "vocab_size": 257}
BASED = {"n_layers": 3, "linear_layers": (1,), "window_layers": (2,), "window": 65}
CONFIGS = {
    "based": BasedConfig(**SIZES, **BASED),
    "jrt": JRTConfig(**SIZES, **BASED, prefix_length=128),
    "transnormer": TransNormerConfig(**SIZES, n_layers=2, head_dim=64),
    "transformer": TransformerConfig(**SIZES, n_layers=2),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = LinattnForCausalLM(LinattnConfig(model=CONFIGS[request.param])).eval().to(DEVICE)
    with torch.no_grad():
        for parameter in model.model.blocks.parameters():
            parameter.mul_(3)
    return model


def on_device(batch):
    return {name: x.to(DEVICE) for name, x in batch.items()}


def test_padding_caches_and_chunks_leave_the_logits_alone(model):
    rows = [row[:n] for row, n in zip(prompts(4, 300), (300, 170, 1, 65), strict=True)]
    batch = on_device(left_padded(rows))
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    if model.config.prefix_length:
        options["prefix_length"] = 0  # short rows have prefixes that a chunk would cut
    together = torch.stack(model.generate(**batch, **options).logits)
    chunked = torch.stack(model.generate(**batch, prefill_chunk_size=100, **options).logits)
    torch.testing.assert_close(chunked[0], together[0], rtol=0, atol=1e-3)
    for i, row in enumerate(rows):
        alone = model.generate(row[None].to(DEVICE), **options).logits
        torch.testing.assert_close(together[0, i], alone[0][0], rtol=0, atol=1e-3)
        with torch.no_grad():
            plain = model(row[None].to(DEVICE), prefix_length=0).logits[0, -1].float()
        torch.testing.assert_close(together[0, i], plain, rtol=0, atol=1e-3)


def test_16_bit_weights_keep_fp32_sums(model):
    half = model.to(torch.bfloat16)
    out = half.generate(prompts(2, 200).to(DEVICE), max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    assert out.sequences.shape == (2, 208)
    kinds = zip(half.config.layer_types, out.past_key_values.state.layers, half.model.blocks, strict=True)
    sums = [state for kind, state, block in kinds if kind == "linear_attention" and not hasattr(block.mixer, "conv")]
    assert {leaf.dtype for state in sums for leaf in state} <= {torch.float32}


def test_a_training_step_lowers_the_loss(model):
    model.train()
    model.gradient_checkpointing_enable()
    ids = prompts(4, 256).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, prefix_length=0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
