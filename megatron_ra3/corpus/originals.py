"""Which file is a copy of which, exact and near copies together, and the largest families of copies.

A count of duplicates says that something was dropped; whether it was rightly dropped shows in which files were taken
for copies of which.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ra3.corpus.duplicates import near_duplicates


@dataclass(frozen=True)
class Originals:
    """For every file the number of the kept file that it duplicates, -1 for a kept one; and whether the text is equal.

    Both are [files]. A file of equal text is `exact` even if what it equals was itself dropped for a near duplicate.
    """

    original: NDArray[np.int64]
    exact: NDArray[np.bool_]

    @property
    def near(self) -> NDArray[np.bool_]:
        """Files dropped although no earlier one has their text."""
        return (self.original >= 0) & ~self.exact


@dataclass(frozen=True)
class Family:
    """A kept file, how many were dropped for it, and the numbers of the first of these."""

    kept: int
    exact: int
    near: int
    first: tuple[int, ...]

    @property
    def files(self) -> tuple[int, ...]:
        """All numbers in it."""
        return self.kept, *self.first


def find_originals(
    digests: NDArray[np.uint64], signatures: NDArray[np.uint32] | None, similarity: float | None
) -> Originals:
    """Finds the copies among files that stand in the order of preference.

    Args:
        digests: [files, words], equal where and only where the texts are.
        signatures: [files, permutations] of `duplicates.signature`; may be a memmap, None if `similarity` is.
        similarity: estimated Jaccard similarity from which on a file is a near duplicate; None: none is.
    """
    original = np.full(len(digests), -1, np.int64)
    if similarity is not None and len(digests):
        assert signatures is not None
        original = near_duplicates(signatures, similarity)
    order = np.lexsort((np.arange(len(digests)), *digests.T))
    ordered = digests[order]
    repeats = np.zeros(len(digests), bool)
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = order[~repeats][np.cumsum(~repeats) - 1]
    exact = np.zeros(len(digests), bool)
    exact[order] = repeats
    original[order[repeats]] = first[repeats]
    # The first of equal texts may be a near duplicate, and what that is near may equal something earlier.
    while len(chained := np.flatnonzero((original >= 0) & (original[original] >= 0))):
        original[chained] = original[original[chained]]
    return Originals(original, exact)


def largest_families(found: Originals, limit: int = 10, shown: int = 8) -> list[Family]:
    """The `limit` families that lost the most files, ties in their order; of each the first `shown` that went."""
    dropped = np.flatnonzero(found.original >= 0)
    dropped = dropped[np.argsort(found.original[dropped], kind="stable")]
    kept, starts, counts = np.unique(found.original[dropped], return_index=True, return_counts=True)
    families = []
    for at in np.lexsort((kept, -counts))[:limit]:
        members = dropped[starts[at] : starts[at] + counts[at]]
        exact = int(found.exact[members].sum())
        families.append(Family(int(kept[at]), exact, len(members) - exact, tuple(members[:shown].tolist())))
    return families
