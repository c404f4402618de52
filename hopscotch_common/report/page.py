"""One self-contained HTML page of any number of runs: tables and pictures, no script, no network."""

import re
from collections.abc import Sequence
from html import escape
from xml.etree import ElementTree

from matplotlib.figure import Figure

from hopscotch_common.report import drawing, scaling_plots, search_plots, tables
from hopscotch_common.report.bend import RULE
from hopscotch_common.report.records import CountsRun, Run, ScalingRun, SearchRun
from hopscotch_common.report.tables import Table

SVG = "http://www.w3.org/2000/svg"
XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
THEME = {drawing.INK: "--ink", drawing.MUTED: "--muted", drawing.FAINT: "--faint", drawing.PAPER: "--paper"}
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+( ± [\d.]+)?")

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --muted: #6a6a6a; --faint: #dcdcdc; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --muted: #a3a3a3; --faint: #3b3e44; --paper: #17191d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; border-top: 1px solid var(--faint); padding-top: 1.25rem; }
p { margin: .25rem 0 1rem; }
.path, figcaption, .note { color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
th, td { padding: .25rem 1.25rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--faint); }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.named td { overflow-wrap: anywhere; min-width: 8rem; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; min-width: 28rem; max-width: 50rem; height: auto; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
"""

CAPTIONS = {
    "distances": "How far each candidate turns the residual stream, a panel a pick: 1 less the cosine "
    "between what enters and what leaves it, a mean over tokens.",
    "candidates": "Loss of each candidate, a panel a pick. Whole-epoch losses can be compared with one "
    "another; a candidate that a race dropped saw fewer batches, and a cross is a loss without any training.",
    "blocks": f"Loss of the picks over the number of blocks skipped. {RULE}",
    "epochs": "Loss by epoch. The training loss is the mean over the epoch, while the scales change.",
    "scales": "The four scales of each layer; 1 is the untrained value. Where a scale is a value a channel, "
    "its mean, and below it the standard deviation over the channels.",
}


def build_page(runs: Sequence[Run]) -> str:
    """The page, as HTML; runs in the order given."""
    named = [run for run in runs if not isinstance(run, CountsRun)] or runs
    models = ", ".join(dict.fromkeys(_text(run.model) for run in named))
    sections = "\n".join(_section(run, number) for number, run in enumerate(runs, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Hopscotch: {models}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Hopscotch: {models}</h1>
<p class="note">Attention blocks that the task does not need: what was run, and what came of it.</p>
{sections}
</main>
</body>
</html>
"""


def pictures(run: Run) -> dict[str, Figure]:
    """The pictures of a run, by name; none where there is nothing to draw."""
    if isinstance(run, SearchRun):
        name = "distances" if run.criterion == "cosine" else "candidates"
        found = {name: search_plots.search_figure(run)}
        return found | ({"blocks": search_plots.blocks_figure(run)} if len(run.iterations) > 1 else {})
    if isinstance(run, ScalingRun):
        found = {"epochs": scaling_plots.epochs_figure(run)}
        return found | ({"scales": scaling_plots.scales_figure(run)} if run.scales is not None else {})
    return {}


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """A picture as an <svg> element for a page.

    All ids begin with the prefix, so that those of several pictures do not collide. The colours of
    THEME become the page's variables, so that the picture follows the window's light or dark. label:
    what a screen reader says.
    """
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(drawing.render(figure, ".svg"))
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", prefix + element.attrib["id"])
        if XLINK_HREF in element.attrib:
            element.set("href", "#" + prefix + element.attrib.pop(XLINK_HREF).removeprefix("#"))
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{prefix}"))
        styles = [element.attrib.pop("style", "").replace("url(#", f"url(#{prefix}")]
        styles += [
            f"{name}: {element.attrib.pop(name)}" for name in ("fill", "stroke") if name in element.attrib
        ]
        style = "; ".join(filter(None, styles))
        for color, variable in THEME.items():
            style = style.replace(color, f"var({variable})")
        if style:
            element.set("style", style)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", tables.plain_text(label))
    return ElementTree.tostring(root, encoding="unicode")


def _section(run: Run, number: int) -> str:
    table = tables.summary(run)
    parts = [
        f"<h2>{_text(run.model)}: {_text(table.title)}</h2>",
        f'<p class="path">{_text(run.path)}</p>',
        _table(table),
    ]
    if isinstance(run, SearchRun):
        parts.append(_table(tables.picks(run)))
    if isinstance(run, ScalingRun):
        parts.append(_table(tables.epochs(run)))
        if run.exports:
            parts.append(_table(tables.exports(run)))
    for name, figure in pictures(run).items():
        svg = inline_svg(figure, f"run{number}-{name}-", f"{run.model}: {name}")
        caption = f"<figcaption>{escape(CAPTIONS[name])}</figcaption>"
        parts.append(f'<figure><div class="scroll" tabindex="0">{svg}</div>{caption}</figure>')
    more = [tables.arguments(run), tables.versions(run)]
    if isinstance(run, ScalingRun):
        if run.scales is not None:
            more.insert(0, tables.scales(run))
        else:
            parts.append(
                '<p class="note">The best epoch’s checkpoint is not there, so its scales are not shown.</p>'
            )
    for table in more:
        if table.rows:
            parts.append(
                f"<details><summary>{_text(table.title.capitalize())}</summary>{_table(table)}</details>"
            )
    assert isinstance(run, (CountsRun, SearchRun, ScalingRun))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(table: Table) -> str:
    """An HTML table; columns of numbers are set to the right."""
    columns = list(zip(*table.rows, strict=True))
    is_number = [
        bool(table.header) and all(not c or NUMBER.fullmatch(c) or c == "skipped" for c in column)
        for column in columns
    ]

    classes = [' class="number"' if number else "" for number in is_number]

    def row(cells: Sequence[str], tag: str) -> str:
        inside = (
            f"<{tag}{kind}>{_text(cell, 2000)}</{tag}>" for cell, kind in zip(cells, classes, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    head = f"<thead>{row(table.header, 'th')}</thead>" if table.header else ""
    body = "".join(row(cells, "td") for cells in table.rows)
    kind = "" if table.header else ' class="named"'
    return f'<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _text(value: object, most: int = 200) -> str:
    return escape(tables.plain_text(value, most))
