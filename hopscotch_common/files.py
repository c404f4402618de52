"""Strict reading of JSON, checks of paths, and files and folders that are written whole or not at all.

Everything is written under the temporary name `.NAME.tmp` beside its destination, flushed to disk, and
renamed. The writer holds a lock, which the kernel releases if the process is killed. A temporary file
whose lock nobody holds is thus a killed writer's, and the next writer removes it.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hopscotch_common.errors import InputError, command_name, logger, reason_of

BOM = b"\xef\xbb\xbf"  # a byte order mark


@contextlib.contextmanager
def open_input(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """Open a file of bytes, unpacked if it is a .gz or .zst; raise InputError if it cannot be read."""
    check_input(path)
    try:
        with _unpacked(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); name another file") from error


def _unpacked(path: Path) -> gzip.GzipFile | io.BufferedReader:
    if path.suffix.lower() == ".zst":
        import pyarrow  # datasets needs it anyway

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield `lines_of_file` of a file (also .gz or .zst); raise InputError also if it cannot be read."""
    with open_input(path) as file:
        yield from lines_of_file(file, path)


def lines_of_file(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, record) for every line of an open file that is not blank.

    Raises InputError if there is none, and for a line that is not a JSON object.
    """
    empty = True
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        empty = False
        yield number, parse_record(line, f"{path}, line {number}")
    if empty:
        raise InputError(f"{path}: holds no records; name another file, or make it again")


def check_input(path: Path, remedy: str = "name another") -> None:
    """Raise InputError unless `path` is a file that can be read."""
    try:
        kind = path.stat().st_mode
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: {reason}; {remedy}") from error
    if stat.S_ISDIR(kind):
        raise InputError(f"{path}: is a folder, not a file; {remedy}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it; {remedy}")


def parse_json(text: bytes | str, where: str, remedy: str):
    """Parse JSON strictly: no NaN, duplicate keys or lone surrogates. An InputError says `where`."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        text.encode("utf-8")
        if "\\u" in text:  # an escaped lone surrogate can be read, but never be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, or {remedy}"
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no text; {remedy}") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); {remedy}") from error
    return value


def parse_record(line: bytes, where: str) -> dict:
    """Return the JSON object on a line; raise InputError, with `where`, if it is none."""
    return as_object(parse_json(line, where, "fix or remove that line"), where)


def as_object(value, where: str, remedy: str = "fix it") -> dict:
    """Return a JSON value that must be an object; raise InputError, with `where`, if it is none."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed, not {type(value).__name__}; {remedy}")
    return value


def _refuse_constant(word: str):
    raise ValueError(f"{word} is not a JSON number")


def _distinct(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def read_json(path: Path, remedy: str = "name another") -> dict:
    """Return the JSON object in a file; raise InputError if it holds none."""
    check_input(path, remedy)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    return as_object(parse_json(content, str(path), remedy), str(path), remedy)


def check_writable(folder: Path, remedy: str = "name another folder") -> None:
    """Raise InputError unless files can be made in `folder` (or where it would be made)."""
    existing = folder.absolute()
    try:
        while not existing.exists() and not existing.is_symlink():
            existing = existing.parent
        folder.absolute().is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, circular links
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {folder}: {reason}; {remedy}") from error
    if not existing.is_dir():
        kind = "is a file" if existing.is_file() else "leads nowhere"
        raise InputError(f"cannot write to {folder}: {existing} {kind}; {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {folder}: no permission in {existing}; {remedy}")


def check_output(path: Path, flag: str, inputs: Iterable[Path] = ()) -> None:
    """Raise InputError unless a file may be written at `path`: a new one, or in place of a plain one.

    flag: what names it, for the message. inputs: files that must not be replaced.
    """
    if not path.name or os.path.isdir(path):  # "." and "/" have no name
        raise InputError(f"{flag} {path}: is a folder; name a file")
    check_name(path, flag)
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {path}: is a device or the like, not a plain file; name another file")
    for other in inputs:
        if same_place(path, other):
            raise InputError(f"{flag} {path}: would take the place of an input; name another file")


def check_name(path: Path, flag: str, remedy: str = "name another folder") -> None:
    """Raise InputError unless a file or folder could be made at `path`, and its lock beside it.

    remedy: what to do where its folder cannot be written to.
    """
    check_writable(path.parent, remedy)
    try:
        lock = path.with_name(f".{path.name}.lock")  # the longest name that is made from it
        os.stat(lock)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} {path}: {reason}; name another") from error
    else:
        if not os.access(lock, os.W_OK):  # another user's, whose run was killed or goes on
            raise InputError(
                f"{flag} {path}: {_holder(lock) or 'another user'} holds or left {lock}; wait for that "
                "run, remove the file if it has ended, or name another output"
            )


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file, there already or not."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.absolute().parent.resolve() / one.name == other.absolute().parent.resolve() / other.name


# Writing


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on an output through the file `.NAME.lock` beside it, which is removed with the lock.

    Raises InputError, naming the holder, if another run has the lock, unless it should `wait`. A killed run's
    lock is free, as the kernel releases it. The holder may take the lock again.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, is_singleton=True, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire(timeout=-1 if wait else 0.1)  # not 0: its last holder may be removing the file just now
    except Timeout as error:
        raise InputError(
            f"{path}: {_holder(file) or 'another run'} is writing there; wait for it, or name another output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise
        logger.warning("%s: cannot be locked (%s); see that no other run writes there", path, error)
    try:
        yield
    finally:
        if lock.lock_counter <= 1:
            with contextlib.suppress(OSError):
                file.unlink()
        lock.release()


def _holder(lock: Path) -> str:
    """What `_sign` wrote into a lock's file."""
    with contextlib.suppress(OSError):
        return lock.read_text(errors="replace")
    return ""


def _sign(descriptor: int) -> None:
    """Write into a lock's file who holds it, if there is space."""
    script = command_name() or "a Python session"
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{script} (process {os.getpid()} on {socket.gethostname()})".encode(), 0)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to, which replaces `path` if all goes well.

    Otherwise it is removed. Raises InputError if another run is writing the same file.
    """
    with locked(path):
        temporary = _temporary(path)
        temporary.unlink(missing_ok=True)  # a killed writer's, or a link that somebody put there
        try:
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_to_disk(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file under a temporary name, flush it to disk, and rename it into place."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSONL atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically; raise ValueError for a number that is not finite."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which replaces `folder` if all goes well.

    The previous folder is replaced only at the very end, and is put back if a killed run had moved it away.
    Raises InputError if another run is writing the same folder.
    """
    with locked(folder):
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def recover_folder(folder: Path) -> None:
    """Put back what a killed `atomic_folder` had moved away, or remove it if its successor is there."""
    old = _old(folder)
    if os.path.lexists(old):
        if folder.exists():
            old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)
            if old.exists():  # another user's, or in use on NFS
                aside = tempfile.mkdtemp(prefix=f"{old.name}.", dir=old.parent)
                os.rename(old, aside)  # in the empty folder's place
                logger.warning("%s: is what %s was before, and cannot be removed", aside, folder)
        else:
            os.rename(old, folder)


def flush_to_disk(path: Path) -> None:
    """fsync a file or, where its file system can do that, a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # shares (CIFS, VirtualBox, virtiofs) refuse it for folders, and flush these in ways of their own
        refused = error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
        if not (refused and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> int:
    """Hard link a file, or copy it if the file system does not support links; return the bytes copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return target.stat().st_size
    return 0
