"""Step 2: answers to training data, token ids with labels, by instructlab-training.

    python process_gt_data.py --model smollm
    python process_gt_data.py --model llama --max_seq_len 25000
    python process_gt_data.py --model granite --output_dir custom_output

Writes data.jsonl, a sample a line: input_ids, labels (-100 where the loss does not count; the
answer and its end-of-turn token count), len; and beside it data_report.json.
"""

import argparse
import contextlib
import ctypes
import io
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hopscotch_common import cli, files, writing
from hopscotch_common.answers.prompts import check_messages, check_vocabulary, render
from hopscotch_common.errors import HopscotchError, InputError, logger
from hopscotch_common.report.runs import describe_run

MIN_SEQ_LEN = 20  # instructlab-training drops what is shorter
RESERVED = "<|UNMASK_"  # instructlab-training's marks around what the loss counts
NO_LIMIT = 2**62
SAMPLES_A_PROCESS = 2000  # another process takes seconds to start, a sample milliseconds


def read_conversations(path: Path, tokenizer) -> list[dict]:
    """The {"messages": …} of every line, checked. InputError names file, line and remedy.

    Checked is all that would stop or silently spoil the processing: the messages' shape, an
    answer at the end, and whether the chat template takes the conversation and keeps the answer.
    """
    checked = [
        check_conversation(record, f"{path}, line {number}", tokenizer)
        for number, record in files.read_jsonl(path)
    ]
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
    render(tokenizer, messages, where)
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


def with_its_workers(function: Callable[[], None]) -> None:
    """Call a function that starts worker processes in a process of its own, which takes them with it.

    Ctrl-C goes to all processes of a terminal, and workers would bury the one line about it under their
    tracebacks; a worker of a killed run would work on. Here both end at once, with their whole group.
    """
    results, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
        # A pool ends its workers by SIGTERM, and that must not end all.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: when this process ends
        try:
            function()
            sender.send(None)
        except BaseException as error:
            sender.send(
                error if isinstance(error, OSError) else RuntimeError(f"{type(error).__name__}: {error}")
            )
        finally:
            os._exit(0)
    sender.close()
    try:
        error = results.recv()
    except EOFError:
        error = HopscotchError("the worker processes were killed; is there enough memory?")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if error is not None:
        raise error


@contextlib.contextmanager
def plain_os_errors() -> Iterator[None]:
    """Raise the OSError, of a full disk for example, that libraries wrap in errors of their own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error


def processes_worth(requested: int, num_conversations: int) -> int:
    """How many of the requested processes can work at once, and have enough to do to be worth a start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(requested, cores, math.ceil(num_conversations / SAMPLES_A_PROCESS))


def process(conversations: list[dict], model_folder: Path, workspace: Path, num_cpu_procs: int) -> Path:
    """Have instructlab-training make samples; the file of all with at least MIN_SEQ_LEN tokens."""
    from instructlab.training.data_process import process_messages_into_input_ids

    source = workspace / "messages.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(conversation) + "\n" for conversation in conversations)
    output = workspace / "processed"
    processes = processes_worth(num_cpu_procs, len(conversations))

    def work() -> None:
        # its coloured previews go to stdout, which is for results
        with (
            plain_os_errors(),
            private_datasets_cache(workspace / "cache"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            process_messages_into_input_ids(
                data_path=str(source),
                data_output_path=str(output),
                max_seq_len=NO_LIMIT,  # write_kept_samples drops the long ones, and counts them
                model_path=str(model_folder),
                num_cpu_procs=processes if processes > 1 else None,  # None: in this process
            )

    if processes > 1:
        with_its_workers(work)
    else:
        work()
    return output / "data.jsonl"


def write_kept_samples(
    processed: Path, file, num_conversations: int, max_seq_len: int, vocab_size: int
) -> dict:
    """Write the samples of fewer than max_seq_len tokens to a file; the figures of the report.

    Raises InputError for a token that the model does not have: its tokenizer is another model's.
    """
    counted = kept = too_long = tokens = longest = 0
    with open(processed, encoding="utf-8") as source:
        for line in source:
            sample = json.loads(line)
            if len(sample["input_ids"]) >= max_seq_len:
                too_long += 1
                continue
            check_vocabulary(sample["input_ids"], vocab_size)
            file.write(json.dumps(sample) + "\n")
            kept += 1
            tokens += len(sample["input_ids"])
            longest = max(longest, len(sample["input_ids"]))
            counted += sum(label >= 0 for label in sample["labels"])  # others are -100
    return {
        "samples": num_conversations,
        "kept": kept,
        "dropped_too_long": too_long,
        "dropped_too_short": num_conversations - kept - too_long,
        "tokens": tokens,
        "loss_counted_tokens": counted,
        "longest": longest,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser, load=False)
    parser.add_argument(
        "--input_file", type=Path, help="JSONL answers, 'messages' a line (default: {model}_math_final.jsonl)"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="folder for data.jsonl (default: data/{model}-processed-data)"
    )
    parser.add_argument(
        "--max_seq_len",
        type=cli.positive_int,
        default=29000,
        help="samples with this many tokens or more are dropped",
    )
    parser.add_argument(
        "--num_cpu_procs",
        type=cli.positive_int,
        default=8,
        help=f"processes at once; never more than cores, nor than one for {SAMPLES_A_PROCESS} samples",
    )
    return parser


@cli.command
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    input_file = args.input_file or Path(f"{args.model.name}_math_final.jsonl")
    output_dir = args.output_dir or Path("data") / f"{args.model.name}-processed-data"
    files.check_input(
        input_file, "make it with generate_model_gt_data.py --model …, or name another with --input_file"
    )
    data_file, report_file = output_dir / "data.jsonl", output_dir / "data_report.json"
    for path in (data_file, report_file):
        files.check_output(path, "--output_dir", [input_file])

    from hopscotch_common.loading import read_config
    from hopscotch_common.tokenization import load_tokenizer

    config = read_config(args.model)
    tokenizer = load_tokenizer(args.model)
    conversations = read_conversations(input_file, tokenizer)
    with writing.locked(data_file), writing.scratch_folder(output_dir, "processing") as workspace:
        processed = process(conversations, args.model.folder(weights=False), workspace, args.num_cpu_procs)
        with writing.atomic_file(data_file) as file:
            figures = write_kept_samples(
                processed, file, len(conversations), args.max_seq_len, config.vocab_size
            )
            if not figures["kept"]:
                raise InputError(
                    f"{input_file}: no sample is left, {figures['dropped_too_long']} have "
                    f"--max_seq_len {args.max_seq_len} tokens or more, "
                    f"{figures['dropped_too_short']} fewer than {MIN_SEQ_LEN}"
                )
        writing.write_json(report_file, describe_run(vars(args)) | {"input_file": str(input_file)} | figures)
    logger.info("longest sample: %d tokens", figures["longest"])
    cli.result(
        f"{data_file}: {figures['kept']} of {figures['samples']} samples kept "
        f"({figures['dropped_too_long']} too long, {figures['dropped_too_short']} too short), "
        f"{figures['tokens']} tokens, {figures['loss_counted_tokens']} loss-counted"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
