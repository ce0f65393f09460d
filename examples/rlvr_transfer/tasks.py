"""Makes verifiable tasks from the positive control's programs: complete a guard that accepts one digit only.

A prompt is a program that assigns variables by digit or by another variable and then asks for one (`q=F`). The answer
is the line that follows, such as `assert q==3`. It becomes the body of a function,

    def accepts(q):
     try:
      guard(q)
     except AssertionError:
      return False
     return True
    def guard(q):
     assert q==3

and hidden tests call `accepts` with all ten digits. The prompt's variables do not exist there, so nothing but the digit
that they stand for passes. As in the programs, two layers cannot follow a chain in one pass, but a rationale can.

Chains are longer here than in mid-training (two roots instead of three, so up to seven links instead of five). A task's
structure is which variables stand for which, and which one is asked for; digits aside. Training and held-out tasks
have no structure in common.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "positive_control"))
from programs import NAMES

HEAD = "def accepts(q):\n try:\n  guard(q)\n except AssertionError:\n  return False\n return True\ndef guard(q):\n "
STOP = "\n"
MAX_ANSWER_TOKENS = 24
HELDOUT_SHARE = 5
"""One in so many structures is held out."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What tasks look like; `min_hops` bounds the links from the asked variable to its digit."""

    assignments: int = 10
    roots: int = 2
    min_hops: int = 2
    max_hops: int = 7

    def __post_init__(self) -> None:
        most = self.roots * (1 + self.max_hops)
        if not self.roots * 2 <= self.assignments <= min(most, len(NAMES)):
            raise ValueError(f"assignments={self.assignments}: {self.roots} chains take {2 * self.roots} to {most}")
        if not 1 <= self.min_hops <= (self.assignments - self.roots) // self.roots:
            raise ValueError(f"min_hops={self.min_hops}: some programs would have no variable to ask for")


@dataclass(frozen=True, slots=True)
class Structure:
    """`parents` says of each variable which earlier one it stands for (-1: a digit); `asked` is the one asked for."""

    parents: tuple[int, ...]
    asked: int

    @property
    def hops(self) -> int:
        """Links from the asked variable to its digit."""
        links, at = 0, self.asked
        while self.parents[at] >= 0:
            links, at = links + 1, self.parents[at]
        return links

    @property
    def is_heldout(self) -> bool:
        """Decided by a hash, so that it does not depend on which structures were drawn."""
        digest = hashlib.sha256(repr((self.parents, self.asked)).encode()).digest()
        return int.from_bytes(digest[:8]) % HELDOUT_SHARE == 0


def write_tasks(folder: Path, config: TaskConfig, *, train: int, heldout: int, seed: int) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, each structure once in all; the same seed, the same bytes."""
    draw = random.Random(f"tasks {seed}")
    wanted = {"train": train, "heldout": heldout}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    seen: set[Structure] = set()
    for _ in range(100 * (train + heldout)):
        if all(len(found[name]) == count for name, count in wanted.items()):
            break
        structure = _structure(config, draw)
        name = "heldout" if structure.is_heldout else "train"
        if structure not in seen and len(found[name]) < wanted[name]:
            seen.add(structure)
            found[name].append(task(structure, draw, f"chains/{name}/{len(found[name])}"))
    else:
        raise ValueError(f"train={train}, heldout={heldout}: there are not that many structures of {config}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in found.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def task(structure: Structure, draw: random.Random, task_id: str) -> dict[str, Any]:
    """One record of the format `completions`, with digits drawn for the roots."""
    roots = [place for place, parent in enumerate(structure.parents) if parent < 0]
    digits = dict(zip(roots, draw.sample(string.digits, len(roots)), strict=True))
    lines = [f"{NAMES[place]}={digits.get(place) or NAMES[parent]}" for place, parent in enumerate(structure.parents)]
    root = structure.asked
    while structure.parents[root] >= 0:
        root = structure.parents[root]
    right = int(digits[root])
    return {
        "task_id": task_id,
        "hops": structure.hops,
        "prompt": "\n".join([*lines, f"q={NAMES[structure.asked]}"]) + "\n",
        "stop": [STOP],
        "head": HEAD,
        "function": "accepts",
        "tests": [[[digit], digit == right] for digit in range(10)],
        "max_new_tokens": MAX_ANSWER_TOKENS,
    }


def _structure(config: TaskConfig, draw: random.Random) -> Structure:
    """Chains of random lengths, shuffled into one another, and a variable at least `min_hops` links from its digit."""
    while True:
        owners = [*range(config.roots), *draw.choices(range(config.roots), k=config.assignments - config.roots)]
        if all(2 <= owners.count(root) <= 1 + config.max_hops for root in range(config.roots)):
            break
    draw.shuffle(owners)
    last: dict[int, int] = {}
    parents = []
    for place, owner in enumerate(owners):
        parents.append(last.get(owner, -1))
        last[owner] = place
    candidates = [Structure(tuple(parents), asked) for asked in range(len(parents))]
    return draw.choice([item for item in candidates if item.hops >= config.min_hops])
