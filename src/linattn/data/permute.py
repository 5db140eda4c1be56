"""A shuffle that is not stored: a bijection of range(n), keyed by (seed, epoch).

A Feistel network over the least power of two >= n, walked until it lands below n: on average under two steps.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8  # each touches one half; four already leave small n visibly unmixed


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation (seed, epoch) of range(n) sends each index.

    Args:
        indices: integers in [0, n), any shape.
        n: the size, up to 2^62.
        seed: any integer.
        epoch: any integer; each has an independent permutation.

    Returns:
        int64, the shape of ``indices``.
    """
    x = np.asarray(indices, dtype=np.uint64)
    if n < 1 or n > 1 << 62 or (x.size and int(x.max()) >= n):
        raise ValueError(f"indices must lie in [0, n) with n in [1, 2^62], got n={n}")
    if n == 1:
        return np.zeros(x.shape, np.int64)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    bits = max(2, (n - 1).bit_length())
    flat = _feistel(x.reshape(-1), bits, keys)
    while (outside := flat >= n).any():
        flat[outside] = _feistel(flat[outside], bits, keys)
    return flat.astype(np.int64).reshape(x.shape)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = x & low_mask, x >> np.uint64(low_bits)
    for i, key in enumerate(keys):
        if i % 2:
            low = low ^ (_mix(high, key) & low_mask)
        else:
            high = high ^ (_mix(low, key) & high_mask)
    return (high << np.uint64(low_bits)) | low


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of x under key: splitmix64's finalizer (Steele, Lea, Flood 2014)."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
