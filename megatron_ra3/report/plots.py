"""Plots of an experiment's rows: panels that share one horizontal axis, with intervals over seeds.

matplotlib is imported where a figure is drawn, and draws to files only: machines that train have no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3.report.experiments import Row

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # safe for colour-blind readers
_MARKERS = "osD^vP"
_MOST_MARKED_POINTS = 12
_PANEL_INCHES = (4.2, 3.1)
_COLUMNS = 3
_DOTS_PER_INCH = 150


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: figures with their labels in the legend, on one scale."""

    ylabel: str
    figures: Mapping[str, str]
    """Figure of the rows -> label."""
    scale: float = 1.0
    references: Mapping[str, str] | None = None
    """Figure of the reference row -> label: a horizontal line."""
    bounds: tuple[float, float] | None = None
    """What the figures cannot leave, after scaling; intervals of few seeds can, and are cut there."""


def draw(
    path: Path,
    rows: Sequence[Row],
    panels: Sequence[Panel],
    *,
    x: str,
    xlabel: str,
    title: str,
    log_x: bool = False,
    reference: Row | None = None,
) -> None:
    """Write a PNG with one panel per group of figures; a panel none of whose figures any row has is left out.

    Args:
        path: the file.
        rows: points, in order; a line joins them, text settings become evenly spaced ticks.
        panels: what is drawn against `x`; means with bars (bands for many points) of the 95 % interval over seeds.
        x: the setting on the horizontal axis.
        xlabel: its label with the unit.
        title: above all panels.
        log_x: logarithmic horizontal axis with a tick per point.
        reference: a row outside the axis, such as a baseline, for `Panel.references`.

    Raises:
        ValueError: no row has any of the figures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if any(figure in row.figures for row in rows for figure in panel.figures)]
    if not shown:
        raise ValueError(f"{path}: none of the figures to draw was measured")
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for place, panel in enumerate(shown, start=1):
        axes = figure.add_subplot(lines, columns, place)
        _draw_panel(axes, rows, panel, x, reference)
        _label_x(axes, [row.setting[x] for row in rows], xlabel, log_x=log_x)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _draw_panel(axes: Any, rows: Sequence[Row], panel: Panel, x: str, reference: Row | None) -> None:
    drawn = 0
    for style, (figure, label) in enumerate(panel.figures.items()):
        points = [
            (_position(row.setting[x], place), row.figures[figure])
            for place, row in enumerate(rows)
            if figure in row.figures
        ]
        if not points:
            continue
        drawn += 1
        at = [place for place, _ in points]
        mean = [panel.scale * estimate.mean for _, estimate in points]
        half_width = [panel.scale * (estimate.half_width or 0.0) for _, estimate in points]
        colour = _COLOURS[style % len(_COLOURS)]
        if len(points) > _MOST_MARKED_POINTS:
            axes.plot(at, mean, color=colour, linewidth=1.2, label=label)
            low, high = zip(*((m - h, m + h) for m, h in zip(mean, half_width, strict=True)), strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        else:
            marker = _MARKERS[style % len(_MARKERS)]
            axes.errorbar(
                at,
                mean,
                yerr=half_width,
                color=colour,
                marker=marker,
                markersize=4,
                capsize=3,
                linewidth=1.2,
                label=label,
            )
    for style, (figure, label) in enumerate((panel.references or {}).items()):
        if reference is not None and figure in reference.figures:
            drawn += 1
            value = panel.scale * reference.figures[figure].mean
            axes.axhline(value, color="0.35", linestyle=("--", ":")[style % 2], linewidth=1.2, label=label)
    axes.set_ylabel(panel.ylabel)
    if panel.bounds is not None:
        low, high = axes.get_ylim()
        margin = 0.03 * (min(high, panel.bounds[1]) - max(low, panel.bounds[0]))
        axes.set_ylim(max(low, panel.bounds[0] - margin), min(high, panel.bounds[1] + margin))
    axes.grid(visible=True, alpha=0.3, linewidth=0.5)
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False)


def _position(setting: Any, place: int) -> float:
    return place if isinstance(setting, str) else float(setting)


def _label_x(axes: Any, settings: Sequence[Any], xlabel: str, *, log_x: bool) -> None:
    axes.set_xlabel(xlabel)
    if all(isinstance(setting, str) for setting in settings):
        axes.set_xticks(range(len(settings)), settings)
        axes.margins(x=0.15)
    elif log_x:
        axes.set_xscale("log")
        axes.set_xticks(settings, [f"{setting:g}" for setting in settings])
        axes.minorticks_off()
    elif all(float(setting).is_integer() for setting in settings):
        axes.xaxis.get_major_locator().set_params(integer=True)
