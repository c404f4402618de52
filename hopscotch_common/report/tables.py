"""The figures of a run as tables: data first, and as text for the terminal."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hopscotch_common.cli import printable
from hopscotch_common.report.bend import find_bend
from hopscotch_common.report.records import CountsRun, Run, ScalingRun, SearchRun


def plain_text(name: object, most: int = 70) -> str:
    """A name as one printable line of at most so many characters."""
    line = printable(str(name))
    return line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"


@dataclass(frozen=True)
class Table:
    """Cells as they are in the reports. header: one cell a column, or none for names and values."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    header: tuple[str, ...] = ()

    def text(self) -> str:
        """Aligned columns, two spaces apart."""
        rows = [self.header, *self.rows] if self.header else self.rows
        lines = [tuple(plain_text(cell, 1000) for cell in row) for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

        return "\n".join(map(line, lines))


def summary(run: Run) -> Table:
    """What a run came to, in a few rows."""
    if isinstance(run, SearchRun):
        return _search_summary(run)
    if isinstance(run, ScalingRun):
        return _scaling_summary(run)
    assert isinstance(run, CountsRun)
    titles = {"answers": "answers of the model", "data": "processed data"}
    rows = tuple(
        (name.replace("_", " "), _value(value)) for name, value in run.figures.items() if name != "model"
    )
    return Table(titles[run.what], rows)


def _search_summary(run: SearchRun) -> Table:
    bend = find_bend(run.losses_by_count())
    cost = sum(iteration.candidate_epochs for iteration in run.iterations)
    rows = [
        ("attention blocks picked", ", ".join(str(iteration.block) for iteration in run.iterations)),
        ("loss of the last pick", f"{run.iterations[-1].loss:.4f}"),
        ("bend of the loss", "none" if bend is None else f"at {bend} blocks"),
        ("cost", f"{cost:.1f} candidate-epochs"),
    ]
    if run.stopped_before is not None:
        refused = run.stopped_before
        rows.insert(1, ("stopped before", f"block {refused.block}, loss {refused.loss:.4f}"))
    for measure, value in run.iterations[-1].held_out.items():
        original = f" (original {run.original[measure]:.4f})" if measure in run.original else ""
        rows.append((f"held-out {_words(measure)}", f"{value:.4f}{original}"))
    return Table("search", tuple(rows))


def _scaling_summary(run: ScalingRun) -> Table:
    rows = [("attention blocks skipped", ", ".join(map(str, run.skipped)))]
    rows += [(flag, str(run.arguments[flag])) for flag in ("granularity", "loss") if flag in run.arguments]
    scaled = next(epoch for epoch in run.epochs if epoch.number == run.best_epoch).held_out
    for measure in scaled:
        for name, measures in (run.baselines | {"scaled": scaled}).items():
            if measure in measures:
                rows.append((f"held-out {_words(measure)}, {name}", f"{measures[measure]:.4f}"))
    if run.weights is None:
        rows.append(("checkpoint", f"{run.checkpoint} (not there)"))
        return Table("scales", tuple(rows))
    for what, unit in (("parameters", ""), ("kv_cache_blocks", " blocks")):
        total, removed = run.weights[what], run.weights[f"{what}_removed"]
        saved = f"{removed:,} of {total:,}{unit} ({removed / total:.1%})"
        rows.append((f"{'KV cache' if unit else what} saved", saved))
    rows.append(("checkpoint", str(run.checkpoint)))
    return Table("scales", tuple(rows))


def picks(run: SearchRun) -> Table:
    """A row for each block that the search picked."""
    rows, before = [], None
    measures = list(run.iterations[0].held_out)
    for iteration in run.iterations:
        candidates = iteration.losses.keys() | iteration.dropped.keys() | iteration.distances.keys()
        trained = whole = 0
        if run.criterion == "trained":
            dropped_before = [drop for drop in iteration.dropped.values() if drop.after_batches == 0]
            trained, whole = len(candidates) - len(dropped_before), len(iteration.losses)
        diverged = sum(not math.isfinite(loss) for loss in iteration.losses.values())
        rows.append(
            (
                str(iteration.count),
                str(iteration.block),
                f"{iteration.loss:.4f}",
                "" if before is None else f"{iteration.loss - before:+.4f}",
                f"{trained} of {len(candidates)}" + (f" ({diverged} diverged)" if diverged else ""),
                f"{whole}",
                f"{iteration.candidate_epochs:.2f}",
                *(
                    f"{iteration.held_out[name]:.4f}" if name in iteration.held_out else ""
                    for name in measures
                ),
            )
        )
        before = iteration.loss
    header = (
        "skipped",
        "block",
        "loss",
        "change",
        "candidates trained",
        "whole epoch",
        "cost (candidate-epochs)",
        *(f"held-out {_words(name)}" for name in measures),
    )
    return Table("picks", tuple(rows), header)


def epochs(run: ScalingRun) -> Table:
    """A row for each epoch, and for the held-out figures of the models that it is compared with."""
    names = list(dict.fromkeys(name for epoch in run.epochs for name in epoch.held_out))

    def cells(measures: Mapping[str, float]) -> tuple[str, ...]:
        return tuple(f"{measures[name]:.4f}" if name in measures else "" for name in names)

    compared = {"original": "original model", "unscaled": "skips without scales"}
    rows = [(compared.get(name, name), "", *cells(values)) for name, values in run.baselines.items()]
    for epoch in run.epochs:
        best = " (best)" if epoch.number == run.best_epoch else ""
        rows.append((f"epoch {epoch.number}{best}", f"{epoch.loss:.4f}", *cells(epoch.held_out)))
    return Table(
        "epochs", tuple(rows), ("", "training loss", *(f"held-out {_words(name)}" for name in names))
    )


def scales(run: ScalingRun) -> Table:
    """A row for each layer with its scales; of vectors mean ± standard deviation over the channels."""
    found = run.scales
    assert found is not None
    rows = []
    for layer, (means, spreads) in enumerate(zip(found.mean, found.spread, strict=True)):
        cells = [
            f"{mean:.4f} ± {spread:.4f}" if is_vector else f"{mean:.4f}"
            for mean, spread, is_vector in zip(means, spreads, found.vectors, strict=True)
        ]
        if layer in run.skipped:
            cells[found.names.index("b_attn")] = "skipped"
        rows.append((str(layer), *cells))
    return Table("scales", tuple(rows), ("layer", *found.names))


def exports(run: ScalingRun) -> Table:
    """A row for each export: where it lies, and what its check found."""
    rows = []
    for name, content in run.exports.items():
        details = content if isinstance(content, Mapping) else {"": content}
        figures = (f"{_words(key)}: {_value(value)}" for key, value in details.items() if key != "folder")
        rows.append((str(name), str(details.get("folder", "")), "; ".join(figures)))
    return Table("exports", tuple(rows), ("format", "folder", "check"))


def arguments(run: Run) -> Table:
    return Table("arguments", _named(run.arguments.items()))


def versions(run: Run) -> Table:
    return Table("versions", _named(run.versions.items()))


def _named(items: Iterable[tuple[object, object]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), _value(value)) for name, value in items)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not given"}[value]
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return ", ".join(map(_value, value)) or "none"
    return json.dumps(value)
