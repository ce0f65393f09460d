"""Watch EM: cross-entropy, ELBO, reward and think rate per round, and step by step.

    python examples/em_monitoring/run.py --corpus positive_control --out runs/em_monitoring --rounds 4 --seeds 0 1 2
    python examples/em_monitoring/run.py --corpus stdlib --out runs/em_monitoring_stdlib --rounds 4 --seeds 0 1 2

Round 0 is the base model with its own latents. Held-out figures, one sample of latents per snippet, the same snippets
every round:

- `CE`, nats per original code token: -log pi(a, z), of lines, gates and rationales. `CE, act everywhere`: the same
  weights never thinking. `CE, lines alone`: E_q[-log pi(a | z)]; minus this bounds log pi(a), latents summed out, from
  below, the model itself being the prior of its latents, so that the bound's KL is 0.
- `ELBO`, nats per token of the lines: E_q[log pi(a_t | z_t) - KL_Bern(rho_t || 1 - alpha')], the bound under the sticky
  prior with alpha' = `objective.stickiness`, which lets the model itself write the rationale.
- `J`, nats per line: what the E-step optimises, on held-out lines: a line's log-prob as a token mean, minus c per
  rationale. `reward` is the same on the E-step's training snippets, before each update.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import CONTROL_FIGURES, NOTHING_LEARNT, PERCENT, POSITIVE, Experiment, experiment

from megatron_ra3.report.experiments import Column, Record, over_seeds, round_figures, step_figures
from megatron_ra3.report.plots import Panel, draw

COLUMNS = (
    Column("nats", "CE, nats/code token", 4),
    Column("act_nats", "CE, act everywhere", 4),
    Column("nats_code_only", "CE, lines alone", 4),
    Column("elbo", "ELBO, nats/line token", 4),
    Column("objective", "J, nats/line", 4),
    Column("reward", "E-step reward, nats/line", 4),
    Column("think_rate", "thinks, % of held-out lines", 1, 100),
    Column("estep_think_rate", "in the E-step, %", 1, 100),
    Column("rationale_tokens", "rationale, tokens", 1),
    Column("mstep_nats", "M-step loss, nats/token", 4),
    Column("accuracy_hard", "accuracy on hard lines, %", 1, 100),
)
ROUND_PANELS = (
    Panel(
        "held-out CE, nats per code token",
        {"nats": "latents sampled and charged", "act_nats": "act everywhere", "nats_code_only": "lines alone"},
    ),
    Panel("held-out ELBO, nats per line token", {"elbo": "sticky prior"}),
    Panel(
        "objective, nats per line",
        {
            "objective": "held-out J",
            "reward": "reward",
            "reward_think": "where it thinks",
            "reward_act": "where it acts",
        },
    ),
    Panel(
        "think rate, % of lines",
        {"think_rate": "held-out", "estep_think_rate": "E-step", "bootstrap_think_rate": "bootstrap"},
        100,
        bounds=PERCENT,
    ),
    Panel("held-out rationale length, tokens", {"rationale_tokens": "held-out"}, bounds=POSITIVE),
    Panel("M-step loss, nats per token", {"mstep_nats": "mean of the round"}),
)
ESTEP_PANELS = (
    Panel("reward, nats per line", {"reward": "all", "reward_think": "where it thinks", "reward_act": "where it acts"}),
    Panel("think rate, % of lines", {"think_rate": "E-step"}, 100, bounds=PERCENT),
    Panel("rationale length, tokens", {"rationale_tokens": "E-step"}, bounds=POSITIVE),
)
MSTEP_PANELS = (Panel("loss, nats per token", {"loss": "M-step"}),)


def main() -> None:
    shared, given = experiment(str(__doc__), _add_arguments)
    records: list[Record] = []
    steps: dict[str, list[Record]] = {"estep": [], "mstep": []}
    for seed in shared.seeds:
        records += one_seed(shared, seed, given.rounds, steps)
    rows = over_seeds(records, ["round"])
    shared.publish(records, rows, {"round": "round"}, COLUMNS)
    title = f"EM, {shared.corpus}, seeds {shared.seed_list} (95 % intervals)"
    draw(shared.out / "rounds.png", rows, ROUND_PANELS, x="round", xlabel="EM round (0: base model)", title=title)
    for phase, name, panels in (("estep", "E-step", ESTEP_PANELS), ("mstep", "M-step", MSTEP_PANELS)):
        by_step = over_seeds(steps[phase], ["phase_step"])
        xlabel = f"{name}s, over all rounds"
        draw(shared.out / f"{phase}s.png", by_step, panels, x="phase_step", xlabel=xlabel, title=f"{name}s of {title}")


def one_seed(shared: Experiment, seed: int, rounds: int, steps: dict[str, list[Record]]) -> list[Record]:
    """The runs of one seed: one record per round from 0; appends the E-steps and M-steps to `steps`."""
    base = shared.base(seed)
    start = shared.run(base, "base", *NOTHING_LEARNT)
    end = shared.run(base, "ra3", f"em.rounds={rounds}")
    folder = shared.folder(base, "ra3")
    heldout = [{"round": 0, **start}, *round_figures(folder)]
    heldout[-1] |= {name: end[name] for name in CONTROL_FIGURES if name in end}
    for phase, panels in (("estep", ESTEP_PANELS), ("mstep", MSTEP_PANELS)):
        names = [name for panel in panels for name in panel.figures]
        steps[phase] += [{"seed": seed, **record} for record in step_figures(folder, phase, names)]
    return [{"seed": seed, **record} for record in heldout]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="EM rounds (default %(default)s)")


if __name__ == "__main__":
    main()
