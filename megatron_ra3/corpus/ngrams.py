"""Hashes of words and word n-grams, computed for a whole text at once.

Decontamination and near-duplicate search ask about every n-gram of terabytes; a Python loop over words would cost more
than reading, parsing and compressing them together. Every machine, process and hash seed gives the same hashes.
"""

import re
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_BLANK_BYTES = tuple((escape, b"  ") for escape in (rb"\n", rb"\t", rb"\r"))
_PUNCTUATION_BEYOND_ASCII = re.compile(r"[^\w\x00-\x7f]")
_SEED = 0x5EED
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)
_NGRAM_BASE = np.uint64(0xD6E8FEB86659FD93)
_POWERS_AT_LEAST = 1 << 16


def word_hashes(text: str) -> Hashes:
    r"""64-bit hashes [words] of the words of `text`, in order: maximal runs of letters, digits and underscores.

    ASCII letters count as lower case. The escapes \n, \t and \r of string literals separate words as the characters
    they stand for do, so that a text and the same text inside a Python or JSON string have the same words.
    """
    codes, starts, ends = _words(text)
    if not len(starts):
        return np.empty(0, np.uint64)
    powers, inverses = _powers(1 << max(_POWERS_AT_LEAST, len(codes)).bit_length())
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_byte_values()[codes] * powers[: len(codes)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


def are_names(text: str) -> NDArray[np.bool_]:
    """Whether each word [words] of `text` is no number and has more than one character."""
    codes, starts, ends = _words(text)
    return (codes[starts] > ord("9")) & (ends - starts > 1)


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """64-bit hashes [max(words - n + 1, 0)] of all runs of `n` words, from the words' hashes."""
    count = max(len(words) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total *= _NGRAM_BASE
        total += words[offset : offset + count]
    return mix(total)


def mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit (MurmurHash3's finalizer)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def _words(text: str) -> tuple[NDArray[np.uint8], NDArray[np.intp], NDArray[np.intp]]:
    """The lower-case bytes of `text`, and where its words start and end in them."""
    if not text.isascii():
        text = _PUNCTUATION_BEYOND_ASCII.sub(" ", text)
    data = text.encode("utf-8", "surrogatepass").lower()
    for escape, blank in _BLANK_BYTES:
        data = data.replace(escape, blank)
    codes = np.frombuffer(data, np.uint8)
    inside = np.zeros(len(codes) + 2, np.int8)
    inside[1:-1] = _word_bytes()[codes]
    edges = np.flatnonzero(np.diff(inside))
    return codes, edges[::2], edges[1::2]


@cache
def _word_bytes() -> NDArray[np.bool_]:
    codes = np.arange(256)
    ascii_word = [chr(code).isalnum() or code == ord("_") for code in range(128)]
    return np.where(codes < 128, np.resize(ascii_word, 256), True)


@cache
def _byte_values() -> Hashes:
    return mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(_SEED))


@cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """The first `count` powers of the base and of its inverse, modulo 2**64."""
    both = np.ones((2, count), np.uint64)
    both[0, 1:], both[1, 1:] = _BASE, _INVERSE
    np.multiply.accumulate(both, axis=1, out=both)
    return both[0], both[1]
