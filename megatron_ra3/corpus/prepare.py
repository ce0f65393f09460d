"""Turns source files of any origin into a corpus: shards, indexes, a manifest, a report and, on request, a tokenizer.

Three passes, each bounded in memory and spread over all cores: documents are examined batch by batch (`staging.py`),
duplicates and splits are decided from what was kept (`assemble.py`), and shards are written. The same input and
settings give the same bytes whatever the number of workers; a killed run goes on by the same command.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from megatron_ra3 import __version__
from megatron_ra3.corpus.assemble import Contents, Plan, count, names_of, plan_corpus, write_splits
from megatron_ra3.corpus.decontaminate import Benchmarks
from megatron_ra3.corpus.examine import Filter, Rules
from megatron_ra3.corpus.inputs import Input, find_inputs
from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.licences import normalise
from megatron_ra3.corpus.lines import CommentMode
from megatron_ra3.corpus.manifest import FORMAT_VERSION, DataFile, Manifest, SplitInfo, TokenForm
from megatron_ra3.corpus.originals import largest_families
from megatron_ra3.corpus.pool import num_workers
from megatron_ra3.corpus.pretokenize import pretokenize_shards
from megatron_ra3.corpus.progress import read_with_progress
from megatron_ra3.corpus.publish import claim, finish_publication, is_publishing, publish, refuse_existing
from megatron_ra3.corpus.report import Report, report_families, write_report
from megatron_ra3.corpus.snippets import SnippetLimits
from megatron_ra3.corpus.staging import Batch, examine_all, load_batch
from megatron_ra3.corpus.tokenizer import SMALLEST_VOCAB, load_tokenizer
from megatron_ra3.corpus.vocabulary import adopt_tokenizer, count_tokens, train_on_shards
from megatron_ra3.latents import Surface

DEFAULT_EXCLUDE = (".*", "__pycache__", "site-packages", "dist-packages")
_FIX = "choose another --out or pass --overwrite"
_EXAMPLES_PER_REASON = 20


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, what to leave out, how to cut it, where to write it."""

    sources: tuple[str, ...]
    out: str
    languages: tuple[str, ...] = ("python",)
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    limits: SnippetLimits = field(default_factory=SnippetLimits)
    without: tuple[Filter, ...] = ()
    """Filters that are switched off."""
    similarity: float = 0.7
    """Estimated Jaccard similarity from which on a file is a near duplicate of an earlier one."""
    licences: tuple[str, ...] = ()
    """SPDX identifiers that are allowed; none: all."""
    unknown_licence: bool = False
    """Keep also files of unknown licence, where `licences` are given."""
    benchmarks: tuple[str, ...] = ()
    """Files of benchmarks whose tasks and solutions must not be in the corpus."""
    heldout_fraction: float = 0.02
    """Of repositories."""
    samples_per_shard: int = 10_000
    max_file_bytes: int = 1_000_000
    limit_files: int | None = None
    tokenizer_vocab: int | None = None
    """Train a tokenizer of that many tokens on the training split."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer that the corpus takes instead."""
    pretokenize: Surface | None = None
    """Store the token ids of every line too, as runs of this `latents.surface` need them."""
    comments: CommentMode = "observe"
    """The `latents.comments` of those runs."""
    workers: int = 0
    """Processes; 0: one per core."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction must be in [0, 1), found {self.heldout_fraction}")
        if not 0.0 < self.similarity <= 1.0:
            raise ValueError(f"similarity must be in (0, 1], found {self.similarity}")
        smallest = {
            "samples_per_shard": 1, "max_file_bytes": 1, "limit_files": 1, "tokenizer_vocab": SMALLEST_VOCAB,
            "workers": 0,
        }  # fmt: skip
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if self.tokenizer and self.tokenizer_vocab is not None:
            raise ValueError(
                f"tokenizer={self.tokenizer} with tokenizer_vocab={self.tokenizer_vocab}: give one of the two"
            )
        if self.pretokenize and not (self.tokenizer or self.tokenizer_vocab):
            raise ValueError(f"pretokenize={self.pretokenize} needs the tokenizer of your model, or a tokenizer_vocab")
        if self.comments != "observe" and not self.pretokenize:
            raise ValueError(
                f"comments={self.comments} shapes token ids alone: the text keeps all; set pretokenize too"
            )
        if self.pretokenize == "newline" and self.comments == "keep_as_code":
            raise ValueError("pretokenize=newline with comments=keep_as_code: no run reads that; see latents.comments")
        if not self.sources:
            raise ValueError("no source given; name folders, archives, JSONL or Parquet files, or --stdlib")
        for name, known in (("without", get_args(Filter)), ("languages", tuple(LANGUAGES))):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise ValueError(f"{name} has unknown {sorted(unknown)}; known are {', '.join(known)}")

    @property
    def suffixes(self) -> frozenset[str]:
        """Ends of the names of the files that are read."""
        return frozenset(suffix for name in self.languages for suffix in LANGUAGES[name].suffixes)


class EmptyCorpusError(ValueError):
    """No training snippet came out."""


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the corpus that `config` describes into `config.out`; the manifest comes last.

    A corpus that is to be overwritten stays until its successor is complete.

    Raises:
        ValueError: a source does not exist or is of no known kind, or no training snippet came out; the message then
            says what was looked at and why it was dropped.
        FileExistsError: the folder holds a corpus and `config.overwrite` is not set, or is being written to.
    """
    inputs = find_inputs(config.sources, suffixes=config.suffixes, exclude=config.exclude)
    for path in config.benchmarks:
        if not Path(path).is_file():
            raise ValueError(f"benchmark file {path} does not exist")
    if config.tokenizer:
        load_tokenizer(config.tokenizer)
    benchmarks = {path: DataFile.of(Path(path)).sha256 for path in config.benchmarks}
    out = Path(config.out)
    if not config.overwrite and not is_publishing(out):
        refuse_existing(out, _FIX)
    with claim(out) as staging:
        if is_publishing(out):
            manifest = finish_publication(out)
            if manifest.settings == _settings(config, benchmarks):
                return manifest
            if not config.overwrite:
                refuse_existing(out, _FIX)
        try:
            manifest = _build(config, inputs, benchmarks, staging)
        except EmptyCorpusError:
            shutil.rmtree(staging)
            raise
        return publish(out, manifest)


def _build(config: PrepareConfig, inputs: Sequence[Input], benchmarks: dict[str, str], staging: Path) -> Manifest:
    workers = num_workers(config.workers, sum(source.bytes for source in inputs))
    rules = Rules(
        limits=config.limits,
        without=frozenset(config.without),
        licences=frozenset(normalise(",".join(config.licences))) if config.licences else None,
        unknown_licence=config.unknown_licence,
        benchmarks=Benchmarks.load([Path(path) for path in config.benchmarks]) if config.benchmarks else None,
    )
    batches = _examine(config, inputs, rules, _fingerprint(config, benchmarks), staging, workers)
    seen = _Seen()
    for path in batches:
        seen.add(load_batch(path))
    similarity = None if "near_duplicates" in config.without else config.similarity
    plan = plan_corpus(batches, config.heldout_fraction, similarity, staging)
    seen.add_duplicates(plan)
    folder = staging / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    contents = count(plan, write_splits(plan, folder, config.samples_per_shard, workers))
    if not contents.splits["train"].snippets:
        raise EmptyCorpusError(_empty_corpus(config, seen, contents.splits["heldout"]))
    form, splits = _tokens(config, folder, contents, workers)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        settings=_settings(config, benchmarks),
        files_seen=seen.documents,
        bytes_seen=seen.bytes,
        files_dropped=dict(seen.dropped),
        cut_dropped=dict(seen.cut_dropped),
        scrubbed=dict(seen.scrubbed),
        licences=dict(contents.licences),
        languages=dict(contents.languages),
        tokenizer_sha256=form.tokenizer_sha256 if form else None,
        splits=splits,
        token_form=form if config.pretokenize else None,
    )
    families = largest_families(plan.originals)
    names = names_of(plan, [file for family in families for file in family.files])
    copies = report_families(plan.originals, families, names)
    write_report(folder, Report(manifest, contents.repos, seen.examples, copies))
    return manifest


class _Seen:
    """What went in, and what was left out and why, summed over batches."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self.dropped = Counter[str]()
        self.cut_dropped = Counter[str]()
        self.scrubbed = Counter[str]()
        self.examples: dict[str, list[list[str]]] = {}

    def add(self, batch: Batch) -> None:
        self.documents += batch.documents
        self.bytes += batch.bytes
        self.dropped.update(batch.dropped)
        self.cut_dropped.update(batch.cut_dropped)
        self.scrubbed.update(batch.scrubbed)
        for reason, examples in batch.examples.items():
            shown = self.examples.setdefault(reason, [])
            shown += examples[: _EXAMPLES_PER_REASON - len(shown)]

    def add_duplicates(self, plan: Plan) -> None:
        found = plan.originals
        self.dropped += Counter(duplicate=int(found.exact.sum()), near_duplicate=int(found.near.sum()))


def _examine(
    config: PrepareConfig, inputs: Sequence[Input], rules: Rules, fingerprint: str, staging: Path, workers: int
) -> list[Path]:
    documents = read_with_progress(
        inputs, suffixes=config.suffixes, exclude=config.exclude, max_file_bytes=config.max_file_bytes
    )
    folder = staging / "batches"
    folder.mkdir(exist_ok=True)
    return list(examine_all(islice(documents, config.limit_files), rules, fingerprint, folder, workers))


def _tokens(
    config: PrepareConfig, folder: Path, contents: Contents, workers: int
) -> tuple[TokenForm | None, dict[str, SplitInfo]]:
    """Brings a tokenizer into `folder`, counts what it makes of the splits, and stores that; each if asked to."""
    if config.tokenizer_vocab is not None:
        tokenizer = train_on_shards(folder, contents.splits["train"], config.tokenizer_vocab)
    elif config.tokenizer:
        tokenizer = adopt_tokenizer(Path(config.tokenizer), folder)
    else:
        return None, contents.splits
    form = TokenForm(tokenizer.fingerprint, config.pretokenize or "newline", config.comments)
    splits = {
        name: replace(split, tokens=count_tokens(tokenizer, folder, split)) for name, split in contents.splits.items()
    }
    if config.pretokenize:
        for name, split in splits.items():
            tars = [folder / shard.tar.name for shard in split.shards]
            splits[name] = replace(split, shards=pretokenize_shards(tars, tokenizer.folder, form, workers))
    return form, splits


def _fingerprint(config: PrepareConfig, benchmarks: dict[str, str]) -> str:
    """What decides the fate of a document besides itself."""
    names = ("limits", "without", "licences", "unknown_licence")
    settings = _settings(config, benchmarks)
    libraries = [version(name) for name in ("datasketch", "detect-secrets", "pygments")]
    programs = [__version__, FORMAT_VERSION, sys.version, *libraries]
    return json.dumps([programs, [settings[name] for name in names], sorted(benchmarks.values())])


def _settings(config: PrepareConfig, benchmarks: dict[str, str]) -> dict[str, Any]:
    """The settings that shape the corpus, as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for name in ("out", "overwrite", "workers"):
        del settings[name]
    return settings | {"benchmarks": benchmarks}


def _empty_corpus(config: PrepareConfig, seen: _Seen, heldout: SplitInfo) -> str:
    return (
        f"empty corpus: no training snippet in {', '.join(config.sources)}; {seen.documents} files seen, "
        f"{heldout.files} held out, dropped {reasons(seen.dropped)} files, {reasons(seen.cut_dropped)}; "
        f"check the sources, languages={list(config.languages)}, exclude={list(config.exclude)}, the limits "
        f"{config.limits}, heldout_fraction={config.heldout_fraction} and unknown_licence={config.unknown_licence}"
    )


def reasons(counts: Counter[str] | dict[str, int]) -> str:
    """Counts in words: "3 empty, 1,204 generated"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "0"
