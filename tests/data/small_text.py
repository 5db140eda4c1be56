"""Small documents and shards."""

import json

import numpy as np

from linattn.data import TokenShards, prepare

EOS = 256


def some_documents(count=40, seed=0):
    """Documents of 1 to 60 bytes that are all different."""
    rng = np.random.default_rng(seed)
    return [f"{i}" + "".join(rng.choice(list("abcde "), rng.integers(0, 58))) + "." for i in range(count)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def make_shards(folder, documents, **options):
    """The documents as byte tokens, all in train unless asked otherwise."""
    source = write_jsonl(folder / "in.jsonl", documents)
    prepare([source], folder / "out", **{"validation_fraction": 0, **options})
    return TokenShards(folder / "out", "train")


def write_bpe(path, corpus=("the whale the sea the ship é €",), specials=("<|endoftext|>",), vocab_size=300):
    """A small byte-level BPE as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(path))
    return path
