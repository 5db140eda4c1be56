"""`linattn export`: our checkpoints and tokenizers for transformers, with the same ids, logits and text."""

import json
import subprocess
import sys

import pytest
import torch
from hf_tiny import CONFIGS, make, prompts
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from linattn.cli import export as verb
from linattn.data import load_tokenizer
from linattn.data.meta import TokenizerMeta
from linattn.generate import GREEDY, generate_text
from linattn.hf.export import export_pretrained
from linattn.hf.tokenizer import hf_tokenizer
from linattn.train.weights import ModelCard, load_model, write_model

TEXTS = ["Call me Ishmael.", "  spaces\n\tand lines ", "naïve Ελλάδα 中文 🙂", "", "I'm \x00 a\x7f\xad byte"]


@pytest.fixture
def checkpoint(model, tmp_path):
    """A model with the byte tokenizer as training writes it."""
    folder, tokenizer = tmp_path / "ours", load_tokenizer("bytes")
    folder.mkdir()
    made = TokenizerMeta("bytes", tokenizer.name, tokenizer.hash, 257, eos=256, eos_token=None)
    write_model(model.model, ModelCard(model.config.model_config(), made), folder, tokenizer)
    return folder


def test_the_verb_writes_what_auto_classes_read(checkpoint, tmp_path, capsys):
    out = tmp_path / "theirs"
    assert verb.run([str(checkpoint), str(out)]) == 0
    assert "parameters, tokenizer bytes" in capsys.readouterr().out
    theirs, (ours, config) = AutoModelForCausalLM.from_pretrained(out), load_model(checkpoint)
    assert theirs.config.model_config() == config
    with torch.no_grad():
        got = theirs(prompts(), prefix_length=0).logits
        torch.testing.assert_close(got, ours(prompts()).logits, rtol=0, atol=1e-6)
    pipe = pipeline("text-generation", str(out), device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    (result,) = generate_text(ours, load_tokenizer("bytes"), [TEXTS[0]], max_new_tokens=6, sampling=GREEDY)
    assert pipe(TEXTS[0], **options)[0]["generated_text"] == result.text
    with pytest.raises(ValueError, match="exists; give another folder"):
        verb.run([str(checkpoint), str(out)])


def test_the_verb_casts_and_shards(checkpoint, tmp_path):
    out = tmp_path / "theirs"
    verb.run([str(checkpoint), str(out), "--dtype", "bf16", "--max-shard-size", "20KB"])
    assert len(list(out.glob("*.safetensors"))) > 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out).parameters()} == {torch.bfloat16}


def test_a_model_without_a_known_tokenizer_is_exported_alone(tmp_path, capsys):
    folder = tmp_path / "ours"
    folder.mkdir()
    write_model(make("based").model, ModelCard(CONFIGS["based"]), folder, None)
    assert verb.run([str(folder), str(tmp_path / "theirs")]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert not list((tmp_path / "theirs").glob("tokenizer*"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = make("based")
    big = load_tokenizer("bytes")
    big.vocab_size = 300
    with pytest.raises(ValueError, match="300 ids and the model 257"):
        export_pretrained(model.model, CONFIGS["based"], tmp_path, big)


@pytest.mark.parametrize("text", TEXTS)
def test_the_byte_tokenizer_gives_bytes(text, tmp_path):
    ours = load_tokenizer("bytes")
    hf_tokenizer(ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side, len(theirs)) == (256, 256, "left", 257)
    assert theirs.decode([104, 105, 256], skip_special_tokens=True) == "hi"


def test_a_file_tokenizer_gives_the_ids_of_training_without_a_bos(tmp_path):
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "call": 2, "me": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    hf_tokenizer(ours).save_pretrained(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs("call me me you")["input_ids"] == ours.encode("call me me you") == [2, 3, 3, 4]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "</s>")


def test_without_transformers_the_import_and_the_verb_say_what_to_install(tmp_path):
    code = """
import sys
sys.modules["transformers"] = None
import linattn, linattn.generate
try:
    import linattn.hf
except ImportError as error:
    print(error)
from linattn.cli.export import run
try:
    run(["nowhere", "out"])
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.splitlines() == ["linattn.hf needs transformers: pip install 'linattn[hf]'"] * 2


def test_importing_linattn_imports_no_transformers():
    code = "import sys, linattn, linattn.generate, linattn.train; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
