"""Tokenizers: bytes, or any `tokenizer.json` of the tokenizers library, behind one small protocol.

Text never turns into a special token: a corpus that spells ``<|endoftext|>`` gets the ordinary tokens of those
characters, so only `prepare` ends a document. Not here: training a tokenizer, chat templates.

    python -c "from linattn.data import load_tokenizer; print(load_tokenizer('bytes').encode('hello'))"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from linattn.core.files import write_text

# Looked for in this order; the first that the vocabulary holds ends a document.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "[SEP]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|bos|>", "<|startoftext|>", "[CLS]")

_REPLACEMENT = "\ufffd"
_PATIENCE = 16  # ids held back for a character of at most 4 bytes, before they count as damage


class Tokenizer(Protocol):
    """What the library asks of a tokenizer.

    ``eos`` is the end-of-document token: `prepare` puts it after every document. ``bos`` is None where the vocabulary
    has none; `prepare` never writes it. Ids lie in [0, vocab_size). ``hash`` is 16 hex digits of a SHA-256 over the
    definition: two tokenizers of one hash give the same ids.
    """

    @property
    def name(self) -> str:
        """A short name for people."""
        ...

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the definition."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos(self) -> int:
        """The end-of-document token."""
        ...

    @property
    def bos(self) -> int | None:
        """The beginning-of-text token, or None."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with no special token added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text as one-dimensional integer arrays: the fast path of `prepare`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special and unknown ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        ...

    def save(self, folder: Path) -> str:
        """Write what `load_tokenizer` needs into ``folder``; returns "bytes" or the file's name there."""
        ...


class ByteTokenizer:
    """Bytes as tokens: ids 0..255 are the bytes of UTF-8 and 256 ends a document, 257 ids in all.

    Models pad the vocabulary to a multiple of 8 (264); the padding ids decode to nothing.
    """

    name = "bytes"
    vocab_size = 257
    eos = 256
    bos: int | None = None
    hash = hashlib.sha256(b"bytes: 0..255 are the bytes of UTF-8, 256 ends a document").hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text`` in UTF-8."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of each text, uint8."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 give U+FFFD, ids of 256 and more give nothing."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> str:
        """Nothing to write; returns "bytes"."""
        return "bytes"


class FileTokenizer:
    """A `tokenizer.json` of the tokenizers library. Made by `load_tokenizer`.

    Truncation and padding that the file asks for are switched off: they would change a corpus silently.
    """

    def __init__(self, text: str, name: str, where: str, eos: str | None = None):
        definition, self._backend = _parse(text, where)
        self.name = name
        self._text = text
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{where}: the tokenizer's vocabulary is empty")
        # Ids may have holes, so the largest one counts and not how many there are.
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_token = _find_eos(vocabulary, eos, where)
        self.eos = int(vocabulary[self.eos_token])
        self.bos: int | None = next((int(vocabulary[b]) for b in BOS_NAMES if b in vocabulary), None)
        canonical = {k: v for k, v in definition.items() if k not in ("truncation", "padding")}
        source = json.dumps([canonical, self.eos_token], sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with no special token added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32; on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.uint32) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special ids, and ids that the vocabulary does not hold, give nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> str:
        """Write the definition, as it was read, to ``folder/tokenizer.json``."""
        write_text(folder / "tokenizer.json", self._text)
        return "tokenizer.json"


def load_tokenizer(spec: str | Path, *, eos: str | None = None) -> Tokenizer:
    """The tokenizer that ``spec`` names: "bytes", the path of a `tokenizer.json`, or a folder that holds one.

    Args:
        spec: "bytes" or a path.
        eos: the token that ends a document, as the file spells it; by default the first of `EOS_NAMES` it has.

    Raises:
        ValueError: no such file, not a tokenizer, or no token to end a document with; the message has the fix.
    """
    if str(spec) == "bytes":
        if eos is not None:
            raise ValueError(f"the byte tokenizer ends documents with id 256; leave eos out (got {eos!r})")
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f'{path}: no such tokenizer file; give "bytes" or the path of a tokenizer.json')
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start}, so not a tokenizer.json; give the JSON file, not a .model file"
        ) from error
    name = path.resolve().parent.name if path.stem == "tokenizer" else path.stem
    return FileTokenizer(text, name, str(path), eos)


class StreamDecoder:
    """Text from ids that arrive one at a time, as a model writes them.

    Bytes that end inside a UTF-8 character are held back until the character is whole, so that the pieces joined are
    the text of all the ids::

        stream = StreamDecoder(tokenizer)
        for i in ids:
            print(stream.push(i), end="", flush=True)
        print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the ids of the last complete text, then those that are pending
        self._pending = 0
        self._shown = 0  # characters of decode(_ids) already given out

    def push(self, token: int) -> str:
        """The text that ``token`` completes; "" while a character is unfinished."""
        self._ids.append(int(token))
        self._pending += 1
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(_REPLACEMENT):
            new = text[self._shown :]
            if new:
                # Some decoders drop the space before a first word, so the last ids stay as context.
                self._ids = self._ids[-self._pending :]
                self._pending, self._shown = 0, len(self._tokenizer.decode(self._ids))
            return new
        if self._pending <= _PATIENCE:
            return ""
        # Damaged bytes, not a character under way. Only the last three U+FFFD can still change: an unfinished
        # character has at most three bytes, and byte-fallback vocabularies show one U+FFFD for each.
        kept = len(text) - min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
        new, self._shown = text[self._shown : kept], max(self._shown, kept)
        return new

    def flush(self) -> str:
        """What is still held back, an unfinished character as U+FFFD. The decoder is then as new."""
        text = self._tokenizer.decode(self._ids)[self._shown :]
        self._ids, self._pending, self._shown = [], 0, 0
        return text


def _parse(text: str, where: str) -> tuple[dict[str, Any], Any]:
    import tokenizers

    try:
        definition = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); give a tokenizer.json"
        ) from error
    if not isinstance(definition, dict) or "model" not in definition:
        raise ValueError(
            f'{where}: has no key "model", so it is not a tokenizer.json of the tokenizers library '
            "(vocab.json and tokenizer_config.json are other files)"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{where}: the tokenizers library cannot read it: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that spells a special token stays text
    return definition, backend


def _find_eos(vocabulary: dict[str, int], eos: str | None, where: str) -> str:
    if eos is not None:
        if eos not in vocabulary:
            raise ValueError(f"{where}: the vocabulary has no token {eos!r} to end documents with")
        return eos
    for name in EOS_NAMES:
        if name in vocabulary:
            return name
    raise ValueError(
        f"{where}: the vocabulary has no end-of-document token (looked for {', '.join(EOS_NAMES)}); "
        'name one of its tokens with load_tokenizer(..., eos="...") or add one to the file'
    )
