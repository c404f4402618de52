"""Pictures of a search: the losses of all candidates, and of the picks over blocks skipped."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hopscotch_common.files import write_atomic
from hopscotch_common.report.bend import find_bend
from hopscotch_common.report.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    WIDTH,
    add_title,
    legend_below,
    loss_label,
    render,
    styled,
)
from hopscotch_common.report.reading import parse_search
from hopscotch_common.report.records import Iteration, SearchRun


def plot_search(path: Path, report: dict) -> None:
    """Draw every candidate's loss of a block_selection.py report into a file; its suffix is the format.

    The file is written whole or not at all. Raises ValueError for a report that is none.
    """
    write_atomic(path, render(search_figure(parse_search(report, path)), path.suffix))


@styled
def search_figure(run: SearchRun) -> Figure:
    """Every candidate's loss by layer, a panel a pick; of a search by cosine, its distance.

    The pick is a star. Whole-epoch losses are filled circles; candidates that a race dropped are grey
    rings at their mean loss until then, with the number of batches after which they fell; losses
    before any training are crosses.
    """
    count = len(run.iterations)
    figure = Figure(figsize=(WIDTH, 1.35 + max(2.2, 1.75 * count)), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, iteration in zip(panels, run.iterations, strict=True):
        _draw_candidates(axes, iteration, run.criterion)
        axes.set_xlim(-0.8, run.num_layers - 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("attention block (decoder layer, counted from 0)")
    by_distance = run.criterion == "cosine"
    figure.supylabel(
        "cosine distance of the residual stream" if by_distance else loss_label(run), fontsize=10
    )
    add_title(figure, run, "distance of each candidate" if by_distance else "loss of each candidate")
    legend_below(figure, panels)
    return figure


DECIDED_BY = {  # how points are named
    "trained": "whole epoch",
    "untrained": "before training",
    "cosine": "how far a block turns the stream",
}


def _draw_candidates(axes: Axes, iteration: Iteration, criterion: str) -> None:
    fallen = {block: drop for block, drop in iteration.dropped.items() if drop.after_batches > 0}
    decided = iteration.losses
    if criterion == "cosine":
        decided = iteration.distances | dict.fromkeys(iteration.losses.keys() - iteration.distances, math.inf)
    others = {block: value for block, value in decided.items() if block != iteration.block}
    chosen = decided.get(iteration.block, iteration.loss)
    of_fallen = [drop.loss for drop in fallen.values()]
    top = _top([chosen, *others.values(), *of_fallen, *iteration.untrained.values()])

    for block in iteration.skipped_before:
        label = "skipped already"
        axes.axvspan(
            block - 0.4, block + 0.4, facecolor="none", edgecolor=FAINT, hatch="////", lw=0, label=label
        )
    _points(axes, iteration.untrained, top, label="before training", marker="x", color=GREY, markersize=5)
    label = "dropped after so many batches: mean loss until then"
    ring = dict(
        marker="o", color=GREY, markersize=11, markerfacecolor=PAPER, markeredgewidth=1.1, label=label
    )
    for order, (block, drop) in enumerate(fallen.items()):
        above_last = 3 + order * 1e-3  # a ring hides the number of one that it overlaps, too
        _points(axes, {block: drop.loss}, top, zorder=above_last, **ring)
        if drop.loss <= top:
            size = 7 if drop.after_batches < 100 else 5
            number = dict(ha="center", va="center", fontsize=size, zorder=above_last)
            axes.text(block, drop.loss, drop.after_batches, **number)
    _points(axes, others, top, label=DECIDED_BY[criterion], marker="o", color=BLUE, markersize=5.5)
    pick = dict(
        marker="*", color=VERMILION, markersize=13, markeredgecolor=INK, markeredgewidth=0.6, zorder=4
    )
    _points(axes, {iteration.block: chosen}, top, label=f"picked ({DECIDED_BY[criterion]})", **pick)
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


@styled
def blocks_figure(run: SearchRun) -> Figure:
    """The picks' losses over the number of blocks skipped, with the bend."""
    losses = run.losses_by_count()
    bend = find_bend(losses)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), marker="o", color=BLUE, markersize=6)
    for iteration in run.iterations:
        beside = dict(textcoords="offset points", ha="right", fontsize=8, color=MUTED)
        axes.annotate(str(iteration.block), (iteration.count, iteration.loss), (-3, 5), **beside)
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
    add_title(figure, run, "loss over blocks skipped" + ("" if bend else " (no bend)"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(losses) - 0.6, max(losses) + 0.6)
    axes.margins(y=0.14)
    return figure
