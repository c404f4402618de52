"""Step 2: turn answers into training data: token ids with labels.

    python process_gt_data.py --model smollm
    python process_gt_data.py --model llama --max_seq_len 25000
    python process_gt_data.py --model granite --output_dir custom_output

Writes data.jsonl, one sample per line: input_ids, labels (-100 where the loss does not count; the
answer and its end-of-turn token count) and len; and data_report.json beside it.

An answer of step 1 becomes exactly the tokens that the model read and generated. For other answers, the chat
template decides: what it adds to the conversation before the answer, up to the token that ends the turn.
"""

import argparse
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from hopscotch_common import cli, files
from hopscotch_common.answers import DATA_FILE, DATA_REPORT
from hopscotch_common.answers.labels import samples_of
from hopscotch_common.answers.prompts import check_vocabulary
from hopscotch_common.answers.records import read_records
from hopscotch_common.errors import HopscotchError, InputError, logger, progress
from hopscotch_common.report import describe_run
from hopscotch_common.training import IGNORE_INDEX

MIN_SEQ_LEN = 20  # shorter samples are dropped, as instructlab-training does
RECORDS_A_PROCESS = 2000  # a process takes seconds to start, a record milliseconds


def processes_worth(requested: int, num_records: int) -> int:
    """How many of the requested processes can run at once and have enough work to be worth starting."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(requested, cores, math.ceil(num_records / RECORDS_A_PROCESS))


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Made(NamedTuple):
    """A sample of step 2. line: of data.jsonl; None for a sample of too few tokens or too many."""

    tokens: int
    loss_counted_tokens: int
    line: str | None


def prepare(placed: tuple[str, dict], max_seq_len: int, vocab_size: int, **how) -> list[Made]:
    """Make the samples of a record (`samples_of`, which takes `how`).

    Raises InputError for a token that the model does not have: the tokenizer is then another model's.
    """
    made = []
    for sample in samples_of(placed, **how):
        length, line = len(sample["input_ids"]), None
        if MIN_SEQ_LEN <= length < max_seq_len:
            check_vocabulary(sample["input_ids"], vocab_size)
            line = json.dumps(sample | {"len": length}) + "\n"
        made.append(Made(length, sum(label != IGNORE_INDEX for label in sample["labels"]), line))
    return made


def make_samples(records: list, work: Callable[..., list[Made]], processes: int) -> Iterator[list[Made]]:
    """Yield the samples of each record, in order; an InputError names the first record that gives none."""
    if processes == 1:
        yield from map(work, records)
        return
    work(records[0])  # before the fork, so that not every process logs the unused fields
    context = multiprocessing.get_context("fork")  # what is loaded need not be loaded again
    pool = ProcessPoolExecutor(processes, context, _start_worker)
    try:
        ahead = processes * 64 * 16  # all at once, the samples would wait in memory
        for start in range(0, len(records), ahead):
            yield from pool.map(work, records[start : start + ahead], chunksize=64)
    except BrokenProcessPool as error:
        raise HopscotchError("a worker process was killed; is there enough memory?") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_kept_samples(made: Iterable[list[Made]], file) -> dict:
    """Write the samples that have a line to a file; return the report's figures."""
    counts = "samples", "kept", "dropped_too_long", "dropped_too_short", "tokens", "loss_counted_tokens"
    figures = dict.fromkeys((*counts, "longest"), 0)
    for sample in itertools.chain.from_iterable(made):
        figures["samples"] += 1
        if sample.line is not None:
            file.write(sample.line)
            figures["kept"] += 1
            figures["tokens"] += sample.tokens
            figures["longest"] = max(figures["longest"], sample.tokens)
            figures["loss_counted_tokens"] += sample.loss_counted_tokens
        else:
            figures["dropped_too_short" if sample.tokens < MIN_SEQ_LEN else "dropped_too_long"] += 1
    return figures


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser, load=False)
    parser.add_argument(
        "--input_file",
        type=cli.path,
        help="answers: records with 'messages', or another form that step 1 reads "
        "(default: {model}_math_final.jsonl)",
    )
    parser.add_argument(
        "--output_dir", type=cli.path, help="folder for data.jsonl (default: data/{model}-processed-data)"
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
        help=f"processes at once; at most one per core and per {RECORDS_A_PROCESS} answers",
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
    data_file, report_file = output_dir / DATA_FILE, output_dir / DATA_REPORT
    for path in (data_file, report_file):
        files.check_output(path, "--output_dir", [input_file])

    from hopscotch_common.loading import tokenization
    from hopscotch_common.loading.loader import read_config

    config = read_config(args.model)
    tokenizer = tokenization.load_tokenizer(args.model)
    if not tokenizer.is_fast:
        raise InputError(
            f"{args.model.source}: its tokenizer does not say which text a token is of; give another"
        )
    stop_ids = tokenization.stop_token_ids(args.model.folder(weights=False), tokenizer)
    records = list(read_records(input_file))
    processes = processes_worth(args.num_cpu_procs, len(records))
    work = functools.partial(
        prepare,
        max_seq_len=args.max_seq_len,
        vocab_size=config.vocab_size,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
    )
    with files.locked(data_file):
        with files.atomic_path(data_file) as temporary, open(temporary, "w", encoding="utf-8") as file:
            made = make_samples(records, work, processes)
            figures = write_kept_samples(progress(made, "samples", len(records)), file)
            if not figures["kept"]:
                raise InputError(
                    f"{input_file}: no sample is left, {figures['dropped_too_long']} have "
                    f"--max_seq_len {args.max_seq_len} tokens or more, "
                    f"{figures['dropped_too_short']} fewer than {MIN_SEQ_LEN}"
                )
        # a mapping, so that the report's tables do not show it among the figures
        made_with = {"model": args.model.source, "sha256": tokenization.fingerprint(tokenizer)}
        origin = {"input_file": str(input_file), "tokenizer": made_with}
        files.write_json(report_file, describe_run(vars(args)) | origin | figures)
    logger.info("longest sample: %d tokens", figures["longest"])
    cli.result(
        f"{data_file}: {figures['kept']} of {figures['samples']} samples kept "
        f"({figures['dropped_too_long']} too long, {figures['dropped_too_short']} too short), "
        f"{figures['tokens']} tokens, {figures['loss_counted_tokens']} loss-counted"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
