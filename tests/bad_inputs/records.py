"""JSONL files that users bring: prompts, answers, processed data."""

import codecs
import json

from .cases import Case, for_scripts, points_to
from .flags import TRAINING
from .makers import Spoil, append, cut, edit_line, folder, line, link, loop, remove, write

# script -> the flag of its JSONL file, and the good file behind it
INPUTS = {
    "generate_model_gt_data": ("--input_file", "prompts.jsonl"),
    "process_gt_data": ("--input_file", "answers.jsonl"),
    "block_selection": ("--data_path", "data.jsonl"),
    "param_scale": ("--data_path", "data.jsonl"),
}
SURROGATE = '"\\ud800"'  # JSON can say it, UTF-8 cannot
UNREADABLE = "/proc/self/mem"  # a plain file whose first bytes nobody can read, not even root


def _every_reader(name: str, message: str, spoil) -> list[Case]:
    """A case for each script that reads JSONL; message and spoil take the file's name."""
    return [
        Case(script, flag, name, message.format(file=file), (), spoil(file))
        for script, (flag, file) in INPUTS.items()
    ]


def _prompt(name: str, record, message: str) -> Case:
    text = record if isinstance(record, (str, bytes)) else json.dumps(record)
    return Case("generate_model_gt_data", "--input_file", name, message, (), line("prompts.jsonl", 3, text))


def _answer(name: str, record, message: str) -> Case:
    text = record if isinstance(record, (str, bytes)) else json.dumps(record)
    return Case("process_gt_data", "--input_file", name, message, (), line("answers.jsonl", 3, text))


def _sample(name: str, message: str, text: str | None = None, **changes) -> Case:
    spoil: Spoil = edit_line("data.jsonl", 3, **changes) if text is None else line("data.jsonl", 3, text)
    return Case("block_selection", "--data_path", name, message, (), spoil)


USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}

CASES = [
    # whatever is in the records: the file itself
    *_every_reader("missing", "{file}: no such file", remove),
    *_every_reader("empty", "{file}: holds no records", lambda file: write(file, "")),
    *_every_reader("a folder", points_to("{file}", "folder"), folder),
    *_every_reader("a link to itself", "{file}: (no such file|.*link|.*loop)", loop),
    *_every_reader("not JSON in line 1", "{file}, line 1: not JSON", lambda file: line(file, 1, "{{")),
    *_every_reader("cut short", "{file}, line 6: not JSON", lambda file: cut(file, 0.98)),
    *_every_reader(
        "not UTF-8", "{file}, line 3: not UTF-8", lambda file: line(file, 3, b'{"question": "\xff"}')
    ),
    *_every_reader(
        "JSON of depth 200,000", points_to("{file}, line 3"), lambda file: line(file, 3, "[" * 200_000)
    ),
    *for_scripts(
        ["block_selection"],
        "--data_path",
        "unreadable",
        points_to(UNREADABLE),
        "--data_path",
        UNREADABLE,
    ),
    *for_scripts(
        ["generate_model_gt_data"],
        "--input_file",
        "unreadable",
        points_to(UNREADABLE),
        "--input_file",
        UNREADABLE,
    ),
    Case(
        "process_gt_data",
        "--input_file",
        "only blank lines",
        "answers.jsonl: holds no records",
        (),
        write("answers.jsonl", "\n \n\r\n"),
    ),
    Case(
        "generate_model_gt_data",
        "--input_file",
        "cut in a character",
        "prompts.jsonl, line 7: not UTF-8",
        (),
        append("prompts.jsonl", '{"question": "é'.encode()[:-1]),
    ),
    Case(
        "generate_model_gt_data",
        "--input_file",
        "UTF-16",
        "prompts.jsonl, line 1: not UTF-8",
        (),
        write("prompts.jsonl", codecs.BOM_UTF16_LE + '{"question": "1?"}\n'.encode("utf-16-le")),
    ),
    Case(
        "generate_model_gt_data",
        "--input_file",
        "10 MB of broken line",
        "prompts.jsonl, line 3: not JSON",
        (),
        line("prompts.jsonl", 3, '{"question": "' + "x" * 10_000_000),
    ),
    Case("process_gt_data", "--input_file", "path too long", points_to("aaa"), ("--input_file", "a" * 5000)),
    Case("block_selection", "--data_path", "path too long", points_to("aaa"), ("--data_path", "a" * 5000)),
    Case(
        "block_selection",
        "--data_path",
        "dangling link",
        "data.jsonl: (no such file|.*link)",
        (),
        link("data.jsonl", "gone.jsonl"),
    ),
    # prompts
    _prompt("a list", [1], "prompts.jsonl, line 3: a JSON object is needed, not list"),
    _prompt("null", "null", "line 3: a JSON object is needed"),
    _prompt("no question", {"answer": "2"}, "line 3: has 'answer', and needs 'messages'"),
    _prompt("question is a number", {"question": 7}, "line 3: 'question' must be text"),
    _prompt("question is NaN", '{"question": NaN}', "line 3: not JSON .NaN is not a JSON number"),
    _prompt(
        "question twice",
        '{"question": "1?", "question": "2?"}',
        points_to("prompts.jsonl, line 3", "question"),
    ),
    _prompt(
        "messages twice",
        '{"messages": [], "messages": [{"role": "user", "content": "x"}]}',
        points_to("prompts.jsonl, line 3", "messages"),
    ),
    _prompt("messages are text", {"messages": "1 + 1?"}, "line 3: 'messages' must be a list"),
    _prompt("a message is text", {"messages": ["1 + 1?"]}, "line 3: each message needs a 'role'"),
    _prompt(
        "role is null", {"messages": [{"role": None, "content": "x"}]}, "line 3: each message needs a 'role'"
    ),
    _prompt(
        "content is a number",
        {"messages": [{"role": "user", "content": 3}]},
        "line 3: the user message's content is int",
    ),
    _prompt(
        "a picture",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "prompts.jsonl, line 3: the user message has a part of type 'image'",
    ),
    _prompt(
        "unknown role",
        {"messages": [{"role": "judge", "content": "x"}]},
        "line 3: role 'judge' is not one of",
    ),
    _prompt(
        "role with escapes",
        {"messages": [{"role": "\x1b[2J\n", "content": "x"}]},
        "line 3: role .* is not one of",
    ),
    _prompt(
        "role with escapes, no content", {"messages": [{"role": "\x1b[2J\nuser", "content": ""}]}, "line 3: "
    ),
    _prompt("only answers", {"messages": [ANSWER]}, "line 3: only assistant messages"),
    _prompt(
        "longer than the context",
        {"question": "x" * 600},
        "line 3: .* leave no room .* context of 512; shorten",
    ),
    _prompt("a lone surrogate", f'{{"question": {SURROGATE}}}', points_to("prompts.jsonl, line 3")),
    _prompt("a number of 5000 digits", '{"question": ' + "9" * 5000 + "}", "line 3: not JSON"),
    # answers
    _answer("a question", {"question": "1 + 1?"}, "line 3: the last message is not the assistant's"),
    _answer("no messages", {"text": "1 + 1?"}, "line 3: has 'text', and needs 'messages'"),
    _answer("no answer", {"messages": [USER]}, "line 3: the last message is not the assistant's"),
    _answer(
        "an empty answer",
        {"messages": [USER, {**ANSWER, "content": " "}]},
        "line 3: the assistant message has",
    ),
    _answer(
        "a null answer",
        {"messages": [USER, {**ANSWER, "content": None}]},
        "line 3: the assistant message has",
    ),
    _answer("no role", {"messages": [USER, {"content": "2"}]}, "line 3: each message needs a 'role'"),
    _answer("unmasked", {"messages": [USER, ANSWER], "unmask": True}, "line 3: has 'unmask'"),
    _answer("with tools", {"messages": [USER, ANSWER], "tools": [{}]}, "line 3: has 'tools'"),
    _answer(
        "ids of words",
        {"messages": [USER, ANSWER], "answer_token_ids": ["2"]},
        "line 3: 'answer_token_ids' is no list",
    ),
    _answer(
        "ids of another model",
        {"messages": [USER, ANSWER], "answer_token_ids": [900] * 20},
        "makes token 900, but the model's vocabulary has 300",
    ),
    _answer(
        "pretraining", {"messages": [{**USER, "role": "pretraining"}, ANSWER]}, "line 3: role 'pretraining'"
    ),
    _answer(
        "a lone surrogate",
        f'{{"messages": [{{"role": "assistant", "content": {SURROGATE}}}]}}',
        points_to("answers.jsonl, line 3"),
    ),
    _answer(
        "messages twice",
        json.dumps({"messages": [USER, ANSWER]})[:-1] + ', "messages": [{"role": "assistant", '
        '"content": "another"}]}',
        points_to("answers.jsonl, line 3", "messages"),
    ),
    _answer(
        "role with escapes", {"messages": [{"role": "\x1b]0;x\x07\n", "content": ""}, ANSWER]}, "line 3: "
    ),
    Case(
        "process_gt_data",
        "--max_seq_len",
        "drops all",
        "answers.jsonl: no sample is left, 6 have --max_seq_len",
        ("--max_seq_len", "21", "--output_dir", "."),
    ),
    # processed data
    _sample("no labels", points_to("data.jsonl, line 3", "labels"), '{"input_ids": [5, 6, 7]}'),
    _sample("an answer", "line 3: needs 'input_ids' and 'labels'.*process_gt_data.py", '{"messages": []}'),
    _sample("ids are text", "line 3: needs 'input_ids' and 'labels'", input_ids="5 6 7"),
    _sample("ids are true", "line 3: needs 'input_ids' and 'labels'", input_ids=[True] * 20),
    _sample("ids are NaN", "line 3: not JSON .NaN is not", '{"input_ids": [5, NaN], "labels": [-100, 6]}'),
    _sample("ids are empty", points_to("data.jsonl, line 3") + "|no label counts", input_ids=[], labels=[]),
    _sample(
        "id of another model",
        "line 3: token id 900 is beyond .* 300",
        input_ids=[900] * 20,
        labels=[900] * 20,
    ),
    _sample(
        "id of 21 digits", "line 3: token id 1000+ is beyond", input_ids=[10**20] * 20, labels=[10**20] * 20
    ),
    _sample("id below 0", "line 3: token id -1 is beyond", input_ids=[-1] * 20, labels=[-1] * 20),
    _sample("fewer labels", "line 3: 20 input_ids but 2 labels", labels=[-100, 7]),
    _sample("other labels", "line 3: a label must equal its token or be -100", labels=[7] * 20),
    _sample("nothing counted", "line 3: no label counts for the loss", labels=[-100] * 20),
    _sample(
        "only the first counted", "line 3: no label counts", input_ids=[7] * 20, labels=[7] + [-100] * 19
    ),
    _sample(
        "labels twice",
        points_to("data.jsonl, line 3", "labels"),
        '{"input_ids": [5, 6], "labels": [-100, 6], "labels": [-100, -100]}',
    ),
    *for_scripts(
        TRAINING,
        "--data_path",
        "longer than the model's context",
        points_to("data.jsonl, line 3", "512"),
        spoil=edit_line("data.jsonl", 3, input_ids=[7] * 600, labels=[7] * 600),
    ),
    _sample("10 MB of ids", "line 3: 3000000 input_ids but 20 labels", input_ids=[7] * 3_000_000),
]
