"""What any model of bytes should beat: unigram and trigram counts, and xz, on the same text.

Counts are of the training bytes alone; the held-out text is what is scored. Bits are per byte of UTF-8.
"""

from __future__ import annotations

import lzma
import math

import numpy as np


def unigram_bits(train: bytes, held_out: bytes) -> float:
    """Bits per byte of held-out text under add-one byte frequencies of the training text."""
    counts = np.bincount(_array(train), minlength=256) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits[_array(held_out)].mean())


def trigram_bits(train: bytes, held_out: bytes) -> float:
    """Bits per byte under an interpolated trigram (Witten-Bell): each order backs off to the next by its novelty.

    p(c | ab) = (n(abc) + d(ab) p(c | b)) / (n(ab) + d(ab)), d(ab) the number of different bytes seen after ab.
    """
    order = [np.zeros(256 ** (n + 1)) for n in range(3)]
    text = _array(train).astype(np.int64)
    for n, counts in enumerate(order):
        np.add.at(counts, _codes(text, n), 1)
    scored = _array(held_out).astype(np.int64)
    p = np.full(len(scored), 1 / 256)
    for n, counts in enumerate(order):
        table = counts.reshape(-1, 256)
        total, kinds = table.sum(1), (table > 0).sum(1)
        codes = _codes(scored, n)
        context = codes // 256
        weight = total[context] + kinds[context]
        better = (counts[codes] + kinds[context] * p[n:]) / np.maximum(weight, 1)
        p[n:] = np.where(weight > 0, better, p[n:])
    return float(-np.log2(p).mean())


def xz_bits(train: bytes, held_out: bytes) -> float:
    """Bits per byte that xz -9e spends on the held-out text after the training text (what it adds to the archive)."""
    return 8 * (_xz(train + held_out) - _xz(train)) / len(held_out)


def xz_whole_bits(text: bytes) -> float:
    """Bits per byte of ``text`` compressed by itself with xz -9e."""
    return 8 * _xz(text) / len(text)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits per byte of a text whose negative log-likelihood is ``nats`` in all."""
    return nats / math.log(2) / n_bytes


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _array(text: bytes) -> np.ndarray:
    if not text:
        raise ValueError("the text is empty: there is nothing to count")
    return np.frombuffer(text, np.uint8)


def _codes(text: np.ndarray, n: int) -> np.ndarray:
    """Each (n+1)-gram as one number, for text[n:]."""
    code = text[: len(text) - n].copy()
    for i in range(1, n + 1):
        code = code * 256 + text[i : len(text) - n + i]
    return code
