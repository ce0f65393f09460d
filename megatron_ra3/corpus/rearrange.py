"""Corpora taken apart without reading their sources again, and what that shares with putting them together."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import SPLITS, Manifest, Shard, SplitInfo
from megatron_ra3.corpus.publish import claim, clear, finish_publication, is_publishing, publish, refuse_existing
from megatron_ra3.corpus.report import Report, write_report
from megatron_ra3.corpus.shards import read_shard, write_split
from megatron_ra3.corpus.snippets import SnippetRecord, num_chars
from megatron_ra3.corpus.tokenizer import FOLDER, load_tokenizer
from megatron_ra3.corpus.vocabulary import count_tokens

_FIX = "choose another --out"


def split_corpus(corpus: Path, outs: Sequence[Path]) -> list[Manifest]:
    """Deals the repositories of a corpus out to new corpora, one for each of `outs`, of about equal size.

    Raises:
        ValueError: fewer than two parts, or one would have no training snippet. FileNotFoundError: no such corpus.
        FileExistsError: a folder of `outs` holds a corpus.
    """
    if len({out.resolve() for out in outs}) < max(len(outs), 2):
        raise ValueError(f"splitting needs two different folders or more, found {', '.join(map(str, outs))}")
    whole = Manifest.load(corpus)
    part_of = _deal(corpus, whole, len(outs))
    samples_per_shard = max(shard.samples for split in whole.splits.values() for shard in split.shards)

    def write_part(number: int, folder: Path) -> Manifest:
        def describe(tallies: dict[str, Tally]) -> tuple[Manifest, tuple[()]]:
            files = sum(tally.counts["files"] for tally in tallies.values())
            part = replace(
                whole,
                settings={
                    "part": f"{number + 1} of {len(outs)}",
                    "of": whole.settings,
                    "heldout_fraction": whole.settings["heldout_fraction"],
                    "similarity": similarity_of(whole),
                },
                files_seen=files,
                bytes_seen=sum(tally.counts["chars"] for tally in tallies.values()),
                files_dropped={},
                cut_dropped={},
                scrubbed={},
                licences=dict(total(tally.licences for tally in tallies.values())),
                languages=dict(total(tally.languages for tally in tallies.values())),
            )
            return part, ()

        records = {
            split: (record for record in records_of(corpus, whole.splits[split]) if part_of[repo_of(record)] == number)
            for split in SPLITS
        }
        return write_corpus(folder, corpus, records, samples_per_shard, describe)

    with ExitStack() as stack:
        folders = [stack.enter_context(new_corpus(out)) for out in outs]
        manifests = [write_part(number, folder) for number, folder in enumerate(folders)]
        return [publish(out, manifest) for out, manifest in zip(outs, manifests, strict=True)]


class Tally:
    """Counts the snippets of a split on their way into shards."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.licences = Counter[str]()
        self.languages = Counter[str]()
        self.repos = Counter[str]()
        self._file = ""

    def watch(self, records: Iterable[SnippetRecord]) -> Iterator[tuple[str, bytes]]:
        """The records as samples; the snippets of a file follow each other."""
        for record in records:
            if file_of(record) != self._file:
                self._file = file_of(record)
                self.counts["files"] += 1
                self.licences[record.licence or "unknown"] += 1
                self.languages[record.language] += 1
                self.repos[repo_of(record)] += 1
            comment = LANGUAGES[record.language].comment
            self.counts["snippets"] += 1
            self.counts["lines"] += len(record.lines)
            self.counts["chars"] += sum(map(num_chars, record.lines))
            self.counts["native_comments"] += sum(
                annotate(line, "observe", comment)[0] is not None for line in record.lines
            )
            yield record.id, record.encode()

    def split(self, shards: tuple[Shard, ...]) -> SplitInfo:
        """The counts of everything that was watched, tokens aside."""
        names = ("files", "snippets", "lines", "native_comments", "chars")
        counts = {name: self.counts[name] for name in names}
        return SplitInfo(**counts, repos=len(self.repos), tokens=None, shards=shards)


@contextmanager
def new_corpus(out: Path) -> Iterator[Path]:
    """Claims `out`, where no corpus is yet, and yields a folder for one on its way to `publish`.

    Raises:
        FileExistsError: `out` holds a corpus, also one that a killed process was about to put there, or is claimed.
    """
    if not is_publishing(out):
        refuse_existing(out, _FIX)
    with claim(out) as claimed:
        try:
            if is_publishing(out):
                finish_publication(out)
                refuse_existing(out, _FIX)
            clear(claimed)
            folder = claimed / "corpus"
            folder.mkdir()
            yield folder
        except BaseException:
            if not is_publishing(out):
                shutil.rmtree(claimed)
            raise


def write_corpus(
    folder: Path,
    tokenizer_of: Path,
    records: Mapping[str, Iterator[SnippetRecord]],
    samples_per_shard: int,
    describe: Callable[[dict[str, Tally]], tuple[Manifest, Sequence[Mapping[str, Any]]]],
) -> Manifest:
    """Writes shards, tokenizer and report into `folder`.

    `describe` is asked last, for all of the manifest but the splits, and for families of duplicates to report.
    """
    tallies = {split: Tally() for split in SPLITS}
    splits = {
        split: tally.split(write_split(folder, split, tally.watch(records[split]), samples_per_shard))
        for split, tally in tallies.items()
    }
    if not splits["train"].snippets:
        raise ValueError(f"{folder.parents[1]} would hold no training snippet; give more input or make fewer parts")
    manifest, families = describe(tallies)
    if manifest.tokenizer_sha256:
        tokenizer = load_tokenizer(shutil.copytree(tokenizer_of / FOLDER, folder / FOLDER))
        splits = {split: replace(info, tokens=count_tokens(tokenizer, folder, info)) for split, info in splits.items()}
    manifest = replace(manifest, splits=splits)
    repos = total(tally.repos for tally in tallies.values())
    write_report(folder, Report(manifest, repos, {}, families))
    return manifest


def similarity_of(corpus: Manifest) -> float | None:
    """From which similarity on near duplicates were dropped from a corpus; None: they were kept."""
    kept = "near_duplicates" in corpus.settings.get("without", ())
    return None if kept else corpus.settings.get("similarity")


def records_of(folder: Path, split: SplitInfo) -> Iterator[SnippetRecord]:
    """All samples of a split, in the order they were written."""
    for shard in split.shards:
        yield from read_shard(folder / shard.tar.name)


def _deal(corpus: Path, whole: Manifest, parts: int) -> dict[str, int]:
    """The part of each repository: the largest first, each to the part that has the fewest snippets so far."""
    sizes = Counter(repo_of(record) for split in SPLITS for record in records_of(corpus, whole.splits[split]))
    filled = [0] * parts
    part_of = {}
    for repo, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        part_of[repo] = filled.index(min(filled))
        filled[part_of[repo]] += size
    return part_of


def file_of(record: SnippetRecord) -> str:
    """Snippets of one text have ids that begin alike."""
    return record.id.rpartition("-")[0]


def repo_of(record: SnippetRecord) -> str:
    """A file of no repository is one of its own."""
    return record.repo or file_of(record)


def total(counts: Iterable[dict[str, int] | Counter[str]]) -> Counter[str]:
    """The sum of counts."""
    return sum(map(Counter, counts), Counter[str]())
