"""A tokenizer of a handful of tokens, each encoded only from its exact text: for tests of pure code."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableTokenizer:
    """`latents.Tokenizer` over a table of token texts."""

    tokens: Sequence[str]
    eos_id: int = 0

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        return [self.tokens.index(text)]

    def id_of(self, token: str) -> int:
        return self.tokens.index(token)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id].encode()
