"""Pictures of the training of the scales: losses by epoch, and the map of the scales."""

import math
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hopscotch_common.report.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MUTED,
    ON_DARK,
    ON_LIGHT,
    PAPER,
    UNITS,
    VERMILION,
    WIDTH,
    legend_below,
    loss_label,
    styled,
)
from hopscotch_common.report.records import ScalingRun
from hopscotch_common.report.tables import plain_text


@styled
def epochs_figure(run: ScalingRun) -> Figure:
    """Training and held-out figures by epoch; the original's and the unscaled model's as lines.

    A panel for each figure that is measured on the held-out answers, the loss first.
    """
    measures = list(dict.fromkeys(name for epoch in run.epochs for name in epoch.held_out)) or ["loss"]
    trained = "kl" if run.arguments.get("loss") == "kl" else "cross_entropy"
    first = trained if trained in measures else measures[0]
    figure = Figure(figsize=(WIDTH, 0.9 + 2.9 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    numbers = [epoch.number for epoch in run.epochs]
    for axes, measure in zip(panels, measures, strict=True):
        if measure == first:
            training = [epoch.loss for epoch in run.epochs]
            axes.plot(numbers, training, color=BLUE, marker="o", markersize=6, label="training")
        if any(epoch.held_out for epoch in run.epochs):
            held_out = [epoch.held_out.get(measure, math.nan) for epoch in run.epochs]
            label = "held out, with scales"
            axes.plot(numbers, held_out, color=VERMILION, marker="s", markersize=6, label=label)
        _draw_baselines(axes, run, measure)
        if measure in UNITS or measure == first:
            axes.set_ylabel(loss_label(run) if measure in ("loss", first) else UNITS[measure])
        else:
            axes.set_ylabel(plain_text(measure, 30))
        axes.axvline(
            run.best_epoch, color=FAINT, linewidth=6, zorder=0, label=f"best epoch: {run.best_epoch}"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(min(numbers) - 0.4, max(numbers) + 0.4)
    panels[-1].set_xlabel("epoch (counted from 0)")
    figure.suptitle(f"{plain_text(run.model)}: training of the scales", x=0.01, ha="left")
    legend_below(figure, panels)
    return figure


def _draw_baselines(axes: Axes, run: ScalingRun, measure: str) -> None:
    """Held-out figures of the original and the unscaled model as lines.

    Where the unscaled one lies so far off that it would squeeze all else, only the legend tells it.
    """

    def draw(name: str, label: str, **look) -> float | None:
        value = run.baselines.get(name, {}).get(measure)
        if value is not None:
            axes.axhline(value, linewidth=1.4, label=f"held out, {label}: {value:.4f}", **look)
        return value

    draw("original", "original model", color=INK, linestyle="--")
    low, high = axes.get_ylim()
    value = draw("unscaled", "skips without scales", color=GREY, linestyle="-.")
    if value is not None and not low - 4 * (high - low) <= value <= high + 4 * (high - low):
        axes.lines[-1].set_label(f"{axes.lines[-1].get_label()} (outside)")
        axes.set_ylim(low, high)


@styled
def scales_figure(run: ScalingRun) -> Figure:
    """The scales of the best epoch by layer, and for those that are vectors their spread.

    Values below 1 carry a minus, for those who see no colour; the attention of skipped blocks, whose
    b_attn is 0 and not trained, is hatched.
    """
    scales = run.scales
    assert scales is not None, "a run whose checkpoint is gone has no map"
    mean = scales.mean.T  # [names, layers]
    columns = {name: row for row, name in enumerate(scales.names)}
    shown = np.ma.masked_array(mean, np.zeros_like(mean, dtype=bool))
    for block in run.skipped:
        if block < mean.shape[1]:
            shown[columns["b_attn"], block] = np.ma.masked
    reach = max(float(np.abs(shown - 1).max()), 0.01) if shown.count() else 0.01
    with_spread = [row for row, is_vector in enumerate(scales.vectors) if is_vector]
    heights = [len(scales.names)] + ([len(with_spread)] if with_spread else [])
    figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * sum(heights) + 0.5 * len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    bars = "mean over channels" if with_spread else "value of the scale"
    norm = TwoSlopeNorm(1.0, 1 - reach, 1 + reach)
    _heat_map(figure, panels[0], shown, scales.names, mpl.colormaps["PuOr"].resampled(31), norm, bars)
    for row, layer in np.argwhere((shown < 1).filled(False)):
        color = ON_DARK if shown[row, layer] < 1 - 0.6 * reach else ON_LIGHT
        panels[0].text(layer, row, "−", ha="center", va="center", fontsize=8, color=color)
    for block in run.skipped:
        hatched = dict(facecolor=PAPER, edgecolor=MUTED, hatch="//////", linewidth=0.8)
        panels[0].add_patch(Rectangle((block - 0.5, columns["b_attn"] - 0.5), 1, 1, **hatched))
    if with_spread:
        names = [scales.names[row] for row in with_spread]
        spread = scales.spread.T[with_spread]
        _heat_map(
            figure,
            panels[1],
            spread,
            names,
            mpl.colormaps["cividis"].resampled(31),
            None,
            "spread (st. dev.)",
        )
    skipped = ", ".join(map(str, run.skipped)) or "none"
    panels[-1].set_xlabel(f"decoder layer (hatched: attention skipped: {plain_text(skipped, 50)})")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_title(f"{plain_text(run.model)}: scales after epoch {run.best_epoch} (−: below 1)")
    return figure


def _heat_map(figure: Figure, axes: Axes, values, names: Iterable[str], colors, norm, label: str) -> None:
    """Cells [names, layers] around whole numbers, the first name on top, with a colour bar."""
    rows, layers = values.shape
    edges = np.arange(layers + 1) - 0.5, np.arange(rows + 1) - 0.5
    cells = axes.pcolormesh(*edges, values, cmap=colors, norm=norm, edgecolors=PAPER, linewidth=0.5)
    axes.invert_yaxis()
    axes.set_yticks(range(rows), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, label=label, pad=0.02, aspect=5 * rows)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
