"""One corpus of several that were prepared apart, every file once.

Parts of a large corpus are prepared by separate jobs, which cannot see each other's files. Without a second look copies
across parts would be trained on several times, and a held-back file could have its twin in the training split of
another part. Sources are not read again: what files share shows in their snippets.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ra3.corpus.duplicates import NUM_PERM, signature
from megatron_ra3.corpus.lines import join_lines
from megatron_ra3.corpus.manifest import SPLITS, Manifest
from megatron_ra3.corpus.originals import find_originals, largest_families
from megatron_ra3.corpus.pool import map_in_processes, num_workers
from megatron_ra3.corpus.publish import publish
from megatron_ra3.corpus.rearrange import Tally, file_of, new_corpus, records_of, similarity_of, total, write_corpus
from megatron_ra3.corpus.report import report_families
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.snippets import SnippetRecord


@dataclass(frozen=True)
class Merged:
    """A merged corpus, and how many files went because of other parts.

    `similarity` is None where near duplicates were not looked for; `reason` then says why.
    """

    manifest: Manifest
    duplicates: int
    near_duplicates: int
    similarity: float | None
    reason: str


@dataclass(frozen=True)
class _Part:
    folder: Path
    manifest: Manifest


def merge_corpora(
    folders: Sequence[Path], out: Path, samples_per_shard: int, *, similarity: float | None = None, workers: int = 0
) -> Merged:
    """Writes one corpus that holds every file of the corpora in `folders` once, in their order.

    Of two copies the earlier one stays; all training files are earlier than the held-back ones.

    Args:
        folders: corpora, in the order of preference.
        out: new folder.
        samples_per_shard: of the new corpus.
        similarity: from which on files are near duplicates; None: as the parts were prepared, where they agree.
        workers: processes that compare; 0: one per core. The result does not depend on it.

    Raises:
        ValueError: fewer than two parts, or their tokenizers, token ids or held-out fractions differ.
        FileNotFoundError: a part is no corpus. FileExistsError: `out` holds a corpus, or is being written to.
    """
    if len(folders) < 2:
        raise ValueError(f"merging needs two corpora or more, found {len(folders)}")
    parts = [_Part(folder, Manifest.load(folder)) for folder in folders]
    _check_alike(parts)
    reason = ""
    if similarity is None:
        similarity, reason = _common_similarity(parts)
    with new_corpus(out) as folder:
        keys, signatures = _compare(parts, folder.parent, similarity is not None, workers)
        found = find_originals(keys, signatures, similarity)
        dropped = Counter(duplicate=int(found.exact.sum()), near_duplicate=int(found.near.sum()))
        families = largest_families(found)
        names = dict.fromkeys(file for family in families for file in family.files)
        numbers = count()

        def kept(split: str) -> Iterator[SnippetRecord]:
            for file, part, records in _files(parts, split, numbers):
                if file in names:
                    names[file] = f"{records[0].repo}/{records[0].source} in {part.folder}"
                if found.original[file] < 0:
                    yield from records

        def describe(tallies: dict[str, Tally]) -> tuple[Manifest, list[dict[str, Any]]]:
            manifest = _describe(parts, tallies, dropped, samples_per_shard, similarity)
            return manifest, report_families(found, families, names)

        manifest = write_corpus(
            folder, folders[0], {split: kept(split) for split in SPLITS}, samples_per_shard, describe
        )
        return Merged(publish(out, manifest), dropped["duplicate"], dropped["near_duplicate"], similarity, reason)


def _files(
    parts: Sequence[_Part], split: str, numbers: Iterator[int]
) -> Iterator[tuple[int, _Part, list[SnippetRecord]]]:
    """The snippets of every file, in the order of `_compare` if the splits are asked for in theirs."""
    for part in parts:
        for _, records in groupby(records_of(part.folder, part.manifest.splits[split]), file_of):
            yield next(numbers), part, list(records)


def _check_alike(parts: Sequence[_Part]) -> None:
    names = ", ".join(str(part.folder) for part in parts)
    if len({part.manifest.tokenizer_sha256 for part in parts}) > 1:
        raise ValueError(
            f"not all of {names} have the same tokenizer; prepare them with the --tokenizer of your model, or without "
            "one and set corpus.tokenizer"
        )
    if len({part.manifest.token_form for part in parts}) > 1:
        raise ValueError(f"not all of {names} hold token ids of one form; prepare them with the same --pretokenize")
    fractions = {part.manifest.settings["heldout_fraction"] for part in parts}
    if len(fractions) > 1:
        raise ValueError(
            f"the parts hold back different fractions of repositories, {sorted(fractions)}, so one would train on what "
            "another holds back; prepare them with the same --heldout-fraction"
        )


def _common_similarity(parts: Sequence[_Part]) -> tuple[float | None, str]:
    """What all parts were prepared with; or None, and why."""
    found = {str(part.folder): similarity_of(part.manifest) for part in parts}
    kept = [name for name, similarity in found.items() if similarity is None]
    if kept:
        return None, f"{', '.join(kept)} prepared without looking for them"
    if len(set(found.values())) > 1:
        return None, "prepared with " + ", ".join(f"--similarity {value} ({name})" for name, value in found.items())
    return next(iter(found.values())), ""


def _compare(parts: Sequence[_Part], scratch: Path, signs: bool, workers: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Keys uint64 [files, 1] of the files of all training, then all held-back splits, and their signatures if `signs`.

    A file that continues in the next shard is signed in two parts. That leaves out the runs of words across the cut,
    which makes one file per shard seem a little less similar to its copies.
    """
    splits = [(part, part.manifest.splits[split]) for split in SPLITS for part in parts]
    shards = [
        (number, part.folder / shard.tar.name) for part, info in splits for number, shard in enumerate(info.shards)
    ]
    jobs = [(tar, scratch / f"{job:06d}.signatures" if signs else None) for job, (_, tar) in enumerate(shards)]
    num_bytes = sum(shard.tar.bytes for _, info in splits for shard in info.shards)
    keys_of = map_in_processes(_describe_shard, jobs, num_workers(workers, num_bytes))
    keys: list[int] = []
    path = scratch / "signatures"
    with path.open("wb") as file:
        last = np.empty(0, np.uint32)
        for (number, _), (_, signed), of_shard in zip(shards, jobs, keys_of, strict=True):
            rows = (
                np.fromfile(signed, np.uint32).reshape(-1, NUM_PERM)
                if signed
                else np.empty((len(of_shard), 0), np.uint32)
            )
            if number and of_shard[0] == keys[-1]:
                rows[0] = np.minimum(rows[0], last)
                file.seek(-last.nbytes, os.SEEK_CUR)
                keys.pop()
            file.write(rows.tobytes())
            keys += of_shard
            last = rows[-1]
    signatures = np.memmap(path, np.uint32, "r", shape=(len(keys), NUM_PERM)) if signs else None
    return np.array(keys, np.uint64).reshape(-1, 1), signatures


def _describe_shard(tar: Path, signatures: Path | None) -> list[int]:
    """Keys of the files that a shard holds snippets of; their signatures go into a file."""
    keys, rows = [], []
    for name, records in groupby(read_shard(tar), file_of):
        keys.append(int(name, 16))
        text = "\n".join(join_lines(record.lines) for record in records)
        if signatures is not None:
            rows.append(signature(text))
    if signatures is not None:
        np.stack(rows).tofile(signatures)
    return keys


def _describe(
    parts: Sequence[_Part],
    tallies: dict[str, Tally],
    dropped: Counter[str],
    samples_per_shard: int,
    similarity: float | None,
) -> Manifest:
    manifests = [part.manifest for part in parts]
    return replace(
        manifests[0],
        settings={
            "merged": [manifest.settings for manifest in manifests],
            "heldout_fraction": manifests[0].settings["heldout_fraction"],
            "similarity": similarity,
            "samples_per_shard": samples_per_shard,
        },
        files_seen=sum(manifest.files_seen for manifest in manifests),
        bytes_seen=sum(manifest.bytes_seen for manifest in manifests),
        files_dropped=dict(total(manifest.files_dropped for manifest in manifests) + dropped),
        cut_dropped=dict(total(manifest.cut_dropped for manifest in manifests)),
        scrubbed=dict(total(manifest.scrubbed for manifest in manifests)),
        licences=dict(total(tally.licences for tally in tallies.values())),
        languages=dict(total(tally.languages for tally in tallies.values())),
    )
