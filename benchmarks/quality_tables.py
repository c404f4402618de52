"""What `quality.py` measured, as tables and a picture."""

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from measuring import row, title

from hopscotch_common.report import plots

TASKS = {"gsm8k": "GSM8K", "puzzles": "puzzles", "functions": "functions"}  # and what tables call them
# What stands in for skipped blocks (nothing, trained scales, maps of a rank as fitted, both), and how it is
# drawn: label, colour, marker.
VARIANTS = {
    "unscaled": ("skipped, no scales", plots.GREY, "o"),
    "layer-ce": ("four scales a layer, cross entropy", plots.BLUE, "^"),
    "layer-kl": ("four scales a layer, KL", plots.BLUE, "v"),
    "channel-ce": ("scales a channel, cross entropy", plots.VERMILION, "D"),
    "channel-kl": ("scales a channel, KL", plots.VERMILION, "s"),
    "rank16": ("maps of rank 16, as fitted", plots.GREEN, "P"),
    "channel-kl-rank16": ("maps of rank 16 and scales a channel, KL", plots.GREEN, "*"),
    "rank64": ("maps of rank 64, as fitted", plots.INK, "P"),
    "channel-kl-rank64": ("maps of rank 64 and scales a channel, KL", plots.INK, "*"),
}


def rank_of(variant: str) -> int:
    return int(variant.partition("rank")[2] or 0)


def accuracy(right: str) -> tuple[float, float]:
    """(share, standard error) of "1" among "0" and "1"."""
    share = right.count("1") / len(right)
    return share, math.sqrt(share * (1 - share) / len(right))


def difference(right: str, reference: str) -> tuple[float, float]:
    """(mean, standard error) of the difference between answers to the same problems: pairs tell more."""
    differences = [int(a) - int(b) for a, b in zip(right, reference, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def table(figures: Sequence[dict], less: str = "original", others: Sequence[dict] = ()) -> list[str]:
    """Markdown: a row for each number of blocks and variant; accuracies in percent with standard errors.

    less: the variant that differences are to, with as many blocks skipped; others: where its figures are,
    if elsewhere.
    """
    tasks = [task for task in TASKS if any(task in figure for figure in figures)]
    columns = [column for task in tasks for column in (f"{TASKS[task]}, %", f"less {less}'s", "cut off")]
    lines = title("blocks", "scales", *columns, "perplexity", "KL", "agreement")
    order = ["original", *VARIANTS]
    for figure in sorted(figures, key=lambda f: (len(f["of"]["blocks"]), order.index(f["of"]["variant"]))):
        blocks, variant = figure["of"]["blocks"], figure["of"]["variant"]
        of = {"blocks": [] if less == "original" else blocks, "variant": less}
        reference = next((f for f in others or figures if f["of"] == of), {})
        cells = [len(blocks), variant.replace("-", ", ")]
        for task in tasks:
            cells += _accuracy_cells(figure.get(task), reference.get(task))
        found = _held_out_of(figures, blocks, variant)
        if found is None:
            cells += ["-"] * 3
        else:
            cells += [f"{found['perplexity']:.3f}", f"{found['kl']:.4f}", f"{100 * found['agreement']:.1f} %"]
        lines.append(row(*cells))
    return lines


def _accuracy_cells(task: dict | None, reference: dict | None) -> list[str]:
    if task is None:
        return ["-", "-", "-"]
    share, error = accuracy(task["right"])
    cells = [f"{100 * share:.1f} ± {100 * error:.1f}", "-", task["truncated"]]
    if reference is not None and reference is not task:
        mean, error = difference(task["right"], reference["right"])
        cells[1] = f"{100 * mean:+.1f} ± {100 * error:.1f}"
    return cells


def _held_out_of(figures: Sequence[dict], blocks: list[int], variant: str) -> dict | None:
    """Held-out figures; those of the original, and of what is not trained, stand with a trained variant."""
    for figure in figures:
        of = figure["of"]
        if "held_out" in figure and variant == "original":
            return figure["held_out"]["original"]
        if "held_out" in figure and of["blocks"] == blocks:
            if of["variant"] == variant:
                return figure["held_out"]["scaled"]
            if "-" not in variant and rank_of(of["variant"]) == rank_of(variant):
                return figure["held_out"]["unscaled"]
    return None


@plots.styled
def draw(figures: Sequence[dict], model: str) -> Figure:
    """Accuracy on GSM8K (with standard errors) and held-out KL over the blocks skipped, a line a variant.

    SystemExit where no accuracy was measured.
    """
    original = next((f for f in figures if f["of"]["variant"] == "original" and "gsm8k" in f), None)
    figures = [figure for figure in figures if "gsm8k" in figure]
    if original is None or len(figures) < 2:
        raise SystemExit("nothing to draw: measure gsm8k first, with --counts 0 and others")
    picture = Figure(figsize=(plots.WIDTH, 3.6), layout="constrained")
    panels = picture.subplots(1, 2)
    every = sorted({len(f["of"]["blocks"]) for f in figures})
    start, error = accuracy(original["gsm8k"]["right"])
    panels[0].axhspan(100 * (start - error), 100 * (start + error), color=plots.FAINT)
    panels[0].axhline(100 * start, color=plots.INK, linewidth=1, label="original (± standard error)")
    for number, (variant, (label, color, marker)) in enumerate(VARIANTS.items()):
        own = [f for f in figures if f["of"]["variant"] == variant]
        if not own:
            continue
        own.sort(key=lambda f: len(f["of"]["blocks"]))
        counts = [len(f["of"]["blocks"]) for f in own]
        line = "-" if counts == [n for n in every if n] else "none"  # none through what was not measured
        style = dict(color=color, marker=marker, label=label, markersize=6, linestyle=line)
        shares = [accuracy(f["gsm8k"]["right"]) for f in own]
        beside = [count + 0.06 * (number - 2) for count in counts]  # so that no error bar hides another
        centres, errors = ([100 * value for value in values] for values in zip(*shares, strict=True))
        panels[0].errorbar(beside, centres, yerr=errors, capsize=3, **style)
        kl = [(_held_out_of(figures, f["of"]["blocks"], variant) or {}).get("kl", math.nan) for f in own]
        panels[1].plot(counts, kl, **style)
    panels[0].set_ylabel(f"GSM8K, {len(original['gsm8k']['right'])} problems: right (%)")
    panels[1].set_ylabel("held out: KL to the original\n(nats per token)")
    for panel in panels:
        panel.set_xlabel("attention blocks skipped")
        panel.set_xticks(every)
        panel.set_xlim(-0.3, every[-1] + 0.3)
        panel.set_ylim(bottom=0)
    picture.suptitle(f"{model}: what is kept", x=0.01, ha="left")
    plots.legend_below(picture, panels)
    return picture
