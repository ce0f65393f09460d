"""Decides what becomes of one document: its snippets, or the reason why it is left out.

Depends on the document and the rules alone, so any number of processes gives the same corpus. The order of the filters
is part of the contract: a document is counted under the first reason that it meets.
"""

import ast
import hashlib
import io
import tokenize
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_ra3.corpus import decontaminate, duplicates, licences, quality, scrub
from megatron_ra3.corpus.documents import Document
from megatron_ra3.corpus.languages import Language, language_of
from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.snippets import SnippetLimits, cut_snippets, num_chars

DropReason = Literal[
    "undecodable", "licence", "generated", "minified", "data", "unparsable", "empty", "contaminated", "no_snippet"
]
Filter = Literal["generated", "minified", "data", "scrub", "near_duplicates"]
"""Filters that can be switched off. Licences and benchmarks are checked where some are given."""


@dataclass(frozen=True)
class Rules:
    """What a document must be like, and how it is cut."""

    limits: SnippetLimits = field(default_factory=SnippetLimits)
    without: frozenset[Filter] = frozenset()
    licences: frozenset[str] | None = None
    """SPDX identifiers that are allowed, in lower case; None allows all."""
    unknown_licence: bool = False
    """Whether a file that nothing is known of is allowed beside `licences`."""
    benchmarks: decontaminate.Benchmarks | None = None


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A kept document: what the corpus counts about it, and the sizes in bytes of its encoded snippets."""

    sha256: str
    repo: str
    licence: str
    language: str
    num_bytes: int
    lines: int
    native_comments: int
    chars: int
    snippets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A document that is good enough, cut into encoded snippets; whether it is a duplicate is not known yet."""

    file: StagedFile
    snippets: tuple[bytes, ...]
    signature: np.ndarray
    cut_dropped: Counter[str]
    scrubbed: Counter[str]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that is left out, with what a reader of the report would want to know."""

    path: str
    reason: DropReason
    detail: str = ""


def examine(document: Document, rules: Rules) -> Kept | Dropped:
    """Reads a document as its language does and applies the rules.

    Raises:
        ValueError: its suffix belongs to no known language; inputs were asked for known suffixes only.
    """
    name = f"{document.repo}/{document.path}"
    language = language_of(document.path)
    if language is None:
        raise ValueError(f"{name} is of no known language")
    try:
        text = decode(document, language)
    except (UnicodeError, SyntaxError, LookupError) as error:
        return Dropped(name, "undecodable", str(error))
    identifiers = licences.normalise(document.licence or licences.spdx_header(text))
    if rules.licences is not None and not licences.allowed(identifiers, rules.licences, unknown=rules.unknown_licence):
        return Dropped(name, "licence", ", ".join(identifiers) or "unknown")
    suspicion = quality.suspicion(text, document.path, rules.without)
    if suspicion is not None:
        return Dropped(name, suspicion)
    scrubbed: Counter[str] = Counter()
    if "scrub" not in rules.without:
        text, scrubbed = scrub.scrub(text)
    try:
        tree = _parse(text, language)
        lines = language.split_lines(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        return Dropped(name, "unparsable", str(error))
    if not any(line.code for line in lines):
        return Dropped(name, "empty")
    if rules.benchmarks is not None and (match := rules.benchmarks.match(text, tree)):
        return Dropped(name, "contaminated", match)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    licence = ",".join(identifiers)
    records, cut_dropped = cut_snippets(
        lines,
        source=document.path,
        file_sha256=sha256,
        limits=rules.limits,
        repo=document.repo,
        licence=licence,
        language=language.name,
    )
    if not records:
        return Dropped(name, "no_snippet", ", ".join(f"{count} {reason}" for reason, count in cut_dropped.items()))
    kept = [line for record in records for line in record.lines]
    snippets = tuple(record.encode() for record in records)
    file = StagedFile(
        sha256=sha256,
        repo=document.repo,
        licence=licence,
        language=language.name,
        num_bytes=len(document.data),
        lines=len(kept),
        native_comments=sum(annotate(line, "observe", language.comment)[0] is not None for line in kept),
        chars=sum(map(num_chars, kept)),
        snippets=tuple(map(len, snippets)),
    )
    signature = np.zeros(0, np.uint32) if "near_duplicates" in rules.without else duplicates.signature(text)
    return Kept(file, snippets, signature, cut_dropped, scrubbed)


def decode(document: Document, language: Language) -> str:
    """A document as text with every newline as one: Python by byte-order mark or coding cookie, all else as UTF-8.

    Raises:
        SyntaxError, LookupError: the cookie names no text encoding. UnicodeError: the bytes do not fit it.
    """
    encoding = "utf-8"
    if language.name == "python" and not document.is_text:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(document.data).readline)
    with io.TextIOWrapper(io.BytesIO(document.data), encoding) as file:
        return file.read()


def _parse(text: str, language: Language) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are the author's business
        if language.name == "python":
            return ast.parse(text)
        language.parse(text)
        return None
