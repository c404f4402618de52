"""Files that are whole or not there: JSONL, atomic writing, locks, and logs that resumed runs go on with.

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
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from hopscotch_common.errors import InputError, logger


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, record) of every line that is not blank.

    Raises InputError, with the line, for a missing or empty file and for a line that is not a
    JSON object.
    """
    check_input(path)
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not line.strip():
                continue
            empty = False
            yield number, _parse_record(line, f"{path}, line {number}")
    if empty:
        raise InputError(f"{path}: holds no records; name another file, or make it again")


def _lines(file: IO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name another file") from error


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
    """A JSON value, strictly: no NaN, no key twice, no lone surrogates. InputError says `where`."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        text.encode("utf-8")
        if "\\u" in text:  # an escaped lone surrogate can be read, but never be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); {remedy}"
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no text; {remedy}") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); {remedy}") from error
    return value


def _parse_record(line: bytes, where: str) -> dict:
    record = parse_json(line, where, "mend or remove that line")
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    return record


def _refuse_constant(word: str):
    raise ValueError(f"{word} is not a JSON number")


def _distinct(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def read_json(path: Path, remedy: str = "name another") -> dict:
    """The JSON object that a file holds; InputError when it holds none."""
    check_input(path, remedy)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    value = parse_json(content, str(path), remedy)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is needed, not {type(value).__name__}; {remedy}")
    return value


def check_writable(folder: Path) -> None:
    """Raise InputError unless files can be made in `folder` (or where it would be made)."""
    existing = folder.absolute()
    try:
        while not existing.exists() and not existing.is_symlink():
            existing = existing.parent
        folder.absolute().is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, links in a circle
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {folder}: {reason}; name another folder") from error
    if not existing.is_dir():
        kind = "is a file" if existing.is_file() else "leads nowhere"
        raise InputError(f"cannot write to {folder}: {existing} {kind}; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {folder}: no permission in {existing}; name another folder")


def check_output(path: Path, flag: str, inputs: Iterable[Path] = ()) -> None:
    """Raise InputError unless a file may be written at `path`: a new one, or in place of a plain one.

    flag: what names it, for the message. inputs: files that must not be replaced.
    """
    if not path.name:  # "." and "/"
        raise InputError(f"{flag} {path}: is a folder; name a file")
    check_name(path, flag)
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {path}: is a device or the like, not a plain file; name another file")
    for other in inputs:
        if same_place(path, other):
            raise InputError(f"{flag} {path}: would take the place of an input; name another file")


def check_name(path: Path, flag: str) -> None:
    """Raise InputError unless a file or folder could be made at `path`, and its lock beside it."""
    check_writable(path.parent)
    try:
        os.stat(path.with_name(f".{path.name}.lock"))  # the longest name that is made of it
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} {path}: {reason}; name another") from error


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file, there already or not."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.absolute().parent.resolve() / one.name == other.absolute().parent.resolve() / other.name


# Locks


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


# Whole or not there


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


# Logs that a run goes on with


def check_settings(written: dict, wanted: dict, where: str, remedy: str) -> None:
    """Raise InputError, naming the setting, unless what was made earlier was made as it is wanted now."""
    for name, value in wanted.items():
        if written.get(name) != value:
            raise InputError(
                f"{where}: was made with {name} = {written.get(name)}, now it is {value}; "
                f"repeat that setting, or {remedy}"
            )


class Log:
    """A JSONL file that an interrupted run goes on with.

    Its first line holds the settings that the records depend on; then comes a record a line, each
    flushed to disk before `append` returns. The file is locked until `close`, made with its first
    record, and cut only where a killed writer left half a line.
    """

    def __init__(self, path: Path, settings: dict, kind: str, remedy: str):
        """kind: what it holds, for example "a search journal". remedy: what helps where it does not fit.

        Raises InputError for a file that is none of this kind, is torn elsewhere than at its end, or
        has other settings, and where another run holds it.
        """
        self.path, self.settings, self.kind, self.remedy = path, settings, kind, remedy
        self.records: list[tuple[int, dict]] = []  # line number, record
        self._file: IO | None = None
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(locked(path))
        try:
            self._whole = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Read what is there; the length in bytes of its whole lines."""
        if not self.path.exists():
            return 0
        check_input(self.path, self.remedy)
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        foreign = InputError(f"{self.path}: is not {self.kind}; move it away, or {self.remedy}")
        if not lines:
            if content and not content.startswith(_HEADER[: len(content)]):
                raise foreign
            return 0
        header = _parse_header(lines[0])
        if header is None or header.get("kind") != self.kind:
            raise foreign
        check_settings(header["settings"], self.settings, str(self.path), self.remedy)
        for number, line in enumerate(lines[1:], 2):
            self.records.append((number, _parse_record(line, f"{self.path}, line {number}")))
        return whole

    def append(self, record: dict) -> None:
        """Add a record, and flush it to disk."""
        if self._file is None:
            self._file = self._resources.enter_context(open(self.path, "ab"))
            self._file.truncate(self._whole)  # what a killed writer left of a line
            if self._whole == 0:
                self._write({"settings": self.settings, "kind": self.kind})
        self._write(record)

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


_HEADER = b'{"settings": {'


def _parse_header(line: bytes) -> dict | None:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) and isinstance(header.get("settings"), dict) else None


def lines_of(records: Sequence[dict]) -> str:
    """Records as the text of a JSONL file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
