"""Errors that one line explains, the logger, and the bar of what may take long.

The error determines a script's exit code.
"""

import functools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger("hopscotch")
warn_once = functools.cache(logger.warning)  # the same words and values only once
BAR_AFTER = 3  # seconds

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield items, with a bar on stderr in the first process if they take more than some seconds."""
    first = os.environ.get("RANK", "0") == "0"  # of those that a launcher started
    return iter(tqdm(items, what, total, delay=BAR_AFTER, disable=not first, dynamic_ncols=True))


class HopscotchError(Exception):
    """An error that one line explains; no traceback is shown for it."""

    exit_code = 1


class InputError(HopscotchError, ValueError):
    """Something that the user gave is wrong; the message says what, where, and what to do."""

    exit_code = 2


def command_name() -> str:
    """The name of the running command, as typed: "param_scale.py", or "python -m hopscotch_common.report"."""
    name, spec = Path(sys.argv[0]).name, getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.parent}" if name == "__main__.py" and spec is not None else name


def printable(text: str, most: int | None = None) -> str:
    """Text on one line, with anything that could control a terminal escaped, cut in the middle to `most`."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if most is None or len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"


def reason_of(error: Exception) -> str:
    """A library's error on one line, shortened if it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # its text is only the key
        text = f"KeyError: {text}"
    return text if len(text) <= 300 else f"{text[:300]}…"


def as_os_error(error: Exception, path: os.PathLike) -> OSError | None:
    """The OSError (of a full disk, say) that a Rust library reports as text; None if it reports none."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is torch's for lack of memory, worded by device and by what needed the memory."""
    ways = ("can't allocate memory", "CUDA error: out of memory", "CUDA driver error: out of memory")
    ways += ("[CUDA]: out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")  # Triton, cuBLAS
    return type(error).__name__ == "OutOfMemoryError" or any(way in str(error) for way in ways)


class TrainingError(HopscotchError):
    """Training cannot go on, for example because a single answer does not fit into memory."""


class Diverged(TrainingError):
    """A loss or a scale is no longer finite."""
