"""The three plots, drawn from the same rows that become the CSV files, so that a plot cannot disagree with its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = ("tab:blue", "tab:orange", "tab:green")
FACTOR_LABELS = {
    "subset_size": "$|Z_\\epsilon|$   (|Z| = 65536, $\\sigma$ = 0.005, $\\delta$ = 0.05)",
    "log_options": "ln |Z|   ($|Z_\\epsilon|$ = 4, $\\sigma$ = 0.005, $\\delta$ = 0.05)",
    "inverse_sigma": "1 / $\\sigma$   (|Z| = 1024, $|Z_\\epsilon|$ = 4, $\\delta$ = 0.05)",
    "log_inverse_delta": "ln 1 / $\\delta$   (|Z| = 1024, $|Z_\\epsilon|$ = 4, $\\sigma$ = 0.005)",
}


def draw_regret(path: Path, instances: Sequence[Row], trade_off: Sequence[Row]) -> None:
    """T1: the residuals of random instances, and the two errors stacked against the size of the subset."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    left.scatter([row["regret"] for row in instances], [max(row["residual"], 1e-18) for row in instances], s=5)
    left.axhline(1e-12, color="black", linestyle="--", label="tolerance")
    left.set(yscale="log", ylim=(1e-19, 1e-10), xlabel="regret", ylabel="|regret - pruning error - RL error|")
    left.set_title(f"{len(instances)} random problems")
    left.legend()
    sizes = [row["options"] for row in trade_off]
    pruning, training = [[row[name] for row in trade_off] for name in ("pruning_error", "rl_error")]
    right.bar(sizes, pruning, color=COLOURS[0], label="pruning error")
    right.bar(sizes, training, bottom=pruning, color=COLOURS[1], label="RL error")
    right.errorbar(
        sizes,
        [row["regret"] for row in trade_off],
        [row["rl_error_half_width"] for row in trade_off],
        color="black",
        marker="o",
        markersize=3,
        label="regret (95 %)",
    )
    right.set(xlabel="options kept, of 12", ylabel="return lost", title="same RL budget for every size")
    right.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def draw_pruning(path: Path, points: Sequence[Row], exponents: Sequence[Row]) -> None:
    """T2: demonstrations required against each factor of the bound, for each family, beside the bounds."""
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4))
    for axis, factor in zip(axes.flat, FACTOR_LABELS, strict=True):
        for colour, slope in zip(COLOURS, [row for row in exponents if row["factor"] == factor], strict=True):
            rows = [row for row in points if row["factor"] == factor and row["family"] == slope["family"]]
            required = [row["required"] for row in rows]
            below = [row["required"] - row["required_low"] for row in rows]
            above = [row["required_high"] - row["required"] for row in rows]
            label = f"{slope['family']}: exponent {slope['exponent']:.2f}"
            axis.errorbar(
                [row["x"] for row in rows],
                required,
                [below, above],
                color=colour,
                marker="o",
                markersize=3,
                label=label,
            )
        x = [row["x"] for row in rows]
        label = f"bound: {slope['bound_exponent']:.2f}"
        axis.plot(x, [row["bound"] for row in rows], color="black", linestyle="--", label=label)
        label = f"sharper bound: {slope['sharper_bound_exponent']:.2f}"
        axis.plot(x, [row["sharper_bound"] for row in rows], color="grey", linestyle=":", label=label)
        axis.set(xscale="log", yscale="log", xlabel=FACTOR_LABELS[factor], ylabel="demonstrations")
        axis.set_xticks(x, [f"{value:.3g}" for value in x])
        axis.xaxis.minorticks_off()
        axis.legend(fontsize=7)
    _save(figure, path)


def draw_iterations(path: Path, rows: Sequence[Row]) -> None:
    """T3: iterations and their bound, and the value that is left, against the length of the options."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for colour, kind in zip(COLOURS, dict.fromkeys(row["kind"] for row in rows), strict=True):
        chosen = [row for row in rows if row["kind"] == kind]
        lengths = [row["length"] for row in chosen]
        _measured_and_bound(left, chosen, lengths, colour)
        right.plot(lengths, [row["value_kept"] for row in chosen], color=colour, marker="o", markersize=3, label=kind)
    left.plot([], [], color="black", linestyle="--", label="bound")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="(mean) length of the options, steps",
        ylabel="iterations to $\\epsilon$ = 0.01",
    )
    left.legend(fontsize=8)
    right.set(xscale="log", ylim=(0.75, 1.02), xlabel="(mean) length of the options, steps")
    right.set_ylabel("V* of options / V* of actions")
    right.legend(fontsize=8)
    _save(figure, path)


def _measured_and_bound(axis: Axes, rows: Sequence[Row], lengths: Sequence[float], colour: str) -> None:
    iterations, spread = [row["iterations"] for row in rows], [row["half_width"] for row in rows]
    axis.errorbar(lengths, iterations, spread, color=colour, marker="o", markersize=3, label=rows[0]["kind"])
    axis.plot(lengths, [row["bound"] for row in rows], color=colour, linestyle="--")


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
