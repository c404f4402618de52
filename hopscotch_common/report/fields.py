"""Typed access to what a JSON file holds; every error is a ValueError that names the key.

where: what comes before the key in an error, for example "iterations[2].".
"""

import math
import re
from collections.abc import Mapping, Sequence

LARGEST = 10**15  # of any count


def get(content: object, key: str, kind: type, where: str = "", default: object = None):
    """content[key], checked to be of a kind; ValueError names it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where.rstrip('.') or 'it'} is no JSON object")
    if key not in content and default is not None:
        return default
    if key not in content:
        raise ValueError(f"{where}{key} is missing")
    value = content[key]
    text_as_list = kind is Sequence and isinstance(value, str)
    truth_as_number = kind is int and isinstance(value, bool)
    if not isinstance(value, kind) or text_as_list or truth_as_number:
        raise ValueError(f"{where}{key} has the wrong type, {type(value).__name__}")
    if kind is int and not 0 <= value < LARGEST:
        raise ValueError(f"{where}{key} is out of range")
    return value


def number(content: object, key: str, where: str) -> float:
    """content[key], a finite number."""
    value = loss(get(content, key, object, where), where + key)
    if not math.isfinite(value):
        raise ValueError(f"{where}{key} is {value}")
    return value


def loss(value: object, what: str) -> float:
    """A loss; null is one that is not finite."""
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{what} is out of range") from error


def measures_of(value: object, what: str) -> dict[str, float]:
    """Held-out figures by measure; a plain number is a loss."""
    named = value if isinstance(value, Mapping) else {"loss": value}
    return {str(name): number(named, name, f"{what}.") for name in named}


def by_block(content: object, key: str, where: str, num_layers: int) -> dict[int, object]:
    """A JSON object whose keys are block indices."""
    values = get(content, key, Mapping, where)
    keys = checked_blocks(list(values), where + key, num_layers)
    return dict(zip(keys, values.values(), strict=True))


def losses(content: object, key: str, where: str, num_layers: int) -> dict[int, float]:
    """A JSON object of losses by block, in the blocks' order."""
    found = by_block(content, key, where, num_layers)
    return {block: loss(value, f"{where}{key}[{block}]") for block, value in sorted(found.items())}


def blocks(content: object, key: str, where: str, num_layers: float = math.inf) -> tuple[int, ...]:
    """A list of block indices below num_layers."""
    return checked_blocks(get(content, key, Sequence, where), where + key, num_layers)


def checked_blocks(values: Sequence, what: str, num_layers: float) -> tuple[int, ...]:
    """Block indices, as numbers or as the texts that JSON makes of keys."""
    found = []
    for value in values:
        if not re.fullmatch(r"[0-9]{1,9}", str(value)) or int(value) >= num_layers:
            raise ValueError(f"{what}: {value!r} is no block of this model")
        found.append(int(value))
    return tuple(found)
