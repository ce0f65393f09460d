"""From records of a shard to tokenised snippets that fit the sequence length."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ra3.corpus.actions import regroup
from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import CommentMode, annotate
from megatron_ra3.corpus.snippets import SnippetRecord
from megatron_ra3.latents import LatentFormat, Snippet, Tokenizer
from megatron_ra3.presets import Granularity


class SnippetTokenizer:
    """Tokenises records segment by segment and cuts them to `max_tokens`.

    Args:
        tokenizer: the model's tokenizer.
        latent_format: surface form of the latents.
        comments: what native full-line comments become.
        max_tokens: tokens of a snippet at most, with `<act>` before every logical line.
        max_rationale_tokens: a native rationale that, closed, is longer is dropped: the model would learn to write
            what it is then punished for.
        granularity: what one action is. Snippets are cut as lines first, so that every granularity sees the same code.

    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        latent_format: LatentFormat,
        comments: CommentMode,
        *,
        max_tokens: int,
        max_rationale_tokens: int,
        granularity: Granularity = "line",
    ) -> None:
        self.tokenizer = tokenizer
        self.format = latent_format
        self.comments = comments
        self.max_tokens = max_tokens
        self.max_rationale_tokens = max_rationale_tokens
        self.granularity = granularity
        self._dropped = 0

    def snippets(self, records: Sequence[SnippetRecord]) -> list[Snippet]:
        """Tokenise `records`, leaving out those of which nothing fits."""
        snippets = [snippet for snippet in map(self._snippet, records) if snippet is not None]
        self._dropped += len(records) - len(snippets)
        return snippets

    def take_dropped(self) -> int:
        """Snippets left out since the last call: not even their first line fits."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _snippet(self, record: SnippetRecord) -> Snippet | None:
        comment = LANGUAGES[record.language].comment
        lines = [annotate(line, self.comments, comment) for line in record.lines if line.code]
        if not lines:
            return None
        whole = self.format.tokenize(self.tokenizer, record.id, record.prompt, lines)
        gate_tokens = len(self.format.gate_prefix) + len(self.format.act_suffix)
        room = self.max_tokens - len(whole.prompt)
        kept = 0
        for line in whole.lines:
            room -= gate_tokens + len(line)
            if room < 0:
                break
            kept += 1
        if not kept:
            return None
        native = tuple(self._short(rationale) for rationale in whole.native[:kept])
        cut = Snippet(whole.snippet_id, whole.prompt, whole.lines[:kept], native)
        return regroup(cut, [text for _, text in lines[:kept]], self.granularity, self.format, comment)

    def _short(self, rationale: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if rationale is None or len(rationale) + len(self.format.close) > self.max_rationale_tokens:
            return None
        return rationale
