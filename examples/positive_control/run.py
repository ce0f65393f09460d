"""The positive control: a corpus on which it is known where thinking helps, and whether RA3 finds out.

`all` makes, for every seed, a corpus, a base model (next-token training with native comments observed), RA3 from that
base, and two next-token baselines from scratch: one on as many tokens, one with as many operations. Finished steps are
not repeated, so the same command goes on where it stopped, and the sub-steps can be run one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from evaluate import evaluate_run, run_config
from programs import ProgramConfig, write_sources
from results import aggregate, matched_tokens, seed_result, table, tokens_per_program

HERE = Path(__file__).parent
CONFIG = HERE / "run.yaml"
MODEL = HERE / "model"
HELDOUT_FRACTION = 0.05
TOKENIZER_VOCAB = {False: 279, True: 285}
"""By `blocks`: the 256 bytes, five special tokens, and the merges that spell the words of these programs; one more, and
two names would become one token."""


def main() -> None:
    given = _parser().parse_args()
    given.act(given)


def make_base(given: argparse.Namespace) -> None:
    """DIR/corpus, and DIR/base: next-token training from random weights, native comments observed as rationales."""
    changes = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in given.program)}
    program = ProgramConfig(blocks=given.blocks, **changes)
    make_corpus(given.out, program, programs=given.programs, seed=given.seed)
    settings = [f"objective.granularity={given.granularity}", *given.set]
    midtrain(given.out, "base", given.seed, "model.init=random", f"model.folder={MODEL}", "em.rounds=0", *settings)


def make_ra3(given: argparse.Namespace) -> None:
    """DIR/ra3: EM rounds from DIR/base/export."""
    midtrain(
        given.out, "ra3", given.seed, f"model.folder={given.out / 'base' / 'export'}", "warmup.steps=0", *given.set
    )


def make_ntp(given: argparse.Namespace) -> None:
    """DIR/ntp and DIR/ntp_flops: next-token training without comments, on as many tokens, and as many operations."""
    per_step = run_config(given.out / "base").warmup.snippets_per_step * tokens_per_program(given.out)
    for name, tokens in matched_tokens(given.out).items():
        if name not in given.only:
            continue
        midtrain(
            given.out,
            name,
            given.seed,
            "model.init=random",
            f"model.folder={MODEL}",
            "em.rounds=0",
            "latents.comments=strip",
            f"warmup.steps={math.ceil(tokens / per_step)}",
            f"warmup.max_tokens={tokens}",
            *given.set,
        )


def evaluate(given: argparse.Namespace) -> None:
    """Write the figures of one run on held-out programs."""
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figures = evaluate_run(given.run, given.programs)
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def make_all(given: argparse.Namespace) -> None:
    """Everything, seed by seed, then the figures over seeds."""
    for seed in given.seeds:
        given.seed, given.out = seed, given.folder / f"seed{seed}"
        make_base(given)
        make_ra3(given)
        make_ntp(given)
        for name in ("base", "ra3", *given.only):
            figures, summary = given.out / f"{name}.json", given.out / name / "summary.json"
            if not figures.is_file() or figures.stat().st_mtime < summary.stat().st_mtime:
                call([sys.executable, __file__, "evaluate", "--run", given.out / name, "--out", figures], figures)
        (given.out / "result.json").write_text(json.dumps(seed_result(given.out, seed), indent=1) + "\n")
    done = aggregate([given.folder / f"seed{seed}" / "result.json" for seed in given.seeds])
    path = given.folder / "results.json"
    path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(table(done), path, sep="\n\n")


def make_corpus(out: Path, program: ProgramConfig, *, programs: int, seed: int) -> None:
    """Generate programs under `out`/sources and prepare them as `out`/corpus; every program is one snippet."""
    wanted = {**dataclasses.asdict(program), "programs": programs, "seed": seed}
    made = out / "program.json"
    if (out / "corpus" / "manifest.json").is_file():
        if json.loads(made.read_text(encoding="utf-8")) != wanted:
            raise SystemExit(f"{out}/corpus was made with other settings than {wanted}: give another --out")
        return
    shutil.rmtree(out / "sources", ignore_errors=True)
    write_sources(out / "sources", program, programs=programs, seed=seed)
    made.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    limits = ["--max-lines", program.lines, "--min-lines", program.lines, "--max-chars", 10_000]
    size = ["--heldout-fraction", HELDOUT_FRACTION, "--tokenizer-vocab", TOKENIZER_VOCAB[program.blocks]]
    call(
        [*_RA3, "prepare", out / "sources", "--out", out / "corpus", "--overwrite", *limits, *size], out / "corpus.log"
    )


def midtrain(out: Path, name: str, seed: int, *settings: str) -> None:
    """Run or resume `ra3 midtrain` into `out`/`name`, unless it is finished under these very settings."""
    folder, record = out / name, out / f"{name}.command.json"
    command = [*_RA3, "midtrain", str(CONFIG), f"run_folder={folder}", f"corpus.folder={out / 'corpus'}"]
    command += [f"seed={seed}", *settings]
    if record.is_file() and json.loads(record.read_text()) == command and (folder / "summary.json").is_file():
        return
    record.write_text(json.dumps(command, indent=1) + "\n", encoding="utf-8")
    call(command, out / f"{name}.log")


def call(command: Sequence[object], log: Path) -> None:
    """Run a command into its log; SystemExit with the log's end when it fails."""
    log = log.with_suffix(".log")
    print(f"{time.strftime('%H:%M:%S')} {log.with_suffix('')}", flush=True)
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, env=_environment(), check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8").splitlines()[-15:]
        raise SystemExit("\n".join([*tail, f"{log}: ended with status {done.returncode}"]))


_RA3 = [sys.executable, "-m", "megatron_ra3"]


def _environment() -> dict[str, str]:
    """One thread, and memory that is given back late: with so small a model, page faults would cost a fifth."""
    late = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
    return {"OMP_NUM_THREADS": "1", **late, **os.environ}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, act in (("base", make_base), ("ra3", make_ra3), ("ntp", make_ntp), ("all", make_all)):
        command = commands.add_parser(name, help=act.__doc__)
        command.set_defaults(act=act)
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="for `ra3 midtrain`; repeat"
        )
        if name == "all":
            command.add_argument("--out", dest="folder", type=Path, required=True)
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        else:
            command.add_argument("--out", type=Path, required=True, metavar="DIR")
            command.add_argument("--seed", type=int, default=0)
        if name in ("ntp", "all"):
            both = ("ntp", "ntp_flops")
            command.add_argument("--only", nargs="+", choices=both, default=both, help="default: both")
        if name in ("base", "all"):
            command.add_argument("--blocks", action="store_true", help="pairs of lines as compound statements")
            command.add_argument("--granularity", choices=("line", "statement", "token"), default="line")
            command.add_argument("--programs", type=int, default=30_000, help="default %(default)s")
            command.add_argument(
                "--program", action="append", default=[], metavar="FIELD=VALUE", help="see ProgramConfig"
            )
    command = commands.add_parser("evaluate", help=evaluate.__doc__)
    command.set_defaults(act=evaluate)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--programs", type=int, default=400, help="default %(default)s")
    return parser


if __name__ == "__main__":
    main()
