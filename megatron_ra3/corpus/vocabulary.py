"""A tokenizer for a corpus, its own or a model's, and the corpus counted in its tokens.

Training and counting see the segments that a run will encode.
"""

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import SplitInfo
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.tokenizer import FOLDER, CodeTokenizer, load_tokenizer, train_tokenizer

TRAINING_CHARS = 500_000_000
"""A tokenizer is trained on every k-th snippet, with k such that about so many characters are read."""
_TEXTS_AT_ONCE = 20_000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def train_on_shards(folder: Path, train: SplitInfo, vocab_size: int) -> CodeTokenizer:
    """Trains a byte-level BPE on a split of the corpus in `folder`, into `folder`/tokenizer."""
    stride = 1 + train.chars // TRAINING_CHARS
    return train_tokenizer(_segments(folder, train, stride), vocab_size, folder / FOLDER)


def adopt_tokenizer(source: Path, folder: Path) -> CodeTokenizer:
    """Copies the tokenizer of a Hugging Face folder, and nothing else of it, into `folder`/tokenizer."""
    target = folder / FOLDER
    target.mkdir()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return load_tokenizer(target)


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
