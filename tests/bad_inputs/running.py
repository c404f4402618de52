"""Run a command line in this process, and tell what it said and what it touched."""

import contextlib
import hashlib
import importlib
import io
import logging
import re
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# What the tables call a command line -> the module whose `main(argv)` it is.
MODULES = {
    "generate_model_gt_data": "generate_model_gt_data",
    "process_gt_data": "process_gt_data",
    "block_selection": "block_selection",
    "param_scale": "param_scale",
    "unscaled_ckpt": "unscaled_ckpt",
    "export": "hopscotch_common.export.__main__",
    "report": "hopscotch_common.report.__main__",
    "checkpoints": "hopscotch_common.checkpoints.__main__",
}
PROGRESS_BAR = re.compile(r"\[\d\d:\d\d.*\]\s*$")
LONGEST_LINE = 1000  # characters: a message longer than that quotes what nobody will read
TIME_LIMIT = 60  # seconds


@dataclass(frozen=True)
class Outcome:
    """How a command line ended. code: its exit code; None where an exception came out instead."""

    code: int | None
    out: str
    err: str
    error: str = ""

    def lines(self) -> list[str]:
        """What it said on stderr, progress bars aside."""
        return [line for line in self.err.splitlines() if line.strip() and not PROGRESS_BAR.search(line)]


def script(name: str):
    """The module of a command line."""
    return importlib.import_module(MODULES[name])


def run(name: str, argv: Sequence[str], capsys, stdin: str = "y\n" * 9) -> Outcome:
    """`main(argv)` of a command line, with someone at the keyboard who says yes to everything."""
    capsys.readouterr()
    code, error = None, ""
    with _libraries_log_to_stderr(), _typing(stdin), _time_limit():
        try:
            code = script(name).main(list(argv))
        except SystemExit as exit_from_argparse:
            code = exit_from_argparse.code
        except Exception as exception:  # what would be a traceback
            error = f"{type(exception).__name__}: {str(exception)[:300]}"
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err, error)


def check_refused(outcome: Outcome, message: str) -> None:
    """Exit code 2, nothing on stdout, and one short printable line on stderr like `message`."""
    assert not outcome.error, f"a traceback: {outcome.error}"
    lines = outcome.lines()
    assert outcome.code == 2, (outcome.code, lines[-3:])
    assert outcome.out == "", outcome.out[:300]
    assert len(lines) == 1, lines[:5]
    assert len(lines[0]) <= LONGEST_LINE, f"{len(lines[0])} characters: {lines[0][:300]}"
    assert lines[0].isprintable(), ascii(lines[0])
    assert re.search(message, lines[0]), lines[0]


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything under a folder: kind, size, time of change and hash by path. Links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, status = str(path.relative_to(folder)), path.lstat()
        if stat.S_ISDIR(status.st_mode):
            found[name] = ("folder",)
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = ("file", status.st_size, status.st_mtime_ns, status.st_ino, content)
        else:
            found[name] = (stat.S_IFMT(status.st_mode), status.st_mtime_ns, status.st_ino)
    return found


def check_untouched(before: dict[str, tuple], after: dict[str, tuple]) -> None:
    """Nothing was made, changed or removed between two snapshots; a new folder, if empty, does no harm."""
    made = sorted(name for name in after.keys() - before.keys() if after[name] != ("folder",))
    gone = sorted(before.keys() - after.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    assert not (made or gone or changed), f"made {made}, removed {gone}, changed {changed}"


@contextlib.contextmanager
def _libraries_log_to_stderr() -> Iterator[None]:
    """Libraries keep the stderr of the moment at which they were imported; a user sees it, so must we."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if hasattr(logger, "handlers")]
    handlers = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    earlier = [handler.stream for handler in handlers]
    try:
        for handler in handlers:  # not by setStream, which flushes what an earlier test may have closed
            handler.stream = sys.stderr
        yield
    finally:
        for handler, stream in zip(handlers, earlier, strict=True):
            handler.stream = stream


@contextlib.contextmanager
def _typing(text: str) -> Iterator[None]:
    earlier, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = earlier


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def too_long(*_):
        raise TimeoutError(f"ran for more than {TIME_LIMIT} s")

    earlier = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
