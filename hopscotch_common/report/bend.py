"""The bend of the curve of loss over skipped blocks: where each further block begins to cost more.

The paper names it the critical break point and reads it off a plot (7 blocks for Llama-3.1-8B, 4
for Qwen2.5-7B). Here it is computed, from the losses alone.
"""

from collections.abc import Mapping

import numpy as np

MIN_POINTS = 4
MIN_STEEPENING = 2.0
MAX_ERROR_SHARE = 0.4

RULE = (
    "The bend is found by fitting, by least squares, two straight lines that meet at one of the numbers of "
    "skipped blocks; it is the number at which they fit best. It is named only where the second line rises "
    "at least twice as fast as the first, and the two leave at most 40 % of the squared error of one line."
)


def find_bend(losses: Mapping[int, float]) -> int | None:
    """The number of skipped blocks at which the loss bends upward; None where it does not.

    losses: finite losses by number of skipped blocks, which need not be adjacent. RULE says how the
    bend is found. Fewer than MIN_POINTS numbers have none. Every point takes part in the fit, so one
    noisy loss, first or last, does not make a bend. A curve that keeps steepening has one that moves
    on as picks are added: it is a bend of the curve so far.
    """
    counts = sorted(losses)
    if len(counts) < MIN_POINTS:
        return None
    x = np.array(counts, dtype=float)
    y = np.array([losses[count] for count in counts], dtype=float)
    one_line = _squared_error(np.stack([np.ones_like(x), x], axis=1), y)[0]
    fits = []
    for count in counts[1:-1]:
        terms = np.stack([np.ones_like(x), x, np.maximum(x - count, 0)], axis=1)
        error, (_, slope, change) = _squared_error(terms, y)
        fits.append((error, count, slope, slope + change))
    error, bend, before, after = min(fits)
    steepens = after > 0 and after >= MIN_STEEPENING * before
    return bend if steepens and error <= MAX_ERROR_SHARE * one_line else None


def _squared_error(terms: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """(squared error, coefficients [terms]) of the least-squares fit; terms is [points, terms]."""
    coefficients = np.linalg.lstsq(terms, y, rcond=None)[0]
    return float(np.sum((terms @ coefficients - y) ** 2)), coefficients
