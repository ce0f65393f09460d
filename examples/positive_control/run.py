"""The positive control: a corpus on which it is known where thinking helps, and whether RA3 finds out.

`all` makes, for every seed, a corpus, a base model (next-token training with native comments observed), RA3 from that
base, and two next-token baselines from scratch: one on as many tokens, one with as many operations. Finished steps are
not repeated, so the same command goes on where it stopped, and the sub-steps can be run one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import CONTROL_EM, RA3, call, call_once
from evaluate import evaluate_run, run_config
from programs import ProgramConfig, write_sources
from results import aggregate, matched_tokens, seed_result, table, tokens_per_program

HERE = Path(__file__).parent
CONFIG = HERE / "run.yaml"
MODEL = HERE / "model"
FROM_SCRATCH = ("model.init=random", "em.rounds=0")
HELDOUT_FRACTION = 0.05
HELDOUT = 400
"""Programs to evaluate on."""
TOKENIZER_VOCAB = {False: 279, True: 285}
"""By `blocks`: the 256 bytes, five special tokens, and the merges that spell the words of these programs; one more, and
two names would become one token."""


def main() -> None:
    given = _parser().parse_args()
    given.act(given)


def make_base(given: argparse.Namespace) -> None:
    """DIR/corpus, and DIR/base: next-token training from random weights, native comments observed as rationales."""
    make_corpus(given.out, _program(given.program), programs=given.programs, seed=given.seed)
    midtrain(given.out, "base", MODEL, given.seed, *FROM_SCRATCH, *given.set)


def make_ra3(given: argparse.Namespace) -> None:
    """DIR/ra3: EM rounds from DIR/base/export."""
    base = _finished(given.out / "base")
    granularity = f"objective.granularity={run_config(base).objective.granularity}"
    midtrain(given.out, "ra3", base / "export", given.seed, "warmup.steps=0", granularity, *CONTROL_EM, *given.set)


def make_ntp(given: argparse.Namespace) -> None:
    """DIR/ntp and DIR/ntp_flops: next-token training without comments, on as many tokens, and as many operations."""
    config = run_config(_finished(given.out / "base"))
    if config.objective.granularity != "line":
        raise SystemExit(f"{given.out}/base: the budgets of baselines are counted for lines, not for other actions")
    per_step = config.warmup.snippets_per_step * tokens_per_program(given.out)
    for name, tokens in matched_tokens(given.out).items():
        if name in given.only:
            steps = math.ceil(tokens / per_step)
            length = (f"warmup.steps={steps}", f"warmup.max_tokens={tokens}")
            midtrain(given.out, name, MODEL, given.seed, *FROM_SCRATCH, *given.set, "latents.comments=strip", *length)


def evaluate(given: argparse.Namespace) -> None:
    """Write the figures of one run on held-out programs."""
    figures = evaluate_run(_finished(given.run), given.programs)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def make_all(given: argparse.Namespace) -> None:
    """Everything, `--jobs` seeds at a time, then the figures over seeds."""
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(functools.partial(_one_seed, given), given.seeds))
    done = aggregate([given.folder / f"seed{seed}" / "result.json" for seed in given.seeds])
    path = given.folder / "results.json"
    path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print("", table(done), path, sep="\n\n")


def _one_seed(given: argparse.Namespace, seed: int) -> None:
    own = argparse.Namespace(**{**vars(given), "seed": seed, "out": given.folder / f"seed{seed}"})
    make_base(own)
    make_ra3(own)
    make_ntp(own)
    for name in ("base", "ra3", *own.only):
        evaluate_once(own.out, name, given.heldout)
    (own.out / "result.json").write_text(json.dumps(seed_result(own.out, seed), indent=1) + "\n", encoding="utf-8")


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
    filters = ["--without", "generated", "minified", "data", "scrub", "near_duplicates"]
    call(
        [*RA3, "prepare", out / "sources", "--out", out / "corpus", "--overwrite", *limits, *size, *filters],
        out / "corpus.log",
        f"{out.name}/corpus",
    )


def midtrain(out: Path, name: str, model: Path, seed: int, *settings: str) -> None:
    """Run or resume `ra3 midtrain` into `out`/`name`, unless it is finished."""
    folder = out / name
    places = [f"run_folder={folder}", f"corpus.folder={out / 'corpus'}", f"model.folder={model}", f"seed={seed}"]
    command = [*RA3, "midtrain", CONFIG, *places, *settings]
    inputs = [CONFIG, out / "corpus" / "manifest.json", model]
    call_once(command, folder / "summary.json", out / f"{name}.log", f"{out.name}/{name}", inputs=inputs)


def evaluate_once(out: Path, name: str, programs: int = HELDOUT) -> Path:
    """`out`/`name`.json, the figures of that run, made anew where the run's weights are not those it was made from."""
    figures, run = out / f"{name}.json", out / name
    command = [sys.executable, __file__, "evaluate", "--run", run, "--out", figures]
    if programs != HELDOUT:
        command += ["--programs", str(programs)]
    log = out / f"{name}.evaluate.log"
    call_once(command, figures, log, f"{out.name}/{name} evaluated", inputs=[run / "export"])
    return figures


def _finished(run: Path) -> Path:
    if not (run / "summary.json").is_file():
        raise SystemExit(f"{run} holds no finished run: make it first (`{Path(__file__).name} --help` lists the steps)")
    return run


def _program(changes: Sequence[str]) -> ProgramConfig:
    """The programs that FIELD=VALUE arguments ask for; SystemExit names what is wrong with them."""
    fields = [field.name for field in dataclasses.fields(ProgramConfig)]
    values = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if name not in fields or not equals:
            raise SystemExit(f"--program {change}: write FIELD=VALUE, FIELD one of {', '.join(fields)}")
        values[name] = yaml.safe_load(value)
    try:
        return ProgramConfig(**values)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--program: {error}") from error


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
            command.add_argument(
                "--heldout", type=int, default=HELDOUT, help="programs to evaluate on; default %(default)s"
            )
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
            jobs = os.cpu_count() or 1
            command.add_argument(
                "--jobs", type=int, default=jobs, help="seeds at a time, a core each; default: %(default)s"
            )
        else:
            command.add_argument("--out", type=Path, required=True, metavar="DIR")
            command.add_argument("--seed", type=int, default=0)
        if name in ("ntp", "all"):
            both = ("ntp", "ntp_flops")
            command.add_argument("--only", nargs="+", choices=both, default=both, help="default: both")
        if name in ("base", "all"):
            command.add_argument("--programs", type=int, default=30_000, help="default %(default)s")
            command.add_argument(
                "--program", action="append", default=[], metavar="FIELD=VALUE", help="see ProgramConfig"
            )
    command = commands.add_parser("evaluate", help=evaluate.__doc__)
    command.set_defaults(act=evaluate)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--programs", type=int, default=HELDOUT, help="default %(default)s")
    return parser


if __name__ == "__main__":
    main()
