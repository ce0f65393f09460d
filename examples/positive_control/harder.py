"""Makes the positive control harder, one thing at a time, to find out where it breaks.

Every variant is a corpus of its own, a base model from scratch and RA3 from it, with the settings of run.yaml; its rows
say how often RA3 thinks, what, and with what effect, next to the base model it came from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = Path(__file__).with_name("run.py")
VARIANTS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "wrong 25 %": ("wrong_comments=0.25",),
    "wrong 50 %": ("wrong_comments=0.5",),
    "wrong 75 %": ("wrong_comments=0.75",),
    "deeper": ("assignments=16", "min_hops=2"),
    "noisy": ("distractors=4", "easy_comments=0.25"),
    "rare comments": ("hard_comments=0.1",),
}
"""Fields of `programs.ProgramConfig` that differ from their defaults."""
FIGURES = (
    "think_rate_hard",
    "think_rate_easy",
    "accuracy_hard",
    "accuracy_hard_act",
    "accuracy_hard_by_hops",
    "rationale_tokens",
    "needed_tokens",
    "rationale_correct",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    given = parser.parse_args()
    rows = [run_variant(given.out, name, seed) for name in given.variants for seed in given.seeds]
    path = given.out / "results.json"
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows), path, sep="\n")


def run_variant(out: Path, name: str, seed: int) -> dict[str, Any]:
    """Corpus, base, RA3 and evaluations of one variant, unless they are there; returns its row."""
    folder = out / f"{''.join(letter for letter in name if letter.isalnum())}-seed{seed}"
    changes = [part for change in VARIANTS[name] for part in ("--program", change)]
    place = ["--out", folder, "--seed", seed]
    call("base", *place, *changes)
    call("ra3", *place)
    row: dict[str, Any] = {"variant": name, "seed": seed, "program": list(VARIANTS[name])}
    for run in ("base", "ra3"):
        figures = folder / f"{run}.json"
        if not figures.is_file():
            call("evaluate", "--run", folder / run, "--out", figures)
        found = json.loads(figures.read_text(encoding="utf-8"))
        row |= {f"{figure}_{run}": found[figure] for figure in FIGURES}
    return row


def call(*arguments: object) -> None:
    """Run a command of run.py; SystemExit when it fails."""
    done = subprocess.run([sys.executable, str(RUN), *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, rates and accuracies in per cent."""
    columns = (
        ("thinks on hard lines", "think_rate_hard_ra3"),
        ("on easy lines", "think_rate_easy_ra3"),
        ("rationale right", "rationale_correct_ra3"),
        ("accuracy", "accuracy_hard_ra3"),
        ("never thinking", "accuracy_hard_act_ra3"),
        ("base: accuracy", "accuracy_hard_base"),
        ("base: rationale right", "rationale_correct_base"),
    )
    lines = [["variant", "seed", *(heading for heading, _ in columns)], ["---"] * (2 + len(columns))]
    lines += [[row["variant"], str(row["seed"]), *(f"{100 * row[key]:.1f}" for _, key in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
