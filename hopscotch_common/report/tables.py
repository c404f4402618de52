"""The figures of a run as tables: as data, and as text for the terminal."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hopscotch_common.errors import printable
from hopscotch_common.report import ANSWERS, find_bend, with_error
from hopscotch_common.report.reading import CountsRun, Run, Scales, ScalingRun, SearchRun, Spread, measures_of

NUMBER = re.compile(r"([-+]?[\d,]*\.?\d+( ± [\d.]+)?|skipped)?")


def plain_text(name: object, most: int = 70) -> str:
    """A name as one printable line of at most `most` characters."""
    return printable(str(name), most)


@dataclass(frozen=True)
class Table:
    """Cells as they are in the reports. header: one cell per column, or none for names and values."""

    title: str
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ()

    @property
    def is_number(self) -> list[bool]:
        """For each column, whether it holds numbers, which the page aligns right."""
        columns = zip(*self.rows, strict=True)
        return [bool(self.header) and all(map(NUMBER.fullmatch, column)) for column in columns]

    def text(self) -> list[str]:
        """Lines of aligned columns, two spaces apart."""
        rows = [self.header, *self.rows] if self.header else self.rows
        lines = [[plain_text(cell, 1000) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def decisions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what a decision needs, two lines per run: what skipping the blocks lost, and what it gained.

    The runs are the trainings of the scales or, if there are none, the searches. With several runs, each line
    begins with the run's model and file.
    """
    shown = [run for run in runs if isinstance(run, ScalingRun)]
    shown = shown or [run for run in runs if isinstance(run, SearchRun)]
    found = []
    for run in shown:
        whose = f"{plain_text(run.model, 200)} ({plain_text(run.path, 200)}): " if len(shown) > 1 else ""
        lost, gained = _lost_and_gained(run)
        found.append((whose + lost, whose + gained))
    return found


def _lost_and_gained(run: ScalingRun | SearchRun) -> tuple[str, str]:
    blocks = ", ".join(map(str, run.skipped_blocks)) or "none"
    if isinstance(run, ScalingRun):
        found, compared = run.best.scaled, {run.compared[k]: v for k, v in run.baselines.items()}
        when = f"after epoch {run.best_epoch}"
        when += f" (the best of {len(run.epochs)} on them)" if len(run.epochs) > 1 else ""
        if kind := run.arguments.get("quantization"):
            when += f", over weights in {plain_text(kind)}"
        gained = [f"attention blocks skipped: {blocks}"]
        for what, (total, saved) in _saved(run).items():
            of = "of" if saved >= 0 else "instead of"
            gained.append(f"{what} left: {total - saved:,} {of} {total:,} ({1 - saved / total:.1%})")
    else:
        found, when = run.iterations[-1].held_out, "after the last pick"
        compared = {"original": run.original_held_out}
        gained = [f"attention blocks skipped: {blocks}"]
        if total := run.kv_cache_blocks:
            left = total - len(run.skipped_blocks)
            gained.append(f"KV cache blocks left: {left} of {total} ({left / total:.1%})")
    if not found:
        return "not measured: no answers were held out (--validation_split)", "; ".join(gained)
    lost = []
    for measure in measures_of(found):
        beside = [f"{name} {other[measure]:.4f}" for name, other in compared.items() if measure in other]
        lost.append(
            f"{_words(measure)} {with_error(found, measure)}" + (f" ({', '.join(beside)})" if beside else "")
        )
    count = f"{found[ANSWERS]:.0f} " if ANSWERS in found else ""
    return f"on {count}held-out answers {when}: {'; '.join(lost)}", "; ".join(gained)


def _saved(run: ScalingRun) -> dict[str, tuple[int, int]]:
    """Return (total, saved) by what the checkpoint lacks; empty if the report does not say.

    The saved parameters are fewer than 0 if scales and maps have more than the skipped blocks had.
    """
    found = run.weights
    if found is None:
        return {}
    return {
        "parameters": (found.parameters, found.parameters_removed - found.parameters_added),
        "KV cache blocks": (found.kv_cache_blocks, found.kv_cache_blocks_removed),
    }


UNITS = (
    "Cross entropy and KL (to the original model's distributions) are in nats per token; agreement is the "
    "share of the answers' tokens that are the model's first choice."
)


def summary(run: Run) -> Table:
    """Return the results of a run, in a few rows."""
    if isinstance(run, SearchRun):
        return Table("search", _search_rows(run))
    if isinstance(run, ScalingRun):
        return Table("scales", _scaling_rows(run))
    assert isinstance(run, CountsRun)
    titles = {"answers": "answers of the model", "data": "processed data"}
    return Table(titles[run.what], [(_words(name), _value(value)) for name, value in run.figures.items()])


def _search_rows(run: SearchRun) -> list[tuple[str, str]]:
    last, refused, bend = run.iterations[-1], run.stopped_before, find_bend(run.losses_by_count())
    rows = [("attention blocks picked", ", ".join(str(pick.block) for pick in run.iterations))]
    if refused is not None:
        rows.append(("stopped before", f"block {refused.block}, loss {refused.loss:.4f}"))
    rows += [
        ("loss of the last pick", f"{last.loss:.4f}"),
        ("bend of the loss", "none" if bend is None else f"at {bend} blocks"),
        ("cost", f"{sum(pick.candidate_epochs for pick in run.iterations):.1f} candidate-epochs"),
    ]
    for measure in measures_of(last.held_out):
        original = run.original_held_out.get(measure)
        beside = "" if original is None else f" (original {original:.4f})"
        rows.append((f"held-out {_words(measure)}", f"{with_error(last.held_out, measure)}{beside}"))
    return rows


def _scaling_rows(run: ScalingRun) -> list[tuple[str, str]]:
    rows = [("attention blocks skipped", ", ".join(map(str, run.skipped_blocks)))]
    settings = {"granularity": "granularity", "loss": "trained on"}
    rows += [(name, str(run.arguments[flag])) for flag, name in settings.items() if flag in run.arguments]
    for measure in run.measures:
        for name, found in (run.baselines | {"scaled": run.best.scaled}).items():
            if measure in found:
                what = run.compared.get(name, name)
                rows.append((f"held-out {_words(measure)}, {what}", with_error(found, measure)))
    for what, (total, saved) in _saved(run).items():
        name, unit = ("KV cache", " blocks") if "KV" in what else (what, "")
        how, of = ("saved", "of") if saved >= 0 else ("added", "to")
        rows.append((f"{name} {how}", f"{abs(saved):,} {of} {total:,}{unit} ({abs(saved) / total:.1%})"))
    return rows + ([("checkpoint", run.checkpoint)] if run.checkpoint else [])


def details(run: Run) -> list[Table]:
    """What the page shows below the summary."""
    if isinstance(run, SearchRun):
        return [picks(run)]
    if isinstance(run, ScalingRun):
        return [epochs(run), *([exports(run)] if run.exports else [])]
    return []


def folded(run: Run) -> list[Table]:
    """What the page shows on request: long tables, arguments, versions."""
    found = [scales(run)] if isinstance(run, ScalingRun) and run.scales is not None else []
    for title, named in (("arguments", run.arguments), ("versions", run.versions)):
        if named:
            found.append(Table(title, [(name, _value(value)) for name, value in named.items()]))
    return found


def picks(run: SearchRun) -> Table:
    """A row for each block that the search picked."""
    rows, before = [], None
    measures = measures_of(run.iterations[0].held_out)
    for pick in run.iterations:
        trained = whole = 0
        if run.criterion == "trained":
            untrained = sum(drop.after_batches == 0 for drop in pick.dropped.values())
            trained = len(pick.candidates) - untrained
            whole = sum(math.isfinite(loss) for loss in pick.losses.values())
        diverged = sum(not math.isfinite(loss) for loss in pick.losses.values())
        rows.append(
            (
                str(pick.count),
                str(pick.block),
                f"{pick.loss:.4f}",
                "" if before is None else f"{pick.loss - before:+.4f}",
                f"{trained} of {len(pick.candidates)}" + (f" ({diverged} diverged)" if diverged else ""),
                f"{whole}",
                f"{pick.candidate_epochs:.2f}",
                *_cells(pick.held_out, measures),
            )
        )
        before = pick.loss
    header = ("skipped", "block", "loss", "change", "candidates trained", "whole epoch")
    return Table("picks", rows, (*header, "cost (candidate-epochs)", *_held_out_header(measures)))


def epochs(run: ScalingRun) -> Table:
    """A row for each epoch, and for the held-out figures of the models that it is compared with."""
    measures = run.measures
    compared = run.compared
    rows = [(compared.get(name, name), "", *_cells(found, measures)) for name, found in run.baselines.items()]
    several = len({epoch.learning_rate for epoch in run.epochs}) > 1
    for epoch in run.epochs:
        name = f"epoch {epoch.epoch}" + (" (best)" if epoch.epoch == run.best_epoch else "")
        if several and epoch.learning_rate is not None:
            name += f", at {epoch.learning_rate:g}"
        rows.append((name, f"{epoch.loss:.4f}", *_cells(epoch.scaled, measures)))
    return Table("epochs", rows, ("", "training loss", *_held_out_header(measures)))


def _cells(figures: Mapping[str, float], measures: Sequence[str]) -> list[str]:
    return [with_error(figures, name) if name in figures else "" for name in measures]


def _held_out_header(measures: Sequence[str]) -> list[str]:
    return [f"held-out {_words(name)}" for name in measures]


def scales(run: ScalingRun) -> Table:
    """A row for each layer with its scales; for vectors, mean ± standard deviation over the channels."""
    assert run.scales is not None

    def cell(layer: int, name: str, found: Spread) -> str:
        if name == "b_attn" and layer in run.untrained_b_attn:
            return "skipped"
        return f"{found.mean[layer]:.4f}" + (f" ± {found.deviation[layer]:.4f}" if found.deviation else "")

    rows = [
        (str(layer), *(cell(layer, name, found) for name, found in run.scales))
        for layer in range(run.scales.num_layers)
    ]
    return Table("scales", rows, ("layer", *Scales.model_fields))


def exports(run: ScalingRun) -> Table:
    """A row for each export: where it is, and what its check found."""
    rows = []
    for name, content in run.exports.items():
        found = content if isinstance(content, Mapping) else {"": content}
        figures = (f"{_words(key)}: {_value(value)}" for key, value in found.items() if key != "folder")
        rows.append((name, str(found.get("folder", "")), "; ".join(figures)))
    return Table("exports", rows, ("format", "folder", "check"))


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
