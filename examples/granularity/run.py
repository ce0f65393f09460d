"""What should one action be: a line, a statement or a token? The paper leaves it open.

    python examples/granularity/run.py --corpus positive_control --out runs/granularity --seeds 0 1 2
    python examples/granularity/run.py --corpus stdlib --out runs/granularity_stdlib --seeds 0 1 2

Per seed and granularity: a base model that saw native comments as latents at that granularity, RA3 from it, and NTP on
as many snippets and updates as RA3's M-steps. Special tokens are the surface form throughout, since a newline cannot
open a latent inside a line; the code and its tokens are the same everywhere, and so is the price of a rationale:
rewards are sums of log-probs, c is in nats, and returns reach over about as much code. On the positive control question
and answer are one compound statement, so that a statement differs from a line: its rationale comes before the question,
where none can help, and the chains in native comments stand inside it, where no rationale does.

Figures are held-out, nats per original code token. `CE`: latents sampled and charged. `lines alone`: without the cost
of gates and rationales; finer actions pay for more gates even where they never think. `gain`: NTP's nats minus RA3's,
lines alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import EXAMPLES, PERCENT, POSITIVE, Experiment, experiment

from megatron_ra3.config import load_config
from megatron_ra3.report.experiments import Column, Record, over_seeds
from megatron_ra3.report.plots import Panel, draw

HORIZON = {"line": 4, "statement": 4, "token": 24}
"""H, in actions of each granularity."""
GRANULARITIES = tuple(HORIZON)
PENALTY = 0.25
"""c: what 0.05 nats per token are on a line of five tokens."""
COLUMNS = (
    Column("nats", "CE, nats/code token", 4),
    Column("nats_code_only", "lines alone", 4),
    Column("ntp_nats_code_only", "NTP, lines alone", 4),
    Column("gain", "gain", 4),
    Column("think_rate", "thinks, % of actions", 2, 100),
    Column("thinks_per_code_token", "thinks/100 code tokens", 2, 100),
    Column("rationale_tokens", "rationale, tokens", 1),
    Column("accuracy_hard", "accuracy on hard lines, %", 1, 100),
    Column("ntp_accuracy_hard_act", "NTP's, %", 1, 100),
    Column("requests_per_rollout", "requests/rollout", 2),
    Column("tokens", "M-step tokens, k", 1, 1e-3),
    Column("seconds", "all steps, s", 0),
)
PANELS = (
    Panel(
        "held-out CE, nats per code token",
        {
            "nats": "RA3, latents charged",
            "nats_code_only": "RA3, lines alone",
            "ntp_nats_code_only": "NTP, lines alone",
        },
    ),
    Panel("gain over NTP, lines alone,\nnats per code token", {"gain": "RA3"}),
    Panel("thinks per 100 code tokens", {"thinks_per_code_token": "RA3"}, 100, bounds=POSITIVE),
    Panel(
        "accuracy on hard lines, %",
        {"accuracy_hard": "RA3", "ntp_accuracy_hard_act": "NTP"},
        100,
        bounds=PERCENT,
    ),
    Panel("engine requests per E-step rollout", {"requests_per_rollout": "RA3"}, bounds=POSITIVE),
    Panel(
        "seconds of all steps",
        {"seconds": "RA3", "estep_seconds": "RA3, E-steps", "ntp_seconds": "NTP"},
        bounds=POSITIVE,
    ),
)


def main() -> None:
    shared, given = experiment(str(__doc__), _add_arguments)
    records = [one_run(shared, seed, name) for seed in shared.seeds for name in given.granularities]
    rows = over_seeds(records, ["granularity"])
    shared.publish(records, rows, {"granularity": "one action"}, COLUMNS)
    title = f"Granularity, {shared.corpus}, seeds {shared.seed_list} (bars: 95 % intervals)"
    draw(shared.out / "granularity.png", rows, PANELS, x="granularity", xlabel="one action", title=title)


def one_run(shared: Experiment, seed: int, granularity: str) -> Record:
    """RA3 and its NTP baseline from the base model of one granularity, in one record."""
    settings = ["latents.surface=special", f"corpus.max_snippet_tokens={snippet_tokens(shared)}"]
    settings += [
        "objective.line_reward=sum",
        f"objective.penalty={PENALTY}",
        f"objective.horizon={HORIZON[granularity]}",
    ]
    base = shared.base(seed, f"granularity-{granularity}", granularity=granularity, settings=settings, blocks=True)
    ra3 = shared.run(base, f"{granularity}-ra3")
    ntp = shared.run(base, f"{granularity}-ntp", *shared.ntp_settings(base))
    return {"granularity": granularity, **against(ra3, ntp)}


def snippet_tokens(shared: Experiment) -> int:
    """The configured length of snippets, or less: with a gate at every token, three times it must fit the model."""
    config = load_config(shared.config, [f"run_folder={shared.out}"])
    model = EXAMPLES.parent / config.model.folder / "config.json"
    return min(config.corpus.max_snippet_tokens, json.loads(model.read_text())["max_position_embeddings"] // 3)


def against(ra3: Record, ntp: Record) -> Record:
    """RA3's record with what NTP reaches, `ntp_...`, and the gain over it."""
    beside = {f"ntp_{name}": ntp[name] for name in ("nats_code_only", "accuracy_hard_act", "seconds") if name in ntp}
    return {**ra3, **beside, "gain": ntp["nats_code_only"] - ra3["nats_code_only"]}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=list(GRANULARITIES))


if __name__ == "__main__":
    main()
