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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from hopscotch_common.report import describe_run, write_report

EMBEDDED_PROMPTS = Path(__file__).parent / "examples" / "math_problems.jsonl"
LOCAL_PROMPTS = Path("gsm8k.jsonl")
HUB_PROMPTS = "openai/gsm8k"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """Messages to answer, and where they came from (file and line) for error messages."""

    messages: list[dict]
    where: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file, every line checked. InputError names file and line."""
    from hopscotch_common.data import read_jsonl

    return [prompt_of(record, f"{path}, line {number}") for number, record in read_jsonl(path)]


def prompt_of(record: dict, where: str) -> Prompt:
    """The prompt of one record with `messages` or `question`; InputError when there is none."""
    from hopscotch_common.data import check_messages

    if "messages" in record:
        messages = record["messages"]
        if isinstance(messages, list):
            messages = [m for m in messages if not (isinstance(m, dict) and m.get("role") == "assistant")]
            if not messages and record["messages"]:
                raise InputError(f"{where}: only assistant messages, there is nothing to answer")
        messages = [
            {"role": message["role"], "content": message["content"]}
            for message in check_messages(messages, where)
        ]
        for message in messages:
            if message["role"] not in ROLES:
                raise InputError(f"{where}: role {message['role']!r} is not one of {', '.join(ROLES)}")
        if messages[-1]["role"] != "user":
            raise InputError(f"{where}: no user message after the system message")
        return Prompt(messages, where)
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: needs 'messages' or 'question' with text in it")
    return Prompt([{"role": "user", "content": question}], where)


def hub_prompts() -> list[Prompt]:
    """The training questions of openai/gsm8k; InputError when they cannot be fetched."""
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # without a network it would warn of each of its retries
    try:
        rows = load_dataset(HUB_PROMPTS, "main", split="train")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"{HUB_PROMPTS} cannot be fetched from the Hugging Face hub ({type(error).__name__}): "
            f"give prompts with --input_file, or put them in {LOCAL_PROMPTS} in this folder"
        ) from error
    return [prompt_of(row, f"{HUB_PROMPTS}, row {number}") for number, row in enumerate(rows, 1)]


def find_prompts(input_file: Path | None, model: ModelRef) -> list[Prompt]:
    """The prompts of --input_file, or else the default ones."""
    if input_file is not None:
        return read_prompts(input_file)
    if model.embedded:
        return read_prompts(EMBEDDED_PROMPTS)
    if LOCAL_PROMPTS.is_file():
        logger.info("prompts from %s in this folder", LOCAL_PROMPTS)
        return read_prompts(LOCAL_PROMPTS)
    return hub_prompts()


def tokenize(prompts: Sequence[Prompt], tokenizer, context: int) -> list[list[int]]:
    """Token ids of each prompt in the chat template, with the generation prompt.

    Raises InputError for one that the template refuses, or that leaves no room for an answer in
    a context of `context` tokens.
    """
    from jinja2 import TemplateError

    token_ids = []
    for prompt in prompts:
        try:
            ids = tokenizer.apply_chat_template(
                prompt.messages, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise InputError(f"{prompt.where}: the model's chat template refuses it: {error}") from error
        if len(ids) >= context:
            raise InputError(
                f"{prompt.where}: {len(ids)} tokens leave no room for an answer in the model's "
                f"context of {context}; shorten it or leave it out"
            )
        token_ids.append(ids)
    return token_ids


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
    write_report(report_file, describe_run(args) | {"backend": backend} | figures)
    print(
        f"{final}: {figures['answers']} answers to {figures['prompts']} prompts "
        f"({figures['truncated_dropped']} truncated and {figures['empty_dropped']} empty ones dropped), "
        f"{figures['generated_tokens']} tokens generated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
