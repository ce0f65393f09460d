"""Which samples every step of a run has used, as one number per step in the metrics.

A restart that loses a sample, or shows one twice, does not show in a loss curve. Two runs over the same corpus used the
same samples in the same steps if and only if these numbers are equal, whatever the number of ranks. Pure Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

_MODULUS = 1 << 128


class Consumed(NamedTuple):
    """A multiset of sample ids: how many, and the sum of their hashes, which no order or split changes."""

    samples: int = 0
    digest: int = 0

    @classmethod
    def of(cls, ids: Iterable[str]) -> Consumed:
        """From sample ids."""
        hashes = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()) for name in ids]
        return cls(len(hashes), sum(hashes) % _MODULUS)

    def plus(self, other: Consumed) -> Consumed:
        """Both together."""
        return Consumed(self.samples + other.samples, (self.digest + other.digest) % _MODULUS)

    def to_json(self) -> dict[str, Any]:
        """Fields of a metrics record."""
        return {"samples": self.samples, "samples_digest": f"{self.digest:032x}"}
