"""Step 1: the model's own greedy answers to prompts, the ground truth that training imitates.

    python generate_model_gt_data.py --model smollm
    python generate_model_gt_data.py --model qwen --input_file prompts.jsonl

Prompts are JSONL lines with `question`, or with `messages` (assistant messages are left out).
Answers go to {model}_math_final.jsonl, in input order. While they come they are kept in
{model}_math.jsonl, so that the same command goes on where an interrupted one stopped.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from hopscotch_common.cli import (
    ArgumentParser,
    InputError,
    check_writable,
    command,
    logger,
    positive_int,
    seed_everything,
    write_atomic,
)
from hopscotch_common.generation import (
    BACKENDS,
    Answer,
    EngineOptions,
    generate,
    resolve_backend,
    stop_token_ids,
    tensor_parallel_size,
)
from hopscotch_common.models import ModelRef, add_model_arguments, load_tokenizer, read_config
from hopscotch_common.prompts import HUB_PROMPTS, LOCAL_PROMPTS, find_prompts, tokenize
from hopscotch_common.report import describe_run, write_report


def output_paths(output_file: Path | None, model: ModelRef) -> tuple[Path, Path, Path]:
    """(final, partial, report) files; by default {model}_math_final.jsonl, {model}_math.jsonl, …"""
    final = output_file or Path(f"{model.name}_math_final.jsonl")
    stem = final.name.removesuffix(".jsonl")
    partial = stem.removesuffix("_final") if stem.endswith("_final") else f"{stem}.partial"
    return final, final.with_name(f"{partial}.jsonl"), final.with_name(f"{stem}_report.json")


def answer_missing(partial, tokenizer, stop_ids: set[int], answers: Iterable[Answer]) -> None:
    """Run the engine's `answers` iterator to its end, keeping each answer as it comes."""
    from tqdm import tqdm

    missing = partial.missing()
    tokens = 0
    total = len(partial.prompts)
    with partial.open() as file, tqdm(total=total, initial=total - len(missing), unit="answer") as bar:
        started = time.perf_counter()
        for answer in answers:
            index = missing[answer.index]
            text_ids = [token for token in answer.token_ids if token not in stop_ids]
            text = tokenizer.decode(text_ids, skip_special_tokens=True)
            record = {
                "index": index,
                "messages": [*partial.prompts[index], {"role": "assistant", "content": text}],
                "finish_reason": answer.finish_reason,
                "num_generated_tokens": len(answer.token_ids),
            }
            partial.add(file, record)
            tokens += len(answer.token_ids)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update()


def select_answers(records: dict[int, dict], keep_truncated: bool) -> tuple[list[dict], dict]:
    """(answers to write, in input order, figures). Truncated and empty answers are left out."""
    ordered = [records[index] for index in sorted(records)]
    empty = [r for r in ordered if not r["messages"][-1]["content"].strip()]
    truncated = [r for r in ordered if r["finish_reason"] == "length" and r not in empty]
    dropped = empty if keep_truncated else empty + truncated
    kept = [{k: v for k, v in r.items() if k != "index"} for r in ordered if r not in dropped]
    figures = {
        "prompts": len(ordered),
        "answers": len(kept),
        "truncated": len(truncated),
        "truncated_dropped": 0 if keep_truncated else len(truncated),
        "empty_dropped": len(empty),
        "generated_tokens": sum(r["num_generated_tokens"] for r in ordered),
    }
    return kept, figures


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--input_file",
        type=Path,
        help="JSONL prompts with 'question' or 'messages'; default: for smollm the embedded problems, "
        f"otherwise {LOCAL_PROMPTS} in this folder, otherwise {HUB_PROMPTS} from the hub",
    )
    parser.add_argument(
        "--output_file",
        type=Path,
        help="where the answers go, JSONL (default: {model}_math_final.jsonl)",
    )
    parser.add_argument("--num_samples", type=positive_int, help="answer only the first so many prompts")
    parser.add_argument("--max_tokens", type=positive_int, default=4096, help="tokens an answer may have")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="engine; auto: vllm where it can run, otherwise transformers",
    )
    parser.add_argument(
        "--tensor_parallel_size",
        type=positive_int,
        help="vllm: GPUs that share the model (default: as many as divide its attention heads)",
    )
    parser.add_argument(
        "--max_tokens_per_batch",
        type=positive_int,
        default=32768,
        help="tokens of KV cache, padding included, that all answers in progress may take "
        "(transformers, and vllm on a CPU); lower it when memory runs out",
    )
    parser.add_argument(
        "--keep_truncated",
        action="store_true",
        help="keep answers that were cut off at --max_tokens instead of dropping them",
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from hopscotch_common.partial_answers import PartialAnswers  # imports torch, so after --help

    final, partial_file, report_file = output_paths(args.output_file, args.model)
    check_writable(final.parent)
    options = EngineOptions(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EngineOptions)}
    )
    prompts = find_prompts(args.input_file, args.model)[: args.num_samples]
    backend = resolve_backend(options)
    config = read_config(args.model)
    if backend == "vllm":
        tensor_parallel_size(args.tensor_parallel_size, config.num_attention_heads)
    tokenizer = load_tokenizer(args.model)
    prompt_ids = tokenize(prompts, tokenizer, config.max_position_embeddings)
    partial = PartialAnswers(
        partial_file,
        {"model": args.model.source, "dtype": args.dtype, "max_tokens": args.max_tokens},
        [prompt.messages for prompt in prompts],
        [prompt.where for prompt in prompts],
    )
    missing = partial.missing()
    logger.info(
        "%d prompts, %d answered before; %s answers the rest",
        len(prompts),
        len(prompts) - len(missing),
        backend,
    )
    if missing:
        seed_everything(args.seed)
        answers = generate(args.model, [prompt_ids[i] for i in missing], args.max_tokens, options)
        stop_ids = stop_token_ids(args.model.folder(weights=False), tokenizer)
        answer_missing(partial, tokenizer, stop_ids, answers)
    kept, figures = select_answers(partial.records, args.keep_truncated)
    if not kept:
        raise InputError(
            f"no answer is left of {len(prompts)}: {figures['truncated_dropped']} were cut off at "
            f"--max_tokens {args.max_tokens} (see --keep_truncated), {figures['empty_dropped']} are empty"
        )
    write_atomic(final, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    write_report(report_file, describe_run(vars(args)) | {"backend": backend} | figures)
    print(
        f"{final}: {figures['answers']} answers to {figures['prompts']} prompts "
        f"({figures['truncated_dropped']} truncated and {figures['empty_dropped']} empty ones dropped), "
        f"{figures['generated_tokens']} tokens generated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
