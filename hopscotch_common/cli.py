"""What the command lines share: argument types, exit codes, logging, seeding.

Results go to stdout, logs and progress bars to stderr. Exit codes: 0 done, 2 bad usage or input
(one line says what, where and what to do), 130 Ctrl-C, 1 anything else.
"""

import argparse
import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger("hopscotch")


class HopscotchError(Exception):
    """An error that one line explains; no traceback is shown for it."""

    exit_code = 1


class InputError(HopscotchError, ValueError):
    """Something that the user gave is wrong; the message says what, where, and what to do."""

    exit_code = 2


class TrainingError(HopscotchError):
    """Training cannot go on: a loss that is not finite, or a minibatch that does not fit."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the script's docstring as help and one-line errors."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc.strip().split("\n")[0],
            epilog="\n".join(doc.strip().split("\n")[1:]),
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, False) or action.required:
            return action.help
        return super()._get_help_string(action)


def command(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int]:
    """Decorate a script's `main(argv=None)`: logging, exit codes, no traceback for user errors."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        set_up_logging()
        try:
            return main(argv) or 0
        except HopscotchError as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapper


def is_main_process() -> bool:
    """True in rank 0, and in a process that no launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def set_up_logging() -> None:
    """Log to stderr, from rank 0 only, and keep the libraries' chatter down to warnings."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    from transformers import set_seed

    set_seed(seed)


@contextlib.contextmanager
def progress(total: int, what: str):
    """A bar on stderr with an ETA, from rank 0; `.update_loss(loss)` steps it and shows the loss."""
    from tqdm import tqdm

    class Bar(tqdm):
        def update_loss(self, loss: float) -> None:
            self.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self.update()

    with Bar(total=total, desc=what, unit="batch", disable=not is_main_process(), dynamic_ncols=True) as bar:
        yield bar


def progress_over(items: Sequence, what: str) -> Iterator:
    """The items, with a bar on stderr that shows once two seconds have passed."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, delay=2, disable=not is_main_process(), dynamic_ncols=True))


def positive_int(text: str) -> int:
    """argparse type: a whole number above 0."""
    value = _number(int, text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = _number(float, text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def share(text: str) -> float:
    """argparse type: a number above 0, up to 1."""
    value = _number(float, text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number from 0 up to, not including, 1."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def block_index(text: str) -> int:
    """argparse type: the index of a decoder layer, from 0."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"block indices start at 0, got {text}")
    return value


def _number(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}") from None


def add_training_arguments(
    parser: argparse.ArgumentParser, learning_rate: float, batch_size: int = 32
) -> None:
    """Add the flags that search and scale training share."""
    group = parser.add_argument_group("training of the scales")
    group.add_argument(
        "--learning_rate", type=positive_float, default=learning_rate, help="Adam's learning rate"
    )
    group.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help="answers per optimizer step"
    )
    group.add_argument(
        "--max_tokens_per_batch",
        type=positive_int,
        help="most tokens that run at once, padding included: bounds memory, does not change the result "
        "(default: 16384 on a GPU, 512 on a CPU, or the longest answer if that is more)",
    )
    group.add_argument(
        "--max_samples", type=positive_int, help="use the first so many answers (default: all)"
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, about a third more time",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile each decoder layer; pays on long GPU runs"
    )


def check_writable(path: Path) -> None:
    """Raise InputError unless files can be made in folder `path` (or where it would be made)."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write to {path}: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {path}: no permission in {existing}; name another folder")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) under a temporary name, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
