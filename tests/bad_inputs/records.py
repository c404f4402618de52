"""JSONL files that users bring: prompts, answers, processed data."""

import codecs
import json

from .cases import TRAINING, Case, cases
from .makers import append, cut, edit_line, folder, line, link, loop, remove, write

# script -> the flag of its JSONL file, and the good file behind it
INPUTS = {
    "generate_model_gt_data": ("--input_file", "prompts.jsonl"),
    "process_gt_data": ("--input_file", "answers.jsonl"),
    "block_selection": ("--data_path", "data.jsonl"),
    "param_scale": ("--data_path", "data.jsonl"),
}
SURROGATE = '"\\ud800"'  # JSON can say it, UTF-8 cannot
UNREADABLE = "/proc/self/mem"  # a plain file whose first bytes nobody can read, not even root
USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}
PAIR = json.dumps({"messages": [USER, ANSWER]})[:-1]


def _files(script: str) -> list[Case]:
    """What is wrong with the file, whatever records it should hold."""
    flag, file = INPUTS[script]
    return cases(
        script,
        flag,
        ("missing", f"{file}: no such file", remove(file)),
        ("empty", f"{file}: holds no records", write(file, "")),
        ("a folder", f"{file}.*folder", folder(file)),
        ("a link to itself", f"{file}: (no such file|.*link|.*loop)", loop(file)),
        ("not JSON in line 1", f"{file}, line 1: not JSON", line(file, 1, "{{")),
        ("cut short", f"{file}, line 6: not JSON", cut(file, 0.98)),
        ("not UTF-8", f"{file}, line 3: not UTF-8", line(file, 3, b'{"question": "\xff"}')),
        ("JSON of depth 200,000", f"{file}, line 3", line(file, 3, "[" * 200_000)),
        ("unreadable", UNREADABLE, f"{flag} {UNREADABLE}"),
        ("path too long", "aaa", f"{flag} {'a' * 5000}"),
    )


def _records(script: str, *rows: tuple) -> list[Case]:
    """A row each: a name, line 3 of the file as text or object, and the message."""
    flag, file = INPUTS[script]
    return cases(script, flag, *((name, message, line(file, 3, record)) for name, record, message in rows))


def _turn(role: str | None, content) -> dict:
    return {"messages": [{"role": role, "content": content}]}


CASES = [
    *(case for script in INPUTS if script != "param_scale" for case in _files(script)),
    *cases("param_scale", "--data_path", ("missing", "data.jsonl: no such file", remove("data.jsonl"))),
    *cases(
        "generate_model_gt_data",
        "--input_file",
        ("only blank lines", "prompts.jsonl: holds no records", write("prompts.jsonl", "\n \n\r\n")),
        (
            "cut in a character",
            "prompts.jsonl, line 7: not UTF-8",
            append("prompts.jsonl", '{"question": "é'.encode()[:-1]),
        ),
        (
            "UTF-16",
            "prompts.jsonl, line 1: not UTF-8",
            write("prompts.jsonl", codecs.BOM_UTF16_LE + '{"question": "1?"}\n'.encode("utf-16-le")),
        ),
        (
            "10 MB of broken line",
            "prompts.jsonl, line 3: not JSON",
            line("prompts.jsonl", 3, '{"question": "' + "x" * 10_000_000),
        ),
        ("dangling link", "prompts.jsonl: (no such file|.*link)", link("prompts.jsonl", "gone.jsonl")),
    ),
    *_records(
        "generate_model_gt_data",
        ("a list", "[1]", "prompts.jsonl, line 3: a JSON object is needed, not list"),
        ("null", "null", "line 3: a JSON object is needed"),
        ("no question", {"answer": "2"}, "line 3: has 'answer', and needs 'messages'"),
        ("question is a number", {"question": 7}, "line 3: 'question' must be text"),
        ("question is NaN", '{"question": NaN}', "line 3: not JSON .NaN is not a JSON number"),
        ("question twice", '{"question": "1?", "question": "2?"}', "jsonl, line 3.*question"),
        ("messages are text", {"messages": "1 + 1?"}, "line 3: 'messages' must be a list"),
        ("a message is text", {"messages": ["1 + 1?"]}, "line 3: each message needs a 'role'"),
        ("role is null", _turn(None, "x"), "line 3: each message needs a 'role'"),
        ("content is a number", _turn("user", 3), "line 3: the user message's content is int"),
        (
            "a picture",
            _turn("user", [{"type": "image", "url": "x"}]),
            "prompts.jsonl, line 3: the user message has a part of type 'image'",
        ),
        ("unknown role", _turn("judge", "x"), "line 3: role 'judge' is not one of"),
        ("role with escapes", _turn("\x1b[2J\n", "x"), "line 3: role .* is not one of"),
        ("role with escapes, no content", _turn("\x1b[2J\nuser", ""), "line 3: "),
        ("only answers", {"messages": [ANSWER]}, "line 3: only assistant messages"),
        ("longer than the context", {"question": "x" * 600}, "line 3: .* no room .* context of 512; shorten"),
        ("a lone surrogate", f'{{"question": {SURROGATE}}}', "prompts.jsonl, line 3"),
        ("a number of 5000 digits", '{"question": ' + "9" * 5000 + "}", "line 3: not JSON"),
    ),
    *_records(
        "process_gt_data",
        ("a question", {"question": "1 + 1?"}, "line 3: the last message is not the assistant's"),
        ("no messages", {"text": "1 + 1?"}, "line 3: has 'text', and needs 'messages'"),
        ("no answer", {"messages": [USER]}, "line 3: the last message is not the assistant's"),
        ("an empty answer", _turn("assistant", " "), "line 3: the assistant message has"),
        ("a null answer", _turn("assistant", None), "line 3: the assistant message has"),
        ("unmasked", {"messages": [USER, ANSWER], "unmask": True}, "line 3: has 'unmask'"),
        ("with tools", {"messages": [USER, ANSWER], "tools": [{}]}, "line 3: has 'tools'"),
        ("ids of words", PAIR + ', "answer_token_ids": ["2"]}', "line 3: 'answer_token_ids' is no list"),
        (
            "ids of another model",
            PAIR + f', "answer_token_ids": {[900] * 20}}}',
            "line 3: 'answer_token_ids' do not read as the answer beside them: they are of another model",
        ),
        ("pretraining", _turn("pretraining", "x"), "line 3: role 'pretraining'"),
        ("a lone surrogate", f'{{"messages": [{SURROGATE}]}}', "answers.jsonl, line 3"),
        ("messages twice", PAIR + ', "messages": []}', "answers.jsonl, line 3.*messages"),
    ),
    *cases(
        "process_gt_data",
        "--max_seq_len",
        (
            "drops all",
            "answers.jsonl: no sample is left, 6 have --max_seq_len",
            "--max_seq_len 21 --output_dir .",
        ),
    ),
    *_records(
        "block_selection",
        ("no labels", {"input_ids": [5, 6, 7]}, "data.jsonl, line 3.*labels"),
        ("an answer", {"messages": []}, "line 3: needs 'input_ids' and 'labels'.*process_gt_data.py"),
        ("ids are text", {"input_ids": "5 6", "labels": [5, 6]}, "line 3: needs 'input_ids' and 'labels'"),
        ("ids are true", {"input_ids": [True], "labels": [1]}, "line 3: needs 'input_ids' and 'labels'"),
        ("ids are NaN", '{"input_ids": [5, NaN], "labels": [-100, 6]}', "line 3: not JSON .NaN is not"),
        ("ids are empty", {"input_ids": [], "labels": []}, "data.jsonl, line 3"),
        ("id of another model", {"input_ids": [5, 900], "labels": [5, 900]}, "token id 900 is beyond .* 300"),
        ("id of 21 digits", {"input_ids": [10**20] * 2, "labels": [10**20] * 2}, "token id 1000+ is beyond"),
        ("id below 0", {"input_ids": [-1] * 2, "labels": [-1] * 2}, "line 3: token id -1 is beyond"),
        ("fewer labels", {"input_ids": [5, 6, 7], "labels": [-100, 6]}, "line 3: 3 input_ids but 2 labels"),
        (
            "other labels",
            {"input_ids": [5, 6], "labels": [7, 7]},
            "line 3: a label must equal its token or be",
        ),
        ("nothing counted", {"input_ids": [5, 6], "labels": [-100, -100]}, "line 3: no label counts for the"),
        ("only the first counted", {"input_ids": [7, 7], "labels": [7, -100]}, "line 3: no label counts"),
        (
            "labels twice",
            '{"input_ids": [5, 6], "labels": [-100, 6], "labels": [-100, -100]}',
            "data.jsonl, line 3.*labels",
        ),
        (
            "10 MB of ids",
            {"input_ids": [7] * 3_000_000, "labels": []},
            "line 3: 3000000 input_ids but 0 labels",
        ),
    ),
    *cases(
        TRAINING,
        "--data_path",
        (
            "longer than the model's context",
            "data.jsonl, line 3.*512",
            edit_line("data.jsonl", 3, input_ids=[7] * 600, labels=[7] * 600),
        ),
    ),
]
