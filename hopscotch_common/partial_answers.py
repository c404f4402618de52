"""Answers kept on disk while they come, so that an interrupted step 1 goes on where it was."""

from collections.abc import Sequence
from pathlib import Path

from hopscotch_common.cli import InputError
from hopscotch_common.data import append_line, read_jsonl, truncate_partial_line

OTHER_OUTPUT = "name another --output_file"


class PartialAnswers:
    """A JSONL file: a line with the settings, then an answer a line, flushed as they come.

    An answer is {"index": of the prompt, "messages": prompt and answer, ...}. records holds them
    by index. prompts: the messages of each prompt; places: where each came from, for errors.
    """

    def __init__(self, path: Path, settings: dict, prompts: Sequence[list[dict]], places: Sequence[str]):
        """Read what an earlier run left. InputError when it had other settings or prompts."""
        self.path, self.settings, self.prompts, self.places = path, settings, prompts, places
        self.records: dict[int, dict] = {}
        if truncate_partial_line(path) == 0:
            return
        lines = read_jsonl(path)
        self._check_settings(next(lines)[1])
        for number, record in lines:
            self._take(record, f"{path}, line {number}")

    def _check_settings(self, header: dict) -> None:
        theirs = header.get("settings")
        if not isinstance(theirs, dict):
            raise InputError(f"{self.path}: not answers of an earlier run; move it away or {OTHER_OUTPUT}")
        for name, value in self.settings.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{self.path} holds answers with {name} {theirs.get(name)}, not {value}: "
                    f"remove it to start anew, or {OTHER_OUTPUT}"
                )

    def _take(self, record: dict, where: str) -> None:
        index, messages = record.get("index"), record.get("messages")
        if type(index) is not int or not isinstance(messages, list):
            raise InputError(f"{where}: not an answer of this script; remove {self.path} to start anew")
        if index >= len(self.prompts):
            return  # an earlier run had more prompts
        if messages[:-1] != self.prompts[index]:
            raise InputError(
                f"{where}: answers another prompt than {self.places[index]}: "
                f"remove {self.path} to start anew, or {OTHER_OUTPUT}"
            )
        self.records.setdefault(index, record)

    def missing(self) -> list[int]:
        """Indices of the prompts that have no answer yet."""
        return [index for index in range(len(self.prompts)) if index not in self.records]

    def open(self):
        """The file, open for appending, with the settings in its first line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a", encoding="utf-8")
        if file.tell() == 0:
            append_line(file, {"settings": self.settings})
        return file

    def add(self, file, record: dict) -> None:
        """Append an answer to the open file and flush it to disk."""
        append_line(file, record)
        self.records[record["index"]] = record
