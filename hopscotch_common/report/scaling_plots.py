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
    add_title,
    legend_below,
    loss_label,
    styled,
)
from hopscotch_common.report.records import ScalingRun
from hopscotch_common.report.tables import plain_text

COLOR_STEPS = 31  # of a colour bar: odd, so that 1 has a colour of its own


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
    add_title(figure, run, "training of the scales")
    legend_below(figure, panels)
    return figure


def _draw_baselines(axes: Axes, run: ScalingRun, measure: str) -> None:
    """Held-out figures of the original and the unscaled model as lines, with their values.

    Where the unscaled one lies so far off that it would squeeze all else, only its value is shown.
    """

    def draw(name: str, label: str, **look) -> float | None:
        value = run.baselines.get(name, {}).get(measure)
        if value is not None:
            axes.axhline(value, linewidth=1.4, label=f"held out, {label}", **look)
        return value

    def write(value: float, at: float, tail: str = "") -> None:
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=8)
        axes.annotate(f"{value:.4f}{tail}", (1, at), (4, 0), **place)

    original = draw("original", "original model", color=INK, linestyle="--")
    low, high = axes.get_ylim()
    unscaled = draw("unscaled", "skips without scales", color=GREY, linestyle="-.")
    if original is not None:
        write(original, original)
    if unscaled is None:
        return
    if low - 4 * (high - low) <= unscaled <= high + 4 * (high - low):
        write(unscaled, unscaled)
    else:
        axes.set_ylim(low, high)
        write(unscaled, *((high, " ↑") if unscaled > high else (low, " ↓")))


@styled
def scales_figure(run: ScalingRun) -> Figure:
    """The scales of the best epoch by layer, and for those that are vectors their spread.

    Values below 1 carry a minus, for those who see no colour; the attention of skipped blocks, whose
    b_attn is 0 and not trained, is hatched.
    """
    scales = run.scales
    assert scales is not None, "a run whose checkpoint is gone has no map"
    not_trained = np.zeros(scales.mean.T.shape, dtype=bool)  # [names, layers], as all that is drawn
    not_trained[scales.names.index("b_attn"), list(run.skipped)] = True
    mean = np.ma.masked_array(scales.mean.T, not_trained)
    spread = np.ma.masked_array(scales.spread.T, not_trained)[list(scales.vectors)]
    heights = [len(mean), len(spread)] if len(spread) else [len(mean)]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * sum(heights) + 0.5 * len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_means(figure, panels[0], mean, scales.names, "mean over channels" if len(spread) else "value")
    if len(spread):
        names = [name for name, is_vector in zip(scales.names, scales.vectors, strict=True) if is_vector]
        colors = mpl.colormaps["cividis"].resampled(COLOR_STEPS)
        _draw_heat_map(figure, panels[1], spread, names, "spread (st. dev.)", cmap=colors)
    skipped = plain_text(", ".join(map(str, run.skipped)) or "none", 50)
    panels[-1].set_xlabel(f"decoder layer (hatched: attention skipped: {skipped})")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    add_title(figure, run, f"scales after epoch {run.best_epoch} (−: below 1)")
    return figure


def _draw_means(
    figure: Figure, axes: Axes, mean: np.ma.MaskedArray, names: Iterable[str], label: str
) -> None:
    """A heat map whose colours diverge from 1, with a minus on every value below it."""
    reach = max([0.01, *np.abs(mean - 1).compressed()])  # untrained scales are not to look like trained ones
    look = dict(
        cmap=mpl.colormaps["PuOr"].resampled(COLOR_STEPS), norm=TwoSlopeNorm(1.0, 1 - reach, 1 + reach)
    )
    _draw_heat_map(figure, axes, mean, names, label, **look)
    size = min(8, 330 / mean.shape[1])  # a minus is narrower than its cell
    for row, layer in np.argwhere((mean < 1).filled(False)):
        color = ON_DARK if mean[row, layer] < 1 - 0.6 * reach else ON_LIGHT
        axes.text(layer, row, "−", ha="center", va="center", fontsize=size, color=color)


def _draw_heat_map(
    figure: Figure, axes: Axes, values: np.ma.MaskedArray, names: Iterable[str], label: str, **look
) -> None:
    """Cells [names, layers] around whole numbers, the first name on top; what is masked is hatched."""
    rows, layers = values.shape
    edges = np.arange(layers + 1) - 0.5, np.arange(rows + 1) - 0.5
    cells = axes.pcolormesh(*edges, values, edgecolors=PAPER, linewidth=0.5, **look)
    for row, layer in np.argwhere(np.ma.getmaskarray(values)):
        hatched = dict(facecolor=PAPER, edgecolor=MUTED, hatch="//////", linewidth=0.8)
        axes.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, **hatched))
    axes.invert_yaxis()
    axes.set_yticks(range(rows), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, label=label, pad=0.02, aspect=5 * rows)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
