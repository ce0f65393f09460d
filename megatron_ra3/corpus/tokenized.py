"""From records of a shard to tokenised snippets that fit the sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain

from megatron_ra3.corpus.actions import regroup
from megatron_ra3.corpus.languages import LANGUAGES
from megatron_ra3.corpus.lines import CommentMode, annotate
from megatron_ra3.corpus.manifest import TokenForm
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
        use_stored: take the token ids that records hold; they were made by this tokenizer, surface and comment mode.

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
        use_stored: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.format = latent_format
        self.comments = comments
        self.max_tokens = max_tokens
        self.max_rationale_tokens = max_rationale_tokens
        self.granularity = granularity
        self.use_stored = use_stored
        self._dropped = 0

    def snippets(self, records: Sequence[SnippetRecord]) -> list[Snippet]:
        """Tokenise `records`, leaving out those of which nothing fits.

        ValueError: token ids that a record holds are not of this tokenizer, or a line reads as a latent.
        """
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
        if self.use_stored and record.tokens is not None:
            whole = self._stored(record)
        else:
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

    def _stored(self, record: SnippetRecord) -> Snippet:
        """A snippet of the ids in a record, which a flipped digit may have changed where no checksum was compared."""
        assert record.tokens is not None
        tokens = [ids for line, ids in zip(record.lines, record.tokens, strict=True) if line.code]
        ids = list(chain.from_iterable(part for line in tokens for part in line if part))
        if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
            raise ValueError(
                f"snippet {record.id} holds token ids from {min(ids)} to {max(ids)}, the tokenizer has "
                f"{self.tokenizer.vocab_size}: the corpus is damaged; restore what `ra3 corpus verify` names"
            )
        return self.format.snippet(record.id, self.tokenizer.encode(record.prompt), tokens)

    def _short(self, rationale: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if rationale is None or len(rationale) + len(self.format.close) > self.max_rationale_tokens:
            return None
        return rationale


def why_unused(stored: TokenForm, wanted: TokenForm) -> str:
    """Says, for people, why a run takes no notice of a corpus's token ids; empty where they fit."""
    ours = asdict(wanted)
    differences = [
        f"{name}={value} instead of {ours[name]}" for name, value in asdict(stored).items() if value != ours[name]
    ]
    if not differences:
        return ""
    return (
        f"the corpus's token ids are not used: they were made with {', '.join(differences)}; its text is tokenised as "
        "it is read, into the same snippets. Prepare it with --pretokenize for these settings to save that"
    )
