"""Records in their various forms: files of several kinds, and a function that turns records into messages."""

import csv
import glob
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hopscotch_common.errors import InputError, logger, reason_of
from hopscotch_common.files import BOM, as_object, check_input, lines_of_file, open_input, parse_json

TABLES = (".parquet", ".csv")
ROLES = ("system", "developer", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
MESSAGE_KEYS = ("role", "content", "reasoning_content", "name")
UNDERSTOOD = (
    "'messages', 'conversations' (from, value), 'prompt' (text or messages; the answer in 'completion'), "
    "'question' ('answer') or 'instruction' with 'input' ('output'), both with 'context'"
)
# Fields besides the messages that would change what is read or trained on.
REFUSED = {
    "unmask": "what is counted for the loss is always the answers",
    "tools": "no tools are given to the chat template",
    "chat_template_kwargs": "the chat template is used with its defaults",
    "history": "earlier turns are read from a list of messages only",
    "choices": "what may be chosen must stand in the question",
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios", "documents"), "only text is read"
    ),
}
OURS = ("prompt_token_ids", "answer_token_ids", "finish_reason", "num_generated_tokens", "index", *REFUSED)


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) of each record in a file: JSONL or a JSON array (also .gz, .zst), .parquet, .csv.

    where: the file, and the line or the record's number from 1. An InputError names it.
    """
    if path.suffix.lower() in TABLES:
        check_input(path)
        yield from _rows(_table(path), str(path))
        return
    with open_input(path) as file:
        head = file.peek(1024).removeprefix(BOM).lstrip()
        if head[:1] == b"[":
            content = file.read().removeprefix(BOM)
            yield from _rows(parse_json(content, str(path), "fix it, or name another file"), str(path))
        elif head.partition(b"\n")[0].strip() == b"{":
            raise InputError(
                f"{path}: one JSON object over several lines; must be an array of records, or JSONL"
            )
        elif head[:1] not in b"{" and ".json" not in path.name.lower():
            raise InputError(
                f"{path}: neither JSONL nor a JSON array; give either (.gz and .zst, too), .parquet or .csv"
            )
        else:
            for number, record in lines_of_file(file, path):
                yield f"{path}, line {number}", _without_none(record)


def _table(path: Path) -> list[dict]:
    try:
        if path.suffix.lower() == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                return _cells(csv.DictReader(file, strict=True), path)
        from datasets import load_dataset

        with tempfile.TemporaryDirectory() as cache:  # nothing stale is read, and nothing is left behind
            name = glob.escape(str(path))  # load_dataset takes patterns
            return load_dataset("parquet", data_files=name, split="train", cache_dir=cache).to_list()
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except Exception as error:  # the readers of so many formats may raise anything
        raise InputError(f"{path}: cannot be read ({reason_of(_cause(error))}); name another file") from error


def _cause(error: Exception) -> Exception:
    """The error itself, or the cause of the one that datasets raises for anything wrong in a file."""
    return (type(error).__name__ == "DatasetGenerationError" and error.__cause__) or error


def _cells(rows: csv.DictReader, path: Path) -> list[dict]:
    """Return rows of text, empty cells as None; raise InputError for cells without a column of their own."""
    csv.field_size_limit(2**31 - 1)
    columns = rows.fieldnames or []
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: two columns have one name; fix it, or name another file")
    found = []
    for number, row in enumerate(rows, 1):
        if any(row.pop(None, ())):
            raise InputError(f"{path}, record {number}: has more cells than columns; quote what has commas")
        found.append({name: cell or None for name, cell in row.items()})
    return found


def _rows(rows: Sequence[dict], where: str) -> Iterator[tuple[str, dict]]:
    """Yield the records of a table or an array, without fields that are None."""
    if not len(rows):
        raise InputError(f"{where}: holds no records; name another, or make it again")
    for number, row in enumerate(rows, 1):
        place = f"{where}, record {number}"
        yield place, _without_none(as_object(row, place))


def _without_none(value, depth: int = 4):
    """Remove None values from a record, down to the parts of a message's content."""
    if depth and isinstance(value, dict):
        return {key: _without_none(part, depth - 1) for key, part in value.items() if part is not None}
    return [_without_none(part, depth - 1) for part in value] if depth and isinstance(value, list) else value


def hub_records(name: str, config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) of a data set on the hub or in a folder; raise InputError if it cannot be read.

    For a folder of `save_to_disk`, config has no effect, nor does split if only one was saved.
    """
    from datasets import load_dataset, load_from_disk
    from huggingface_hub.utils.logging import set_verbosity_error

    if Path(name).exists() and glob.escape(place := str(Path(name).resolve())) != place:
        raise InputError(
            f"--dataset {name}: datasets reads {place} as a pattern; rename it without any of [?*"
        )
    set_verbosity_error()  # without a network, the client would warn of each retry
    try:
        if any(Path(name, saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            rows = load_from_disk(name)
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            rows = load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client and the readers of so many formats may raise anything
        of = "" if Path(name).exists() else " from the Hugging Face hub"
        raise InputError(
            f"{name} cannot be read{of} ({type(error).__name__}: {reason_of(_cause(error))}): give prompts "
            "with --input_file, or check --dataset, --dataset_config and --split"
        ) from error
    yield from _rows(rows, name)


def messages_of(record: dict, where: str, field: str | None = None, answers: bool = True) -> list[dict]:
    """Return the conversation in a record, with its answer if it has one.

    A message has a role of ROLES and text as its content, and may have `reasoning_content`.
    field: the one that holds text or messages, if it has another name. answers: False leaves out the
    assistant's messages, whatever they hold, unless they call tools. An InputError says what was found.
    """
    for key, why in REFUSED.items():
        if key != field and record.get(key):
            raise InputError(f"{where}: has {key!r}, which is not supported ({why}); leave it out")
    found, used = _conversation(record, where, field, answers)
    for name in ("system_prompt", "system"):
        if record.get(name):
            found, used = [{"role": "system", "content": record[name]}, *found], {*used, name}
    _name_unused(set(record) - used - set(OURS))
    if not found:
        raise InputError(f"{where}: its list of messages is empty; leave it out")
    messages = [_message(message, where, answers) for message in found]
    return [message for message in messages if message is not None]


def _conversation(record: dict, where: str, field: str | None, answers: bool) -> tuple[list, set[str]]:
    """Return (unchecked messages, the fields that they come from)."""
    if field is not None:
        if field not in record:
            raise InputError(f"{where}: has no {field!r}, only {_named(record)}; name another --prompt_field")
        return _as_messages(record[field], field, where), {field}
    for name in ("messages", "conversations"):
        if name in record:
            if not isinstance(record[name], list):
                raise InputError(f"{where}: {name!r} must be a list of messages")
            return record[name], {name}
    for prompt, answer, *about in (
        ("prompt", "completion"),
        ("question", "answer", "context"),
        ("instruction", "output", "input", "context"),
    ):
        alone = prompt == "instruction" and {"input", "output"} <= record.keys()
        if prompt not in record and not alone:
            continue
        asked, used = record.get(prompt), {prompt, answer, *about}
        for name in about:
            asked = _with_input(asked, record.get(name), (prompt, name), where)
        messages = _as_messages(asked, prompt, where)
        completion = record.get(answer)
        if isinstance(completion, list) and all(isinstance(part, dict) for part in completion):
            messages += completion
        elif isinstance(completion, str):
            messages.append({"role": "assistant", "content": completion})
        elif answers and completion is not None:
            raise InputError(f"{where}: {answer!r} must be text, or a list of messages; fix it")
        return messages, used
    if record.keys() == {"settings", "kind"}:
        raise InputError(
            f"{where}: a log of a run that goes on; finish step 1, and give its {{model}}_math_final.jsonl"
        )
    remedy = "rename the field" if answers else "name the field by --prompt_field"
    raise InputError(f"{where}: has {_named(record)}, and needs {UNDERSTOOD}; {remedy}")


def _with_input(instruction, about, names: tuple[str, str], where: str):
    """Join an instruction and its 'input', or a question and its 'context'; each of them may be missing."""
    if about is None or isinstance(about, str) and not about.strip():
        return instruction
    if not isinstance(about, str) or not isinstance(instruction, str | None):
        raise InputError(f"{where}: {names[0]!r} and {names[1]!r} must both be text; fix it")
    return f"{instruction}\n\n{about}" if instruction and instruction.strip() else about


def _named(record: dict) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "nothing"


def _as_messages(value, name: str, where: str) -> list:
    if isinstance(value, list):
        return list(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name!r} must be text, or a list of messages, and not empty")
    if re.match(r"""\s*\[\s*\{\s*['"](role|from|content)['"]""", value):
        raise InputError(f"{where}: {name!r} holds messages written as text; give JSONL or Parquet")
    return [{"role": "user", "content": value}]


def _message(message, where: str, answers: bool) -> dict | None:
    """Check a message; return None for an answer if answers are left out."""
    if isinstance(message, dict) and "from" in message and ("value" in message or "role" not in message):
        role, content = SHAREGPT_ROLES.get(str(message["from"]), message["from"]), message.get("value")
        message = {k: v for k, v in message.items() if k not in ("from", "value")}
        message = {"role": role, "content": content} | message
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise InputError(f"{where}: each message needs a 'role' and a 'content'")
    left_out = () if answers else ("weight",)  # 'weight' says what is trained on
    message = {k: v for k, v in message.items() if v not in (None, []) and k not in left_out}
    if role == "tool" or "tool_calls" in message or "function_call" in message:
        raise InputError(
            f"{where}: calls tools, which is not supported: without their definitions the model would read "
            "another text than when it made the calls; leave the record out"
        )
    if role == "assistant" and not answers:
        return None
    if role not in ROLES:
        raise InputError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    if unknown := set(message) - set(MESSAGE_KEYS):
        raise InputError(
            f"{where}: the {role} message has {min(unknown)!r}, which is not understood; leave it out"
        )
    content = _text(message.get("content"), role, where)
    if role in ("user", "assistant") and not content.strip():  # an empty system message replaces the default
        raise InputError(f"{where}: the {role} message has no content")
    return message | {"content": content}


def _text(content, role: str, where: str) -> str:
    """A message's content as text; a list of text parts is joined."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise InputError(
                    f"{where}: the {role} message has a part of type {kind!r}; only text is read"
                )
        return "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where}: the {role} message's content is {type(content).__name__}, not text")
    return content or ""


_named_before: set[str] = set()


def _name_unused(fields: set[str]) -> None:
    if new := fields - _named_before:
        _named_before.update(new)
        logger.info("not used, in the records: %s", ", ".join(sorted(map(json.dumps, new))))
