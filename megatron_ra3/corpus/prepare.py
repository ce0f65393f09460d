"""Turns folders of source files into a corpus: shards, indexes, a manifest and, on request, a tokenizer.

Runs once per corpus, so it is deterministic to the byte, and every file it leaves out is counted under a reason: a
corpus that silently lost half its files trains just as smoothly as a whole one.
"""

import argparse
import json
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import FORMAT_VERSION, SPLITS, Manifest, SplitInfo
from megatron_ra3.corpus.reader import SplitReader
from megatron_ra3.corpus.shards import SplitWriter, publish, refuse_existing
from megatron_ra3.corpus.snippets import SnippetLimits, cut_snippets
from megatron_ra3.corpus.sources import SourceFile, find_files, read_source
from megatron_ra3.corpus.tokenizer import SMALLEST_VOCAB, train_tokenizer

DEFAULT_EXCLUDE = (".*", "__pycache__", "site-packages", "dist-packages")
STDLIB_EXCLUDE = ("test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "encodings", "_sysconfigdata*")


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, how to cut it, where to write it."""

    sources: tuple[str, ...]
    out: str
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    limits: SnippetLimits = field(default_factory=SnippetLimits)
    heldout_fraction: float = 0.02
    samples_per_shard: int = 10_000
    max_file_bytes: int = 1_000_000
    limit_files: int | None = None
    tokenizer_vocab: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction must be in [0, 1), found {self.heldout_fraction}")
        smallest = {"samples_per_shard": 1, "max_file_bytes": 1, "limit_files": 1, "tokenizer_vocab": SMALLEST_VOCAB}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if not self.sources:
            raise ValueError("no source folder given; name folders of Python files, or --stdlib")


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the corpus that `config` describes into `config.out`; the manifest comes last.

    A corpus that is to be overwritten stays until its successor is complete.

    Raises:
        ValueError: a source folder does not exist, or no training snippet came out; the message then says what was
            looked at and why it was dropped.
        FileExistsError: the folder holds a corpus and `config.overwrite` is not set.
    """
    for source in config.sources:
        if not Path(source).is_dir():
            raise ValueError(f"source folder {source} does not exist")
    out = Path(config.out)
    if not config.overwrite:
        refuse_existing(out)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix="partial-") as staging:
        manifest = _build(config, Path(staging))
        publish(Path(staging), out, manifest)
    return manifest


def split_of(file_sha256: str, heldout_fraction: float) -> str:
    """The split of a file, decided by its content alone: copies and later corpora agree on it."""
    return "heldout" if int(file_sha256[:13], 16) / 16**13 < heldout_fraction else "train"


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that `run_prepare` reads."""
    defaults = PrepareConfig(sources=(".",), out="")
    limits = defaults.limits
    add = parser.add_argument
    add("sources", nargs="*", metavar="FOLDER", help="folders of Python files, searched recursively")
    add("--stdlib", action="store_true", help="add this interpreter's standard library; leaves out test folders")
    add("--out", required=True, metavar="FOLDER", help="where the corpus goes")
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave out files and folders by name or path")
    add("--max-lines", type=int, default=limits.max_lines, help="logical lines per snippet (default %(default)s)")
    add("--max-chars", type=int, default=limits.max_chars, help="characters per snippet (default %(default)s)")
    add("--min-lines", type=int, default=limits.min_lines, help="drop shorter snippets (default %(default)s)")
    add("--heldout-fraction", type=float, default=defaults.heldout_fraction, help="of files (default %(default)s)")
    add("--samples-per-shard", type=int, default=defaults.samples_per_shard, help="default %(default)s")
    add("--max-file-bytes", type=int, default=defaults.max_file_bytes, help="drop larger files (default %(default)s)")
    add("--limit-files", type=int, default=None, metavar="N", help="read only the first N files")
    add("--tokenizer-vocab", type=int, default=None, metavar="N", help="train a byte-level BPE into OUT/tokenizer")
    add("--overwrite", action="store_true", help="replace the corpus that is in OUT")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepares a corpus from parsed arguments and prints what it holds."""
    stdlib = (sysconfig.get_paths()["stdlib"],) if args.stdlib else ()
    config = PrepareConfig(
        sources=(*args.sources, *stdlib),
        out=args.out,
        exclude=(*DEFAULT_EXCLUDE, *args.exclude, *(STDLIB_EXCLUDE if args.stdlib else ())),
        limits=SnippetLimits(args.max_lines, args.max_chars, args.min_lines),
        heldout_fraction=args.heldout_fraction,
        samples_per_shard=args.samples_per_shard,
        max_file_bytes=args.max_file_bytes,
        limit_files=args.limit_files,
        tokenizer_vocab=args.tokenizer_vocab,
        overwrite=args.overwrite,
    )
    started_s = time.monotonic()
    manifest = prepare(config)
    print(f"{args.out}: {manifest.files_seen} files seen in {time.monotonic() - started_s:.1f} s")
    for name, split in manifest.splits.items():
        print(
            f"  {name:<8} {split.files:>8,} files {split.snippets:>10,} snippets {split.lines:>12,} lines "
            f"{split.chars:>14,} chars {split.native_comments:>10,} comments {len(split.shards):>5,} shards"
        )
    print(f"  dropped  {_reasons(manifest.files_dropped)} files; {_reasons(manifest.cut_dropped)}")
    return 0


def _build(config: PrepareConfig, folder: Path) -> Manifest:
    writers = {split: SplitWriter(folder, split, config.samples_per_shard) for split in SPLITS}
    files_dropped: Counter[str] = Counter()
    cut_dropped: Counter[str] = Counter()
    seen_sha256: set[str] = set()
    files = [(path, Path(source)) for source in config.sources for path in find_files(Path(source), config.exclude)]
    files = files[: config.limit_files]
    for path, source in tqdm(files, desc="prepare", unit="file", disable=None):
        read = read_source(path, config.max_file_bytes, seen_sha256)
        if not isinstance(read, SourceFile):
            files_dropped[read] += 1
            continue
        snippets, dropped = cut_snippets(
            read.lines, source=path.relative_to(source).as_posix(), file_sha256=read.sha256, limits=config.limits
        )
        cut_dropped += dropped
        if snippets:
            writers[split_of(read.sha256, config.heldout_fraction)].add_file(snippets)
        else:
            files_dropped["no_snippet"] += 1
    splits = {split: writer.close() for split, writer in writers.items()}
    if not splits["train"].snippets:
        raise ValueError(_empty_corpus(config, len(files), files_dropped, cut_dropped, splits["heldout"].files))
    return Manifest(
        format_version=FORMAT_VERSION,
        settings=_settings(config),
        files_seen=len(files),
        files_dropped=dict(files_dropped),
        cut_dropped=dict(cut_dropped),
        tokenizer_sha256=_train_tokenizer(config.tokenizer_vocab, folder, splits["train"]),
        splits=splits,
    )


def _train_tokenizer(vocab_size: int | None, folder: Path, train: SplitInfo) -> str | None:
    if vocab_size is None:
        return None
    return train_tokenizer(_segments(folder, train), vocab_size, folder / "tokenizer").fingerprint


def _segments(folder: Path, info: SplitInfo) -> Iterator[str]:
    """The texts that training will encode: rationales and lines, each alone."""
    reader = SplitReader(folder, info)
    for sample in range(len(reader)):
        for line in reader.read(sample).lines:
            rationale, text = annotate(line, "observe")
            if rationale:
                yield rationale
            yield text
    reader.close()


def _settings(config: PrepareConfig) -> dict[str, object]:
    """The settings that shape the corpus, as JSON values."""
    settings = json.loads(json.dumps(asdict(config)))
    del settings["out"], settings["overwrite"]
    return dict(settings)


def _empty_corpus(
    config: PrepareConfig, files_seen: int, files_dropped: Counter[str], cut_dropped: Counter[str], heldout_files: int
) -> str:
    return (
        f"empty corpus: no training snippet in {', '.join(config.sources)}; {files_seen} .py files seen, "
        f"{heldout_files} held out, dropped {_reasons(files_dropped)} files, {_reasons(cut_dropped)}; "
        f"check the folders, exclude={list(config.exclude)} and the limits {config.limits}"
    )


def _reasons(counts: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "0"
