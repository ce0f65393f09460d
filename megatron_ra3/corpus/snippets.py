"""Cuts files into snippets short enough for one training sequence, at places where a reader would cut too.

Cutting at a fixed number of lines would start most snippets inside a function whose signature is out of sight.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_ra3.corpus.lines import CodeLine
from megatron_ra3.latents import LineIds

_TEXTS = ("id", "source", "prompt", "repo", "licence", "language")
_INSIDE_A_BLOCK = re.compile(r"[\s})\]]|(elif|else|except|finally)\b")


@dataclass(frozen=True, slots=True)
class SnippetRecord:
    """One sample of the corpus: an expert trajectory of code lines after an optional prompt.

    `source` is the path of the file inside `repo`; `licence` is what the input says of it, empty if nothing. `tokens`
    has one entry per line where the corpus is pre-tokenised.
    """

    id: str
    source: str
    prompt: str
    lines: tuple[CodeLine, ...]
    repo: str = ""
    licence: str = ""
    language: str = "python"
    tokens: tuple[LineIds, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values: lines as [trivia, code] pairs, tokens as [line, rationale or null] pairs."""
        content = {
            "id": self.id,
            "source": self.source,
            "repo": self.repo,
            "licence": self.licence,
            "language": self.language,
            "prompt": self.prompt,
            "lines": [[line.trivia, line.code] for line in self.lines],
        }
        return content if self.tokens is None else content | {"tokens": self.tokens}

    def encode(self) -> bytes:
        """The bytes that stand in a shard."""
        return json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: Any) -> "SnippetRecord":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        if not isinstance(data, dict) or data.keys() - {"tokens"} != {*_TEXTS, "lines"}:
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"a snippet must have the fields {sorted((*_TEXTS, 'lines'))} and may have tokens, found {found}"
            )
        for name in _TEXTS:
            if not isinstance(data[name], str):
                raise ValueError(f"snippet field {name!r} must be a string, found {data[name]!r}")
        if not _are_pairs(data["lines"]):
            raise ValueError(f"snippet {data['id']!r}: 'lines' must be a non-empty list of [trivia, code] strings")
        lines = tuple(map(CodeLine._make, data["lines"]))
        tokens = data.get("tokens")
        if tokens is not None and not _are_tokens(tokens, len(lines)):
            raise ValueError(
                f"snippet {data['id']!r}: 'tokens' must hold [ids of the line, ids of its rationale or null] for every "
                "line"
            )
        return cls(lines=lines, tokens=tokens and tuple(map(tuple, tokens)), **{name: data[name] for name in _TEXTS})


@dataclass(frozen=True, slots=True)
class SnippetLimits:
    """How large a snippet may be: in logical lines and in characters, trivia and newlines included."""

    max_lines: int = 40
    max_chars: int = 2048
    min_lines: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.min_lines <= self.max_lines:
            raise ValueError(
                f"need 1 <= min_lines <= max_lines, found min_lines={self.min_lines}, max_lines={self.max_lines}"
            )
        if self.max_chars < 1:
            raise ValueError(f"max_chars must be at least 1, found {self.max_chars}")


def cut_snippets(
    lines: Sequence[CodeLine],
    *,
    source: str,
    file_sha256: str,
    limits: SnippetLimits,
    repo: str = "",
    licence: str = "",
    language: str = "python",
) -> tuple[list[SnippetRecord], Counter[str]]:
    """Cuts a file's lines into contiguous snippets, each as full as the limits allow.

    A snippet that cannot reach the end of the file ends before a top-level statement if there is one in its second
    half. A line too long for any snippet is dropped, and so is a snippet with fewer than `min_lines` lines.

    Returns:
        The snippets in file order, and how many lines (`line_too_long`) and snippets (`snippet_too_short`) are gone.
    """
    lines = [line for line in lines if line.code]
    snippets: list[SnippetRecord] = []
    dropped: Counter[str] = Counter()
    start = 0
    while start < len(lines):
        end = _snippet_end(lines, start, limits)
        if end == start:
            dropped["line_too_long"] += 1
            start += 1
            continue
        if end - start < limits.min_lines:
            dropped["snippet_too_short"] += 1
        else:
            snippet_id = f"{file_sha256[:16]}-{len(snippets):04d}"
            cut = tuple(lines[start:end])
            snippets.append(SnippetRecord(snippet_id, source, "", cut, repo, licence, language))
        start = end
    return snippets, dropped


def num_chars(line: CodeLine) -> int:
    """Characters of a line, its trivia and its newline included."""
    return len(line.trivia) + len(line.code) + 1


def _snippet_end(lines: Sequence[CodeLine], start: int, limits: SnippetLimits) -> int:
    """Index one past the last line of the snippet that begins at `start`; `start` itself if not even one line fits."""
    boundary = None
    chars = 0
    for end in range(start, len(lines)):
        half_full = 2 * (end - start) >= limits.max_lines or 2 * chars >= limits.max_chars
        if half_full and not _INSIDE_A_BLOCK.match(lines[end].code):
            boundary = end
        chars += num_chars(lines[end])
        if end - start == limits.max_lines or chars > limits.max_chars:
            return boundary or end
    return len(lines)


def _are_pairs(values: Any) -> bool:
    """Whether `values` is a non-empty list of lists of two strings; half of a sample's decoding, so without a loop."""
    return (
        type(values) is list
        and set(map(type, values)) == {list}
        and set(map(len, values)) == {2}
        and set(map(type, chain.from_iterable(values))) == {str}
    )


def _are_tokens(values: Any, num_lines: int) -> bool:
    """Whether `values` holds, per line, a list of ids and another one or None; as fast as `_are_pairs`."""
    if type(values) is not list or len(values) != num_lines or set(map(type, values)) != {list}:
        return False
    if set(map(len, values)) != {2}:
        return False
    ids = [part for line, rationale in values for part in ((line,) if rationale is None else (line, rationale))]
    return set(map(type, ids)) == {list} and set(map(type, chain.from_iterable(ids))) == {int}
