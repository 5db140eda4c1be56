"""Published checkpoints written for the tests, a hub that holds them, and the commands that read them."""

import json
import shutil
import types
from fnmatch import fnmatch

import tokenizers
import torch
from safetensors.torch import save_file

from linattn.cli.main import main


def draw(shapes, seed=0, dtype=torch.float32):
    """Weights large enough that every part of the model matters; the head is the embedding, as published."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            x = 1 + 0.3 * x
        elif name.endswith("theta"):
            x = x.abs()
        elif len(shape) == 2:
            x = 1.5 * x / shape[1] ** 0.5
        weights[name] = x.to(dtype)
    for head, embedding in (
        ("lm_head.weight", "transformer.embeddings.word_embeddings.weight"),
        ("lm_head.weight", "model.embed_tokens.weight"),
    ):
        weights |= {head: weights[embedding]} if embedding in weights else {}
    return weights


def write(folder, config, weights, form="bin"):
    """A published checkpoint of ``weights`` in ``folder``, in one of `FORMS`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, _, sharded = form.partition("-")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = list(weights)
    parts = [names[0::2], names[1::2]] if sharded else [names]
    files = [f"{stem}-{i:05d}-of-00002.{kind}" for i in (1, 2)] if sharded else [f"{stem}.{kind}"]
    for file, part in zip(files, parts, strict=True):
        some = {n: weights[n] for n in part}
        if kind == "bin":
            torch.save(some, folder / file)
        else:
            save_file({n: x.clone().contiguous() for n, x in some.items()}, folder / file)
    if sharded:
        places = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder, words):
    """A tokenizer.json of one word an id; the last ends a document."""
    vocab = {w: i for i, w in enumerate([*words, "<|endoftext|>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


WORDS = [f"w{i}" for i in range(36)]
GREEDY = ("--temperature", "0", "--max-new-tokens", "6", "--device", "cpu")


def printed(capsys, *argv):
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


class Hub(types.ModuleType):
    """huggingface_hub with the one repository that ``folder`` is, and GPT-2's tokenizer. As there, a snapshot holds
    what was asked for so far."""

    def __init__(self, folder, tokenizer):
        super().__init__("huggingface_hub")
        self.folder, self.tokenizer, self.asked = folder, tokenizer, []
        self.snapshot = folder.with_name("snapshot")

    def snapshot_download(self, name, allow_patterns):
        self.asked.append((name, tuple(allow_patterns)))
        self.snapshot.mkdir(exist_ok=True)
        for file in self.folder.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, self.snapshot / file.name)
        return str(self.snapshot)

    def hf_hub_download(self, name, filename):
        self.asked.append((name, filename))
        return str(self.tokenizer)
