"""Writes little programs whose hard lines need a chain of look-ups, so that it is known where thinking helps.

A program assigns ten variables, by digit (`A=3`) or by another variable (`B=A`), then asks three times for one:
`q=B`, which is easy (nothing could foretell the variable), and `assert q==3`, which is hard: its digit follows only
from the chain B, A, 3. What the hard line needs is settled before its gate; on one line with the question it would not
be, and no rationale could help. A minority of hard lines carries the chain as a comment (`#BA3`), and some easy lines a
useless one (`#so.ok`). Names come in the order of the alphabet: drawn at random, they are noise that keeps a small
model from learning to look names up. They are capitals, all else is lower case, and comments hold no space, so that a
byte-level tokenizer makes every name and every digit a token of its own.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = string.ascii_uppercase[:16]
WORDS = ("ok", "so", "now", "set", "next", "then")
PROGRAMS_PER_FILE = 100


@dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    """What programs look like. `min_hops` and `max_hops` bound the links from the asked variable to its digit."""

    assignments: int = 10
    roots: int = 3
    pairs: int = 3
    min_hops: int = 1
    max_hops: int = 5
    hard_comments: float = 0.4
    """Part of the hard lines with a comment."""
    wrong_comments: float = 0.0
    """Part of those comments whose chain slips to a variable of another digit, and ends there."""
    easy_comments: float = 0.04
    """Part of the easy lines with a useless comment of one or two words."""
    distractors: int = 0
    """Lines like `z=B` or `z=3` per program, anywhere: random, easy, and of no use."""
    blocks: bool = False
    """Write a pair as one compound statement: `for q in[B]:` and the indented assert."""

    def __post_init__(self) -> None:
        least, most = self.roots * (1 + self.min_hops), self.roots * (1 + self.max_hops)
        if not 1 <= self.roots <= len(string.digits) or not least <= self.assignments <= min(most, len(NAMES)):
            raise ValueError(
                f"assignments={self.assignments}, roots={self.roots}: {self.roots} chains of {self.min_hops} to "
                f"{self.max_hops} hops take {least} to {most} assignments, with at most {len(NAMES)} names and "
                f"{len(string.digits)} digits"
            )
        if not 1 <= self.pairs <= self.assignments - self.roots * self.min_hops:
            raise ValueError(f"pairs={self.pairs}: there is only {self.assignments - least + self.roots} to ask for")

    @property
    def lines(self) -> int:
        """Logical lines of every program."""
        return self.assignments + 2 * self.pairs + self.distractors


@dataclass(frozen=True, slots=True)
class Question:
    """One hard line: the chain of names from the asked variable to a digit, as in `BA3`."""

    chain: str

    @property
    def digit(self) -> str:
        """What the hard line asserts."""
        return self.chain[-1]


def write_sources(folder: Path, config: ProgramConfig, *, programs: int, seed: int) -> None:
    """Writes files of `PROGRAMS_PER_FILE` programs into the new folder `folder`; the same seed, the same bytes."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(0, programs, PROGRAMS_PER_FILE):
        count = min(PROGRAMS_PER_FILE, programs - number)
        text = "".join(program(config, draw) for _ in range(count))
        (folder / f"programs_{number // PROGRAMS_PER_FILE:05d}.py").write_text(text, encoding="utf-8")


def program(config: ProgramConfig, draw: random.Random) -> str:
    """The source text of one program; running it raises nothing."""
    values = _assignments(config, draw)
    rows = [_easy(f"{name}={value}", config, draw) for name, value in values.items()]
    for chain in _asked(values, config, draw):
        comment = ""
        if draw.random() < config.hard_comments:
            slips = draw.random() < config.wrong_comments
            comment = f"#{_slipped(chain, values, config, draw) if slips else chain}\n"
        if config.blocks:
            rows.append(_easy(f"for q in[{chain[0]}]:", config, draw))
            rows.append(f"{' ' if comment else ''}{comment} assert q=={chain[-1]}\n")
        else:
            rows.append(_easy(f"q={chain[0]}", config, draw))
            rows.append(f"{comment}assert q=={chain[-1]}\n")
    return "".join(_with_distractors(rows, values, config, draw))


def hops(chain: str) -> int:
    """Links between names in a chain such as `BA3` (one)."""
    return len(chain) - 2


def is_hard(line: str) -> bool:
    """Whether a line of code is one of those that need a chain."""
    return line.lstrip().startswith("assert")


def questions(lines: list[str]) -> Iterator[tuple[int, Question]]:
    """Number and question of every hard line among a program's lines of code (no comments)."""
    values: dict[str, str] = {}
    for number, line in enumerate(lines):
        if is_hard(line):
            yield number, Question(_chain(values["q"], values))
        else:
            name, _, value = line.strip().removeprefix("for ").replace(" in[", "=").rstrip("]:").partition("=")
            values[name] = value


def _assignments(config: ProgramConfig, draw: random.Random) -> dict[str, str]:
    """Names in order, each with its digit or the earlier name it stands for.

    Every root begins a chain of its own, with a digit of its own, and the chains are shuffled into one another. Were a
    name the parent of several, or drawn from the last few, most late names would come from one root and a model would
    guess well without following any chain.
    """
    links = [config.min_hops] * config.roots
    while sum(links) < config.assignments - config.roots:
        short = [root for root in range(config.roots) if links[root] < config.max_hops]
        links[draw.choice(short)] += 1
    order = [root for root, count in enumerate(links) for _ in range(count + 1)]
    draw.shuffle(order)
    heads = draw.sample(string.digits, config.roots)
    values: dict[str, str] = {}
    for name, root in zip(NAMES, order, strict=False):
        values[name], heads[root] = heads[root], name
    return values


def _chain(name: str, values: dict[str, str]) -> str:
    return name if name.isdigit() else name + _chain(values[name], values)


def _asked(values: dict[str, str], config: ProgramConfig, draw: random.Random) -> list[str]:
    """Different chains to ask for: each digit equally likely while its chain has a variable left to ask for."""
    chains = [_chain(name, values) for name in values]
    asked: list[str] = []
    while len(asked) < config.pairs:
        digit = draw.choice([chain[-1] for chain in chains if hops(chain) == 0])
        left = [c for c in chains if c[-1] == digit and hops(c) >= config.min_hops and c not in asked]
        asked += [draw.choice(left)] if left else []
    return asked


def _slipped(chain: str, values: dict[str, str], config: ProgramConfig, draw: random.Random) -> str:
    """The chain up to a random link, then that of a variable with another digit; as long as a right one may be."""
    kept = chain[: draw.randrange(1, len(chain) - 1)]
    others = [other for other in (_chain(name, values) for name in values) if other[-1] != chain[-1]]
    return kept + draw.choice([other for other in others if hops(kept + other) <= config.max_hops])


def _easy(line: str, config: ProgramConfig, draw: random.Random) -> str:
    if draw.random() >= config.easy_comments:
        return f"{line}\n"
    words = draw.choices(WORDS, k=draw.choice((1, 2)))
    return f"#{'.'.join(words)}\n{line}\n"


def _with_distractors(
    rows: list[str], values: dict[str, str], config: ProgramConfig, draw: random.Random
) -> Iterator[str]:
    """Puts distractors at random places after the first row, never inside a block."""
    places = [place for place, row in enumerate(rows) if not (config.blocks and is_hard(row.splitlines()[-1]))][1:]
    at = sorted(draw.choice(places) for _ in range(config.distractors))
    for place, row in enumerate(rows):
        for _ in range(at.count(place)):
            value = draw.choice([draw.choice([*values][:place]), draw.choice(string.digits)])
            yield _easy(f"z={value}", config, draw)
        yield row
