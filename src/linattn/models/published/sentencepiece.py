"""A SentencePiece file of the BPE kind (TransNormerLLM's tokenizer.model) as a tokenizer.json.

It is read from its bytes, without the package sentencepiece, for the tokenizers library. Not here: the unigram kind,
and tiktoken's files, whose splitting rule and special tokens are no part of the file.

    pytest tests/hf/test_published_tokenizer.py
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

SPACE = "\u2581"
"""How pieces spell a space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Kinds of pieces."""

BPE = 2
"""The kind of model, of unigram (1), BPE, word (3) and char (4)."""


class SentencePiece(NamedTuple):
    """What a file says: its pieces (text, score, kind), which stand at their ids, and how text is made ready."""

    pieces: list[tuple[str, float, int]]
    model_type: int
    byte_fallback: bool
    space_is_suffix: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def sentencepiece_json(path: Path) -> str:
    """The tokenizer.json of a tokenizer.model: the same ids.

    But for one case: where the file puts a space before a text, a text that is one of its user-defined pieces and
    nothing else gets none.

    Raises:
        ValueError: not such a file, or not of the BPE kind.
    """
    try:
        found = read_sentencepiece(path.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error}); copy the file again") from error
    if not found.pieces or found.model_type != BPE or found.space_is_suffix or not found.escape_whitespaces:
        raise ValueError(
            f"{path}: only SentencePiece models of the BPE kind are read (this one has type {found.model_type} and "
            f"{len(found.pieces)} pieces); make a tokenizer.json of it and give that with --tokenizer"
        )
    ids = {text: i for i, (text, _, _) in enumerate(found.pieces)}
    unknown = next((text for text, _, kind in found.pieces if kind == UNKNOWN), None)
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids, merges=_merges(found, ids), unk_token=unknown, fuse_unk=True, byte_fallback=found.byte_fallback
        )
    )
    own = [text for text, _, kind in found.pieces if kind == USER_DEFINED]
    made.normalizer = normalizers.Sequence(_normalizers(found, own))  # pyright: ignore
    strip = [decoders.Strip(" ", 1, 0)] if found.add_dummy_prefix else []
    made.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [text for text, _, kind in found.pieces if kind in (UNKNOWN, CONTROL)]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made.add_tokens([AddedToken(text, normalized=True) for text in own])
    return made.to_str()


def read_sentencepiece(data: bytes) -> SentencePiece:
    """The fields of a ModelProto that matter here.

    Raises:
        ValueError, IndexError, struct.error, UnicodeDecodeError: bytes that are no such message.
    """
    pieces, trainer, normalizer = [], {}, {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            (score,) = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))
            pieces.append((_bytes(piece.get(1, 0)).decode(), score, piece.get(3, NORMAL)))
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(_fields(_bytes(value)))
    return SentencePiece(
        pieces,
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        space_is_suffix=bool(trainer.get(24, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _merges(found: SentencePiece, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best score first: the order in which SentencePiece joins them."""
    normal = {text for text, _, kind in found.pieces if kind == NORMAL}
    ways = [
        (-score, ids[text], ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
        for text, score, kind in found.pieces
        if kind == NORMAL
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _normalizers(found: SentencePiece, own: list[str]) -> list[normalizers.Normalizer]:
    made: list[normalizers.Normalizer] = []
    if found.charsmap:
        made.append(normalizers.Precompiled(found.charsmap))
    if found.remove_extra_whitespaces:
        made += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" +"), " "),
        ]
    if found.add_dummy_prefix:
        # The library normalizes added tokens as it does texts, and these must stay what they are.
        alone = "|".join(re.escape(text) for text in own)
        start = rf"\A(?!(?:{alone})\z)(?=.|\n)" if own else r"\A(?=.|\n)"
        made.append(normalizers.Replace(tokenizers.Regex(start), SPACE))
    return [*made, normalizers.Replace(" ", SPACE)]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message, in order: (number, integer or bytes)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(message, at)
        elif not size:
            raise ValueError(f"a field of wire type {key & 7} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"it ends inside a field, at byte {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("an integer where text was due")
    return value
