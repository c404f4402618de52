"""JSON and JSONL, read strictly, and paths, checked before they are used."""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from hopscotch_common.errors import InputError


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, record) of every line that is not blank.

    Raises InputError, with the line, for a missing or empty file and for a line that is not a
    JSON object.
    """
    check_input(path)
    with open(path, "rb") as file:
        yield from lines_of_file(_lines(file, path), path)


def lines_of_file(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict]]:
    """`read_jsonl` of lines that were read before."""
    empty = True
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if not line.strip():
            continue
        empty = False
        yield number, parse_record(line, f"{path}, line {number}")
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


def parse_record(line: bytes, where: str) -> dict:
    """The JSON object of a line; InputError, with `where`, when it is none."""
    record = parse_json(line, where, "mend or remove that line")
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object is needed, not {type(record).__name__}; mend it")
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


def lines_of(records: Sequence[dict]) -> str:
    """Records as the text of a JSONL file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
