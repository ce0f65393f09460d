"""Near duplicates among more documents than fit in memory, by MinHash and locality-sensitive hashing.

Public code holds most files several times with a changed header or a renamed import. Exact hashes miss those copies,
the model memorises them, and a held-out split that contains one measures memory. The signatures are datasketch's; its
LSH tables keep every band of every document in memory, so the join is done here, one band at a time.
"""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_ra3.corpus.ngrams import Hashes, mix, ngram_hashes, word_hashes

if TYPE_CHECKING:
    from datasketch import MinHash

NUM_PERM = 128
SHINGLE_WORDS = 5
SEED = 1
# Of false positives and false negatives among candidates: the first cost a comparison, the second stay in the corpus.
# On 25,474 files at threshold 0.7, (0.5, 0.5) finds 1677 duplicates with 14 bands, (0.1, 0.9) finds 1851 with 20.
LSH_WEIGHTS = (0.1, 0.9)
NO_SHINGLE = np.uint32(0xFFFFFFFF)  # datasketch's signature of an empty set holds nothing else

_LEADERS_PER_BUCKET = 16
_SHINGLES_AT_ONCE = 8192
_ROWS_AT_ONCE = 1 << 16


def signature(text: str) -> NDArray[np.uint32]:
    """MinHash signature [NUM_PERM] of the set of runs of five words in `text`: 512 bytes per document.

    A text without a shingle, one of fewer than five words, has `NO_SHINGLE` everywhere and resembles nothing.
    """
    shingles = np.unique(ngram_hashes(word_hashes(text), SHINGLE_WORDS) >> np.uint64(32))
    minhash = _empty_minhash().copy()
    for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
        minhash.update_batch(shingles[start : start + _SHINGLES_AT_ONCE].tolist())
    return minhash.digest()


def near_duplicates(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """For each document the number of the earlier document it duplicates, or -1 for a document to keep.

    `signatures` [documents, num_perm], in the order of preference, may be a memmap: it is read once per band and pass.
    A document is dropped if it shares a band with an earlier kept document and the two signatures agree in at least
    `threshold` of their places, the estimate of the Jaccard similarity. Whatever is named as original is itself kept.

    Two documents of similarity s share a band with probability 1 - (1 - s**rows)**bands (`band_shape`):
    0.92 at s = 0.7 and 0.998 at s = 0.8 for a threshold of 0.7.
    Within one bucket a document is compared with at most 16 earlier ones, which differ from each other: boilerplate
    that puts a million documents into one bucket costs 16 million comparisons, not 10**12.

    Peak memory is about 40 bytes per document and 100 MB, whatever the number of bands.

    Raises:
        ValueError: `threshold` is not in (0, 1], or `signatures` is not two-dimensional.
    """
    if signatures.ndim != 2:
        raise ValueError(f"signatures must be [documents, num_perm], found shape {signatures.shape}")
    bands, rows = band_shape(threshold, signatures.shape[1])
    original = np.full(len(signatures), -1, np.int64)
    has_shingle = _has_shingle(signatures)
    # A document's original can turn out to be a duplicate itself, in a later band: what it displaced is asked again.
    # Every pass settles at least the earliest unsettled document, so the passes end; real corpora need a few.
    while True:
        for band in range(bands):
            kept = np.flatnonzero((original < 0) & has_shingle)
            keys = _band_keys(signatures, kept, band * rows, (band + 1) * rows)
            _join_band(signatures, kept, keys, threshold, original)
        displaced = np.flatnonzero(original >= 0)
        displaced = displaced[original[original[displaced]] >= 0]
        if not len(displaced):
            return original
        original[displaced] = -1


def band_shape(threshold: float, num_perm: int = NUM_PERM) -> tuple[int, int]:
    """How many bands, of how many rows each: datasketch's optimum under `LSH_WEIGHTS`, (20, 6) for 0.7.

    Raises:
        ValueError: `threshold` is not in (0, 1].
    """
    from datasketch import MinHashLSH

    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"the similarity threshold must be in (0, 1], found {threshold}")
    index = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=LSH_WEIGHTS)
    return index.b, index.r


@cache
def _empty_minhash() -> "MinHash":
    from datasketch import MinHash

    # The shingles are hashes already; affine32 is the scheme with 4 bytes per permutation.
    return MinHash(num_perm=NUM_PERM, seed=SEED, hashfunc=int, scheme="affine32")


def _has_shingle(signatures: NDArray[np.uint32]) -> NDArray[np.bool_]:
    parts = [
        (signatures[start : start + _ROWS_AT_ONCE] != NO_SHINGLE).any(axis=1)
        for start in range(0, len(signatures), _ROWS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.empty(0, bool)


def _band_keys(signatures: NDArray[np.uint32], documents: NDArray[np.int64], first: int, end: int) -> Hashes:
    """One 64-bit key per document: equal if the signatures agree in the columns from `first` to `end`."""
    keys = np.empty(len(documents), np.uint64)
    for start in range(0, len(documents), _ROWS_AT_ONCE):
        rows = signatures[documents[start : start + _ROWS_AT_ONCE], first:end].astype(np.uint64)
        key = np.zeros(len(rows), np.uint64)
        for column in rows.T:
            key = mix(key ^ column)
        keys[start : start + _ROWS_AT_ONCE] = key
    return keys


def _join_band(
    signatures: NDArray[np.uint32],
    documents: NDArray[np.int64],
    keys: Hashes,
    threshold: float,
    original: NDArray[np.int64],
) -> None:
    """Writes into `original` the duplicates among `documents` (ascending) that share one of `keys`.

    In each bucket, the earliest document takes out what is close to it, then the earliest of the rest, and so on.
    """
    order = np.argsort(keys, kind="stable")
    documents, keys = documents[order], keys[order]
    for _ in range(_LEADERS_PER_BUCKET):
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        leaders = documents[first][np.cumsum(first) - 1]
        members = np.flatnonzero(~first)
        close = _close(signatures, leaders[members], documents[members], threshold)
        original[documents[members[close]]] = leaders[members[close]]
        rest = members[~close]
        if not len(rest):
            return
        documents, keys = documents[rest], keys[rest]


def _close(
    signatures: NDArray[np.uint32], left: NDArray[np.int64], right: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    """Whether the signatures of each pair agree in at least `threshold` of their places."""
    least = threshold * signatures.shape[1]
    close = np.empty(len(left), bool)
    for start in range(0, len(left), _ROWS_AT_ONCE):
        pairs = slice(start, start + _ROWS_AT_ONCE)
        agree = np.count_nonzero(signatures[left[pairs]] == signatures[right[pairs]], axis=1)
        close[pairs] = agree >= least
    return close
