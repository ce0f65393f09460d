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

from run import evaluate_once

from megatron_ra3.report.experiments import Column, Record, markdown, over_seeds

RUN = Path(__file__).with_name("run.py")
VARIANTS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "wrong 25 %": ("wrong_comments=0.25",),
    "wrong 50 %": ("wrong_comments=0.5",),
    "wrong 75 %": ("wrong_comments=0.75",),
    "deeper": ("assignments=16", "min_hops=2", "max_hops=6"),
    "noisy": ("distractors=4", "easy_comments=0.25"),
    "rare comments": ("hard_comments=0.1",),
}
"""Fields of `programs.ProgramConfig` that differ from their defaults."""
COLUMNS = (
    Column("think_rate_hard_ra3", "thinks on hard lines, %", 1, 100),
    Column("think_rate_easy_ra3", "on easy lines, %", 1, 100),
    Column("rationale_correct_ra3", "rationale right, %", 1, 100),
    Column("rationale_tokens_ra3", "rationale, tokens", 2),
    Column("needed_tokens_ra3", "needed", 2),
    Column("accuracy_hard_ra3", "accuracy, %", 1, 100),
    Column("accuracy_hard_act_ra3", "never thinking, %", 1, 100),
    Column("accuracy_hard_base", "base: accuracy, %", 1, 100),
    Column("rationale_correct_base", "base: rationale right, %", 1, 100),
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
    print(markdown(over_seeds(rows, ["variant"]), {"variant": "variant"}, COLUMNS), path, sep="\n\n")


def run_variant(out: Path, name: str, seed: int) -> Record:
    """Corpus, base, RA3 and evaluations of one variant, unless they are there; returns its row."""
    folder = out / f"{''.join(letter for letter in name if letter.isalnum())}-seed{seed}"
    changes = [part for change in VARIANTS[name] for part in ("--program", change)]
    place = ["--out", folder, "--seed", seed]
    call("base", *place, *changes)
    call("ra3", *place)
    row: Record = {"variant": name, "seed": seed}
    for run in ("base", "ra3"):
        found = json.loads(evaluate_once(folder, run).read_text(encoding="utf-8"))
        row |= {f"{figure}_{run}": value for figure, value in found.items() if isinstance(value, float)}
    return row


def call(*arguments: object) -> None:
    """Run a command of run.py; SystemExit when it fails."""
    done = subprocess.run([sys.executable, str(RUN), *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
