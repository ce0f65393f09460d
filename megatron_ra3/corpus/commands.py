"""The commands about corpora: `ra3 prepare` and `ra3 corpus stats|head|verify|split|merge`."""

import argparse
import sys
import sysconfig
import time
from itertools import islice
from pathlib import Path
from typing import get_args

from megatron_ra3.corpus.examine import Filter
from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.licences import PERMISSIVE
from megatron_ra3.corpus.lines import CommentMode, join_lines
from megatron_ra3.corpus.manifest import SPLITS, Manifest
from megatron_ra3.corpus.merge import merge_corpora
from megatron_ra3.corpus.prepare import DEFAULT_EXCLUDE, PrepareConfig, prepare, reasons
from megatron_ra3.corpus.rearrange import split_corpus
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.snippets import SnippetLimits
from megatron_ra3.corpus.verify import problems
from megatron_ra3.latents import Surface

STDLIB_EXCLUDE = ("test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "encodings", "_sysconfigdata*")


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that `run_prepare` reads."""
    defaults = PrepareConfig(sources=(".",), out="")
    limits = defaults.limits
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="folders, git repositories, tar(.gz|.zst), jsonl(.gz|.zst), parquet, or folders of such files",
    )
    add("--stdlib", action="store_true", help="read this interpreter's standard library, without its tests")
    add("--out", required=True, metavar="FOLDER", help="where the corpus goes; the same command resumes after a kill")
    add("--languages", nargs="+", choices=list(LANGUAGES), default=list(defaults.languages), help="default: python")
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave out files and folders by name or path")
    add("--workers", type=int, default=defaults.workers, metavar="N", help="processes (default: one per core)")
    add("--limit-files", type=int, default=None, metavar="N", help="read only the first N files")
    add("--overwrite", action="store_true", help="replace the corpus that is in OUT")

    add = parser.add_argument_group("filters").add_argument
    add("--without", nargs="+", choices=get_args(Filter), default=[], help="filters to switch off")
    add("--max-file-bytes", type=int, default=defaults.max_file_bytes, help="drop larger files (default %(default)s)")
    add("--licences", nargs="+", default=[], metavar="SPDX", help='allowed licences; "permissive" stands for a list')
    add("--unknown-licence", action="store_true", help="with --licences: keep also files of unknown licence")
    add("--benchmarks", nargs="+", default=[], metavar="FILE", help="drop files that hold tasks or solutions of these")
    add("--similarity", type=float, default=defaults.similarity, help="of near duplicates (default %(default)s)")

    add = parser.add_argument_group("snippets and shards").add_argument
    add("--max-lines", type=int, default=limits.max_lines, help="logical lines per snippet (default %(default)s)")
    add("--max-chars", type=int, default=limits.max_chars, help="characters per snippet (default %(default)s)")
    add("--min-lines", type=int, default=limits.min_lines, help="drop shorter snippets (default %(default)s)")
    add("--heldout-fraction", type=float, default=defaults.heldout_fraction, help="of repositories, %(default)s")
    add("--samples-per-shard", type=int, default=defaults.samples_per_shard, help="default %(default)s")

    add = parser.add_argument_group("tokens").add_argument
    add("--tokenizer-vocab", type=int, default=None, metavar="N", help="train a byte-level BPE into OUT/tokenizer")
    add("--tokenizer", default="", metavar="FOLDER", help="count tokens with that of a model; copied to OUT/tokenizer")
    add(
        "--pretokenize",
        choices=get_args(Surface),
        help="store token ids beside the text, for runs of this latents.surface; takes a tokenizer",
    )
    add(
        "--comments",
        choices=get_args(CommentMode),
        default=defaults.comments,
        help="with --pretokenize: the latents.comments of these runs (default %(default)s)",
    )


def run_prepare(args: argparse.Namespace) -> int:
    """Prepares a corpus from parsed arguments and prints what it holds."""
    if args.stdlib and args.sources:
        raise ValueError("--stdlib leaves out test folders everywhere; prepare other sources apart, then merge")
    stdlib = (sysconfig.get_paths()["stdlib"],) if args.stdlib else ()
    named = [name for name in args.licences if name.lower() != "permissive"]
    permissive = sorted(PERMISSIVE) if len(named) < len(args.licences) else []
    config = PrepareConfig(
        sources=(*args.sources, *stdlib),
        out=args.out,
        languages=tuple(args.languages),
        exclude=(*DEFAULT_EXCLUDE, *args.exclude, *(STDLIB_EXCLUDE if args.stdlib else ())),
        limits=SnippetLimits(args.max_lines, args.max_chars, args.min_lines),
        without=tuple(args.without),
        similarity=args.similarity,
        licences=(*named, *permissive),
        unknown_licence=args.unknown_licence,
        benchmarks=tuple(args.benchmarks),
        heldout_fraction=args.heldout_fraction,
        samples_per_shard=args.samples_per_shard,
        max_file_bytes=args.max_file_bytes,
        limit_files=args.limit_files,
        tokenizer_vocab=args.tokenizer_vocab,
        tokenizer=args.tokenizer,
        pretokenize=args.pretokenize,
        comments=args.comments,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    started_s = time.monotonic()
    manifest = prepare(config)
    seconds = time.monotonic() - started_s
    print(f"{args.out}: prepared in {seconds:.1f} s, {manifest.bytes_seen / 1e6 / seconds:.2f} MB/s")
    _print_stats(manifest)
    print(f"  report   {Path(args.out) / 'report.html'}")
    if config.heldout_fraction and not manifest.splits["heldout"].snippets:
        print("  no repository was held out, but training needs some: raise --heldout-fraction, add --overwrite")
    return 0


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommands of `ra3 corpus`; each sets `run`."""
    commands = parser.add_subparsers(dest="corpus_command", required=True)

    stats = commands.add_parser("stats", help="what a corpus holds and what was left out")
    stats.add_argument("folder", type=Path)
    stats.set_defaults(run=_stats)

    head = commands.add_parser("head", help="print the first snippets")
    head.add_argument("folder", type=Path)
    head.add_argument("--split", choices=SPLITS, default="train")
    head.add_argument("-n", type=_positive, default=3, help="default %(default)s")
    head.set_defaults(run=_head)

    verify = commands.add_parser("verify", help="read everything; exit status 1 if something is damaged")
    verify.add_argument("folder", type=Path)
    verify.set_defaults(run=_verify)

    split = commands.add_parser("split", help="deal the repositories of a corpus out to new ones of about equal size")
    split.add_argument("folder", type=Path)
    split.add_argument("--out", type=Path, nargs="+", required=True, metavar="FOLDER")
    split.set_defaults(run=_split)

    merge = commands.add_parser("merge", help="one corpus of several, every file once")
    merge.add_argument("folders", type=Path, nargs="+")
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--samples-per-shard", type=_positive, default=PrepareConfig.samples_per_shard)
    merge.add_argument(
        "--similarity", type=float, default=None, help="of near duplicates (default: as the parts were prepared)"
    )
    merge.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    merge.set_defaults(run=_merge)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return number


def _stats(args: argparse.Namespace) -> int:
    _print_stats(Manifest.load(args.folder))
    return 0


def _head(args: argparse.Namespace) -> int:
    shards = Manifest.load(args.folder).splits[args.split].shards
    records = (record for shard in shards for record in read_shard(args.folder / shard.tar.name))
    for record in islice(records, args.n):
        known = ", ".join(filter(None, (record.language, record.licence)))
        print(f"==> {record.id}  {record.repo}/{record.source} ({known})\n{join_lines(record.lines)}\n")
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = list(problems(args.folder))
    for problem in found:
        print(problem, file=sys.stderr)
    shards = sum(len(split.shards) for split in Manifest.load(args.folder).splits.values())
    print(f"{args.folder}: {shards} shards, " + (f"{len(found)} problems" if found else "all as they were written"))
    return 1 if found else 0


def _split(args: argparse.Namespace) -> int:
    for out, manifest in zip(args.out, split_corpus(args.folder, args.out), strict=True):
        print(f"{out}:")
        _print_stats(manifest)
    return 0


def _merge(args: argparse.Namespace) -> int:
    merged = merge_corpora(
        args.folders, args.out, args.samples_per_shard, similarity=args.similarity, workers=args.workers
    )
    print(f"{args.out}:")
    _print_stats(merged.manifest)
    print(f"  across   {len(args.folders)} parts {merged.duplicates:,} duplicates", end="")
    if merged.similarity is None:
        print(f"; near duplicates were not looked for: {merged.reason}; give --similarity to drop them")
    else:
        print(f" and {merged.near_duplicates:,} near duplicates (similarity {merged.similarity:g}) dropped")
    return 0


def _print_stats(manifest: Manifest) -> None:
    print(f"  seen     {manifest.files_seen:>8,} files {manifest.bytes_seen / 1e6:>10,.1f} MB")
    for name in filter(manifest.splits.__contains__, SPLITS):
        split = manifest.splits[name]
        tokens = "" if split.tokens is None else f" {split.tokens:>12,} tokens"
        print(
            f"  {name:<8} {split.files:>8,} files {split.repos:>6,} repositories {split.snippets:>9,} snippets "
            f"{split.lines:>10,} lines {split.native_comments:>8,} comments{tokens} {len(split.shards):>4,} shards"
        )
    if manifest.token_form:
        form = manifest.token_form
        print(f"  stored   token ids for latents.surface={form.surface} latents.comments={form.comments}")
    print(f"  dropped  {reasons(manifest.files_dropped)}; {reasons(manifest.cut_dropped)}")
    print(f"  scrubbed {reasons(manifest.scrubbed)}")
