"""Tells training files that hold a task of an evaluation benchmark, by its text or by the form of its solution.

A model that has read the test reports a score nobody can reproduce on new problems. Benchmarks are copied into
tutorials, evaluation harnesses and answer collections, as they are, reformatted, or with other names.
"""

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ra3.corpus.benchmarks import BenchmarkTask, read_tasks
from megatron_ra3.corpus.ngrams import Hashes, are_names, ngram_hashes, word_hashes
from megatron_ra3.corpus.normal_form import functions, normal_form

# Chosen on 25,474 different files, a standard library and installed packages, against HumanEval(+) and MBPP(+), where
# every match was a coincidence. By their form, 24 functions of ordinary libraries with 16 to 21 nodes match (powers of
# two, lists without repetitions, sums of pairs) and none with more. By n-grams 3 files match, two of them with lists of
# numerals; were one-letter words names, the alphabet alone would give 13 more.
NGRAM_WORDS = 13
SHORTEST_TEXT_WORDS = 8
MIN_DISTINCT_NAMES = 7
MAX_TASKS = 3  # MBPP holds some tasks two and three times
MIN_NODES = 24


@dataclass(frozen=True, slots=True)
class _Index:
    """Hashes [entries], ascending and unique, and the number of the task [entries] that each one stands for."""

    hashes: Hashes
    tasks: NDArray[np.int32]

    def hits(self, queries: Hashes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Positions [hits] of the queries that are in the index, and their entries [hits]."""
        if not len(self.hashes):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        entries = np.minimum(np.searchsorted(self.hashes, queries), len(self.hashes) - 1)
        positions = np.flatnonzero(self.hashes[entries] == queries)
        return positions, entries[positions]


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """What identifies the tasks of benchmarks; pickles to 12 bytes per n-gram.

    `counts` says what the files held: `tasks`, `ngrams`, `short_texts` and `functions` that identify a task,
    `boilerplate_ngrams` and `boilerplate_functions` that do not, `unparsable_solutions` known by n-grams only.

    Of HumanEval's prompts 163 of 164 are found alone, of MBPP's 958 of 974 (the others have fewer than eight words, or
    than seven names); of their solutions without docstring and with every name changed, 118 of 164 and 486 of 974: the
    rest are too small to tell from ordinary code.
    """

    ngram_words: int
    task_ids: tuple[str, ...]
    counts: dict[str, int]
    _ngrams: _Index
    _openings: _Index
    _short_texts: dict[tuple[int, int], int]
    _functions: dict[int, int]
    _skeletons: frozenset[str]

    @classmethod
    def load(
        cls,
        paths: Sequence[Path],
        *,
        ngram_words: int = NGRAM_WORDS,
        max_tasks: int = MAX_TASKS,
        min_nodes: int = MIN_NODES,
    ) -> "Benchmarks":
        """Reads benchmark files (`benchmarks.read_tasks` says which).

        An n-gram identifies a task if at least seven of its words are different names, and if at most `max_tasks`
        tasks have it: what more of them share is boilerplate. A text of 8 to `ngram_words` - 1 words identifies its
        task as a whole under the same conditions. A function does if it has at least `min_nodes` AST nodes.

        Raises:
            ValueError: a file is of no known format, or `ngram_words` is below 8.
            OSError: a file cannot be read.
        """
        if ngram_words < SHORTEST_TEXT_WORDS:
            raise ValueError(f"ngram_words must be at least {SHORTEST_TEXT_WORDS}, found {ngram_words}")
        tasks: dict[str, list[BenchmarkTask]] = {}
        for path in paths:
            for task in read_tasks(path):
                tasks.setdefault(task.id, []).append(task)
        builder = _Builder(ngram_words, max_tasks, min_nodes)
        for number, versions in enumerate(tasks.values()):
            for version in versions:
                builder.add(number, version)
        return builder.build(tuple(tasks))

    def match(self, text: str, tree: ast.Module | None) -> str | None:
        """The task that a file holds and what gave it away, as "HumanEval/12 (13-gram)" or "Mbpp/5 (ast)"; else None.

        `tree` is the parsed `text`, if it is Python.
        """
        words = word_hashes(text)
        positions, entries = self._ngrams.hits(ngram_hashes(words, self.ngram_words))
        if len(positions):
            return f"{self.task_ids[self._ngrams.tasks[entries[0]]]} ({self.ngram_words}-gram)"
        task = self._short_text(words)
        if task is not None:
            return f"{self.task_ids[task]} (text)"
        task = self._function(tree) if tree else None
        return None if task is None else f"{self.task_ids[task]} (ast)"

    def _function(self, tree: ast.Module) -> int | None:
        """The task one of whose functions is in `tree`."""
        try:
            for function, skeleton in functions(tree):
                if skeleton in self._skeletons:
                    task = self._functions.get(normal_form(function).hash)
                    if task is not None:
                        return task
        except RecursionError:  # hundreds of nested blocks: no benchmark has such code, and its text was looked at
            return None
        return None

    def _short_text(self, words: Hashes) -> int | None:
        """The task of which `words` holds a whole text that is shorter than one n-gram."""
        positions, _ = self._openings.hits(ngram_hashes(words, SHORTEST_TEXT_WORDS))
        for position in positions:
            for length in range(SHORTEST_TEXT_WORDS, self.ngram_words):
                for whole in ngram_hashes(words[position : position + length], length).tolist():
                    if (length, whole) in self._short_texts:
                        return self._short_texts[length, whole]
        return None


class _Builder:
    """Collects what each task has, then keeps what few tasks have."""

    def __init__(self, ngram_words: int, max_tasks: int, min_nodes: int) -> None:
        self._ngram_words, self._max_tasks, self._min_nodes = ngram_words, max_tasks, min_nodes
        self._ngrams: list[Hashes] = []
        self._ngram_tasks: list[NDArray[np.int32]] = []
        self._short_texts: dict[tuple[int, int], dict[int, int]] = {}  # (words, hash) -> task -> hash of the opening
        self._functions: dict[int, dict[int, str]] = {}  # hash -> task -> skeleton
        self._unparsable = 0

    def add(self, number: int, task: BenchmarkTask) -> None:
        for text in task.texts:
            self._add_text(number, text)
        for before, code in task.solutions:
            tree = _parse(code) or _parse(f"{before}{code}")
            self._unparsable += tree is None
            for function, skeleton in functions(tree) if tree else ():
                form = normal_form(function)
                if form.nodes >= self._min_nodes:
                    self._functions.setdefault(form.hash, {})[number] = skeleton

    def _add_text(self, number: int, text: str) -> None:
        words, named = word_hashes(text), are_names(text)
        length = min(len(words), self._ngram_words)
        if length < SHORTEST_TEXT_WORDS:
            return
        hashes = ngram_hashes(words, length)[_distinct_names(words, named, length) >= MIN_DISTINCT_NAMES]
        if length == self._ngram_words:
            self._ngrams.append(np.unique(hashes))
            self._ngram_tasks.append(np.full(len(self._ngrams[-1]), number, np.int32))
        elif len(hashes):
            opening = int(ngram_hashes(words[:SHORTEST_TEXT_WORDS], SHORTEST_TEXT_WORDS)[0])
            self._short_texts.setdefault((length, int(hashes[0])), {})[number] = opening

    def build(self, task_ids: tuple[str, ...]) -> Benchmarks:
        ngrams, boilerplate_ngrams = self._index()
        short = {key: tasks for key, tasks in self._short_texts.items() if len(tasks) <= self._max_tasks}
        kept = {key: tasks for key, tasks in self._functions.items() if len(tasks) <= self._max_tasks}
        openings = np.unique(np.array([hash_ for tasks in short.values() for hash_ in tasks.values()], np.uint64))
        counts = {
            "tasks": len(task_ids),
            "ngrams": len(ngrams.hashes),
            "boilerplate_ngrams": boilerplate_ngrams,
            "short_texts": len(short),
            "functions": len(kept),
            "boilerplate_functions": len(self._functions) - len(kept),
            "unparsable_solutions": self._unparsable,
        }
        return Benchmarks(
            ngram_words=self._ngram_words,
            task_ids=task_ids,
            counts=counts,
            _ngrams=ngrams,
            _openings=_Index(openings, np.zeros(len(openings), np.int32)),
            _short_texts={key: min(tasks) for key, tasks in short.items()},
            _functions={key: min(tasks) for key, tasks in kept.items()},
            _skeletons=frozenset(skeleton for tasks in kept.values() for skeleton in tasks.values()),
        )

    def _index(self) -> tuple[_Index, int]:
        """The n-grams of at most `max_tasks` tasks, each with its first task, and the number of the others."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._ngrams])
        tasks = np.concatenate([np.empty(0, np.int32), *self._ngram_tasks])
        order = np.lexsort((tasks, hashes))
        hashes, tasks = hashes[order], tasks[order]
        first = np.ones(len(hashes), bool)
        first[1:] = hashes[1:] != hashes[:-1]
        new_task = first.copy()
        new_task[1:] |= tasks[1:] != tasks[:-1]
        few = np.bincount(np.cumsum(first) - 1, weights=new_task, minlength=0) <= self._max_tasks
        return _Index(hashes[first][few], tasks[first][few]), int(np.count_nonzero(~few))


def _distinct_names(words: Hashes, named: NDArray[np.bool_], n: int) -> NDArray[np.intp]:
    """How many different names, words of two letters and more, each run [words - n + 1] of `n` words holds."""
    runs = np.sort(np.lib.stride_tricks.sliding_window_view(np.where(named, words, np.uint64(0)), n), axis=1)
    return (runs[:, :1] != 0).sum(axis=1) + ((runs[:, 1:] != runs[:, :-1]) & (runs[:, 1:] != 0)).sum(axis=1)


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are the author's business
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
