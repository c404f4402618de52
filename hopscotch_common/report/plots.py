"""Pictures of a run, drawn from its reports alone, so that they can be redrawn at any time.

Each `..._figure` makes one picture of a run that `reading.py` read; `render` turns it into the bytes
of a file, `plot_search` does both for a search that has just ended. Colours are those of Okabe and
Ito, which colour-blind readers can tell apart; what they say is also said by shapes and lines, so
that it survives a grey print. Names are drawn as they are: no mathtext, no markup.
"""

import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hopscotch_common.cli import write_atomic
from hopscotch_common.report.bend import find_bend
from hopscotch_common.report.reading import parse_search
from hopscotch_common.report.records import Iteration, Run, ScalingRun, SearchRun

FORMATS = (".png", ".pdf", ".svg")

# A page may give these four other values in a dark window.
INK, MUTED, FAINT, PAPER = "#1a1a1a", "#6a6a6a", "#dcdcdc", "#ffffff"
ON_LIGHT, ON_DARK = "#000001", "#fffffe"  # on a coloured cell, whatever the window
BLUE, VERMILION, ORANGE, GREY = "#0072b2", "#d55e00", "#e69f00", "#8c8c8c"

WIDTH = 7.0  # inches
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": PAPER,
    "figure.titlesize": 11,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "hopscotch",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
UNITS = {
    "loss": "cross entropy (nats per token)",
    "ce": "cross entropy (nats per token)",
    "cross_entropy": "cross entropy (nats per token)",
    "kl": "KL divergence (nats per token)",
    "agreement": "agreement with the original (share of tokens)",
}


def plain_text(name: object, most: int = 70) -> str:
    """A name as one printable line of at most so many characters."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(name)
    )
    return line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"


def loss_label(run: Run) -> str:
    """What the run's training loss is, with its unit."""
    return UNITS.get(str(run.arguments.get("loss")), UNITS["ce"])


def plot_search(path: Path, report: dict) -> None:
    """Draw every candidate's loss of a block_selection.py report into a file; its suffix is the format.

    The file is written whole or not at all. Raises ValueError for a report that is none.
    """
    write_atomic(path, render(search_figure(parse_search(report, path)), path.suffix))


def render(figure: Figure, suffix: str) -> bytes:
    """The picture as the bytes of a .png, .pdf or .svg file, the same for the same figure."""
    buffer = io.BytesIO()
    dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=suffix.lower().lstrip("."), dpi=160, metadata=dates.get(suffix.lower()))
    return buffer.getvalue()


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    def styled(*arguments, **options) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    styled.__name__, styled.__doc__ = draw.__name__, draw.__doc__
    return styled


# --- the search ---------------------------------------------------------------------------------


@_styled
def search_figure(run: SearchRun) -> Figure:
    """Every candidate's loss by layer, a panel a pick.

    The pick is a star. Whole-epoch losses are filled circles; candidates that a race dropped are grey
    rings at their mean loss until then, with the number of batches after which they fell; losses
    before any training are crosses.
    """
    count = len(run.iterations)
    figure = Figure(figsize=(WIDTH, 1.35 + 1.75 * count), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, iteration in zip(panels, run.iterations, strict=True):
        _draw_candidates(axes, iteration)
        axes.set_xlim(-0.8, run.num_layers - 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("attention block (decoder layer, counted from 0)")
    figure.supylabel(loss_label(run), fontsize=10)
    figure.suptitle(f"{plain_text(run.model)}: loss of each candidate", x=0.01, ha="left")
    _legend_outside(figure, panels)
    return figure


def _draw_candidates(axes: Axes, iteration: Iteration) -> None:
    fallen = {block: drop for block, drop in iteration.dropped.items() if drop.after_batches > 0}
    others = {block: loss for block, loss in iteration.losses.items() if block != iteration.block}
    of_fallen = {block: drop.loss for block, drop in fallen.items()}
    top = _top([iteration.loss, *others.values(), *of_fallen.values(), *iteration.untrained.values()])

    for block in iteration.skipped_before:
        label = "skipped already"
        axes.axvspan(
            block - 0.4, block + 0.4, facecolor="none", edgecolor=FAINT, hatch="////", lw=0, label=label
        )
    _points(axes, iteration.untrained, top, label="before training", marker="x", color=GREY, markersize=5)
    ring = dict(marker="o", color=GREY, markersize=12, markerfacecolor=PAPER, markeredgewidth=1.1)
    _points(axes, of_fallen, top, label="dropped after so many batches: mean loss until then", **ring)
    for block, drop in fallen.items():
        if drop.loss <= top:
            size = 7 if drop.after_batches < 100 else 5
            axes.text(
                block, drop.loss, drop.after_batches, ha="center", va="center", fontsize=size, color=INK
            )
    _points(axes, others, top, label="whole epoch", marker="o", color=BLUE, markersize=5.5)
    pick = dict(
        marker="*", color=VERMILION, markersize=13, markeredgecolor=INK, markeredgewidth=0.6, zorder=4
    )
    _points(axes, {iteration.block: iteration.loss}, top, label="picked (whole epoch)", **pick)
    axes.set_title(f"pick {iteration.count}: block {iteration.block}, loss {iteration.loss:.4f}")
    axes.margins(y=0.16)


def _top(losses: Iterable[float]) -> float:
    """Where a panel ends: what lies far above most losses would squeeze them into a line."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    low, median, high = min(finite), float(np.median(finite)), max(finite)
    limit = low + 2.5 * (median - low)
    return high if high <= limit * 1.1 or limit <= low else limit


def _points(axes: Axes, losses: dict[int, float], top: float, **look) -> None:
    """Losses as points; those above `top`, or not finite, as arrowheads at the edge."""
    if not losses:
        return
    inside = {block: loss for block, loss in losses.items() if loss <= top}
    axes.plot(list(inside), list(inside.values()), linestyle="none", **look)
    above = [block for block in losses if block not in inside]
    if above:
        arrow = dict(marker="^", markersize=5, color=GREY, linestyle="none", clip_on=False)
        axes.plot(above, [top] * len(above), label="above the panel, or diverged", **arrow)


@_styled
def blocks_figure(run: SearchRun) -> Figure:
    """The picks' losses over the number of blocks skipped, with the bend."""
    losses = run.losses_by_count()
    bend = find_bend(losses)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), marker="o", color=BLUE, markersize=6)
    for iteration in run.iterations:
        place = (iteration.count, iteration.loss)
        axes.annotate(
            str(iteration.block),
            place,
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=MUTED,
        )
    if bend is not None:
        axes.axvline(bend, color=VERMILION, linestyle="--", linewidth=1.2, zorder=1)
        axes.plot([bend], [losses[bend]], marker="D", color=VERMILION, markersize=8, markeredgecolor=INK)
        name = f"bend at {bend} blocks"
        axes.annotate(
            name,
            (bend, 0.94),
            (6, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
        )
    axes.set_xlabel("attention blocks skipped (small numbers: the block picked)")
    axes.set_ylabel(f"loss of the pick:\n{loss_label(run)}")
    axes.set_title(f"{plain_text(run.model)}: loss over blocks skipped" + ("" if bend else " (no bend)"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(losses) - 0.6, max(losses) + 0.6)
    axes.margins(y=0.14)
    return figure


# --- the training of the scales -----------------------------------------------------------------


@_styled
def epochs_figure(run: ScalingRun) -> Figure:
    """Training and held-out figures by epoch; the original's and the unscaled model's as lines.

    A panel for each figure that is measured on the held-out answers, the loss first.
    """
    trained = run.arguments.get("loss")
    measures = list(dict.fromkeys(name for epoch in run.epochs for name in epoch.held_out)) or ["loss"]
    first = {"ce": "cross_entropy"}.get(trained, trained) if len(measures) > 1 else measures[0]
    figure = Figure(figsize=(WIDTH, 0.9 + 2.9 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    numbers = [epoch.number for epoch in run.epochs]
    for axes, measure in zip(panels, measures, strict=True):
        series = []
        if measure == first:
            series.append(("training", [epoch.loss for epoch in run.epochs], BLUE, "o", "-"))
        held_out = [epoch.held_out.get(measure, math.nan) for epoch in run.epochs]
        if run.epochs[0].held_out:
            series.append(("held out, with scales", held_out, VERMILION, "s", "-"))
        for label, values, color, marker, line in series:
            axes.plot(numbers, values, color=color, marker=marker, linestyle=line, markersize=6, label=label)
        lines = {"unscaled": ("skips without scales", GREY, "-."), "original": ("original model", INK, "--")}
        for name, (label, color, line) in lines.items():
            if measure in run.baselines.get(name, {}):
                value = run.baselines[name][measure]
                axes.axhline(
                    value, color=color, linestyle=line, linewidth=1.4, label=f"held out, {label}: {value:.4f}"
                )
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
    _legend_outside(figure, panels)
    return figure


@_styled
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


def _legend_outside(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    by_label = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower left", ncols=2)
