"""Latents between lines of code: surface forms, tokenised snippets and trajectories.

A latent stands before every line: `<act>` keeps the current rationale, `<think>` writes a new one (algorithm.md 1).
Everything here is token ids with an explicit kind per token, so that no text is ever decoded and encoded again:
re-tokenisation silently changes which tokens carry a log-probability. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, Protocol

Surface = Literal["newline", "special"]
NOT_SAMPLED = 0.0

LineIds = tuple[Sequence[int], Sequence[int] | None]
"""Token ids of a line and of its native rationale, if it has one."""


class Tokenizer(Protocol):
    """What a latent format needs of a tokenizer; `corpus.tokenizer.CodeTokenizer` is the real one."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token, written once before every snippet."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added or recognised."""

    def id_of(self, token: str) -> int:
        """Id of one vocabulary entry; ValueError where it is missing."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a token stands for."""


class Kind(IntEnum):
    """What a token of a trajectory is."""

    PROMPT = 0
    GATE = 1
    RATIONALE = 2
    LINE = 3


@dataclass(frozen=True, slots=True)
class Snippet:
    """A tokenised snippet: `prompt` ids and, per line, its token ids and the native rationale's ids (or None)."""

    snippet_id: str
    prompt: tuple[int, ...]
    lines: tuple[tuple[int, ...], ...]
    native: tuple[tuple[int, ...] | None, ...]

    def __post_init__(self) -> None:
        if not self.lines or any(not line for line in self.lines):
            raise ValueError(f"snippet {self.snippet_id}: needs at least one line and no line without tokens")
        assert len(self.native) == len(self.lines)


@dataclass(slots=True)
class Trajectory:
    """One snippet with its latents, as parallel per-token lists; every append checks the lengths.

    `engine_logprobs` holds the behaviour log-prob (nats) of every sampled decision: each token of a rationale, and
    for the gate its last token. Elsewhere `sampled` is False and the value is meaningless. `thought` and
    `well_formed` have one entry per finished latent.
    """

    snippet_id: str
    token_ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    line_index: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    engine_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    thought: list[bool] = field(default_factory=list)
    well_formed: list[bool] = field(default_factory=list)

    def append(
        self,
        kind: Kind,
        line: int,
        token_ids: Sequence[int],
        *,
        logprobs: Sequence[float] | None = None,
        weight_version: int = 0,
    ) -> None:
        """Append tokens of one kind; with `logprobs` (nats, one per token) they count as sampled."""
        if logprobs is not None and len(logprobs) != len(token_ids):
            raise ValueError(
                f"trajectory {self.snippet_id}, line {line}: {len(token_ids)} tokens but {len(logprobs)} log-probs"
            )
        count = len(token_ids)
        self.token_ids.extend(token_ids)
        self.kinds.extend([int(kind)] * count)
        self.line_index.extend([line] * count)
        self.sampled.extend([logprobs is not None] * count)
        self.engine_logprobs.extend([NOT_SAMPLED] * count if logprobs is None else logprobs)
        self.weight_versions.extend([weight_version] * count)

    @property
    def num_lines(self) -> int:
        """Number of latents decided so far, which is the number of finished lines between two steps."""
        return len(self.thought)

    @property
    def sampled_gates(self) -> int:
        """Number of gates whose choice was sampled."""
        return sum(flag for flag, kind in zip(self.sampled, self.kinds, strict=True) if kind == Kind.GATE)

    def before(self, line: int) -> Trajectory:
        """A copy of what stands before the gate of `line`, an index below `num_lines`."""
        end = next(
            position
            for position, (kind, index) in enumerate(zip(self.kinds, self.line_index, strict=True))
            if kind == Kind.GATE and index == line
        )
        per_token, per_line = self.__slots__[1:-2], self.__slots__[-2:]
        return Trajectory(
            self.snippet_id,
            **{name: getattr(self, name)[:end] for name in per_token},
            **{name: getattr(self, name)[:line] for name in per_line},
        )

    def line_tokens(self, line: int) -> list[int]:
        """Token ids of one line."""
        segments = zip(self.token_ids, self.kinds, self.line_index, strict=True)
        return [token for token, kind, index in segments if kind == Kind.LINE and index == line]

    def rationale_lengths(self) -> list[int]:
        """Tokens of each line's rationale, closing tokens included; 0 for `<act>`."""
        lengths = [0] * self.num_lines
        for kind, line in zip(self.kinds, self.line_index, strict=True):
            lengths[line] += kind == Kind.RATIONALE
        return lengths

    def to_json(self) -> dict[str, object]:
        """Plain dict of all fields."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, record: dict[str, object]) -> Trajectory:
        """Inverse of `to_json`; ValueError when the per-token lists differ in length."""
        trajectory = cls(**record)  # type: ignore[arg-type]
        *per_token, thought, well_formed = (getattr(trajectory, name) for name in cls.__slots__[1:])
        if len({len(values) for values in per_token}) != 1 or len(thought) != len(well_formed):
            raise ValueError(f"trajectory {trajectory.snippet_id}: lists of different lengths")
        return trajectory


def log1mexp(logprob: float) -> float:
    """log(1 - exp(logprob)) for logprob < 0, exact near both ends (Maechler 2012)."""
    if logprob >= 0.0:
        return -math.inf
    return math.log(-math.expm1(logprob)) if logprob > -math.log(2) else math.log1p(-math.exp(logprob))


@dataclass(frozen=True, slots=True)
class LatentFormat:
    r"""Surface form of the latents, as token ids (algorithm.md 1, 4).

    `newline` (published): `<act>` is "\n" and `<think>` is "\n#" plus a one-line comment. The gate is decided by the
    token after the newline: think iff it is "#", over the full vocabulary; a line is conditioned on not starting
    with "#". `special`: the tokens `<act>`, `<think>` ... `</think>`; P(think) is renormalised over the two.
    """

    surface: Surface
    start: tuple[int, ...]
    gate_prefix: tuple[int, ...]
    act_suffix: tuple[int, ...]
    think_suffix: tuple[int, ...]
    gate_ids: tuple[int, ...]
    close: tuple[int, ...]
    close_ids: frozenset[int]
    stop_ids: frozenset[int]
    blank_ids: frozenset[int]

    @classmethod
    def build(cls, surface: Surface, tokenizer: Tokenizer) -> LatentFormat:
        """Resolve the surface form against a tokenizer; ValueError where it lacks the tokens."""
        token_bytes = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        blank = frozenset(i for i, raw in token_bytes.items() if not raw.strip())
        with_newline = frozenset(i for i, raw in token_bytes.items() if b"\n" in raw)
        start = (tokenizer.eos_id,)
        if surface == "newline":
            newline, hash_id = _single(tokenizer, "\n"), _single(tokenizer, "#")
            ends_line = frozenset(i for i in with_newline if token_bytes[i].find(b"\n") == len(token_bytes[i]) - 1)
            stop = with_newline | {tokenizer.eos_id}
            return cls(surface, start, (newline,), (), (hash_id,), (hash_id,), (newline,), ends_line, stop, blank)
        act, think, end = (tokenizer.id_of(name) for name in ("<act>", "<think>", "</think>"))
        stop = with_newline | {tokenizer.eos_id, act, think, end}
        return cls(surface, start, (), (act,), (think,), (act, think), (end,), frozenset({end}), stop, blank | {end})

    @property
    def conditions_line(self) -> bool:
        """Whether a line's log-prob is conditioned on its first token not opening a rationale."""
        return not self.act_suffix

    def think_logprob(self, gate_logprobs: Sequence[float]) -> float:
        """Log q(think) in nats from the full-vocabulary log-probs of `gate_ids` at the gate row."""
        if self.surface == "newline":
            return gate_logprobs[0]
        act, think = gate_logprobs
        gap = act - think
        return -math.log1p(math.exp(gap)) if gap <= 0 else -gap - math.log1p(math.exp(-gap))

    def tokenize(
        self, tokenizer: Tokenizer, snippet_id: str, prompt: str, lines: Sequence[tuple[str | None, str]]
    ) -> Snippet:
        """Tokenise segment by segment; `lines` are (native rationale text or None, line text) pairs."""
        ids = [encode_line(tokenizer, self.surface, *line) for line in lines]
        return self.snippet(snippet_id, tokenizer.encode(prompt), ids)

    def snippet(self, snippet_id: str, prompt: Sequence[int], lines: Sequence[LineIds]) -> Snippet:
        """Put a snippet together from token ids that `encode_line` made; ValueError where a line reads as a latent."""
        ids = tuple(tuple(line) for line, _ in lines)
        native = tuple(None if rationale is None else tuple(rationale) for _, rationale in lines)
        if self.conditions_line and any(line[:1] == self.think_suffix for line in ids):
            raise ValueError(
                f"snippet {snippet_id}: a line starts with '#', which the newline form reads as a rationale; "
                "use latents.comments=observe or strip, or latents.surface=special"
            )
        return Snippet(snippet_id, self.start + tuple(prompt), ids, native)

    def merge(self, snippet: Snippet, sizes: Sequence[int]) -> Snippet:
        """Make one action of every `sizes[i]` lines in a row; the rationale of the first is kept.

        Lines stay tokenised one by one, so the code's tokens are the same at every granularity.
        """
        assert sum(sizes) == len(snippet.lines)
        lines: list[tuple[int, ...]] = []
        native = []
        first = 0
        for size in sizes:
            merged = snippet.lines[first]
            for line in snippet.lines[first + 1 : first + size]:
                merged += self.gate_prefix + line
            lines.append(merged)
            native.append(snippet.native[first])
            first += size
        return Snippet(snippet.snippet_id, snippet.prompt, tuple(lines), tuple(native))

    def split(self, snippet: Snippet) -> Snippet:
        """Make one action of every token; a line's rationale stays before its first. Needs the special form."""
        if self.surface != "special":
            raise ValueError(
                "objective.granularity=token: a newline cannot open a latent inside a line; set latents.surface=special"
            )
        lines = tuple((token,) for line in snippet.lines for token in line)
        native: list[tuple[int, ...] | None] = []
        for line, rationale in zip(snippet.lines, snippet.native, strict=True):
            native += [rationale, *[None] * (len(line) - 1)]
        return Snippet(snippet.snippet_id, snippet.prompt, lines, tuple(native))

    def begin(self, snippet: Snippet) -> Trajectory:
        """A trajectory holding only the prompt."""
        trajectory = Trajectory(snippet.snippet_id)
        trajectory.append(Kind.PROMPT, -1, snippet.prompt)
        return trajectory

    def append_act(
        self,
        trajectory: Trajectory,
        line: Sequence[int],
        *,
        logprob: float | None = None,
        weight_version: int = 0,
    ) -> None:
        """Write `<act>` and the next line; `logprob` is the gate's (None: the gate was not sampled)."""
        self._append_gate(trajectory, think=False, logprob=logprob, weight_version=weight_version)
        self._finish(trajectory, line, think=False, well_formed=True)

    def append_think(self, trajectory: Trajectory, *, logprob: float | None = None, weight_version: int = 0) -> None:
        """Write the opening of `<think>`; the rationale and the line follow with `append_rationale`."""
        self._append_gate(trajectory, think=True, logprob=logprob, weight_version=weight_version)

    def append_rationale(
        self,
        trajectory: Trajectory,
        rationale: Sequence[int],
        line: Sequence[int],
        *,
        logprobs: Sequence[float] | None = None,
        weight_version: int = 0,
    ) -> None:
        """Write a rationale, close it if its last token does not, and write the line.

        Nothing sampled is dropped: a rationale cut by the cap, or ended by a token that is no proper close, stays in
        the context and is marked as not well formed (algorithm.md 3, format reward).
        """
        index = trajectory.num_lines
        closed = bool(rationale) and rationale[-1] in self.close_ids
        content = rationale[:-1] if closed else rationale
        trajectory.append(Kind.RATIONALE, index, rationale, logprobs=logprobs, weight_version=weight_version)
        if not closed:
            trajectory.append(Kind.RATIONALE, index, self.close)
        has_text = any(token not in self.blank_ids for token in content)
        complete = closed or logprobs is None
        clean = not any(token in self.stop_ids for token in content)
        self._finish(trajectory, line, think=True, well_formed=complete and clean and has_text)

    def render(self, snippet: Snippet, *, observe: bool) -> Trajectory:
        """Annotate without sampling: every latent `<act>` (NTP), or native comments observed as `<think>`."""
        trajectory = self.begin(snippet)
        for line, native in zip(snippet.lines, snippet.native, strict=True):
            if observe and native is not None:
                self.append_think(trajectory)
                self.append_rationale(trajectory, native, line)
            else:
                self.append_act(trajectory, line)
        return trajectory

    def code_ids(self, ids: Sequence[int]) -> list[int]:
        """`ids` of free text without gates and rationales of the special form; in the newline form all of them.

        There a rationale is a comment, which is code. One that does not close takes everything that follows.
        """
        if self.surface == "newline":
            return list(ids)
        kept, thinking = [], False
        for token in ids:
            if token in self.think_suffix:
                thinking = True
            elif token in self.close_ids:
                thinking = False
            elif not thinking and token not in self.act_suffix:
                kept.append(token)
        return kept

    def _append_gate(self, trajectory: Trajectory, *, think: bool, logprob: float | None, weight_version: int) -> None:
        tokens = self.gate_prefix + (self.think_suffix if think else self.act_suffix)
        index = trajectory.num_lines
        trajectory.append(Kind.GATE, index, tokens[:-1], weight_version=weight_version)
        trajectory.append(
            Kind.GATE,
            index,
            tokens[-1:],
            logprobs=None if logprob is None else [logprob],
            weight_version=weight_version,
        )

    def _finish(self, trajectory: Trajectory, line: Sequence[int], *, think: bool, well_formed: bool) -> None:
        trajectory.append(Kind.LINE, trajectory.num_lines, line)
        trajectory.thought.append(think)
        trajectory.well_formed.append(well_formed)


def encode_line(tokenizer: Tokenizer, surface: Surface, rationale: str | None, text: str) -> LineIds:
    """Token ids of a line, with the newline that the special form ends it by, and of its native rationale."""
    ids = tokenizer.encode(text if surface == "newline" else f"{text}\n")
    return ids, None if rationale is None else tokenizer.encode(rationale)


def _single(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(
            f"tokenizer: {text!r} must be one token for the newline form but is {len(ids)}; "
            "use latents.surface=special or a byte-level tokenizer"
        )
    return ids[0]
