"""What `ra3 watch` shows: one screen about a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_ra3.observe.run_view import RunView

MAIN_METRICS = (
    "loss",
    "reward",
    "pass_rate",
    "think_rate",
    "rationale_tokens",
    "nats_per_line",
    "nats_per_code_token",
    "mismatch",
    "effective_samples",
    "entropy",
    "kl",
    "grad_norm",
    "rollout_wait_seconds",
    "engine_running",
    "engine_kv_cache_usage",
    "engine_prefix_hit_rate",
    "engine_tokens_per_second",
    "seconds",
)
HELDOUT_METRICS = ("objective", "pass_rate", "think_rate", "rationale_tokens", "nats_per_code_token")
BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_BARS = "_.-=+*#@"
SPARK_WIDTH = 40
QUIET_S = 120.0
"""A run that has written nothing for so long is marked."""
ENGINE_FIGURES = {
    "open": "open",
    "running": "running",
    "waiting": "waiting",
    "kv_cache_usage": "cache",
    "tokens_per_second": "tokens/s",
    "version": "weights",
}


def render(view: RunView, bars: str = BARS) -> Group:
    """The whole screen."""
    parts: list[Any] = [_head(view)]
    if view.by_phase:
        parts.append(_metrics(view, bars))
    if view.engines:
        parts.append(_engines(view))
    parts.append(_lines("who waits for whom, longer than seconds", view.waits, "nobody"))
    parts.append(_lines("last warnings", view.warnings, "none"))
    return Group(*parts)


def sparkline(values: Iterable[float], bars: str = BARS, width: int = SPARK_WIDTH) -> str:
    """The newest values as a row of bars, means of neighbours where there are more than `width`; NaN leaves a gap."""
    found = list(values)
    per_bar = -(-len(found) // width) or 1
    means = []
    for begin in range(0, len(found), per_bar):
        part = [value for value in found[begin : begin + per_bar] if abs(value) < float("inf")]
        means.append(sum(part) / len(part) if part else None)
    known = [value for value in means if value is not None]
    if not known:
        return ""
    low, spread = min(known), (max(known) - min(known)) or 1.0
    heights = [None if value is None else round((value - low) / spread * (len(bars) - 1)) for value in means]
    return "".join(" " if height is None else bars[height] for height in heights)


def duration(seconds: float) -> str:
    """The two largest units of it."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours) % 24} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(minutes)} min {int(seconds) % 60} s" if minutes >= 1 else f"{seconds:.0f} s"


def _head(view: RunView) -> Text:
    card, last = view.card, view.last
    text = Text()
    text.append(f"{view.folder.resolve().name}", style="bold")
    text.append(f"  {card.get('kind', 'run')} on {card.get('ranks', '?')} ranks")
    if last:
        text.append(f"\nstep {last['step']}")
        if view.steps_left is not None:
            text.append(f" of {last['step'] + view.steps_left}")
        text.append(f", {last['phase']} of round {last['round']}, {last['seconds']:.1f} s")
    if view.is_finished:
        return text.append("\nfinished", style="green")
    if view.remaining_s is not None:
        text.append(f"\n{duration(view.remaining_s)} left at this pace")
    if view.sign_s is not None:
        silent_s = max(view.now_s - view.sign_s, 0.0)
        text.append(f"\nlast sign of life {duration(silent_s)} ago", style="red" if silent_s > QUIET_S else "")
    return text


def _metrics(view: RunView, bars: str) -> Table:
    phases = [phase for phase in view.by_phase if phase != "evaluate"]
    trained = max(phases, key=lambda phase: _newest(view, phase), default="evaluate")
    table = Table(title=f"metrics of {trained} and held-out ones of evaluations", title_justify="left", box=None)
    for column in ("", "now", "least", "most"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("course")
    rows = [(trained, name, name) for name in MAIN_METRICS]
    rows += [("evaluate", name, f"held-out {name}") for name in HELDOUT_METRICS]
    for phase, name, label in rows:
        values = [float(record[name]) for record in view.by_phase.get(phase, ()) if name in record]
        if values:
            figures = (values[-1], min(values), max(values))
            table.add_row(label, *(f"{value:.4g}" for value in figures), sparkline(values, bars))
    return table


def _newest(view: RunView, phase: str) -> int:
    step: int = view.by_phase[phase][-1]["step"]
    return step


def _engines(view: RunView) -> Table:
    table = Table(title="engines", title_justify="left", box=None)
    for column in ("", "standing", "since", *ENGINE_FIGURES.values()):
        table.add_column(column, justify="right" if column in ENGINE_FIGURES.values() else "left", no_wrap=True)
    for url, state in view.engines.items():
        table.add_row(url, *_engine(state, view.now_s))
    return table


def _engine(state: Mapping[str, Any], now_s: float) -> list[str | Text]:
    standing = str(state.get("standing", "?"))
    style = {"serving": "green", "lost": "red", "given up": "red"}.get(standing, "yellow")
    reason = f" ({state['reason']})" if state.get("reason") else ""
    since = duration(max(now_s - state["since_us"] / 1e6, 0.0)) if "since_us" in state else ""
    figures = [f"{state[key]:.4g}" if state.get(key) is not None else "" for key in ENGINE_FIGURES]
    return [Text(standing + reason, style=style), since, *figures]


def _lines(title: str, lines: Sequence[str], otherwise: str) -> Text:
    text = Text(f"\n{title}: ", style="bold")
    return text.append("\n  ".join(["", *lines]) if lines else otherwise, style="")
