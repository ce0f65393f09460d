"""The table at the end: base, NTP and RA3 side by side, from the runs' own metrics files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.report.signatures import entries


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """All steps of a run; FileNotFoundError when it has none."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not a run folder, or the run wrote no metrics")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarize(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Compare runs by name ("base", "ntp", "ra3"); E-step figures come from the run that has an E-step.

    Keys: `nats_per_code_token` (held-out nats per original code token, rationale cost included), `act_only` (the same
    with `<act>` everywhere), `reward_first` and `reward_last` (E-step, nats per line, mean over up to 5 steps),
    `think_rate`, `rationale_tokens`, `tokens` (trained on), `signatures` (see
    `signatures.entries`), `seconds` (per phase).
    """
    summary: dict[str, Any] = {name: {} for name in ("nats_per_code_token", "act_only", "tokens", "signatures")}
    seconds: dict[str, float] = defaultdict(float)
    for name, folder in runs.items():
        steps = read_metrics(folder)
        evaluations = [step for step in steps if step["phase"] == "evaluate"]
        if not evaluations:
            raise ValueError(f"{folder}: the run has not reached its evaluation yet; start it again to resume it")
        summary["nats_per_code_token"][name] = evaluations[-1]["nats_per_code_token"]
        summary["act_only"][name] = evaluations[-1]["act_nats_per_code_token"]
        summary["tokens"][name] = sum(step["tokens"] for step in steps if "tokens" in step)
        summary["signatures"][name] = [item for step in steps for item in entries(step)]
        for step in steps:
            seconds[f"{name}.{step['phase']}"] += step["seconds"]
        rewards = [step["reward"] for step in steps if step["phase"] == "estep"]
        if rewards:
            ends = max(1, min(5, len(rewards) // 2))
            summary |= {
                "reward_first": sum(rewards[:ends]) / ends,
                "reward_last": sum(rewards[-ends:]) / ends,
                "think_rate": evaluations[-1]["think_rate"],
                "rationale_tokens": evaluations[-1]["rationale_tokens"],
            }
    return summary | {"seconds": {name: round(value, 2) for name, value in seconds.items()}}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text."""
    rows = [f"{'':<8}{'nats/code token':>16}{'act only':>12}{'tokens':>12}"]
    for name, nats in summary["nats_per_code_token"].items():
        rows.append(f"{name:<8}{nats:>16.4f}{summary['act_only'][name]:>12.4f}{summary['tokens'][name]:>12.0f}")
    if "reward_first" in summary:
        rows += [
            "",
            f"E-step reward     {summary['reward_first']:.4f} -> {summary['reward_last']:.4f} nats",
            f"think rate        {100 * summary['think_rate']:.1f} % of held-out lines",
            f"rationale length  {summary['rationale_tokens']:.1f} tokens",
        ]
    rows += ["", "seconds per phase"]
    rows += [f"  {name:<16}{value:>8.1f}" for name, value in summary["seconds"].items()]
    rows += ["", *_signature_rows(summary["signatures"])]
    return "\n".join(rows)


def _signature_rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """One row per run and signature: the rounds that showed it, and its last message."""
    yield "failure signatures" if any(found.values()) else "failure signatures: none"
    for run, items in found.items():
        rounds: dict[str, list[str]] = defaultdict(list)
        messages: dict[str, str] = {}
        for item in items:
            rounds[item["name"]].append(str(item["round"]))
            messages[item["name"]] = item["message"]
        for name, message in messages.items():
            yield f"  {run:<8}{name}, round {', '.join(rounds[name])}: {message}"
