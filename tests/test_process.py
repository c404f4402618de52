"""Step 2: labels cover exactly the answer and its end-of-turn token; drops are counted."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, byte_tokenizer, check_refused
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import block_selection
import param_scale
import process_gt_data
import unscaled_ckpt
from hopscotch_common import inputs
from hopscotch_common.answers import labels
from hopscotch_common.loading import tokenization
from hopscotch_common.loading.models import model_ref

CONVERSATIONS = [
    [("user", "What is 3 + 4?"), ("assistant", "3 + 4 = 7.")],
    [("system", "Be brief."), ("user", "And 5 + 6?\nSay why."), ("assistant", "  11, because\n\n5 + 6.")],
    [
        ("system", ""),
        ("user", "1 + 1?"),
        ("assistant", "Two."),
        ("user", "Again, in digits?"),
        ("assistant", "2 — é"),
    ],
]


def messages_of(turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def expected_sample(turns, tokenizer) -> tuple[list[int], list[int]]:
    """(input_ids, labels) spelled out piece by piece, without a chat template."""

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    ids, labels = [], []
    for role, content in turns:
        head = encode(f"<|im_start|>{role}\n")
        body, tail = encode(f"{content}<|im_end|>"), encode("\n")
        ids += head + body + tail
        counted = body if role == "assistant" else [-100] * len(body)
        labels += [-100] * len(head) + counted + [-100] * len(tail)
    return ids, labels


@pytest.fixture
def work(tiny_folder, tmp_path, monkeypatch):
    """A working folder; returns the command line that processes answers.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write_lines([messages_of(turns) for turns in CONVERSATIONS])
    return ["--model", str(tiny_folder()), "--input_file", "answers.jsonl", "--output_dir", "out"] + [
        "--num_cpu_procs", "1",
    ]  # fmt: skip


def write_lines(records) -> None:
    Path("answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_samples() -> list[dict]:
    return [json.loads(line) for line in Path("out/data.jsonl").read_text().splitlines()]


def test_labels_cover_exactly_the_answers_and_their_end_of_turn(work, capfd):
    assert process_gt_data.main(work) == 0
    tokenizer = AutoTokenizer.from_pretrained(work[1])
    expected = [expected_sample(turns, tokenizer) for turns in CONVERSATIONS]
    assert [(s["input_ids"], s["labels"]) for s in read_samples()] == expected
    counted = [[token for token in labels if token != -100] for _, labels in expected]
    assert tokenizer.decode(counted[0]) == "3 + 4 = 7.<|im_end|>"

    (line,) = capfd.readouterr().out.splitlines()  # of this process and of instructlab's
    tokens, total = sum(len(ids) for ids, _ in expected), sum(map(len, counted))
    assert line == (
        "out/data.jsonl: 3 of 3 samples kept (0 too long, 0 too short), "
        f"{tokens} tokens, {total} loss-counted"
    )
    report = json.loads(Path("out/data_report.json").read_text())
    assert (report["tokens"], report["loss_counted_tokens"]) == (tokens, total)
    assert sorted(os.listdir("out")) == ["data.jsonl", "data_report.json"]


def another_tokenizer(folder: Path) -> Path:
    """A copy of a model whose tokenizer has the same tokens under other ids."""
    copy = shutil.copytree(folder, Path("another"))
    content = json.loads((copy / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]  # 4 special tokens, then the letters
    content["model"]["vocab"] = {token: i if i < 4 else 263 - i for token, i in vocab.items()}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


def test_data_of_another_tokenizer_is_refused(work, capsys):
    assert process_gt_data.main(work) == 0
    report = Path("out/data_report.json")
    content = json.loads(report.read_text())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(tokenization.PROBE)
    ids = [4 + letters.index(letter) for word, _ in split for letter in word]
    sha256 = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert content["tokenizer"] == {"model": work[1], "sha256": sha256}

    another = another_tokenizer(Path(work[1]))
    data = ["--model", str(another), "--data_path", "out/data.jsonl"]
    message = f"^[^:]*: error: out/data.jsonl: made with another tokenizer .*{work[1]}.*process_gt_data.py"
    check_refused(block_selection, data, message, capsys)
    check_refused(param_scale, [*data, "--blocks_to_skip", "1"], message, capsys)
    check_refused(unscaled_ckpt, [*data, "--blocks_to_skip", "1", "--replacement_rank", "2"], message, capsys)
    theirs, ours = model_ref(str(another)), model_ref(work[1])
    for packed in (".gz", ".zst"):
        with pytest.raises(process_gt_data.InputError, match="made with another tokenizer"):
            inputs.check_data(Path(f"out/data.jsonl{packed}"), theirs)
    inputs.check_data(Path("out/data.jsonl"), ours)
    assert "are they one model" not in capsys.readouterr().err
    copied = shutil.copytree(work[1], "elsewhere/model")
    inputs.check_data(Path("out/data.jsonl"), model_ref(str(copied)))
    assert f"made with {work[1]}, and --model is {copied}: are they one model?" in capsys.readouterr().err
    for made_with in (7, ["a"], "a\0b"):  # by hand
        report.write_text(json.dumps(content | {"tokenizer": {"model": made_with, "sha256": sha256}}))
        inputs.check_data(Path("out/data.jsonl"), ours)
        assert "are they one model" in capsys.readouterr().err
    shutil.copyfile("out/data.jsonl", "out/search.jsonl")  # as `head` makes it: of whom, no report tells
    inputs.check_data(Path("out/search.jsonl"), theirs)
    report.unlink()
    inputs.check_data(Path("out/data.jsonl"), theirs)


def test_long_and_short_samples_are_dropped_and_counted(work, capsys, monkeypatch):
    monkeypatch.setattr(process_gt_data, "MIN_SEQ_LEN", 40)
    tokenizer = AutoTokenizer.from_pretrained(work[1])

    def of_length(tokens: int):
        """A conversation of so many tokens: the template's 34, and an answer to fill up."""
        turns = [("user", "?"), ("assistant", "")]
        missing = tokens - len(expected_sample(turns, tokenizer)[0])
        return [turns[0], ("assistant", "x" * missing)]

    lengths = [100, 40, 99, 101, 39]
    write_lines([messages_of(of_length(n)) for n in lengths])
    assert process_gt_data.main([*work, "--max_seq_len", "100"]) == 0
    assert [len(sample["input_ids"]) for sample in read_samples()] == [40, 99]
    report = json.loads(Path("out/data_report.json").read_text())
    assert (report["kept"], report["dropped_too_long"], report["dropped_too_short"]) == (2, 2, 1)
    assert "2 of 5 samples kept (2 too long, 1 too short)" in capsys.readouterr().out


def test_when_every_sample_is_dropped_nothing_is_written(work, capsys, monkeypatch):
    check_refused(
        process_gt_data, [*work, "--max_seq_len", "30"], "no sample is left, 3 have --max_seq_len 30", capsys
    )
    monkeypatch.setattr(process_gt_data, "MIN_SEQ_LEN", 1000)
    check_refused(process_gt_data, work, "no sample is left, 0 .* 3 fewer than 1000", capsys)
    assert not list(Path("out").iterdir())


def test_earlier_data_is_replaced_whole_or_not_at_all(work, monkeypatch):
    Path("out").mkdir()
    Path("out/data.jsonl").write_text("earlier")
    Path("out/mine.txt").write_text("of the user")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(process_gt_data, "write_kept_samples", interrupt)
        assert process_gt_data.main(work) == 130
    assert Path("out/data.jsonl").read_text() == "earlier"
    assert sorted(os.listdir("out")) == ["data.jsonl", "mine.txt"]
    assert process_gt_data.main(work) == 0
    assert len(read_samples()) == 3 and Path("out/mine.txt").exists()


def test_no_more_processes_than_cores_or_than_the_work_pays_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    counts = [process_gt_data.processes_worth(8, samples) for samples in (1, 48, 2000, 2001, 7000, 10**6)]
    assert counts == [1, 1, 1, 2, 4, 4]
    assert process_gt_data.processes_worth(2, 10**6) == 2


def test_reasoning_is_kept_where_the_template_sets_it_apart():
    tokenizer = byte_tokenizer()
    message = {"role": "assistant", "content": "<think>\n3 and 4\n</think>\n\n7"}
    assert labels.split_reasoning(message, tokenizer) == message
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
        "{{ message['content'] }}",
    )
    split = labels.split_reasoning(message, tokenizer)
    assert split == {"role": "assistant", "content": "7", "reasoning_content": "3 and 4"}
    text = tokenizer.apply_chat_template([split], tokenize=False)
    assert text == "<|im_start|>assistant\n<think>3 and 4</think>7<|im_end|>\n"


def test_missing_answers_name_the_script_that_makes_them(work, capsys):
    Path("answers.jsonl").unlink()
    check_refused(process_gt_data, work, "no such file; make it with generate_model_gt_data.py", capsys)


def test_what_the_chat_template_refuses_or_leaves_out_names_the_line():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[-1]['content'][:5] }}"
    )
    where = "answers.jsonl, line 2"
    with pytest.raises(process_gt_data.InputError, match=f"{where}: .* no system role"):
        labels.samples_of((where, messages_of(CONVERSATIONS[1])), tokenizer, set())
    with pytest.raises(process_gt_data.InputError, match=f"{where}: .* rewrites part of the user message"):
        labels.samples_of((where, messages_of(CONVERSATIONS[0])), tokenizer, set())
