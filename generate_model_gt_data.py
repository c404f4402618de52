"""Step 1: generate the model's own greedy answers to prompts, the ground truth that training imitates.

    python generate_model_gt_data.py --model smollm
    python generate_model_gt_data.py --model qwen --input_file prompts.jsonl
    python generate_model_gt_data.py --model qwen --dataset openai/gsm8k --dataset_config main

Prompts are records with `question`, `messages`, `prompt`, `instruction` or `conversations`, in JSONL, JSON,
Parquet or CSV files, or in a data set on the hub. The model answers what is asked; answers already in a
record are ignored.
Answers go to {model}_math_final.jsonl, in input order. During the run they are kept in
{model}_math.jsonl, so that the same command resumes where an interrupted one stopped.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from hopscotch_common import cli, files
from hopscotch_common.answers import BACKENDS, EngineOptions
from hopscotch_common.answers.prompts import (
    ANSWER_IDS,
    HUB_PROMPTS,
    KIND,
    LOCAL_PROMPTS,
    PROMPT_IDS,
    REMEDY,
    Prompt,
    answer_text,
    find_prompts,
    kept_answers,
    tokenize,
)
from hopscotch_common.answers.records import TABLES
from hopscotch_common.errors import InputError, logger
from hopscotch_common.loading.models import ModelRef
from hopscotch_common.report import describe_run
from hopscotch_common.resumable import ResumableLog


def output_paths(output_file: Path | None, model: ModelRef) -> tuple[Path, Path, Path]:
    """(final, partial, report) files; by default {model}_math_final.jsonl, {model}_math.jsonl, …"""
    final = output_file or Path(f"{model.name}_math_final.jsonl")
    stem = final.name.removesuffix(".jsonl")
    partial = stem.removesuffix("_final") if stem.endswith("_final") else f"{stem}.partial"
    return final, final.with_name(f"{partial}.jsonl"), final.with_name(f"{stem}_report.json")


def check_outputs(final: Path, partial: Path, report: Path, input_file: Path | None) -> None:
    """Raise InputError for outputs that could not be written or would replace an input."""
    if final.suffix.lower() in (".gz", *TABLES):  # step 2 would read it as that format
        raise InputError(f"--output_file {final}: is written as JSONL; name it .jsonl")
    beside = f"--output_file {final}, which needs"  # a file that the user did not name
    for path, flag in ((final, "--output_file"), (partial, beside), (report, beside)):
        files.check_output(path, flag, [] if input_file is None else [input_file])
    if final.exists() and not report.exists() and not partial.exists():
        raise InputError(f"--output_file {final}: exists and is not of this script; name another file")


def answer_missing(
    log: ResumableLog,
    records: dict[int, dict],
    missing: Sequence[int],
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    tokenizer,
    generate: Callable[..., Iterable],
) -> None:
    """Add each answer from an engine to `log` and `records`.

    generate: takes `on_tokens` and yields the answers to the missing prompts, numbered by place in `missing`.
    The bar counts tokens: in transformers many answers grow for a long time before one of them ends.
    """
    total = len(prompts)
    with tqdm(unit=" tokens", desc=f"{len(records)}/{total} answers", dynamic_ncols=True) as bar:
        for answer in generate(on_tokens=bar.update):
            index = missing[answer.index]
            stopped = answer.finish_reason == "stop"
            text = answer_text(tokenizer, answer.token_ids[:-1] if stopped else answer.token_ids)
            record = {
                "index": index,
                "messages": [*prompts[index].messages, {"role": "assistant", "content": text}],
                "finish_reason": answer.finish_reason,
                "num_generated_tokens": len(answer.token_ids),
                # a template may print the date, or change, and the text may tokenize differently
                PROMPT_IDS: list(prompt_ids[index]),
                ANSWER_IDS: list(answer.token_ids),
            }
            log.append(record)
            records[index] = record
            bar.set_description_str(f"{len(records)}/{total} answers", refresh=False)


def select_answers(records: dict[int, dict], keep_truncated: bool) -> tuple[list[dict], dict]:
    """Return (answers to write, in input order, figures), without empty answers.

    Truncated answers are left out, too, unless `keep_truncated`.
    """
    ordered = [records[index] for index in sorted(records)]
    truncated = [r for r in ordered if r["finish_reason"] == "length"]
    ended = ordered if keep_truncated else [r for r in ordered if r["finish_reason"] != "length"]
    said = [r for r in ended if r["messages"][-1]["content"].strip()]
    kept = [{k: v for k, v in r.items() if k != "index"} for r in said]
    figures = {
        "prompts": len(ordered),
        "answers": len(kept),
        "truncated": len(truncated),
        "truncated_dropped": 0 if keep_truncated else len(truncated),
        "empty_dropped": len(ended) - len(said),
        "generated_tokens": sum(r["num_generated_tokens"] for r in ordered),
    }
    return kept, figures


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--input_file",
        type=cli.path,
        help="prompts: .jsonl or .json (also .gz), .jsonl.zst, .parquet or .csv; default: for smollm the "
        f"embedded problems, otherwise {LOCAL_PROMPTS} in this folder, otherwise {HUB_PROMPTS} from the hub",
    )
    source.add_argument("--dataset", metavar="OWNER/NAME", help="prompts: a data set on the hub, or a folder")
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of --dataset")
    parser.add_argument("--split", help="split of --dataset (default: train)")
    parser.add_argument(
        "--prompt_field",
        metavar="NAME",
        help="field that holds the text or messages, if none of the usual names",
    )
    parser.add_argument(
        "--output_file",
        type=cli.path,
        help="JSONL file for the answers (default: {model}_math_final.jsonl)",
    )
    parser.add_argument("--num_samples", type=cli.positive_int, help="answer only the first N prompts")
    parser.add_argument("--max_tokens", type=cli.positive_int, default=4096, help="most tokens of an answer")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=EngineOptions.backend,
        help="engine; auto: vllm where it can run, otherwise transformers",
    )
    parser.add_argument(
        "--tensor_parallel_size",
        type=cli.positive_int,
        help="vllm: GPUs to split the model over (default: as many as its heads and MLP allow)",
    )
    parser.add_argument(
        "--max_tokens_per_batch",
        type=cli.positive_int,
        default=EngineOptions.max_tokens_per_batch,
        help="most tokens of KV cache, padding included, for all answers in progress "
        "(transformers, and vllm on a CPU); lower it when memory runs out",
    )
    parser.add_argument(
        "--keep_truncated",
        action="store_true",
        help="keep answers that were cut off at --max_tokens instead of dropping them",
    )
    return parser


@cli.command
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    final, partial_file, report_file = output_paths(args.output_file, args.model)
    check_outputs(final, partial_file, report_file, args.input_file)
    options = EngineOptions(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EngineOptions)}
    )
    for flag in ("dataset_config", "split"):
        if getattr(args, flag) and not args.dataset:
            raise InputError(f"--{flag}: goes with --dataset, which names the data set")
    source = dict(dataset=args.dataset, config=args.dataset_config, split=args.split or "train")
    source |= dict(field=args.prompt_field, num_samples=args.num_samples)
    prompts = find_prompts(args.model, args.input_file, **source)

    from hopscotch_common.answers import engines
    from hopscotch_common.loading import tokenization, weights
    from hopscotch_common.loading.loader import read_config

    config = read_config(args.model, checkpoint=True)
    backend = engines.resolve_backend(options, config)
    if backend == "vllm":
        engines.tensor_parallel_size(args.tensor_parallel_size, config)
    tokenizer = tokenization.load_tokenizer(args.model)
    stop_ids = tokenization.stop_token_ids(args.model.folder(weights=False), tokenizer)
    prompt_ids = tokenize(prompts, tokenizer, config)
    weights.check_weights(args.model.folder(), config, args.attn_implementation)
    settings = {
        "tensors": weights.fingerprint(args.model.folder()),
        "dtype": args.dtype,
        "max_tokens": args.max_tokens,
        "chat_template": tokenization.template_fingerprint(tokenizer),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "stop_tokens": sorted(stop_ids),
    }
    with ResumableLog(partial_file, settings, KIND, REMEDY) as log:
        records = kept_answers(log, prompts)
        missing = [index for index in range(len(prompts)) if index not in records]
        logger.info(
            "%d prompts, %d answered before; %s answers the rest",
            len(prompts),
            len(prompts) - len(missing),
            backend,
        )
        if missing:
            asked = [prompt_ids[i] for i in missing]
            generate = functools.partial(
                engines.generate, args.model, config, backend, asked, stop_ids, args.max_tokens, options
            )
            answer_missing(log, records, missing, prompts, prompt_ids, tokenizer, generate)
        kept, figures = select_answers(records, args.keep_truncated)
        if not kept:
            raise InputError(
                f"no answer is left of {len(prompts)}: {figures['truncated_dropped']} were cut off at "
                f"--max_tokens {args.max_tokens} (see --keep_truncated), {figures['empty_dropped']} are empty"
            )
        files.write_json(report_file, describe_run(vars(args)) | {"backend": backend} | figures)
        files.write_lines(final, kept)
    cli.result(
        f"{final}: {figures['answers']} answers to {figures['prompts']} prompts "
        f"({figures['truncated_dropped']} truncated and {figures['empty_dropped']} empty ones dropped), "
        f"{figures['generated_tokens']} tokens generated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
