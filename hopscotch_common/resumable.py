"""Logs from which an interrupted run resumes, headed by the settings that their records depend on."""

import contextlib
import json
import os
from pathlib import Path
from typing import IO

from hopscotch_common.errors import InputError
from hopscotch_common.files import check_input, locked, parse_record

# Descriptions of settings that nobody typed: fingerprints.
IN_WORDS = dict.fromkeys(
    ("data", "held_out_data"), "other answers (--data_path, --max_samples, --validation_split, --seed)"
) | {
    "tensors": "other weights or another config of --model",
    "chat_template": "another chat template of --model",
    "tokenizer": "another tokenizer of --model",
}
_HEADER = b'{"settings": {'


def check_settings(written: dict, wanted: dict, where: str, remedy: str) -> None:
    """Raise InputError, naming the setting, unless earlier work was made with the wanted settings."""
    for name, value in wanted.items():
        if written.get(name) == value:
            continue
        if name not in written:
            raise InputError(f"{where}: an earlier version made it, which did not record {name}; {remedy}")
        change = IN_WORDS.get(name) or f"{name} = {written.get(name)}, now it is {value}"
        raise InputError(f"{where}: was made with {change}; repeat that setting, or {remedy}")


class ResumableLog(contextlib.ExitStack):
    """A JSONL file from which an interrupted run resumes.

    Its first line holds the settings that the records depend on. Each further line is a record, flushed to
    disk before `append` returns. The file is locked until `close` (or the end of a `with`), created with its
    first record, and cut only if a killed writer left half a line.
    """

    def __init__(self, path: Path, settings: dict, kind: str, remedy: str):
        """Lock the file and read it.

        kind: what it holds, for example "a search journal". remedy: what to do if it does not fit.
        Raises InputError for a file that is not of this kind, is torn anywhere but at its end, or has other
        settings, and if another run holds it.
        """
        super().__init__()
        self.path, self.settings, self.kind, self.remedy = path, settings, kind, remedy
        self.records: list[tuple[int, dict]] = []  # line number, record
        self._file: IO | None = None
        self.enter_context(locked(path))
        try:
            self._whole = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Read what is there; return the length in bytes of its whole lines."""
        if not self.path.exists():
            return 0
        if not os.access(self.path, os.W_OK):
            raise InputError(f"{self.path}: no permission to write to it; make it writable, or name another")
        check_input(self.path, self.remedy)
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        foreign = InputError(f"{self.path}: is not {self.kind}; move it away, or {self.remedy}")
        if not lines:
            if content and not content.startswith(_HEADER[: len(content)]):
                raise foreign
            return 0
        try:
            header = parse_record(lines[0], str(self.path))
        except InputError:
            raise foreign from None
        if header.get("kind") != self.kind or not isinstance(header.get("settings"), dict):
            raise foreign
        check_settings(header["settings"], self.settings, str(self.path), self.remedy)
        for number, line in enumerate(lines[1:], 2):
            self.records.append((number, parse_record(line, f"{self.path}, line {number}")))
        return whole

    def append(self, record: dict) -> None:
        """Add a record and flush it to disk."""
        if self._file is None:
            self._file = self.enter_context(open(self.path, "ab"))
            self._file.truncate(self._whole)  # drops what a killed writer left of a line
            if self._whole == 0:
                self._write({"settings": self.settings, "kind": self.kind})
        self._write(record)

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
