"""Errors that one line explains, and the logger. A script's exit code comes from the error."""

import logging
import os
import re
import sys
from pathlib import Path

logger = logging.getLogger("hopscotch")


class HopscotchError(Exception):
    """An error that one line explains; no traceback is shown for it."""

    exit_code = 1


class InputError(HopscotchError, ValueError):
    """Something that the user gave is wrong; the message says what, where, and what to do."""

    exit_code = 2


def command_name() -> str:
    """What runs, as one types it: "param_scale.py", or "python -m hopscotch_common.report"."""
    name, spec = Path(sys.argv[0]).name, getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.parent}" if name == "__main__.py" and spec is not None else name


def printable(text: str, most: int | None = None) -> str:
    """Text on one line, with whatever a terminal could obey escaped; of one above `most`, its ends."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if most is None or len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"


def reason_of(error: Exception) -> str:
    """An error of a library's on one line, and not too long a one."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # whose text is the key alone
        text = f"KeyError: {text}"
    return text if len(text) <= 300 else f"{text[:300]}…"


def as_os_error(error: Exception, path: os.PathLike) -> OSError | None:
    """The OSError (of a full disk, say) that a library in Rust tells as text; None where it is none."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is torch's way to say so, which differs by device and by what wanted the memory."""
    ways = ("can't allocate memory", "CUDA error: out of memory", "CUDA driver error: out of memory")
    ways += ("[CUDA]: out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")  # Triton, cuBLAS
    return type(error).__name__ == "OutOfMemoryError" or any(way in str(error) for way in ways)


class TrainingError(HopscotchError):
    """Training cannot go on, for example because a single answer does not fit into memory."""


class Diverged(TrainingError):
    """A loss or a scale is no longer finite."""
