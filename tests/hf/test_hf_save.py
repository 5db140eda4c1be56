"""On disk: Auto classes, dtypes, shards, remote code, configuration."""

import json
import subprocess
import sys

import pytest
import torch
from hf_tiny import CONFIGS, SIZES, make, prompts
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from linattn.hf import LinattnConfig, LinattnForCausalLM
from linattn.models import BasedConfig, build_model


def logits(model):
    with torch.no_grad():
        return model(prompts(), prefix_length=0).logits


def test_auto_classes_read_what_was_saved(model, folder):
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is LinattnForCausalLM
    assert not again.training
    assert AutoConfig.from_pretrained(folder).to_dict() == again.config.to_dict()
    assert again.config.model_config() == model.config.model_config()
    assert torch.equal(logits(again), logits(model))


def test_16_bit_weights_keep_fp32_decays(model, folder):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for block, ours in zip(half.model.blocks, model.model.blocks, strict=True):
        for (name, buffer), (_, fresh) in zip(block.named_buffers(), ours.named_buffers(), strict=True):
            assert buffer.dtype == torch.float32, name
            assert torch.equal(buffer, fresh), name
    cast = make(next(n for n, c in CONFIGS.items() if c == model.config.model_config())).to(torch.bfloat16)
    assert torch.equal(logits(half), logits(cast))


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    assert sorted(names) == sorted(f"model.{name}" for name in model.model.state_dict())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_tied_weights_are_one_tensor(model, folder):
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.tie_word_embeddings
    assert again.model.head.weight is None
    assert again.get_output_embeddings() is None
    assert again.get_input_embeddings() is again.model.embedding
    with torch.no_grad():
        again.get_input_embeddings().weight[7] = 0
    assert (logits(again)[..., 7] == 0).all()


def test_missing_tensors_are_drawn_as_fresh_ones(tmp_path):
    model = make("transnormer")
    state = {k: v for k, v in model.state_dict().items() if "blocks.1" not in k and "theta" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = build_model(CONFIGS["transnormer"])
    assert torch.equal(again.model.blocks[0].mixer.lrpe.theta, fresh.blocks[0].mixer.lrpe.theta)
    assert 0.018 < again.model.blocks[1].mixer.qkvu_proj.weight.std() < 0.022
    for block, ours in zip(again.model.blocks, fresh.blocks, strict=True):
        assert torch.equal(block.mixer.log_decay, ours.mixer.log_decay)
    assert torch.equal(again.model.embedding.weight, model.model.embedding.weight)


def test_a_folder_loads_in_a_process_that_has_never_heard_of_linattn(tmp_path):
    folder = tmp_path / "model"
    make("based").save_pretrained(folder)
    code = f"""
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=False)
except ValueError as error:
    print("asked" if "trust_remote_code" in str(error) else error)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(model).__module__, model(torch.tensor([[1, 2, 3]])).logits.sum().item())
model.save_pretrained({str(folder / "again")!r})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    asked, loaded = out.stdout.splitlines()
    module, total = loaded.split()
    assert (asked, module) == ("asked", "linattn.hf.modeling")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert float(total) == pytest.approx(model(torch.tensor([[1, 2, 3]])).logits.sum().item(), abs=1e-3)
    stub = (folder / "modeling_linattn.py").read_text()
    assert len(stub.splitlines()) == 2
    again = folder / "again"
    assert sorted(f.name for f in again.iterdir()) == sorted(f.name for f in folder.iterdir() if f != again)
    maps = [json.loads((f / "config.json").read_text())["auto_map"] for f in (folder, again)]
    assert maps[0] == maps[1]


def test_the_configuration_speaks_transformers(model):
    config = model.config
    assert config.num_hidden_layers == len(config.layer_types) == config.model["n_layers"]
    assert set(config.layer_types) <= {"linear_attention", "sliding_attention", "full_attention"}
    assert (config.hidden_size, config.vocab_size, config.num_attention_heads) == (32, 257, 2)
    assert (config.intermediate_size, config.num_key_value_heads) == (48, 2)
    windows = "sliding_attention" in config.layer_types
    assert config.sliding_window == (9 if windows else None)
    assert config.prefix_length == (8 if "JRT" in config.model["type"] else 0)


def test_the_default_is_the_published_360m():
    config = LinattnConfig()
    assert config.model_config() == BasedConfig()
    assert config.layer_types.count("linear_attention") == 22


@pytest.mark.parametrize(
    "data, message",
    [
        ({"type": "BasedConfig", "d_modell": 3}, "did you mean 'd_model'"),
        ({"type": "BasedConfig", "d_model": "wide"}, "expected int"),
        ({"type": "LlamaConfig"}, "not one of"),
        ({"d_model": 3}, "with the key .type."),
        (3, "with the key .type."),
    ],
)
def test_a_wrong_configuration_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        LinattnConfig(model=data)


def test_from_decoder_shares_the_weights():
    decoder = build_model(CONFIGS["based"])
    wrapped = LinattnForCausalLM.from_decoder(decoder, CONFIGS["based"])
    assert wrapped.model is decoder
    assert not any(p.is_meta for p in wrapped.parameters())
    with pytest.raises(ValueError, match="not the configuration"):
        LinattnForCausalLM.from_decoder(decoder, BasedConfig(**SIZES, n_layers=1, linear_layers=(0,), window_layers=()))


def test_fresh_models_begin_as_linattn_begins_them():
    torch.manual_seed(3)
    wrapped = LinattnForCausalLM(LinattnConfig(model=CONFIGS["based"]))
    torch.manual_seed(3)
    ours = build_model(CONFIGS["based"])
    for (name, a), (_, b) in zip(wrapped.model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name
