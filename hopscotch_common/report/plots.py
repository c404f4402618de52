"""The pictures of a run, and how every picture is drawn: colours, fonts, formats, names as plain text.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Shapes and lines say the
same as the colours, so that nothing is lost in a grey print.
"""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hopscotch_common.files import write_atomic
from hopscotch_common.report import BEND_RULE, find_bend
from hopscotch_common.report.reading import IterationRecord, Run, ScalingRun, SearchRun, parse
from hopscotch_common.report.tables import plain_text

# In a dark window, a page may give these four other values.
INK, MUTED, FAINT, PAPER = "#1a1a1a", "#6a6a6a", "#dcdcdc", "#ffffff"
ON_LIGHT, ON_DARK = "#000001", "#fffffe"  # on a coloured cell, whatever the window
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8c8c8c"
COLOR_STEPS = 31  # of a colour bar: odd, so that 1 has a colour of its own
WIDTH = 7.0  # inches
STYLE = {
    **dict.fromkeys(["axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "hatch.color", "xtick.color", "ytick.color"], MUTED),
    **dict.fromkeys(["axes.facecolor", "figure.facecolor", "savefig.facecolor"], PAPER),
    **dict.fromkeys(["axes.spines.right", "axes.spines.top", "legend.frameon"], False),
    **dict.fromkeys(["text.parse_math", "text.usetex"], False),  # names are not formulas
    **dict.fromkeys(["axes.titlesize", "figure.titlesize", "font.size"], 10),
    **dict.fromkeys(["grid.linewidth", "hatch.linewidth"], 0.6),
    **{"axes.axisbelow": True, "axes.grid": True, "axes.titlelocation": "left", "grid.color": FAINT},
    **{"font.family": "sans-serif", "legend.fontsize": 9, "svg.fonttype": "none"},
    "svg.hashsalt": "hopscotch",  # the same ids each time
}
styled = mpl.rc_context(STYLE)  # decorates what draws, whatever matplotlib's settings outside are
CROSS_ENTROPY = "cross entropy\n(nats per token)"
UNITS = {
    **dict.fromkeys(["loss", "ce", "cross_entropy"], CROSS_ENTROPY),
    "kl": "KL divergence\n(nats per token)",
    "agreement": "agreement: the answers' tokens that are\nthe first choice (share)",
}
CAPTIONS = {
    "distances": "How far each candidate turns the residual stream, a panel a pick: 1 less the cosine "
    "between what enters and what leaves it, a mean over tokens.",
    "map_errors": "What the map of each candidate gets wrong, a panel a pick: the squared norm of the "
    "difference, as a share of the residual stream's behind the block.",
    "candidates": "Loss of each candidate, a panel a pick. Whole-epoch losses can be compared with one "
    "another; a candidate that a race dropped saw fewer batches. A cross is a loss before any training, in a "
    "race on the first batches alone: compare it with other crosses.",
    "blocks": f"Loss of the picks over the number of blocks skipped. {BEND_RULE}",
    "epochs": "Loss by epoch. The training loss is the mean over the epoch, while the scales change.",
    "scales": "The four scales of each layer; 1 is the untrained value. Where a scale is a value a channel, "
    "its mean, and below it the standard deviation over the channels.",
}
DECIDED_BY = {  # labels of points, by criterion or, if that uses no loss, by picture
    "trained": "whole epoch",
    "untrained": "before training",
    "distances": "how far a block turns the stream",
    "map_errors": "what a block's map gets wrong",
}


def pictures(run: Run) -> dict[str, Figure]:
    """Draw the pictures of a run, by their names in CAPTIONS; none if there is nothing to draw."""
    found = {}
    if isinstance(run, SearchRun):
        found[_what_is_shown(run)] = search_figure(run)
        if len(run.iterations) > 1:
            found["blocks"] = blocks_figure(run)
    if isinstance(run, ScalingRun):
        found["epochs"] = epochs_figure(run)
        if run.scales is not None:
            found["scales"] = scales_figure(run)
    return found


def plot_search(path: Path, report: dict) -> None:
    """Draw every candidate's loss of a block_selection.py report into a file; its suffix is the format.

    The file is written whole or not at all. Raises ValueError for an invalid report.
    """
    write_atomic(path, render(search_figure(parse(SearchRun, report, path)), path.suffix))


def render(figure: Figure, suffix: str) -> bytes:
    """Return the picture as the bytes of a .png, .pdf or .svg file, the same for the same figure."""
    buffer, kind = io.BytesIO(), suffix.lower().lstrip(".")
    undated = {"pdf": {"CreationDate": None}, "svg": dict.fromkeys(["Date", "Format", "Type", "Creator"])}
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=undated.get(kind))
    return buffer.getvalue()


def legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """Draw one legend for all panels, below them."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    by_label = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower left", ncols=2)


def _panels(
    run: Run, what: str, height: float, x_label: str, heights: Sequence[int] = (1,)
) -> tuple[Figure, Sequence[Axes]]:
    """Make a figure with a title and, one below another, axes over whole numbers."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(f"{plain_text(run.model, 28)}: {what}", x=0.01, ha="left")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels[-1].set_xlabel(x_label)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panels


def _loss_label(run: Run) -> str:
    """Name the run's training loss, with its unit."""
    return UNITS.get(str(run.arguments.get("loss")), CROSS_ENTROPY)


def _what_is_shown(run: SearchRun) -> str:
    """Return the name, in CAPTIONS, of the picture of a search's candidates."""
    if run.criterion != "cosine":
        return "candidates"
    return "map_errors" if run.arguments.get("replacement_rank") else "distances"


@styled
def search_figure(run: SearchRun) -> Figure:
    """Draw every candidate's loss by layer, one panel per pick; for a search by cosine, its distance.

    The pick is a star. Whole-epoch losses are filled circles. Candidates that a race dropped are grey rings
    at their mean loss until then, with the number of batches after which they dropped out. Losses before any
    training are crosses.
    """
    count, shown = len(run.iterations), _what_is_shown(run)
    what, unit = {
        "candidates": ("loss of each candidate", _loss_label(run)),
        "distances": ("distance of each candidate", "cosine distance of the residual stream"),
        "map_errors": ("error of each candidate's map", "share of the residual stream"),
    }[shown]
    decided_by = DECIDED_BY[run.criterion if shown == "candidates" else shown]
    x_label = "attention block (decoder layer, counted from 0)"
    figure, panels = _panels(run, what, 1.35 + max(2.2, 1.75 * count), x_label, [1] * count)
    for axes, pick in zip(panels, run.iterations, strict=True):
        _draw_candidates(axes, pick, run.criterion, decided_by)
        axes.set_xlim(-0.8, run.num_layers - 0.2)
    figure.supylabel(unit, fontsize=10)
    legend_below(figure, panels)
    return figure


def _draw_candidates(axes: Axes, pick: IterationRecord, criterion: str, decided_by: str) -> None:
    fallen = {block: drop for block, drop in pick.dropped.items() if drop.after_batches > 0}
    decided = pick.losses
    if criterion == "cosine":
        decided = dict.fromkeys(pick.losses, math.inf) | pick.distances
    others = {block: value for block, value in decided.items() if block != pick.block}
    chosen = decided.get(pick.block, pick.loss)
    of_fallen = [drop.mean_loss for drop in fallen.values()]
    top = _top([chosen, *others.values(), *of_fallen, *pick.untrained_losses.values()])
    top = max(top, chosen)

    def draw(losses: dict[int, float], **look) -> None:
        """Draw losses as points, and those above the panel or not finite as arrowheads at its edge."""
        inside = {block: loss for block, loss in losses.items() if loss <= top}
        if losses:
            axes.plot(list(inside), list(inside.values()), linestyle="none", **look)
        if above := [block for block in losses if block not in inside]:
            arrow = dict(marker="^", markersize=5, color=GREY, linestyle="none", clip_on=False)
            axes.plot(above, [top] * len(above), label="above the panel, or diverged", **arrow)

    for block in pick.skipped_before:
        hatched = dict(facecolor="none", edgecolor=FAINT, hatch="////", lw=0, label="skipped already")
        axes.axvspan(block - 0.4, block + 0.4, **hatched)
    draw(pick.untrained_losses, label="before training", marker="x", color=GREY, markersize=5)
    ring = dict(marker="o", color=GREY, markersize=11, markerfacecolor=PAPER, markeredgewidth=1.1)
    ring["label"] = "dropped after so many batches: mean loss until then"
    for order, (block, drop) in enumerate(fallen.items()):
        above_last = 3 + order * 1e-3  # a ring also hides the number of one that it overlaps
        draw({block: drop.mean_loss}, zorder=above_last, **ring)
        if drop.mean_loss <= top:
            size = 7 if drop.after_batches < 100 else 5
            number = dict(ha="center", va="center", fontsize=size, zorder=above_last)
            axes.text(block, drop.mean_loss, drop.after_batches, **number)
    draw(others, label=decided_by, marker="o", color=BLUE, markersize=5.5)
    star = dict(
        marker="*", color=VERMILION, markersize=13, markeredgecolor=INK, markeredgewidth=0.6, zorder=4
    )
    draw({pick.block: chosen}, label=f"picked ({decided_by})", **star)
    axes.set_title(f"pick {pick.count}: block {pick.block}, loss {pick.loss:.4f}")
    axes.margins(y=0.16)


def _top(losses: Iterable[float]) -> float:
    """Return where a panel ends: values far above most losses would squeeze these into a line."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    low, median, high = min(finite), float(np.median(finite)), max(finite)
    limit = low + 2.5 * (median - low)
    return high if high <= limit * 1.1 or limit <= low else limit


@styled
def blocks_figure(run: SearchRun) -> Figure:
    """Draw the picks' losses over the number of blocks skipped, with the bend."""
    losses = run.losses_by_count()
    bend = find_bend(losses)
    what = "loss over blocks skipped" + ("" if bend else " (no bend)")
    x_label = "attention blocks skipped (small numbers: the block picked)"
    figure, (axes,) = _panels(run, what, 3.6, x_label)
    axes.plot(list(losses), list(losses.values()), marker="o", color=BLUE, markersize=6)
    for pick in run.iterations:
        beside = dict(textcoords="offset points", ha="right", fontsize=8, color=MUTED)
        axes.annotate(str(pick.block), (pick.count, pick.loss), (-3, 5), **beside)
    if bend is not None:
        axes.axvline(bend, color=VERMILION, linestyle="--", linewidth=1.2, zorder=1)
        axes.plot([bend], [losses[bend]], marker="D", color=VERMILION, markersize=8, markeredgecolor=INK)
        place = dict(xycoords=("data", "axes fraction"), textcoords="offset points", va="top")
        axes.annotate(f"bend at {bend} blocks", (bend, 0.94), (6, 0), **place)
    axes.set_ylabel(f"loss of the pick:\n{_loss_label(run)}")
    axes.set_xlim(min(losses) - 0.6, max(losses) + 0.6)
    axes.margins(y=0.14)
    return figure


@styled
def epochs_figure(run: ScalingRun) -> Figure:
    """Draw training and held-out figures by epoch, with lines for the original's and the unscaled model's.

    There is one panel for each figure measured on the held-out answers, the loss first.
    """
    measures = run.measures or ["loss"]
    trained = "kl" if run.arguments.get("loss") == "kl" else "cross_entropy"
    first = trained if trained in measures else measures[0]
    height, x_label = 0.9 + 2.9 * len(measures), "epoch (counted from 0)"
    figure, panels = _panels(run, "training of the scales", height, x_label, [1] * len(measures))
    numbers = [epoch.epoch for epoch in run.epochs]
    for axes, measure in zip(panels, measures, strict=True):
        if measure == first:
            training = [epoch.loss for epoch in run.epochs]
            axes.plot(numbers, training, color=BLUE, marker="o", markersize=6, label="training")
        if run.measures:
            held_out = [epoch.scaled.get(measure, math.nan) for epoch in run.epochs]
            look = dict(color=VERMILION, marker="s", markersize=6, label="held out, with scales")
            axes.plot(numbers, held_out, **look)
        _draw_baselines(axes, run, measure)
        unit = UNITS.get(measure, plain_text(measure, 30))
        axes.set_ylabel(_loss_label(run) if measure in ("loss", first) else unit)
        best = dict(color=FAINT, linewidth=6, zorder=0, label=f"best epoch: {run.best_epoch}")
        axes.axvline(run.best_epoch, **best)
        axes.set_xlim(min(numbers) - 0.4, max(numbers) + 0.4)
    legend_below(figure, panels)
    return figure


def _draw_baselines(axes: Axes, run: ScalingRun, measure: str) -> None:
    """Held-out figures of the original and the unscaled model as lines, with their values.

    Where the unscaled one lies so far off that it would squeeze all else, only its value is shown.
    """

    def draw(name: str, **look) -> float | None:
        value = run.baselines.get(name, {}).get(measure)
        if value is not None:
            axes.axhline(value, linewidth=1.4, label=f"held out, {run.compared[name]}", **look)
        return value

    def write(value: float, at: float, tail: str = "", va: str = "center") -> None:
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", va=va, fontsize=8)
        axes.annotate(f"{value:.4f}{tail}", (1, at), (4, 0), **place)

    original = draw("original", color=INK, linestyle="--")
    low, high = axes.get_ylim()
    unscaled = draw("unscaled", color=GREY, linestyle="-.")
    off = unscaled is not None and not low - 4 * (high - low) <= unscaled <= high + 4 * (high - low)
    if off:
        axes.set_ylim(low, high)
        write(unscaled, *((high, " ↑") if unscaled > high else (low, " ↓")))
    low, high = axes.get_ylim()
    shown = sorted(value for value in (original, None if off else unscaled) if value is not None)
    overlap = len(shown) == 2 and shown[1] - shown[0] < 0.06 * (high - low)
    for value, side in zip(shown, ("top", "bottom"), strict=False):
        write(value, value, va=side if overlap else "center")


@styled
def scales_figure(run: ScalingRun) -> Figure:
    """Draw the best epoch's scales by layer and, for those that are vectors, their spread.

    Values below 1 carry a minus, for readers who see no colour. The b_attn of skipped blocks with nothing in
    their place is hatched.
    """
    assert run.scales is not None, "an earlier report has no map"
    skipped = list(run.skipped_blocks)
    mean, spread = {}, {}
    for name, found in run.scales:
        hidden = np.isin(np.arange(run.scales.num_layers), run.untrained_b_attn) & (name == "b_attn")
        mean[name] = np.ma.masked_array(found.mean, hidden)
        if found.deviation:
            spread[name] = np.ma.masked_array(found.deviation, hidden)
    heights = [len(mean), len(spread)] if spread else [len(mean)]
    what = f"scales after epoch {run.best_epoch} (−: below 1)"
    blocks = plain_text(", ".join(map(str, skipped)) or "none", 50)
    how = "hatched: attention skipped" if run.untrained_b_attn else "a map in attention's place"
    x_label = f"decoder layer ({how}: {blocks})"
    figure, panels = _panels(run, what, 1.5 + 0.36 * sum(heights) + 0.5 * len(heights), x_label, heights)

    means = np.ma.stack(list(mean.values()))  # [names, layers]
    reach = max([0.01, *np.abs(means - 1).compressed()])  # untrained scales must not look like trained ones
    around_1 = dict(cmap=mpl.colormaps["PuOr"].resampled(COLOR_STEPS))
    around_1["norm"] = TwoSlopeNorm(1.0, 1 - reach, 1 + reach)
    _draw_heat_map(panels[0], mean, "mean over channels" if spread else "value", **around_1)
    size = min(8, 330 / means.shape[1])  # a minus is narrower than its cell
    for row, layer in np.argwhere((means < 1).filled(False)):
        color = ON_DARK if means[row, layer] < 1 - 0.6 * reach else ON_LIGHT
        panels[0].text(layer, row, "−", ha="center", va="center", fontsize=size, color=color)
    if spread:
        colors = mpl.colormaps["cividis"].resampled(COLOR_STEPS)
        _draw_heat_map(panels[1], spread, "spread (st. dev.)", cmap=colors)
    return figure


def _draw_heat_map(axes: Axes, values: dict[str, np.ma.MaskedArray], label: str, **look) -> None:
    """Draw cells around whole numbers, one row per name, the first on top; masked cells are hatched."""
    cells = np.ma.stack(list(values.values()))
    rows, layers = cells.shape
    edges = np.arange(layers + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, cells, edgecolors=PAPER, linewidth=0.5, **look)
    for row, layer in np.argwhere(np.ma.getmaskarray(cells)):
        hatched = dict(facecolor=PAPER, edgecolor=MUTED, hatch="//////", linewidth=0.8)
        axes.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, **hatched))
    axes.invert_yaxis()
    axes.set_yticks(range(rows), list(values))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.02, aspect=5 * rows)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
