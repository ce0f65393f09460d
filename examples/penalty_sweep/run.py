"""Sweep the penalty c: how often the model thinks, how much, what it gains, and what it costs.

    python examples/penalty_sweep/run.py --corpus positive_control --out runs/penalty_sweep --seeds 0 1 2
    python examples/penalty_sweep/run.py --corpus stdlib --out runs/penalty_sweep_stdlib --seeds 0 1 2

Per seed, all from one base model: RA3 at every c, and NTP on as many snippets and updates as RA3's M-steps, acting
everywhere (c = infinity). Figures are held-out, nats per original code token. `gain`: the base model's nats, acting
everywhere, minus the run's with latents sampled, the cost of gates and rationales charged to both. `gain, lines
alone`: the same for the code alone. `over NTP`: NTP's nats minus the run's, seed by seed. `thinking adds`: what the
same weights gain over acting everywhere, lines alone. Cost: tokens of the M-steps, requests to the engine per E-step
rollout, seconds of all steps without start-up.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import NOTHING_LEARNT, PERCENT, POSITIVE, Experiment, experiment

from megatron_ra3.report.experiments import Column, Record, over_seeds
from megatron_ra3.report.plots import Panel, draw

PENALTIES = (0.01, 0.03, 0.05, 0.2)
NTP = "NTP"
COLUMNS = (
    Column("think_rate", "thinks, % of lines", 1, 100),
    Column("think_rate_hard", "of hard lines, %", 1, 100),
    Column("think_rate_easy", "of easy lines, %", 1, 100),
    Column("rationale_tokens", "rationale, tokens", 1),
    Column("gain", "gain, nats/code token", 4),
    Column("gain_code_only", "gain, lines alone", 4),
    Column("over_ntp", "over NTP, lines alone", 4),
    Column("thinking_adds", "thinking adds", 4),
    Column("accuracy_hard", "accuracy on hard lines, %", 1, 100),
    Column("accuracy_hard_act", "acting everywhere, %", 1, 100),
    Column("requests_per_rollout", "requests/rollout", 2),
    Column("tokens", "M-step tokens, k", 1, 1e-3),
    Column("estep_seconds", "E-steps, s", 0),
    Column("seconds", "all steps, s", 0),
)
PANELS = (
    Panel(
        "held-out think rate, % of lines",
        {"think_rate": "all", "think_rate_hard": "hard", "think_rate_easy": "easy"},
        100,
        bounds=PERCENT,
    ),
    Panel("rationale length, tokens", {"rationale_tokens": "RA3"}, bounds=POSITIVE),
    Panel(
        "held-out gain over base,\nnats per code token",
        {"gain": "RA3, latents charged", "gain_code_only": "RA3, lines alone"},
        references={"gain": "NTP, gates charged", "gain_code_only": "NTP, lines alone"},
    ),
    Panel(
        "accuracy on hard lines, %",
        {"accuracy_hard": "RA3", "accuracy_hard_act": "RA3, acting everywhere"},
        100,
        {"accuracy_hard_act": "NTP"},
        PERCENT,
    ),
    Panel("engine requests per E-step rollout", {"requests_per_rollout": "RA3"}, bounds=POSITIVE),
    Panel(
        "seconds of all steps",
        {"seconds": "RA3", "estep_seconds": "RA3, E-steps"},
        references={"seconds": "NTP"},
        bounds=POSITIVE,
    ),
)


def main() -> None:
    shared, given = experiment(str(__doc__), _add_arguments)
    records = [record for seed in shared.seeds for record in one_seed(shared, seed, given.penalties)]
    rows = over_seeds(records, ["c"])
    shared.publish(records, rows, {"c": "c, nats"}, COLUMNS)
    draw(
        shared.out / "penalty_sweep.png",
        [row for row in rows if row.setting["c"] != NTP],
        PANELS,
        x="c",
        xlabel="penalty c, nats per rationale",
        title=f"Penalty sweep, {shared.corpus}, seeds {shared.seed_list} (bars: 95 % intervals)",
        log_x=True,
        reference=next(row for row in rows if row.setting["c"] == NTP),
    )


def one_seed(shared: Experiment, seed: int, penalties: list[float]) -> list[Record]:
    """The runs of one seed: one record per penalty, then NTP."""
    base = shared.base(seed)
    start = shared.run(base, "base", *NOTHING_LEARNT)
    records = [
        {"c": penalty, **shared.run(base, f"c{penalty:g}", f"objective.penalty={penalty:g}")} for penalty in penalties
    ]
    ntp = {"c": NTP, **shared.run(base, "ntp", *shared.ntp_settings(base))}
    return [*(with_gains(record, start, ntp) for record in records), with_gains(ntp, start)]


def with_gains(record: Record, start: Record, ntp: Record | None = None) -> Record:
    """A run's record with its gains over the base model's record `start`, and over that of NTP on the same seed."""
    beside = {} if ntp is None else {"over_ntp": ntp["act_nats_code_only"] - record["nats_code_only"]}
    return {
        **beside,
        **record,
        "gain": start["act_nats"] - record["nats"],
        "gain_code_only": start["act_nats_code_only"] - record["nats_code_only"],
        "thinking_adds": record["act_nats_code_only"] - record["nats_code_only"],
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--penalties", type=float, nargs="+", default=list(PENALTIES), metavar="C")


if __name__ == "__main__":
    main()
