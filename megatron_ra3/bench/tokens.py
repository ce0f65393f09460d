"""`ra3 bench tokens`: what stored token ids save of the processor time that reading and tokenising a snippet takes.

Two corpora of the same snippets, one with ids and one without, are read by the package's stream in turns, so that a
machine that slows down slows both. Processor time of all threads, not the clock: both wait for nothing.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import sysconfig
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_ra3.bench.result import publish
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.stream import ShardStream
from megatron_ra3.corpus.tokenized import SnippetTokenizer
from megatron_ra3.corpus.tokenizer import load_tokenizer
from megatron_ra3.latents import LatentFormat

_NEVER_CUT = 1 << 20
"""Tokens: longer than any snippet."""


def add_tokens_arguments(parser: argparse.ArgumentParser) -> None:
    """How much to read and how often."""
    parser.add_argument("--files", type=int, default=150, metavar="N", help="of the standard library (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, metavar="N", help="tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="also write the result as a JSON file")


def run_tokens(arguments: argparse.Namespace) -> int:
    """Measure and print one JSON object on the last line."""
    for name in ("files", "repeats"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    result = measure(arguments.files, arguments.vocabulary, arguments.repeats)
    return publish(result, arguments.out)


def measure(files: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """`cpu_ms` per snippet from its `text` and from `stored` ids, medians over repeats, and `bytes` of a sample."""
    with tempfile.TemporaryDirectory(prefix="ra3-bench-") as temporary:
        sources = Path(temporary) / "sources"
        sources.mkdir()
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]:
            shutil.copy(path, sources)
        stored, text = Path(temporary) / "stored", Path(temporary) / "text"
        common: dict[str, Any] = {"sources": (str(sources),), "heldout_fraction": 0.0}
        prepare(PrepareConfig(**common, out=str(stored), tokenizer_vocab=vocabulary, pretokenize="newline"))
        prepare(PrepareConfig(**common, out=str(text), tokenizer=str(stored / "tokenizer")))
        runs = [{folder.name: _read(folder, number) for folder in (text, stored)} for number in range(repeats)]
        shards = {folder.name: Manifest.load(folder).splits["train"].shards for folder in (text, stored)}
    samples = sum(shard.samples for shard in shards["text"])
    return {
        "cpu_ms": {name: statistics.median(run[name][0] for run in runs) * 1e3 / samples for name in shards},
        "bytes": {name: sum(shard.tar.bytes for shard in found) / samples for name, found in shards.items()},
        "tokens": runs[0]["text"][1] / samples,
        "samples": samples,
        "files": files,
        "vocabulary": vocabulary,
        "cpu_s": [{name: seconds for name, (seconds, _) in run.items()} for run in runs],
        "platform": platform.platform(),
    }


def _read(folder: Path, seed: int) -> tuple[float, int]:
    """Processor seconds of reading and tokenising a whole corpus once, and the tokens of its lines."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenise = SnippetTokenizer(
        tokenizer,
        LatentFormat.build("newline", tokenizer),
        "observe",
        max_tokens=_NEVER_CUT,
        max_rationale_tokens=_NEVER_CUT,
        use_stored=folder.name == "stored",
    )
    with closing(ShardStream(folder, "train", seed)) as stream:
        started_s = time.process_time()
        snippets = tokenise.snippets(stream.take(len(stream)))
        taken_s = time.process_time() - started_s
    return taken_s, sum(len(line) for snippet in snippets for line in snippet.lines)
