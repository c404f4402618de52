"""Files and folders that are whole or not there, and locks on outputs.

Everything is written under the temporary name `.NAME.tmp` beside its place, flushed to disk, and
renamed. Whoever writes holds a lock, which the kernel takes back from a killed process, so what
lies under a temporary name that nobody holds is a killed writer's, and the next writer removes it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from hopscotch_common.errors import InputError, logger

_held: set[int] = set()  # descriptors of this process's locks


def _let_go(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _forget_locks() -> None:
    """A forked child must not hold its parent's locks beyond its parent's end."""
    for descriptor in tuple(_held):
        _let_go(descriptor)


os.register_at_fork(after_in_child=_forget_locks)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _take(path: Path, wait: bool = False) -> int:
    """Open `path`, made if need be, and lock it; its descriptor.

    wait: until whoever holds it lets go; otherwise an InputError names the holder.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "another run"
            os.close(descriptor)
            target = path.with_name(path.name.removeprefix(".").rpartition(".")[0])
            raise InputError(
                f"{target}: {holder} is writing there; wait for it, or name another output"
            ) from error
        except OSError as error:  # a network file system without locks
            logger.warning("%s: cannot be locked (%s); see that no other run writes there", path, error)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _held.add(descriptor)
                return descriptor
        os.close(descriptor)  # its last holder has just renamed or removed it


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on an output, by the file `.NAME.lock` beside it, which goes with the lock.

    Raises InputError, naming the holder, where another run has it, unless it should `wait`. A killed
    run's lock is free: the kernel took it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _take(lock, wait)
    try:
        os.ftruncate(descriptor, 0)
        script = Path(sys.argv[0]).name or "a Python session"
        os.pwrite(descriptor, f"{script} (process {os.getpid()} on {socket.gethostname()})".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        _let_go(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path of an empty file, which takes the place of `path` when all went well.

    Otherwise it is removed. InputError where another run is writing the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    descriptor = _take(temporary)
    try:
        os.ftruncate(descriptor, 0)
        yield temporary
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        _let_go(descriptor)
    flush_to_disk(path.parent)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """An open file that takes the place of `path` when all went well, and otherwise is removed.

    mode: "w" (UTF-8 text) or "wb". InputError where another run is writing the same file.
    """
    encoding = None if "b" in mode else "utf-8"
    with atomic_path(path) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file under a temporary name, flush it to disk, and rename it into place."""
    with atomic_file(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, atomically. ValueError for a number that is not finite."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when all went well.

    What was there before is replaced only at the very end, and comes back where a killed run had
    moved it away. InputError where another run is writing the same folder.
    """
    with locked(folder), _replacement(folder) as temporary:
        yield temporary


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder by `build` unless it is there. Of several processes one does, and the others wait."""
    with locked(folder, wait=True):
        recover_folder(folder)
        if not folder.exists():
            with _replacement(folder) as temporary:
                build(temporary)


@contextlib.contextmanager
def _replacement(folder: Path) -> Iterator[Path]:
    recover_folder(folder)
    temporary, old = _temporary(folder), _old(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            flush_to_disk(path)
        flush_to_disk(temporary)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(folder)


@contextlib.contextmanager
def scratch_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """An empty folder to work in, `.PURPOSE.tmp`, removed afterwards. The caller holds a lock beside it."""
    folder = parent / f".{purpose}.tmp"
    shutil.rmtree(folder, ignore_errors=True)  # a killed run's
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def recover_folder(folder: Path) -> None:
    """Put back what a killed `atomic_folder` had moved away, or remove it where its successor is there."""
    old = _old(folder)
    if old.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
