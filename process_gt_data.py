"""Step 2: answers to training data, token ids with labels, by instructlab-training.

    python process_gt_data.py --model smollm
    python process_gt_data.py --model llama --max_seq_len 25000
    python process_gt_data.py --model granite --output_dir custom_output

Writes data.jsonl, a sample a line: input_ids, labels (-100 where the loss does not count; the
answer and its end-of-turn token count), len; and beside it data_report.json.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hopscotch_common.cli import (
    ArgumentParser,
    InputError,
    check_writable,
    command,
    logger,
    positive_int,
)
from hopscotch_common.models import add_model_arguments, load_tokenizer, read_config
from hopscotch_common.report import describe_run, write_report

MIN_SEQ_LEN = 20  # instructlab-training drops what is shorter
RESERVED = "<|UNMASK_"  # instructlab-training's marks around what the loss counts
NO_LIMIT = 2**62


def read_conversations(path: Path, tokenizer) -> list[dict]:
    """The {"messages": …} of every line, checked. InputError names file, line and remedy.

    Checked is all that would stop or silently spoil the processing: the messages' shape, an
    answer at the end, and whether the chat template takes the conversation and keeps the answer.
    """
    from hopscotch_common.data import read_jsonl

    checked = [check_conversation(record, f"{path}, line {n}", tokenizer) for n, record in read_jsonl(path)]
    text = tokenizer.apply_chat_template(checked[0]["messages"], tokenize=False)
    if (tokenizer.eos_token or "") not in text.rpartition(checked[0]["messages"][-1]["content"])[2]:
        logger.warning(
            "the chat template does not end an answer with %s, the tokenizer's end of sequence: "
            "the loss will not count how answers end",
            tokenizer.eos_token,
        )
    return checked


def check_conversation(record: dict, where: str, tokenizer) -> dict:
    """One record as instructlab-training takes it; InputError when it would not."""
    from jinja2 import TemplateError

    from hopscotch_common.data import check_messages

    if "messages" not in record:
        raise InputError(f"{where}: needs 'messages'; make them with generate_model_gt_data.py")
    messages = [
        {"role": message["role"], "content": message["content"]}
        for message in check_messages(record["messages"], where)
    ]
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message is not the assistant's, there is no answer to train on")
    if any(RESERVED in message["content"] for message in messages):
        raise InputError(f"{where}: contains {RESERVED}…, which instructlab-training keeps for itself")
    if any(message["role"] == "pretraining" for message in messages):
        raise InputError(f"{where}: role 'pretraining' is not for answers; use system, user, assistant")
    messages = [split_reasoning(message, tokenizer) for message in messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise InputError(f"{where}: the model's chat template refuses it: {error}") from error
    if messages[-1]["content"].strip() not in text:
        raise InputError(f"{where}: the model's chat template leaves out part of the answer")
    return {"messages": messages}


def split_reasoning(message: dict, tokenizer) -> dict:
    """An answer's <think> part as `reasoning_content`, for chat templates that tell the two apart."""
    head, end, answer = message["content"].partition("</think>")
    if not end or message["role"] != "assistant" or "reasoning_content" not in tokenizer.chat_template:
        return message
    reasoning = head.removeprefix("<think>").strip("\n")
    return {"role": "assistant", "content": answer.lstrip("\n"), "reasoning_content": reasoning}


@contextlib.contextmanager
def private_datasets_cache(folder: Path) -> Iterator[None]:
    """Let `datasets` cache in `folder`, so that nothing stale is ever read nor left behind."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def process(conversations: list[dict], model_folder: Path, workspace: Path, num_cpu_procs: int) -> Path:
    """Have instructlab-training make samples; the file of all with at least MIN_SEQ_LEN tokens."""
    from instructlab.training.data_process import process_messages_into_input_ids

    source = workspace / "messages.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(conversation) + "\n" for conversation in conversations)
    output = workspace / "processed"
    # its coloured previews go to stdout, which is for results
    with private_datasets_cache(workspace / "cache"), contextlib.redirect_stdout(io.StringIO()):
        process_messages_into_input_ids(
            data_path=str(source),
            data_output_path=str(output),
            max_seq_len=NO_LIMIT,  # kept_samples drops the long ones, and counts them
            model_path=str(model_folder),
            num_cpu_procs=min(num_cpu_procs, len(conversations)),
        )
    return output / "data.jsonl"


def write_kept_samples(processed: Path, target: Path, num_conversations: int, max_seq_len: int) -> dict:
    """Write the samples of fewer than max_seq_len tokens to `target`; the figures of the report."""
    from hopscotch_common.data import IGNORE_INDEX

    counted = kept = too_long = tokens = longest = 0
    with open(processed, encoding="utf-8") as source, open(target, "w", encoding="utf-8") as file:
        for line in source:
            sample = json.loads(line)
            if len(sample["input_ids"]) >= max_seq_len:
                too_long += 1
                continue
            file.write(json.dumps(sample) + "\n")
            kept += 1
            tokens += len(sample["input_ids"])
            longest = max(longest, len(sample["input_ids"]))
            counted += sum(label != IGNORE_INDEX for label in sample["labels"])
        file.flush()
        os.fsync(file.fileno())
    return {
        "samples": num_conversations,
        "kept": kept,
        "dropped_too_long": too_long,
        "dropped_too_short": num_conversations - kept - too_long,
        "tokens": tokens,
        "loss_counted_tokens": counted,
        "longest": longest,
    }


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add_model_arguments(parser, load=False)
    parser.add_argument(
        "--input_file", type=Path, help="JSONL answers, 'messages' a line (default: {model}_math_final.jsonl)"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="folder for data.jsonl (default: data/{model}-processed-data)"
    )
    parser.add_argument(
        "--max_seq_len",
        type=positive_int,
        default=29000,
        help="samples with this many tokens or more are dropped",
    )
    parser.add_argument(
        "--num_cpu_procs",
        type=positive_int,
        default=8,
        help="processes that work at once; never more than there are samples",
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    input_file = args.input_file or Path(f"{args.model.name}_math_final.jsonl")
    output_dir = args.output_dir or Path("data") / f"{args.model.name}-processed-data"
    if not input_file.is_file():
        raise InputError(
            f"{input_file}: no such file; make it with generate_model_gt_data.py --model …, "
            "or name another with --input_file"
        )
    check_writable(output_dir)
    read_config(args.model)
    tokenizer = load_tokenizer(args.model)
    conversations = read_conversations(input_file, tokenizer)
    output_dir.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=".processing-", dir=output_dir))
    try:
        processed = process(conversations, args.model.folder(weights=False), workspace, args.num_cpu_procs)
        complete = workspace / "data.jsonl"
        figures = write_kept_samples(processed, complete, len(conversations), args.max_seq_len)
        if not figures["kept"]:
            raise InputError(
                f"{input_file}: no sample is left, {figures['dropped_too_long']} have --max_seq_len "
                f"{args.max_seq_len} tokens or more, {figures['dropped_too_short']} fewer than {MIN_SEQ_LEN}"
            )
        data_file = output_dir / "data.jsonl"
        complete.replace(data_file)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    write_report(
        output_dir / "data_report.json", describe_run(vars(args)) | {"input_file": str(input_file)} | figures
    )
    logger.info("longest sample: %d tokens", figures["longest"])
    print(
        f"{data_file}: {figures['kept']} of {figures['samples']} samples kept "
        f"({figures['dropped_too_long']} too long, {figures['dropped_too_short']} too short), "
        f"{figures['tokens']} tokens, {figures['loss_counted_tokens']} loss-counted"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
