"""Token ids stored in every sample beside its text, so that a long run does not tokenise what it reads again and again.

They are derived data: a run whose tokenizer, surface or comment mode differs reads the text, and gets the same snippets
as without them. They stand in the sample itself, under the checksum, the index and the request of its text.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import Shard, TokenForm
from megatron_ra3.corpus.pool import map_in_processes
from megatron_ra3.corpus.shards import read_shard, write_shard
from megatron_ra3.corpus.snippets import SnippetRecord
from megatron_ra3.corpus.tokenizer import load_tokenizer
from megatron_ra3.latents import Tokenizer, encode_line


def pretokenize_shards(
    tars: Sequence[Path], tokenizer_folder: Path, form: TokenForm, workers: int
) -> tuple[Shard, ...]:
    """Replaces shards by ones whose samples also hold the ids of their lines; equal bytes for any number of workers."""
    return tuple(map_in_processes(_rewrite, [(tar, tokenizer_folder, form) for tar in tars], workers))


def with_tokens(record: SnippetRecord, tokenizer: Tokenizer, form: TokenForm) -> SnippetRecord:
    """The record with the token ids of every line."""
    comment = LANGUAGES[record.language].comment
    lines = (annotate(line, form.comments, comment) for line in record.lines)
    return replace(record, tokens=tuple(encode_line(tokenizer, form.surface, *line) for line in lines))


_loaded = cache(load_tokenizer)


def _rewrite(tar: Path, tokenizer_folder: Path, form: TokenForm) -> Shard:
    tokenizer = _loaded(tokenizer_folder)
    text_only = tar.rename(tar.with_suffix(".text"))
    records = (with_tokens(record, tokenizer, form) for record in read_shard(text_only))
    shard = write_shard(tar, ((record.id, record.encode()) for record in records))
    text_only.unlink()
    return shard
