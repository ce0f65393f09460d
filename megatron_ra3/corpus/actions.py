"""What one action is: a line, a statement, a token or the whole snippet (algorithm.md 1).

Regroups tokenised lines and leaves the tokens alone: held-out figures of different granularities would otherwise not be
figures of the same text. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ra3.latents import LatentFormat, Snippet
from megatron_ra3.presets import Granularity


def regroup(
    snippet: Snippet, code: Sequence[str], granularity: Granularity, latent_format: LatentFormat, comment: str = "#"
) -> Snippet:
    """Turn a snippet of lines into one of actions; `code` holds the text of each of its lines.

    `comment` is the sign of a full-line comment in the snippet's language. A native rationale survives where it stands
    before the first line of an action.
    ValueError: `token` with a surface form that has no gate inside a line.
    """
    match granularity:
        case "line":
            return snippet
        case "statement":
            return latent_format.merge(snippet, statement_sizes(code, comment))
        case "snippet":
            return latent_format.merge(snippet, [len(snippet.lines)])
        case "token":
            return latent_format.split(snippet)


def statement_sizes(code: Sequence[str], comment: str = "#") -> list[int]:
    """How many logical lines each statement takes.

    A block without blocks inside it is one statement together with the line that opens it. Any other line is one by
    itself, also the opening line of a block that encloses others.
    """
    indents = [len(row) - len(row.lstrip()) for row in (_first_row_of_code(text, comment) for text in code)]
    sizes = []
    start = 0
    while start < len(code):
        end = start + 1
        while end < len(code) and indents[end] > indents[start]:
            end += 1
        if len(set(indents[start + 1 : end])) > 1:
            end = start + 1
        sizes.append(end - start)
        start = end
    return sizes


def _first_row_of_code(text: str, comment: str) -> str:
    """A line may come with blank rows and comments above it."""
    rows = text.split("\n")
    return next((row for row in rows if row.strip() and not row.lstrip().startswith(comment)), rows[-1])
