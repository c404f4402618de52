"""Answers kept on disk while they come, so that an interrupted step 1 goes on where it was."""

from collections.abc import Sequence
from pathlib import Path

from hopscotch_common.answers.prompts import Prompt
from hopscotch_common.errors import InputError
from hopscotch_common.log import Log

REMEDY = "remove it to start anew, or name another --output_file"


class PartialAnswers:
    """A log of answers: {"index": of the prompt, "messages": prompt and answer, ...} each.

    records holds them by index. Locked until `close`.
    """

    def __init__(self, path: Path, settings: dict, prompts: Sequence[Prompt]):
        """Read what an earlier run left. InputError when it had other settings or prompts."""
        self.prompts = prompts
        self.records: dict[int, dict] = {}
        self._log = Log(path, settings, "the answers of an earlier run", REMEDY)
        try:
            for number, record in self._log.records:
                self._take(record, f"{path}, line {number}")
        except BaseException:
            self._log.close()
            raise

    def _take(self, record: dict, where: str) -> None:
        index, messages = record.get("index"), record.get("messages")
        sound = (
            type(index) is int
            and index >= 0
            and isinstance(messages, list)
            and messages
            and isinstance(messages[-1], dict)
            and isinstance(messages[-1].get("content"), str)
            and record.get("finish_reason") in ("stop", "length")
            and type(record.get("num_generated_tokens")) is int
        )
        if not sound:
            raise InputError(f"{where}: not an answer of this script; {REMEDY}")
        if index >= len(self.prompts):
            return  # an earlier run had more prompts
        if messages[:-1] != self.prompts[index].messages:
            raise InputError(f"{where}: answers another prompt than {self.prompts[index].where}; {REMEDY}")
        self.records.setdefault(index, record)

    def missing(self) -> list[int]:
        """Indices of the prompts that have no answer yet."""
        return [index for index in range(len(self.prompts)) if index not in self.records]

    def add(self, record: dict) -> None:
        """Keep an answer, flushed to disk."""
        self._log.append(record)
        self.records[record["index"]] = record

    def close(self) -> None:
        self._log.close()
