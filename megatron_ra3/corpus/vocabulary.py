"""A tokenizer for a corpus, and the corpus counted in its tokens; both see the segments that training will encode."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import SplitInfo
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.tokenizer import CodeTokenizer, train_tokenizer

TRAINING_CHARS = 500_000_000
"""A tokenizer is trained on every k-th snippet, with k such that about so many characters are read."""
_TEXTS_AT_ONCE = 20_000


def train_on_shards(folder: Path, train: SplitInfo, vocab_size: int) -> CodeTokenizer:
    """Trains a byte-level BPE on a split of the corpus in `folder`, into `folder`/tokenizer."""
    stride = 1 + train.chars // TRAINING_CHARS
    return train_tokenizer(_segments(folder, train, stride), vocab_size, folder / "tokenizer")


def count_tokens(tokenizer: CodeTokenizer, folder: Path, split: SplitInfo) -> int:
    """Tokens of all lines and native rationales of a split, without gates."""
    segments = _segments(folder, split, 1)
    tokens = 0
    while texts := list(islice(segments, _TEXTS_AT_ONCE)):
        tokens += tokenizer.count(texts)
    return tokens


def _segments(folder: Path, split: SplitInfo, stride: int) -> Iterator[str]:
    """The texts that training will encode: rationales and lines, each alone."""
    for shard in split.shards:
        for record in islice(read_shard(folder / shard.tar.name), 0, None, stride):
            comment = LANGUAGES[record.language].comment
            for line in record.lines:
                rationale, text = annotate(line, "observe", comment)
                if rationale:
                    yield rationale
                yield text
