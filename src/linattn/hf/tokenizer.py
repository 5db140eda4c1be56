"""linattn's tokenizers as transformers' own: the same ids for the same text, padding on the left.

pytest tests/hf/test_hf_export.py -k tokenizer
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linattn.data import Tokenizer

BYTES_EOS = "<|endoftext|>"
"""How the byte tokenizer's id 256 is written in transformers, which has no nameless tokens."""


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers; pads are its end-of-document token.

    Text gets the ids that the model was trained on: special tokens that the file would put around it (a BOS) are left
    out, since linattn trains without them. A prompt that spells a special token gets that token, as in all of
    transformers and unlike in linattn's own `encode`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = tokenizer.save(Path(folder))
        backend = _bytes() if file == "bytes" else tokenizers.Tokenizer.from_file(str(Path(folder) / file))
    backend.no_truncation()
    backend.no_padding()
    plain, dressed = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    if plain != dressed:
        backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    eos = backend.id_to_token(tokenizer.eos)
    bos = None if tokenizer.bos is None else backend.id_to_token(tokenizer.bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=eos,
        bos_token=bos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _bytes() -> tokenizers.Tokenizer:
    alphabet = _byte_letters()
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([BYTES_EOS])
    return backend


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write byte i as: itself if printable, else the next one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(i) if i in printable else chr(next(others)) for i in range(256)]
