"""Pure integer functions behind the data order: keys, a permutation without memory, a mixture without history.

Training data must be found from (seed, step, row) alone, so that no state has to be saved and any rank can make any
row. A shuffled index list per epoch would do for small corpora, but takes 8 bytes per window on every rank (2 GB for a
trillion tokens) and seconds at each epoch's start; a Feistel network with cycle walking takes neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

MASK64 = (1 << 64) - 1
FEISTEL_ROUNDS = 6

MIXTURE_BITS = 48
# The odd number next to 2**48 / golden ratio: successive multiples spread as evenly as any sequence can.
_GOLDEN = 173961102589771


def derive_key(*parts: object) -> int:
    """A 64-bit key from values, through sha256: equal parts give equal keys on any machine and in any version."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def mix64(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def mix64_array(values: np.ndarray) -> np.ndarray:
    """:func:`mix64` of each element of a uint64 array."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def permute(index: int, size: int, key: int) -> int:
    """Where ``index`` goes in a pseudo-random permutation of ``range(size)`` chosen by ``key``; O(1) memory.

    A balanced Feistel network permutes the smallest even number of bits that holds ``size``; values beyond ``size``
    are sent through again until they fall inside (Black and Rogaway 2002, cycle walking), at most 4 times on average.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside range({size})")
    if size == 1:
        return 0
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(key ^ (number << 56) ^ right) & mask)
        index = (left << half) | right
        if index < size:
            return index


class Mixture:
    """A fixed sequence of domains with given shares, and how often each has come up before any point of it.

    Draw ``r`` looks where ``r * golden ratio + shift (mod 1)`` falls in the unit interval, divided by the shares. This
    keeps every domain's count within a few draws of its share at all times, not only on average, and the
    count before draw ``r`` has a closed form (:func:`floor_sum`), so nothing is replayed.

    Args:
        weights: relative shares, positive; used to a precision of 2**-48.
        key: decides the shift, so that different seeds begin at different places.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        total = sum(map(Fraction, weights))
        self._modulus = 1 << MIXTURE_BITS
        self._shift = key % self._modulus
        self._bounds = [0]
        cumulative = Fraction(0)
        for weight in weights:
            cumulative += Fraction(weight)
            self._bounds.append(round(cumulative / total * self._modulus))

    def choose(self, draw: int) -> int:
        """The domain of draw ``draw``."""
        point = (draw * _GOLDEN + self._shift) % self._modulus
        for domain, bound in enumerate(self._bounds[1:]):
            if point < bound:
                return domain
        raise AssertionError("the last bound is the modulus")

    def counts(self, draws: int) -> list[int]:
        """How often each domain comes up among draws ``0 .. draws - 1``."""
        if len(self._bounds) == 2:
            return [draws]
        below = [self._count_below(draws, bound) for bound in self._bounds]
        return [after - before for before, after in pairwise(below)]

    def _count_below(self, draws: int, bound: int) -> int:
        # One draw is below the bound when floor(x / M) - floor((x - bound) / M) is 1, with x before the modulus.
        modulus = self._modulus
        whole = floor_sum(draws, modulus, _GOLDEN, self._shift + modulus)
        return whole - floor_sum(draws, modulus, _GOLDEN, self._shift + modulus - bound)


def floor_sum(count: int, modulus: int, slope: int, offset: int) -> int:
    """Sum of ``floor((slope * i + offset) / modulus)`` for i in ``range(count)``, all non-negative; O(log) steps.

    The Euclid-like recursion of Graham, Knuth and Patashnik, Concrete Mathematics, section 3.5.
    """
    total = 0
    while count > 0:
        total += (slope // modulus) * (count * (count - 1) // 2) + (offset // modulus) * count
        slope, offset = slope % modulus, offset % modulus
        top = slope * count + offset
        if top < modulus:
            break
        count, offset, slope, modulus = top // modulus, top % modulus, modulus, slope
    return total
