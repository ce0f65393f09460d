"""From examined batches to shards: duplicates out, splits by repository, every shard planned before one is written.

Held-back files are chosen by repository, because the files of one repository resemble each other: a split by file would
measure memory. Nothing here grows with the text of the corpus; a document takes about 250 bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ra3.corpus.manifest import SPLITS, Shard, SplitInfo
from megatron_ra3.corpus.originals import Originals, find_originals
from megatron_ra3.corpus.pool import map_in_processes
from megatron_ra3.corpus.shards import shard_name, write_shard
from megatron_ra3.corpus.staging import load_batch, load_signatures, load_snippets

Piece = tuple[Path, list[tuple[int, int, int]]]
"""A batch, and of it (file, first snippet, one past the last snippet)."""


@dataclass(frozen=True)
class Plan:
    """What becomes of every staged file; all arrays but `starts` are [files].

    `starts` [batches + 1] holds the number of each batch's first file, `snippets` how many each file has, `repo` a hash
    of its repository; a file of none is one of its own.
    """

    batches: tuple[Path, ...]
    starts: np.ndarray
    snippets: np.ndarray
    repo: np.ndarray
    heldout: np.ndarray
    originals: Originals

    def kept(self, split: str) -> np.ndarray:
        """Numbers of the files that go into a split."""
        return np.flatnonzero((self.originals.original < 0) & (self.heldout == (split == "heldout")))


@dataclass(frozen=True)
class Contents:
    """Counts of a corpus; `licences`, `languages` and `repos` count files."""

    splits: dict[str, SplitInfo]
    licences: Counter[str]
    languages: Counter[str]
    repos: Counter[str]


def plan_corpus(batches: Sequence[Path], heldout_fraction: float, similarity: float | None, scratch: Path) -> Plan:
    """Decides the fate of every staged file. A duplicate is one of an earlier file.

    `similarity` is the Jaccard similarity from which on files are near duplicates, None keeps them. Signatures are
    gathered in a file in `scratch`.
    """
    digests: list[bytes] = []
    snippets: list[int] = []
    repos: list[int] = []
    starts = [0]
    for path in batches:
        files = load_batch(path).files
        digests += [bytes.fromhex(file.sha256[:32]) for file in files]
        snippets += [len(file.snippets) for file in files]
        repos += [_repo_hash(file.repo or file.sha256) for file in files]
        starts.append(len(snippets))
    compared = similarity is not None and snippets
    originals = find_originals(
        np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2),
        _gather_signatures(batches, len(snippets), scratch) if compared else None,
        similarity,
    )
    repo = np.array(repos, np.uint64)
    return Plan(
        batches=tuple(batches),
        starts=np.array(starts),
        snippets=np.array(snippets, np.int64),
        repo=repo,
        heldout=repo < np.float64(heldout_fraction) * 2.0**64,
        originals=originals,
    )


def write_splits(plan: Plan, folder: Path, samples_per_shard: int, workers: int) -> dict[str, tuple[Shard, ...]]:
    """Writes the shards of all splits into `folder`, several at once."""
    jobs = [
        (split, folder / f"{shard_name(split, number)}.tar", pieces)
        for split in SPLITS
        for number, pieces in enumerate(_shard_pieces(plan, plan.kept(split), samples_per_shard))
    ]
    shards = map_in_processes(_write_pieces, [(path, pieces) for _, path, pieces in jobs], workers)
    return {
        split: tuple(shard for shard, (of, _, _) in zip(shards, jobs, strict=True) if of == split) for split in SPLITS
    }


def count(plan: Plan, shards: dict[str, tuple[Shard, ...]]) -> Contents:
    """Counts what the plan keeps."""
    sums = {split: Counter[str]() for split in SPLITS}
    licences, languages, repos = Counter[str](), Counter[str](), Counter[str]()
    for number, path in enumerate(plan.batches):
        first = plan.starts[number]
        for at, file in enumerate(load_batch(path).files, start=first):
            if plan.originals.original[at] >= 0:
                continue
            licences[file.licence or "unknown"] += 1
            languages[file.language] += 1
            repos[file.repo] += 1
            counts = sums["heldout" if plan.heldout[at] else "train"]
            counts["files"] += 1
            for name in ("lines", "native_comments", "chars"):
                counts[name] += getattr(file, name)
    splits = {
        split: SplitInfo(
            files=counts["files"],
            repos=len(np.unique(plan.repo[plan.kept(split)])),
            snippets=sum(shard.samples for shard in shards[split]),
            lines=counts["lines"],
            native_comments=counts["native_comments"],
            chars=counts["chars"],
            tokens=None,
            shards=shards[split],
        )
        for split, counts in sums.items()
    }
    return Contents(splits, licences, languages, repos)


def names_of(plan: Plan, files: Iterable[int]) -> dict[int, str]:
    """Repository and path of some files, which only their snippets know."""
    names = {}
    for file in sorted(set(files)):
        batch = int(np.searchsorted(plan.starts, file, side="right")) - 1
        ((_, data),) = _samples(plan.batches[batch], [(file - int(plan.starts[batch]), 0, 1)])
        record = json.loads(data)
        names[file] = f"{record['repo']}/{record['source']}"
    return names


def _repo_hash(repo: str) -> int:
    return int.from_bytes(hashlib.sha256(repo.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def _gather_signatures(batches: Sequence[Path], num_files: int, scratch: Path) -> np.ndarray:
    gathered: np.ndarray | None = None
    at = 0
    for part in map(load_signatures, batches):
        if len(part) and gathered is None:
            shape = (num_files, part.shape[1])
            gathered = np.lib.format.open_memmap(scratch / "signatures.npy", "w+", part.dtype, shape)
        if gathered is not None:
            gathered[at : at + len(part)] = part
        at += len(part)
    assert gathered is not None, "some file is staged"
    return gathered


def _shard_pieces(plan: Plan, files: np.ndarray, samples_per_shard: int) -> Iterator[list[Piece]]:
    """For each shard, which snippets of which batches it holds."""
    ends = np.cumsum(plan.snippets[files])
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, samples_per_shard):
        end = min(start + samples_per_shard, total)
        pieces: list[Piece] = []
        first, last = np.searchsorted(ends, [start, end - 1], side="right")
        for at in range(first, last + 1):
            file = int(files[at])
            begins = int(ends[at]) - int(plan.snippets[file])
            batch = int(np.searchsorted(plan.starts, file, side="right")) - 1
            part = (file - int(plan.starts[batch]), max(start - begins, 0), min(end, int(ends[at])) - begins)
            if not pieces or pieces[-1][0] != plan.batches[batch]:
                pieces.append((plan.batches[batch], []))
            pieces[-1][1].append(part)
        yield pieces


def _write_pieces(path: Path, pieces: Sequence[Piece]) -> Shard:
    return write_shard(path, (sample for batch, parts in pieces for sample in _samples(batch, parts)))


def _samples(batch: Path, parts: Sequence[tuple[int, int, int]]) -> Iterator[tuple[str, bytes]]:
    """Ids and encoded snippets of some files of a batch."""
    files = load_batch(batch).files
    data = load_snippets(batch)
    begins = np.concatenate([[0], np.cumsum([sum(file.snippets) for file in files])])
    for number, first, last in parts:
        file = files[number]
        ends = int(begins[number]) + np.cumsum([0, *file.snippets])
        for snippet in range(first, last):
            yield f"{file.sha256[:16]}-{snippet:04d}", data[ends[snippet] : ends[snippet + 1]]
