"""Corpora put together and taken apart without reading their sources again.

Parts of a large corpus are prepared by separate jobs; a file that two parts hold is dropped from the later one when
they are merged, and from the held-back split where the training split has it. Near duplicates across parts are not
found, for their signatures are not kept.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import SPLITS, Manifest, Shard, SplitInfo
from megatron_ra3.corpus.publish import publish, refuse_existing
from megatron_ra3.corpus.report import Report, write_report
from megatron_ra3.corpus.shards import read_shard, write_split
from megatron_ra3.corpus.snippets import SnippetRecord, num_chars
from megatron_ra3.corpus.tokenizer import FOLDER, load_tokenizer
from megatron_ra3.corpus.vocabulary import count_tokens


def merge_corpora(parts: Sequence[Path], out: Path, samples_per_shard: int) -> Manifest:
    """Writes one corpus that holds every file of `parts` once, in their order.

    Raises:
        ValueError: fewer than two parts, or their tokenizers or held-out fractions differ. FileNotFoundError: a part is
            no corpus.
        FileExistsError: `out` holds a corpus.
    """
    if len(parts) < 2:
        raise ValueError(f"merging needs two corpora or more, found {len(parts)}")
    manifests = [Manifest.load(part) for part in parts]
    if len({manifest.tokenizer_sha256 for manifest in manifests}) > 1:
        raise ValueError(
            f"not all of {', '.join(map(str, parts))} have the same tokenizer; prepare them without --tokenizer-vocab "
            "and set corpus.tokenizer to the one of your model"
        )
    fractions = {manifest.settings["heldout_fraction"] for manifest in manifests}
    if len(fractions) > 1:
        raise ValueError(
            f"the parts hold back different fractions of repositories, {sorted(fractions)}, so one would train on what "
            "another holds back; prepare them with the same --heldout-fraction"
        )
    before: set[str] = set()
    repeated = 0

    def records(split: str) -> Iterator[SnippetRecord]:
        nonlocal repeated
        for part, manifest in zip(parts, manifests, strict=True):
            here: set[str] = set()
            for record in _records(part, manifest.splits[split]):
                here.add(_file_of(record))
                if _file_of(record) not in before:
                    yield record
            repeated += len(here & before)
            before.update(here)

    def describe(tallies: dict[str, "_Tally"]) -> Manifest:
        dropped = _sum(manifest.files_dropped for manifest in manifests) + Counter(duplicate=repeated)
        return replace(
            manifests[0],
            settings={
                "merged": [manifest.settings for manifest in manifests],
                "heldout_fraction": fractions.pop(),
                "samples_per_shard": samples_per_shard,
            },
            files_seen=sum(manifest.files_seen for manifest in manifests),
            bytes_seen=sum(manifest.bytes_seen for manifest in manifests),
            files_dropped=dict(dropped),
            cut_dropped=dict(_sum(manifest.cut_dropped for manifest in manifests)),
            scrubbed=dict(_sum(manifest.scrubbed for manifest in manifests)),
            licences=dict(_sum(tally.licences for tally in tallies.values())),
            languages=dict(_sum(tally.languages for tally in tallies.values())),
        )

    sources = {split: records(split) for split in SPLITS}
    with _new_corpus(out, parts[0], sources, samples_per_shard, describe) as new:
        new.publish()
    return new.manifest


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

    def part(number: int) -> AbstractContextManager[_NewCorpus]:
        def describe(tallies: dict[str, _Tally]) -> Manifest:
            files = sum(tally.counts["files"] for tally in tallies.values())
            return replace(
                whole,
                settings={
                    "part": f"{number + 1} of {len(outs)}",
                    "of": whole.settings,
                    "heldout_fraction": whole.settings["heldout_fraction"],
                },
                files_seen=files,
                bytes_seen=sum(tally.counts["chars"] for tally in tallies.values()),
                files_dropped={},
                cut_dropped={},
                scrubbed={},
                licences=dict(_sum(tally.licences for tally in tallies.values())),
                languages=dict(_sum(tally.languages for tally in tallies.values())),
            )

        records = {
            split: (record for record in _records(corpus, whole.splits[split]) if part_of[_repo_of(record)] == number)
            for split in SPLITS
        }
        return _new_corpus(outs[number], corpus, records, samples_per_shard, describe)

    with ExitStack() as stack:
        parts = [stack.enter_context(part(number)) for number in range(len(outs))]
        for new in parts:
            new.publish()
    return [new.manifest for new in parts]


class _Tally:
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
            if _file_of(record) != self._file:
                self._file = _file_of(record)
                self.counts["files"] += 1
                self.licences[record.licence or "unknown"] += 1
                self.languages[record.language] += 1
                self.repos[_repo_of(record)] += 1
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


@dataclass(frozen=True)
class _NewCorpus:
    """A corpus that is complete in a temporary folder."""

    staging: Path
    out: Path
    manifest: Manifest

    def publish(self) -> None:
        publish(self.staging, self.out, self.manifest)


@contextmanager
def _new_corpus(
    out: Path,
    tokenizer_of: Path,
    records: Mapping[str, Iterator[SnippetRecord]],
    samples_per_shard: int,
    describe: Callable[[dict[str, _Tally]], Manifest],
) -> Iterator[_NewCorpus]:
    """Writes shards, tokenizer and report; `describe` is asked last, for all but the splits."""
    refuse_existing(out, "choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".rearranging-") as name:
        folder = Path(name)
        tallies = {split: _Tally() for split in SPLITS}
        splits = {
            split: tally.split(write_split(folder, split, tally.watch(records[split]), samples_per_shard))
            for split, tally in tallies.items()
        }
        if not splits["train"].snippets:
            raise ValueError(f"{out} would hold no training snippet; give more input or make fewer parts")
        manifest = describe(tallies)
        if manifest.tokenizer_sha256:
            tokenizer = load_tokenizer(shutil.copytree(tokenizer_of / FOLDER, folder / FOLDER))
            splits = {
                split: replace(info, tokens=count_tokens(tokenizer, folder, info)) for split, info in splits.items()
            }
        manifest = replace(manifest, splits=splits)
        write_report(folder, Report(manifest, _sum(tally.repos for tally in tallies.values()), {}))
        yield _NewCorpus(folder, out, manifest)


def _records(folder: Path, split: SplitInfo) -> Iterator[SnippetRecord]:
    for shard in split.shards:
        yield from read_shard(folder / shard.tar.name)


def _deal(corpus: Path, whole: Manifest, parts: int) -> dict[str, int]:
    """The part of each repository: the largest first, each to the part that has the fewest snippets so far."""
    sizes = Counter(_repo_of(record) for split in SPLITS for record in _records(corpus, whole.splits[split]))
    filled = [0] * parts
    part_of = {}
    for repo, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        part_of[repo] = filled.index(min(filled))
        filled[part_of[repo]] += size
    return part_of


def _file_of(record: SnippetRecord) -> str:
    """Snippets of one text have ids that begin alike."""
    return record.id.rpartition("-")[0]


def _repo_of(record: SnippetRecord) -> str:
    """A file of no repository is one of its own."""
    return record.repo or _file_of(record)


def _sum(counts: Iterable[dict[str, int] | Counter[str]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter[str]())
