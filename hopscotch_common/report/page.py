"""One self-contained HTML page for any number of runs: tables and pictures, no script, no network."""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from hopscotch_common.report import plots, tables
from hopscotch_common.report.reading import CountsRun, Run

THEME = {plots.INK: "--ink", plots.MUTED: "--muted", plots.FAINT: "--faint", plots.PAPER: "--paper"}
TEMPLATE = "page.html.jinja"


def build_page(runs: Sequence[Run]) -> str:
    """Return the page as HTML, with the runs in the order given."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["plain"] = tables.plain_text
    named = [run for run in runs if not isinstance(run, CountsRun)] or runs
    sections = [
        {
            "run": run,
            "summary": tables.summary(run),
            "details": tables.details(run),
            "folded": tables.folded(run),
            "pictures": [
                (inline_svg(figure, f"run{number}-{name}-", f"{run.model}: {caption}"), caption)
                for name, figure in plots.pictures(run).items()
                for caption in [plots.CAPTIONS[name]]
            ],
        }
        for number, run in enumerate(runs, 1)
    ]
    models = dict.fromkeys(run.model for run in named)
    return pages.get_template(TEMPLATE).render(
        models=models, decisions=tables.decisions(runs), units=tables.UNITS, sections=sections
    )


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """Return a picture as an <svg> element for a page.

    All ids begin with the prefix, so that those of several pictures do not collide. The colours of THEME
    become the page's variables, so that the picture follows the window's light or dark mode. label: what a
    screen reader says.
    """

    def adapt(tag: re.Match) -> str:
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])
        return re.sub("|".join(THEME), lambda color: f"var({THEME[color[0]]})", text)

    svg = plots.render(figure, ".svg").decode()
    svg = re.sub("<[^>]*>", adapt, svg[svg.index("<svg") :])  # names, which are between tags, stay unchanged
    return Markup(
        svg.replace("<svg", f'<svg role="img" aria-label="{escape(tables.plain_text(label, 1000))}"', 1)
    )
