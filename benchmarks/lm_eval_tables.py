"""A table of lm-eval results: the original model, others, and how far each is from the original.

    python benchmarks/lm_eval_tables.py original=results/llama skipped-4=results/llama_4 results/llama_7
    python benchmarks/lm_eval_tables.py original=results/a skipped=results/b --columns local_choices:acc,none

Each argument is a folder that `lm_eval --output_path` wrote to, with or without a name; the first is the
original. All `results_*.json` below it count, so tasks can be run one by one; of several results of a task
the latest counts. The columns are those of the poster that have results, or what --columns names as
TASK:METRIC,FILTER.

It prints Markdown, in percent: value ± standard error, and in brackets the difference from the original ± its
standard error, as if the samples were independent. All were asked the same questions, so the true error is
smaller.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The columns of the Hopscotch poster (FE: flexible extract, SM: strict match). It does not say which metric
# of arc_challenge and gpqa it means, nor which of gpqa's tasks.
POSTER = {
    "gsm8k:exact_match,flexible-extract": "gsm8k FE",
    "gsm8k:exact_match,strict-match": "gsm8k SM",
    "arc_challenge:acc_norm,none": "arc_challenge",
    "gpqa_main_zeroshot:acc_norm,none": "gpqa",
    "social_iqa:acc,none": "social_iqa",
    "pawsx:acc,none": "pawsx",
}


@dataclass(frozen=True)
class Figure:
    """A metric, from 0 to 1, and its standard error; NaN where lm-eval gives none."""

    value: float
    error: float


def read_results(folder: Path) -> dict[str, Figure]:
    """Figures by "task:metric,filter" of all result files below a folder; the latest of each task.

    SystemExit where there is none.
    """
    contents = []
    for path in folder.rglob("results_*.json"):
        content = json.loads(path.read_text())
        contents.append((content["date"], content["results"]))
    if not contents:
        raise SystemExit(f"{folder}: no results_*.json of lm-eval below it")
    tasks = {}
    for _, results in sorted(contents, key=lambda dated: dated[0]):
        tasks |= results
    figures = {}
    for task, metrics in tasks.items():
        for key, value in metrics.items():
            metric, comma, by = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{by}")
                error = error if isinstance(error, int | float) else math.nan  # "N/A"
                figures[f"{task}:{key}"] = Figure(value, error)
    return figures


def difference(figure: Figure, original: Figure) -> Figure:
    """How far a figure is from the original's, as of independent samples."""
    return Figure(figure.value - original.value, math.hypot(figure.error, original.error))


def cell(figure: Figure | None, original: Figure | None) -> str:
    """In percent, for example "81.05 ± 1.10 (-2.05 ± 1.51)"; without an original no difference."""
    if figure is None:
        return "-"
    text = f"{100 * figure.value:.2f}" + _error(figure)
    if original is not None:
        apart = difference(figure, original)
        text += f" ({100 * apart.value:+.2f}{_error(apart)})"
    return text


def _error(figure: Figure) -> str:
    return "" if math.isnan(figure.error) else f" ± {100 * figure.error:.2f}"


def table(models: Mapping[str, Mapping[str, Figure]], columns: Mapping[str, str]) -> list[str]:
    """Markdown: a row for each model, the first is the original; columns: titles by figure."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    original = next(iter(models.values()))
    lines = [row(["model", *columns.values()]), "|---" * (1 + len(columns)) + "|"]
    for name, figures in models.items():
        reference = {} if figures is original else original
        lines.append(row([name, *(cell(figures.get(key), reference.get(key)) for key in columns)]))
    return lines


def columns_of(models: Mapping[str, Mapping[str, Figure]], wanted: Sequence[str]) -> dict[str, str]:
    """Titles by figure: those wanted, or those of the poster. SystemExit where no model has one of them."""
    present = {key for figures in models.values() for key in figures}
    columns = {key: key for key in wanted} or {key: POSTER[key] for key in POSTER if key in present}
    missing = [key for key in columns if key not in present]
    if missing or not columns:
        what = f"no model has {', '.join(missing)}" if missing else "no column of the poster is there"
        raise SystemExit(f"{what}; --columns takes any of: {', '.join(sorted(present))}")
    return columns


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", metavar="[NAME=]FOLDER", help="the original model's first")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="TASK:METRIC,FILTER", help="default: the poster's"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    models = {}
    for word in arguments.results:
        name, named, folder = word.rpartition("=")
        name = name if named else Path(folder).name
        if name in models:
            raise SystemExit(f"{name}: named twice; give NAME=FOLDER")
        models[name] = read_results(Path(folder))
    print("\n".join(table(models, columns_of(models, arguments.columns))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
