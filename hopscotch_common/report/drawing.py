"""How every picture is drawn: colours, fonts, formats, and names as plain text.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; what they say is also
said by shapes and lines, so that it survives a grey print.
"""

import functools
import io
from collections.abc import Callable, Iterable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hopscotch_common.report.records import Run
from hopscotch_common.report.tables import plain_text

# A page may give these four other values in a dark window.
INK, MUTED, FAINT, PAPER = "#1a1a1a", "#6a6a6a", "#dcdcdc", "#ffffff"
ON_LIGHT, ON_DARK = "#000001", "#fffffe"  # on a coloured cell, whatever the window
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8c8c8c"

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
    "figure.titlesize": 10,
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
    "loss": "cross entropy\n(nats per token)",
    "ce": "cross entropy\n(nats per token)",
    "cross_entropy": "cross entropy\n(nats per token)",
    "kl": "KL divergence\n(nats per token)",
    "agreement": "agreement with the original\n(share of tokens)",
}


def loss_label(run: Run) -> str:
    """What the run's training loss is, with its unit."""
    return UNITS.get(str(run.arguments.get("loss")), UNITS["ce"])


def render(figure: Figure, suffix: str) -> bytes:
    """The picture as the bytes of a .png, .pdf or .svg file, the same for the same figure."""
    buffer = io.BytesIO()
    dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=suffix.lower().lstrip("."), dpi=160, metadata=dates.get(suffix.lower()))
    return buffer.getvalue()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws, in STYLE, whatever matplotlib is set to outside."""

    @functools.wraps(draw)
    def in_style(*arguments, **options) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    return in_style


def add_title(figure: Figure, run: Run, what: str) -> None:
    """The model's name and what is shown, at the upper left."""
    figure.suptitle(f"{plain_text(run.model, 28)}: {what}", x=0.01, ha="left")


def legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    by_label = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower left", ncols=2)
