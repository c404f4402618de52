"""Records as people have them become messages; what cannot be read is refused by file, line and name."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from conftest import byte_tokenizer, check_refused

import generate_model_gt_data
import process_gt_data
from hopscotch_common.answers import records
from hopscotch_common.answers.prompts import find_prompts, prompt_of
from hopscotch_common.answers.records import hub_records, messages_of, read_records
from hopscotch_common.errors import InputError
from hopscotch_common.loading.models import model_ref

ASKED, SAID = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
BOTH = [ASKED, SAID]
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
RECORDS = [
    ({"messages": BOTH}, BOTH),
    ({"messages": [{"role": "user", "content": PARTS}, SAID]}, BOTH),
    (
        {"messages": [{"role": "developer", "content": "x"}, *BOTH]},
        [{"role": "developer", "content": "x"}, *BOTH],
    ),
    ({"messages": [SYSTEM | {"content": ""}, *BOTH]}, [SYSTEM | {"content": ""}, *BOTH]),
    ({"question": "1 + 1?", "answer": "2", "id": 7}, BOTH),
    ({"prompt": "1 + 1?", "completion": "2", "chat_template_kwargs": {}, "tools": None}, BOTH),
    ({"prompt": [ASKED], "completion": [SAID]}, BOTH),
    ({"prompt": [SYSTEM, ASKED]}, [SYSTEM, ASKED]),
    (
        {"instruction": "Add", "input": "1, 1", "output": "2"},
        [{"role": "user", "content": "Add\n\n1, 1"}, SAID],
    ),
    ({"instruction": "1 + 1?", "input": "", "output": "2"}, BOTH),
    ({"instruction": "Add", "context": "1, 1"}, [{"role": "user", "content": "Add\n\n1, 1"}]),
    ({"question": "How many?", "context": "1, 1"}, [{"role": "user", "content": "How many?\n\n1, 1"}]),
    ({"question": "1 + 1?", "answer": "2", "context": " ", "choices": [], "image": None}, BOTH),
    ({"system_prompt": "Be brief.", "question": "1 + 1?"}, [SYSTEM, ASKED]),
    ({"instruction": None, "input": "1 + 1?", "output": "2"}, BOTH),
    ({"instruction": " ", "input": "1 + 1?", "output": "2"}, BOTH),
    ({"instruction": [SYSTEM, ASKED], "input": " "}, [SYSTEM, ASKED]),
    ({"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}, BOTH),
    ({"system": "Be brief.", "conversations": [{"from": "human", "value": "1 + 1?"}]}, [SYSTEM, ASKED]),
]


@pytest.mark.parametrize(("record", "messages"), RECORDS)
def test_forms_of_records(record, messages):
    assert messages_of(record, "here") == messages


@pytest.mark.parametrize("answer", [["2", "two"], 2, {"text": "2"}])
def test_answers_of_other_forms_are_no_answers(answer):
    record = {"question": "1 + 1?", "answer": answer}
    assert messages_of(record, "here", answers=False) == [ASKED]
    with pytest.raises(InputError, match="here: 'answer' must be text, or a list of messages"):
        messages_of(record, "here")


def test_a_field_of_another_name():
    assert messages_of({"problem": "1 + 1?", "answer": "2"}, "here", "problem") == [ASKED]
    assert messages_of({"history": [ASKED, SAID]}, "here", "history") == BOTH
    with pytest.raises(InputError, match="here: has no 'task', only 'problem'"):
        messages_of({"problem": "1 + 1?"}, "here", "task")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "1 + 1?", "label": 2}, "has 'text', 'label', and needs 'messages'.*--prompt_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int, not text"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "role 'judge' is not one of"),
        ({"messages": [{**ASKED, "unmask": True}]}, "the user message has 'unmask'"),
        ({"messages": BOTH, "unmask": True}, "has 'unmask'"),
        ({"messages": BOTH, "tools": [{"name": "f"}]}, "has 'tools'"),
        ({"instruction": "And 2?", "history": [["1 + 1?", "2"]]}, "has 'history'"),
        ({"question": "Which?", "choices": ["2", "3"], "answer": 0}, "has 'choices'"),
        ({"messages": BOTH, "images": ["a.png"]}, "has 'images', .*only text is read"),
        ({"question": "1 + 1?", "context": {"title": ["x"]}}, "'question' and 'context' must both be text"),
        ({"prompt": '[{"role": "user", "content": "?"}]'}, "'prompt' holds messages written as text; give"),
        ({"prompt": "[{'content': '?', 'role': 'user'}]"}, "messages written as text"),
        ({"question": "[ {'from': 'human', 'value': '?'}]"}, "messages written as text"),
        ({"conversations": [{"from": ["human"], "value": "?"}]}, "each message needs a 'role'"),
        (
            {"prompt": "?", "chat_template_kwargs": {"enable_thinking": False}},
            "template is used with its def",
        ),
        ({"prompt": 7}, "'prompt' must be text"),
        ({"conversations": "1 + 1?"}, "'conversations' must be a list"),
        ({"question": "  "}, "'question' must be text"),
        ({"instruction": None, "input": " "}, "'instruction' must be text"),
        ({"instruction": "Add", "input": 0}, "'instruction' and 'input' must both be text"),
        ({"instruction": [ASKED], "input": "more"}, "'instruction' and 'input' must both be text"),
        ({"messages": []}, "its list of messages is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "the user message has no content"),
        ({"messages": [SYSTEM]}, "no user message after the system message"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(record, message):
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        prompt_of(record, "here")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "1 + 1?", "input": "", "output": ""}, "the assistant message has no content"),
        ({"question": "1 + 1?", "answer": " "}, "no content"),
        (
            {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": ""}]},
            "no content",
        ),
        ({"messages": [ASKED, SAID | {"unmask": True}]}, "the assistant message has 'unmask'"),
        ({"messages": [ASKED | {"weight": 0.0}, SAID]}, "the user message has 'weight'"),
        ({"messages": [ASKED, SAID | {"weight": 1}]}, "the assistant message has 'weight'"),
    ],
)
def test_answers_are_checked_where_they_are_not_left_out(record, message):
    assert prompt_of(record, "here").messages == [ASKED]
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        messages_of(record, "here")


def test_step_2_is_told_of_no_flag_of_step_1():
    with pytest.raises(InputError, match="has 'text', and needs .*; rename the field$"):
        messages_of({"text": "1 + 1?"}, "here")
    with pytest.raises(InputError, match="finish step 1, and give its {model}_math_final.jsonl"):
        messages_of({"settings": {"dtype": "auto"}, "kind": "the answers of an earlier run"}, "here")


def test_tools_are_refused_and_answers_left_out():
    function = {"name": "add", "arguments": "1, 1"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    old_call = {"role": "assistant", "content": "", "function_call": function}
    tool = {"role": "tool", "content": "2"}
    for messages in ([ASKED, call], [ASKED, old_call], [ASKED, tool, SAID]):
        with pytest.raises(InputError, match="^here: calls tools, which is not supported"):
            prompt_of({"messages": messages}, "here")
    none = SAID | {"tool_calls": [], "function_call": None}  # as OpenAI's answers have them
    assert prompt_of({"messages": [ASKED, none, ASKED, SAID]}, "here").messages == [ASKED, ASKED]


def test_an_input_that_is_no_instruction_s_is_named_as_not_used(caplog):
    records._named_before.discard("input")
    with caplog.at_level("INFO", "hopscotch"):
        (asked,) = prompt_of({"prompt": "Translate:", "input": "Bonjour"}, "here").messages
    assert asked["content"] == "Translate:" and 'not used, in the records: "input"' in caplog.text


def write_all(folder: Path, records: list[dict]) -> list[Path]:
    """The same records as files of every kind."""
    import datasets

    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    made = {
        "a.jsonl": lines,
        "a.json": json.dumps(records).encode(),
        "a.txt": b"\xef\xbb\xbf" + lines,
        "array.txt": b"\xef\xbb\xbf\n " + json.dumps(records).encode(),
        "blank.jsonl": lines.replace(b"\n", b"\n\n  \n", 2),
        "a.jsonl.gz": gzip.compress(lines),
        "a.json.gz": gzip.compress(json.dumps(records, indent=1).encode()),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    datasets.Dataset.from_list(records).to_parquet(str(folder / "a.parquet"))
    with open(folder / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return [folder / name for name in (*made, "a.parquet", "a.csv")]


def test_files_of_every_kind(tmp_path):
    records = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}, é"} for n in range(3)]
    for name in ("set1", "set[1]"):  # as a pattern, the second matches the first
        (tmp_path / name).mkdir()
        for path in write_all(tmp_path / name, records):
            found = list(read_records(path))
            assert [record for _, record in found] == records, path
            second = 4 if path.name == "blank.jsonl" else 2
            assert found[1][0] in (f"{path}, line {second}", f"{path}, record {second}")
        records.pop()
    assert [record for _, record in hub_records(str(tmp_path / "set1"), None, "train")]
    with pytest.raises(InputError, match="as a pattern; rename it"):
        next(hub_records(str(tmp_path / "set[1]"), None, "train"))


def test_null_is_as_if_it_were_not_there(tmp_path):
    turns = [{"from": "human", "value": "1 + 1?", "role": None}, {"from": "gpt", "value": None}]
    rows = [
        {"messages": None, "question": "1 + 1?", "answer_token_ids": None},
        {"prompt": None, "conversations": turns, "deep": json.loads("[" * 700 + "]" * 700)},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        found = list(read_records(tmp_path / name))
        assert found[0][1] == {"question": "1 + 1?"}
        assert [prompt_of(record, where).messages for where, record in found] == [[ASKED], [ASKED]]


def test_cells_of_a_table_are_the_text_that_stands_there(tmp_path):
    rows = ["instruction,input,output", "Double it,007,14", "12,,N/A", "Is it?,null,", ",1 + 1?,2,", "So"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    records = [record for _, record in read_records(tmp_path / "a.csv")]
    assert records == [
        {"instruction": "Double it", "input": "007", "output": "14"},
        {"instruction": "12", "output": "N/A"},
        {"instruction": "Is it?", "input": "null"},
        {"input": "1 + 1?", "output": "2"},
        {"instruction": "So"},
    ]
    assert messages_of(records[3], "here") == BOTH


def test_files_and_folders_without_records_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n")
    with pytest.raises(InputError, match="a.csv: holds no records"):
        list(read_records(tmp_path / "a.csv"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.jsonl").write_text('{"question": "1 + ')
    with pytest.raises(InputError, match="torn cannot be read .*JSON parse error.*--input_file"):
        list(hub_records(str(tmp_path / "torn"), None, "train"))


def test_folders_of_save_to_disk(tmp_path):
    import datasets

    one, other = (datasets.Dataset.from_list([{"question": text}]) for text in ("1?", "2?"))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    for name, split, question in (("one", "train", "1?"), ("both", "train", "1?"), ("both", "test", "2?")):
        ((_, record),) = hub_records(str(tmp_path / name), None, split)
        assert record == {"question": question}
    with pytest.raises(InputError, match="both cannot be read .*'dev'.*--split"):
        next(hub_records(str(tmp_path / "both"), None, "dev"))


def test_conversations_that_ask_several_times_are_counted(tmp_path, caplog):
    several, one = {"messages": [ASKED, SAID, ASKED, SAID]}, {"messages": [SYSTEM, ASKED, SAID]}
    (tmp_path / "a.json").write_text(json.dumps([several, one, several]))
    with caplog.at_level("INFO", "hopscotch"):
        assert len(find_prompts(model_ref("smollm"), tmp_path / "a.json")) == 3
    assert "2 of 3 records ask several times" in caplog.text


def test_zstd_lines_are_read_as_they_stand(tmp_path):
    records = [{"prompt": "2024-01-01"}, {"prompt": "2024-01-02", "id": None}]  # no dates
    frames = [pyarrow.compress(json.dumps(r).encode() + b"\n", "zstd", asbytes=True) for r in records]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [record for _, record in read_records(tmp_path / "a.jsonl.zst")] == [
        {"prompt": "2024-01-01"},
        {"prompt": "2024-01-02"},
    ]


def test_records_beyond_those_taken_are_not_looked_at(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1?"}\n{"question": "2?"}\n{"question":')
    prompts = find_prompts(model_ref("smollm"), tmp_path / "a.jsonl", num_samples=2)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["1?", "2?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "holds no records"),
        ("a.json", b"[1]", "record 1: a JSON object is needed"),
        ("a.json", b"[{]", "not JSON"),
        ("a.jsonl.gz", b"no gzip", "cannot be read .Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "1?"}\n', mtime=0)[:-12],
            "cannot be read .Compressed file ended",
        ),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, "cannot be read .Error -3"),
        ("a.jsonl.zst", b"no zstd", "cannot be read"),
        ("a.jsonl.zst", pyarrow.compress(b'{"a": 1}\n' * 9, "zstd", asbytes=True)[:-9], "a.jsonl.zst"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.csv", b"prompt\na, b\n", "record 1: has more cells than columns"),
        ("a.csv.gz", gzip.compress(b"prompt\na\n", mtime=0), "a.csv.gz: neither JSONL .*; give .*.csv$"),
        ("a.tsv", b"prompt\tid\na\t1\n", "a.tsv: neither JSONL nor a JSON array; give"),
        ("a.txt", b"", "a.txt: holds no records"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns have one name"),
        ("a.csv", b'prompt\n"a" b\n', "cannot be read"),
        ("a.csv", b"prompt\n\xff\n", "a.csv: not UTF-8 text .*; save it as UTF-8"),
        ("a.jsonl", '{"question": "1?"}'.encode("utf-16"), "not UTF-8 text .*; save it as UTF-8"),
        ("a.json", b'{\n  "question": "1?"\n}\n', "a.json: .* must be an array of records"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_records(tmp_path / name))


def test_the_scripts_take_them(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_folder())]
    Path("set").mkdir()
    records = [
        {"problem": "What is 1 + 1, or 2?", "solution": "2"},
        {"problem": "And 2 + 2, in words?", "solution": "4"},
    ]
    Path("set/train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("set/test.jsonl").write_text(json.dumps({"problem": "Of which split?"}) + "\n")
    common = [*model, "--backend", "transformers", "--device", "cpu", "--max_tokens", "4", "--keep_truncated"]
    from_set = ["--dataset", "set", "--prompt_field", "problem", "--output_file", "b_final.jsonl"]
    assert generate_model_gt_data.main([*common, *from_set]) == 0
    answers = [json.loads(line) for line in Path("b_final.jsonl").read_text().splitlines()]
    assert [answer["messages"][0]["content"] for answer in answers] == [r["problem"] for r in records]
    assert process_gt_data.main([*model, "--input_file", "b_final.jsonl", "--output_dir", "out"]) == 0
    samples = [json.loads(line) for line in Path("out/data.jsonl").read_text().splitlines()]
    for sample, answer in zip(samples, answers, strict=True):
        assert [label for label in sample["labels"] if label != -100] == answer["answer_token_ids"]
        prompt = byte_tokenizer().apply_chat_template(answer["messages"][:1], add_generation_prompt=True)[
            "input_ids"
        ]
        assert sample["input_ids"] == prompt + answer["answer_token_ids"]
    from_set[-1] = "c_final.jsonl"
    assert generate_model_gt_data.main([*common, *from_set, "--split", "test"]) == 0
    (answer,) = Path("c_final.jsonl").read_text().splitlines()
    assert json.loads(answer)["messages"][0]["content"] == "Of which split?"
    check_refused(
        generate_model_gt_data,
        [*common, "--dataset", "no/such"],
        "no/such cannot be read from the Hugging Face hub",
        capsys,
    )
