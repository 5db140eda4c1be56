"""Published checkpoints, written here tiny and random in every format they come in, against an independent reading."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import published_attention
import published_based
import published_jrt
import published_mamba
import published_tables as tables
import published_transnormer
import pytest
import torch
from published_files import GREEDY, WORDS, Hub, draw, printed, write, write_tokenizer
from safetensors.torch import save_file

from linattn.cli import convert as verb
from linattn.cli import generate
from linattn.cli.convert import convert
from linattn.cli.main import main
from linattn.cli.published import read_published
from linattn.core.config import to_data
from linattn.models import PUBLISHED, build_model
from linattn.models.costs import model_costs
from linattn.models.published import is_published, load_published, plan_published, to_published
from linattn.models.published.hub import SMALL
from linattn.train import load_model

TIGHT = 1e-10
"""Relative difference of logits, both in float64. A planted swap must make a hundred million times as much."""
SEEN = 1e-2

TINY_BASED = {"d": 24, "layers": 5, "heads": 2, "linear": (1, 4), "window": (2,), "feature_dim": 4, "window_size": 8}
TINY_TNL = {"d": 24, "layers": 3, "heads": 3, "glu": 20, "vocab": 40}

TINY = {
    "based": (tables.based_config(**TINY_BASED, vocab=37), tables.based_shapes, published_based),
    "jrt": (tables.jrt_config(**TINY_BASED, vocab=37, enc_length=10), tables.jrt_shapes, published_jrt),
    # Heads of 10 features, of which int(10 * 0.5) = 5 are rotary: three frequencies.
    "attn": (tables.attention_config(d=40, layers=2, heads=4, vocab=37), tables.attention_shapes, published_attention),
    "tnl1": (tables.transnormer_config(**TINY_TNL), tables.transnormer_shapes, published_transnormer),
    "tnl2": (tables.transnormer_config(**TINY_TNL, scaled=False), tables.transnormer_shapes, published_transnormer),
    "tnl3": (tables.transnormer_config(**TINY_TNL, gate=5), tables.transnormer_shapes, published_transnormer),
}
FORMS = ("bin", "bin-sharded", "safetensors", "safetensors-sharded")


def tokens_of(config, length=24):
    return torch.randint(config["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))


def our_logits(folder, tokens):
    config, state = load_published(folder, dtype=torch.float64)
    model = build_model(config).double()
    model.load_state_dict(state)
    prefix = getattr(config, "prefix_length", 0)
    lengths = torch.tensor([min(prefix, len(tokens))]) if prefix else None
    with torch.no_grad():
        return model(tokens[None], prefix_lengths=lengths).logits[0]


def difference(got, want):
    """The largest difference of logits, relative to the largest logit; padded rows of ``want`` are no logits."""
    want = want[:, : got.shape[1]]
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(params=TINY)
def family(request):
    config, shapes, reading = TINY[request.param]
    return config, draw(shapes(config)), reading


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_published_forwards(family, form, tmp_path):
    config, weights, reading = family
    tokens = tokens_of(config)
    got = our_logits(write(tmp_path, config, weights, form), tokens)
    assert got.shape == (len(tokens), config["vocab_size"])
    assert difference(got, reading.logits(config, weights, tokens)) < TIGHT


def test_a_prompt_shorter_than_the_prefix_and_one_of_its_length(tmp_path):
    config, shapes, reading = TINY["jrt"]
    weights = draw(shapes(config))
    write(tmp_path, config, weights)
    for length in (1, 9, 10, 11):
        tokens = tokens_of(config, length)
        assert difference(our_logits(tmp_path, tokens), reading.logits(config, weights, tokens)) < TIGHT


@pytest.mark.parametrize("d, heads", [(32, 4), (40, 5), (48, 6)])
def test_decays_of_any_number_of_heads(d, heads, tmp_path):
    config = tables.transnormer_config(d=d, layers=4, heads=heads, glu=16, vocab=40)
    weights, tokens = draw(tables.transnormer_shapes(config)), tokens_of(config)
    want = published_transnormer.logits(config, weights, tokens)
    assert difference(our_logits(write(tmp_path, config, weights), tokens), want) < TIGHT


def change(weights, pattern, function):
    hit = [n for n in weights if re.search(pattern, n)]
    assert hit, pattern
    return {n: function(x) if n in hit else x for n, x in weights.items()}


def rows(*order):
    """The blocks of rows of a fused projection in another order."""

    def reorder(x):
        blocks = x.chunk(len(order), 0)
        return torch.cat([blocks[i] for i in order])

    return reorder


def exchange(weights, one, other):
    """Tensors named by ``one`` and by ``other`` trade places."""
    return {n: weights.get(n.replace(one, other), x) if one in n else weights.get(n.replace(other, one), x)
            for n, x in weights.items()}  # fmt: skip


PLANTED = [
    ("based", "gate and value", lambda w: change(w, r"fc1", rows(1, 0))),
    ("attn", "gate and value", lambda w: change(w, r"fc1", rows(1, 0))),
    ("based", "k and v of the window", lambda w: change(w, r"Wqkv", rows(0, 2, 1))),
    ("attn", "k and v", lambda w: change(w, r"Wqkv", rows(0, 2, 1))),
    ("attn", "q and k", lambda w: change(w, r"Wqkv", rows(1, 0, 2))),
    ("based", "q and k of linear attention", lambda w: exchange(w, "proj_q", "proj_k")),
    ("based", "conv taps reversed", lambda w: change(w, r"conv\.conv", lambda x: x.flip(-1))),
    ("based", "conv branch and gate", lambda w: change(w, r"in_proj", rows(1, 0))),
    ("jrt", "encoder's and decoder's keys", lambda w: exchange(w, "proj_k.", "proj_k_enc.")),
    ("jrt", "encoder's and decoder's values", lambda w: exchange(w, "proj_v.", "proj_v_enc.")),
    ("jrt", "the two norms", lambda w: exchange(w, "norm1", "norm2")),
    ("tnl1", "v and u", lambda w: change(w, r"qkvu", rows(0, 1, 3, 2))),
    ("tnl1", "q and k", lambda w: change(w, r"qkvu", rows(1, 0, 2, 3))),
    ("tnl1", "u first", lambda w: change(w, r"qkvu", rows(3, 0, 1, 2))),
    ("tnl3", "k and v", lambda w: change(w, r"qkv_proj", rows(0, 2, 1))),
    ("tnl1", "theta of one head", lambda w: change(w, r"theta", lambda x: x.roll(1, 0))),
]


@pytest.mark.parametrize("name, planted, tamper", PLANTED, ids=[f"{f}: {what}" for f, what, _ in PLANTED])
def test_the_comparison_sees_a_planted_swap(name, planted, tamper, tmp_path):
    config, shapes, reading = TINY[name]
    weights, tokens = draw(shapes(config)), tokens_of(config)
    wrong = our_logits(write(tmp_path, config, tamper(weights)), tokens)
    assert difference(wrong, reading.logits(config, weights, tokens)) > SEEN


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("based", ("alt_mixer_2", "window_size"), 6),
        ("based", ("alt_mixer_2", "window_size"), 10),
        ("based", ("alt_mixer_2", "window_size"), 16),
        ("jrt", ("alt_mixer", "enc_length"), 9),
        ("jrt", ("alt_mixer", "enc_length"), 11),
        ("attn", ("rotary_emb_fraction",), 1.0),
        ("attn", ("rotary_emb_fraction",), 0),
        ("tnl1", ("no_scale_embedding",), True),
    ],
)
def test_the_comparison_sees_a_setting_off_by_one(name, field, value, tmp_path):
    config, shapes, reading = TINY[name]
    weights, tokens = draw(shapes(config)), tokens_of(config)
    other = json.loads(json.dumps(config))
    *into, last = field
    place = other
    for step in into:
        place = place[step]
    place[last] = value
    wrong = our_logits(write(tmp_path, other, weights), tokens)
    assert difference(wrong, reading.logits(config, weights, tokens)) > SEEN


@pytest.mark.parametrize("size, keys", [(8, 5), (9, 5), (256, 129), (1, 1)])
def test_a_window_size_is_halved_and_the_token_itself_counts(size, keys):
    config = tables.based_config(**TINY_BASED | {"window_size": size})
    assert plan_published(config, stripped(tables.based_shapes(config))).config.window == keys


def test_spellings_that_mean_the_same():
    config, shapes, _ = TINY["tnl1"]
    square = config | {"glu_dim": 24}
    plan = plan_published(square, stripped(shapes(square)))
    assert plan_published(square | {"glu_dim": -1, "linear_act_fun": "silu"}, stripped(shapes(square))) == plan
    config, shapes, _ = TINY["jrt"]
    plan = plan_published(config, stripped(shapes(config)))
    inner = {n: x for n, x in config["alt_mixer"].items() if n != "enc_length"}
    again = config | {"alt_mixer": inner, "enc_length": 10}
    assert plan_published(again, stripped(shapes(config))) == plan
    both = config | {"alt_mixer_layers": [1, 2, 4]}
    assert plan_published(both, stripped(shapes(config))) == plan
    config, shapes, _ = TINY["attn"]
    table = {n: (60, 40) if "Wqkv" in n else s for n, s in shapes(config).items()}
    for name in ("num_head_kv", "n_head_kv"):
        assert plan_published(config | {name: 1}, table).config.n_kv_heads == 1


def stripped(shapes):
    return {n.removeprefix("model."): s for n, s in shapes.items()}


@pytest.mark.parametrize("released", tables.RELEASED)
def test_a_released_checkpoint_of_real_size_matches_key_for_key(released):
    size, config, shapes_of = tables.RELEASED[released]
    shapes = stripped(shapes_of(config))
    plan = plan_published(config, shapes)
    assert plan.config == PUBLISHED[size]()
    assert set(plan.names.values()) == shapes.keys() - {"lm_head.weight"}
    held = sum(torch.Size(s).numel() for n, s in shapes.items() if n != "lm_head.weight")
    assert model_costs(plan.config.decoder()).parameters == held


@pytest.mark.parametrize(
    "released, parameters",
    [("hazyresearch/based-360m", 362_620_928), ("hazyresearch/based-1b", 1_349_453_056)],
)
def test_published_counts_of_parameters(released, parameters):
    size, config, shapes_of = tables.RELEASED[released]
    assert model_costs(PUBLISHED[size]().decoder()).parameters == parameters
    assert sum(torch.Size(s).numel() for n, s in shapes_of(config).items() if n != "lm_head.weight") == parameters


def test_what_lightning_and_older_code_left_in_a_file_is_put_right(tmp_path):
    config, shapes, reading = TINY["based"]
    weights, tokens = draw(shapes(config)), tokens_of(config)
    old = {"model." + n.replace("mixer.conv.", "mixer.conv1."): x for n, x in weights.items()}
    old |= {"train_metrics.num-tokens.count": torch.tensor(7), "val_metrics.loss": 3.0}
    old |= {"model.transformer.decay.decay": torch.zeros(2)}
    old |= {"model.transformer.layers.2.mixer.rotary_emb.inv_freq": torch.zeros(6)}
    got = our_logits(write(tmp_path, config, old), tokens)
    assert difference(got, reading.logits(config, weights, tokens)) < TIGHT


@pytest.mark.parametrize("kept", ["transformer.embeddings.word_embeddings.weight", "lm_head.weight"])
def test_a_shared_embedding_may_be_stored_once_under_either_name(kept, tmp_path):
    config, shapes, reading = TINY["based"]
    weights, tokens = draw(shapes(config)), tokens_of(config)
    both = {"transformer.embeddings.word_embeddings.weight", "lm_head.weight"}
    once = {n: x for n, x in weights.items() if n not in both - {kept}}
    got = our_logits(write(tmp_path, config, once, "safetensors"), tokens)
    assert difference(got, reading.logits(config, weights, tokens)) < TIGHT


@pytest.mark.parametrize("name, row_count", [("based", 37), ("based", 48), ("attn", 37), ("attn", 64), ("tnl1", 43)])
def test_padding_of_the_vocabulary_is_cut_or_filled(name, row_count, tmp_path):
    config, shapes, reading = TINY[name]
    table = shapes(config)
    ends = [n for n in table if "embed" in n or "lm_head" in n]
    weights = draw(table | {n: (row_count, table[n][1]) for n in ends})
    tokens = tokens_of(config)
    got = our_logits(write(tmp_path, config, weights), tokens)
    assert difference(got, reading.logits(config, weights, tokens)) < TIGHT


def test_dtypes_are_kept_or_widened_or_as_asked(tmp_path):
    config, shapes, _ = TINY["tnl1"]
    folder = write(tmp_path / "bf16", config, draw(shapes(config), dtype=torch.bfloat16))
    assert {x.dtype for x in load_published(folder)[1].values()} == {torch.bfloat16}
    assert {x.dtype for x in load_published(folder, torch.float32)[1].values()} == {torch.float32}
    mixed = draw(shapes(config), dtype=torch.bfloat16)
    mixed["model.layers.0.token_mixer.lrpe.theta"] = mixed["model.layers.0.token_mixer.lrpe.theta"].float()
    state = load_published(write(tmp_path / "mixed", config, mixed, "safetensors"))[1]
    assert {x.dtype for x in state.values()} == {torch.float32}


def test_to_published_is_the_way_back(family, tmp_path):
    config, weights, _ = family
    folder = write(tmp_path, config, weights)
    back = to_published(*load_published(folder))
    assert back.keys() == weights.keys() - {"lm_head.weight"}
    same = [n for n, x in back.items() if torch.equal(x[: len(weights[n])], weights[n])]
    assert same == list(back)


def error_of(folder, dtype=None):
    with pytest.raises(ValueError) as raised:
        load_published(folder, dtype)
    return str(raised.value)


def test_unknown_missing_and_misshapen_tensors_are_one_error(tmp_path):
    config, shapes, _ = TINY["based"]
    weights = draw(shapes(config))
    del weights["transformer.ln_f.weight"]
    del weights["transformer.layers.1.mixer.proj_q.weight"]
    weights["transformer.layers.0.norm1.weight"] = torch.ones(25)
    weights["transformer.layers.0.mixer.conv.conv.weight"] = torch.ones(48, 3)
    weights["transformer.layers.1.mixer.g_norm.weight"] = torch.ones(12)
    weights["transformer.layers.4.mixer.decay_proj.weight"] = torch.ones(2, 24)
    message = error_of(write(tmp_path, config, weights))
    for part in (
        "missing: transformer.ln_f.weight [24]",
        "missing: transformer.layers.1.mixer.proj_q.weight [8, 24]",
        "misshapen: transformer.layers.0.norm1.weight [25], expected [24]",
        "misshapen: transformer.layers.0.mixer.conv.conv.weight [48, 3], expected [48, 1, 3]",
        "unknown: transformer.layers.1.mixer.g_norm.weight [12]",
        "unknown: transformer.layers.4.mixer.decay_proj.weight [2, 24]",
    ):
        assert part in message
    assert message.count("\n  ") == 6


def test_an_embedding_short_of_the_vocabulary_is_misshapen(tmp_path):
    config, shapes, _ = TINY["jrt"]
    weights = draw(shapes(config))
    few = weights["lm_head.weight"][:37]
    weights |= {"lm_head.weight": few, "transformer.embeddings.word_embeddings.weight": few}
    assert "word_embeddings.weight [37, 24], expected [40, 24]" in error_of(write(tmp_path / "jrt", config, weights))
    config, shapes, _ = TINY["based"]
    weights = draw(shapes(config))
    few = weights["lm_head.weight"][:36]
    weights |= {"lm_head.weight": few, "transformer.embeddings.word_embeddings.weight": few}
    assert "expected [37 and padding, 24]" in error_of(write(tmp_path / "based", config, weights))


def test_a_head_of_its_own_is_refused(tmp_path):
    config, shapes, _ = TINY["tnl1"]
    weights = draw(shapes(config))
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    assert "lm_head.weight is not the embedding's tensor" in error_of(write(tmp_path, config, weights))


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("based", {"n_layer": 6}, "config.json says 6 layers, the tensors are of 5"),
        ("based", {"n_layer": 10**9}, "n_layer is 1000000000"),
        ("based", {"n_embd": "24"}, "n_embd is '24'"),
        ("based", {"n_embd": 2**40}, "n_embd is"),
        ("based", {"n_head": 5}, "alt_mixer.num_heads is 2 and n_head 5"),
        ("based", {"n_inner": None}, "config.json lacks n_inner"),
        ("based", {"alt_mixer_2": None}, "alt_mixer_2 is None; it must be an object"),
        ("based", {"alt_mixer_layers": "1,4"}, "it must be a list of whole numbers"),
        ("based", {"alt_mixer_layers": [1, 9]}, "linear_layers names layer 9"),
        ("based", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction 0.5 (only 1 is supported)"),
        ("attn", {"activation_function": "gelu_new"}, "a plain GPT-2 loads through transformers"),
        ("attn", {"rms_norm": False, "rotary_emb_base": 500.0}, "rms_norm False (only True is supported); rotary_emb"),
        ("attn", {"rotary_emb_fraction": None}, "rotary_emb_fraction is None"),
        ("tnl1", {"norm_type": "layernorm"}, "norm_type 'layernorm' (only 'simplermsnorm' is supported)"),
        ("tnl1", {"bias": True}, "bias True"),
        ("tnl1", {"linear_act_fun": "1+elu"}, "linear_act_fun is '1+elu'; only silu, or swish, is read"),
        ("jrt", {"alt_mixer": {"num_heads": 2, "feature_dim": 4, "feature_name": "relu"}}, "feature_name 'relu'"),
        ("based", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("tnl1", {"linear_use_lrpe_list": [1]}, "linear_use_lrpe_list has 1 entries for 3 layers"),
        ("tnl1", {"no_scale_embedding": None}, "no_scale_embedding is None; it must be true or false"),
        ("tnl1", {"decoder_attention_heads": 5}, "not a multiple of decoder_attention_heads 5"),
    ],
)
def test_a_configuration_that_is_wrong_or_not_ours_says_what(name, fields, message, tmp_path):
    config, shapes, _ = TINY[name]
    assert message in error_of(write(tmp_path, config | fields, draw(shapes(config))))


def test_damaged_files_say_which_and_what_to_do(tmp_path):
    config, shapes, _ = TINY["tnl1"]
    weights = draw(shapes(config))
    folder = write(tmp_path / "bin", config, weights)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    assert re.search(r"pytorch_model.bin: cut short or no file of tensors .*copy it again", error_of(folder))
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "no .bin of torch 1.6 or newer" in error_of(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert "holds a list, not tensors by name" in error_of(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "holds no model.safetensors and no pytorch_model.bin" in error_of(folder)
    folder = write(tmp_path / "safetensors", config, weights, "safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    assert "model.safetensors: cut short" in error_of(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not JSON" in error_of(folder)
    assert "config.json: is missing" in error_of(tmp_path / "nowhere")


class Trap:
    def __reduce__(self):
        return open, ("trap", "w")


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, shapes, _ = TINY["tnl1"]
    folder = write(tmp_path, config, draw(shapes(config)) | {"model.trap": Trap()})
    assert "holds more than tensors" in error_of(folder)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("stray", ["../pytorch_model-00001-of-00002.bin", "/etc/passwd.bin", "a/b.bin", "..", "c.txt"])
def test_an_index_names_files_of_its_folder_alone(stray, tmp_path):
    config, shapes, _ = TINY["tnl1"]
    folder = write(tmp_path / "inner", config, draw(shapes(config)), "bin-sharded")
    index = folder / "pytorch_model.bin.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.embed_tokens.weight"] = stray
    index.write_text(json.dumps(data))
    assert "shards are *.bin files of the same folder" in error_of(folder)


def test_a_missing_shard_and_a_tensor_in_two_files_are_named(tmp_path):
    config, shapes, _ = TINY["tnl1"]
    weights = draw(shapes(config))
    folder = write(tmp_path / "twice", config, weights, "safetensors-sharded")
    one, two = sorted(folder.glob("*.safetensors"))
    save_file({n: x.clone() for n, x in weights.items()}, two)
    assert re.search(r"are both \S+ \(model-00002", error_of(folder))
    one.unlink()
    assert "names ['model-00001-of-00002.safetensors'], which are missing" in error_of(folder)


def test_sizes_that_no_file_holds_are_refused_before_memory_is_taken(tmp_path):
    config, shapes, _ = TINY["tnl1"]
    weights = draw(shapes(config))
    huge = torch.zeros(1).expand(1 << 18, 24)
    config = config | {"glu_dim": 1 << 18}
    weights = {n: huge if n.endswith(("l1.weight", "l2.weight")) else x for n, x in weights.items()}
    assert "more than the" in error_of(write(tmp_path, config, weights))


def test_integer_weights_are_no_weights(tmp_path):
    config, shapes, _ = TINY["tnl1"]
    weights = draw(shapes(config))
    weights["model.layers.0.token_mixer.out_proj.weight"] = torch.ones(24, 24, dtype=torch.int8)
    assert "of no floating-point dtype" in error_of(write(tmp_path, config, weights))


@pytest.mark.parametrize(
    "config", [{"d_model": 8, "n_layer": 2, "ssm_cfg": {}}, {"model_type": "mamba2"}, tables.attention_config(layers=1)]
)
def test_a_mamba_is_sent_to_transformers(config, tmp_path):
    folder = write(tmp_path, config, {"backbone.layers.0.mixer.A_log": torch.zeros(16, 16)})
    assert "MambaForCausalLM" in error_of(folder)


def test_another_model_says_what_is_read(tmp_path):
    folder = write(tmp_path, {"model_type": "llama", "hidden_size": 8}, {"a": torch.zeros(1)})
    assert "model_type 'llama') is none of the checkpoints that linattn reads" in error_of(folder)
    assert not is_published(folder)


def test_a_converted_folder_is_a_checkpoint_of_ours(family, tmp_path):
    config, weights, _ = family
    made = convert(write(tmp_path / "from", config, weights), tmp_path / "to")
    assert made.tokenizer is None
    model, loaded = load_model(tmp_path / "to")
    assert loaded == made.config
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["config.json", "model.safetensors"]
    state = model.state_dict()
    assert [n for n, x in made.state.items() if not torch.equal(state[n], x)] == []
    with pytest.raises(ValueError, match=r"to: exists; give another folder"):
        convert(tmp_path / "from", tmp_path / "to")
    with pytest.raises(ValueError, match=r"to: is a checkpoint of linattn's own already"):
        convert(tmp_path / "to", tmp_path / "more")


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    config, shapes, _ = TINY["tnl1"]
    folder = write(tmp_path / "from", config, draw(shapes(config)))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("linattn.train.weights.write_json", full)
    with pytest.raises(OSError, match=r"No space"):
        convert(folder, tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["from"]


def test_converting_needs_no_transformers():
    code = "import sys; sys.modules['transformers'] = None; sys.modules['huggingface_hub'] = None; "
    code += "import linattn.cli.convert, linattn.cli.generate, linattn.models.published"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_export(folder, config, state, **others):
    """What `linattn export` leaves, by its format's definition."""
    folder.mkdir(exist_ok=True)
    others = {"model_type": "linattn", "architectures": ["LinattnForCausalLM"], "use_cache": True} | others
    (folder / "config.json").write_text(json.dumps({"model": to_data(config)} | others))
    save_file({"model." + n: x.contiguous() for n, x in state.items()}, folder / "model.safetensors")
    return folder


def test_an_export_comes_back_as_it_was(family, tmp_path):
    config, weights, _ = family
    ours, state = load_published(write(tmp_path, config, weights))
    again, back = load_published(write_export(tmp_path / "export", ours, state))
    assert again == ours and list(back) == list(state)
    assert [n for n, x in state.items() if not torch.equal(back[n], x)] == []


def test_an_export_of_transformers_own_making_comes_back(tmp_path):
    pytest.importorskip("transformers")
    export_pretrained = pytest.importorskip("linattn.hf.export").export_pretrained
    config, shapes, _ = TINY["jrt"]
    made = read_published(write(tmp_path / "from", config, draw(shapes(config))))
    export_pretrained(made.decoder("cpu"), made.config, tmp_path / "export", max_shard_size="20KB")
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    again = read_published(tmp_path / "export")
    assert again.config == made.config
    assert [n for n, x in made.state.items() if not torch.equal(again.state[n], x)] == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_model": 2**40}, "d_model is"),
        ({"n_layers": 4}, "config.json says 4 layers, the tensors are of 5"),
        ({"type": "Evil"}, "type 'Evil' is not one of"),
        ({"windows": 3}, "BasedConfig has no field 'windows'; did you mean 'window'"),
        ({"d_hidden": 50}, "misshapen: blocks.0.mlp.fc1.weight"),
    ],
)
def test_a_damaged_export_says_what(change, message, tmp_path):
    config, shapes, _ = TINY["based"]
    ours, state = load_published(write(tmp_path, config, draw(shapes(config))))
    folder = write_export(tmp_path / "export", ours, state, model=to_data(ours) | change)
    assert message in error_of(folder)


@pytest.fixture
def published_folder(family, tmp_path):
    config, weights, reading = family
    folder = write(tmp_path / "published", config, weights, "safetensors-sharded")
    write_tokenizer(folder, WORDS)
    return folder, config, weights, reading


def continued(config, weights, reading, text, tokens):
    """The continuation by the independent reading, one whole forward pass a token."""
    ids = [WORDS.index(w) for w in text.split()]
    for _ in range(tokens):
        ids.append(int(reading.logits(config, weights, torch.tensor(ids))[-1, : config["vocab_size"]].argmax()))
    return ids[-tokens:]


def test_generate_continues_as_the_published_model_would(family, tmp_path, capsys):
    """JRT-RNN decodes with the prefix it had at first, so a full pass a token is compared for a prompt beyond it."""
    config, weights, reading = family
    write_tokenizer(tmp_path, [f"w{i}" for i in range(config["vocab_size"] - 1)])
    folder = write(tmp_path, config, weights)
    prompt = " ".join(WORDS[:12])
    out = printed(capsys, "generate", "--model", folder, prompt, *GREEDY, "--json")
    words = json.loads(out)["text"].split()
    want = continued(config, weights, reading, prompt, 6)
    ended = config["vocab_size"] - 1
    stop = want.index(ended) if ended in want else len(want)
    assert words == [f"w{i}" for i in want[:stop]]
    assert stop > 0


def test_generate_says_the_same_of_the_source_and_of_the_converted_folder(published_folder, tmp_path, capsys):
    folder, *_ = published_folder
    verb.run([str(folder), str(tmp_path / "ours"), "--dtype", "fp32"])
    assert "parameters in float32" in capsys.readouterr().out
    source = printed(capsys, "generate", folder, "w1 w2 w3", *GREEDY)
    assert printed(capsys, "generate", tmp_path / "ours", "w1 w2 w3", *GREEDY) == source
    assert printed(capsys, "generate", "w1 w2 w3", *GREEDY, f"--model={folder}") == source
    assert re.match(r"w1 w2 w3 ?w\d", source)


def test_a_model_without_a_tokenizer_asks_for_one(tmp_path, capsys):
    config, shapes, _ = TINY["based"]
    folder = write(tmp_path / "published", config, draw(shapes(config)))
    assert main(["generate", str(folder), "w1", "--device", "cpu"]) == 2
    assert "has no tokenizer.json; give one with --tokenizer" in capsys.readouterr().err
    verb.run([str(folder), str(tmp_path / "ours")])
    assert "no tokenizer.json; name one with --tokenizer" in capsys.readouterr().out
    named = write_tokenizer(tmp_path, WORDS)
    source = printed(capsys, "generate", folder, "w1 w2", *GREEDY, "--tokenizer", named)
    assert printed(capsys, "generate", tmp_path / "ours", "w1 w2", *GREEDY, "--tokenizer", named) == source
    write_tokenizer(folder, [f"w{i}" for i in range(40)])
    with pytest.raises(ValueError, match=r"has 41 ids, the model 37"):
        convert(folder, tmp_path / "more")


@pytest.mark.parametrize("form, kinds", [("bin", 2), ("bin-sharded", 2), ("safetensors-sharded", 1)])
def test_a_hub_name_is_fetched_with_gpt2s_tokenizer(form, kinds, tmp_path, monkeypatch, capsys):
    config, shapes, _ = TINY["based"]
    folder = write(tmp_path / "repository", config, draw(shapes(config)), form)
    hub = Hub(folder, write_tokenizer(tmp_path, WORDS))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert "w1 w2" in printed(capsys, "generate", "--model", "hazyresearch/based-360m", "w1 w2", *GREEDY)
    wanted = [("hazyresearch/based-360m", (*SMALL, "model*.safetensors"))]
    wanted += [("hazyresearch/based-360m", (*SMALL, "pytorch_model*.bin"))]
    assert hub.asked == [*wanted[:kinds], ("openai-community/gpt2", "tokenizer.json")]
    made = convert("hazyresearch/based-360m", tmp_path / "ours")
    assert made.tokenizer is not None and (tmp_path / "ours" / "tokenizer.json").is_file()


def test_a_transnormer_of_the_hub_is_not_given_gpt2s_tokenizer(tmp_path, monkeypatch):
    config, shapes, _ = TINY["tnl1"]
    hub = Hub(write(tmp_path / "repository", config, draw(shapes(config))), None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert convert("OpenNLPLab/TransNormerLLM-385M", tmp_path / "ours").tokenizer is None


def test_without_huggingface_hub_or_a_network_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"fetching it from the hub needs huggingface_hub: pip install"):
        convert("hazyresearch/based-360m", tmp_path / "ours")
    hub = Hub(tmp_path, None)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: (tmp_path / "no network").stat())
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(ValueError, match=r"could not be fetched from the hub .* give the folder"):
        convert("hazyresearch/based-360m", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"no such folder, and no hub name of the form owner/name"):
        convert("based-360m", tmp_path / "ours")


def test_a_path_beside_things_that_are_there_is_no_hub_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["generate", "runs/misspelt", "w1", "--device", "cpu"]) == 2
    assert "runs/misspelt: holds no model.safetensors" in capsys.readouterr().err


def test_convert_is_one_sentence_for_a_wrong_request(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"there: exists"):
        verb.run([str(tmp_path / "there"), str(tmp_path / "there")])
    with pytest.raises(SystemExit) as left:
        verb.run(["--help"])
    assert left.value.code == 0
    assert "hazyresearch/based-360m" in capsys.readouterr().out


PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_the_pages_table_is_true():
    rows = re.findall(r"^\| (\w+/\S+) \| (\w+) \| ([\d,]+) \|", PAGE, re.M)
    assert {name for name, *_ in rows} == {name for name in tables.RELEASED if "/" in name}
    for name, size, parameters in rows:
        assert size == tables.RELEASED[name][0]
        assert model_costs(PUBLISHED[size]().decoder()).parameters == int(parameters.replace(",", "")), name


def test_the_pages_commands_and_python_run(tmp_path, monkeypatch, capsys):
    config, shapes, _ = TINY["based"]
    folder = write(tmp_path / "repository", config, draw(shapes(config)))
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(folder, write_tokenizer(tmp_path, WORDS)))
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in re.findall(r"^    linattn (.*)$", PAGE, re.M):
        name, *rest = shlex.split(line)
        short = ["--max-new-tokens", "2"] if name == "generate" else []
        assert {"convert": verb.run, "generate": generate.run}[name]([*rest, *short]) == 0, line
        ran.append(name)
    assert ran == ["generate", "convert", "generate"]
    (tmp_path / "checkpoints" / "released").symlink_to(folder)
    code, _ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(code, "checkpoints.md", "exec"), {})


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("head", [True, False])
def test_the_pages_mamba_is_the_published_forward(prefix, head, tmp_path):
    pytest.importorskip("transformers")
    weights = {name: 0.3 * x for name, x in draw(published_mamba.shapes()).items()}
    stored = {prefix + name: x for name, x in weights.items()} | {"train_metrics.total": torch.zeros(())}
    stored |= {f"{prefix}lm_head.weight": weights["backbone.embedding.weight"]} if head else {}
    folder = write(tmp_path, {"d_model": 12, "n_layer": 2, "ssm_cfg": {}}, stored, "bin-sharded")
    session: dict = {}
    exec(compile(re.findall(r"```python\n(.*?)```", PAGE, re.S)[1], "checkpoints.md", "exec"), session)
    model = session["load_mamba"](folder).double()
    ids = torch.randint(37, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(ids).logits[0]
    want = published_mamba.logits({name: x.double() for name, x in weights.items()}, ids[0])
    assert want.std() > 0.05
    assert difference(got, want) < 1e-6  # transformers keeps A and its sums in fp32
