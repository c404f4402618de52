"""Speed of answering: both engines of step 1 and transformers' own batching, against one prompt at a time.

    python benchmarks/generation.py --model smollm --runs 3
    python benchmarks/generation.py --model smollm --engines transformers continuous --dtype bfloat16 \\
        --result generation_bfloat16_cpu.json
    python benchmarks/generation.py --model smollm --table

One prompt at a time is stock `model.generate` in transformers. Its tokens/s do not depend on the number of
prompts, so it answers only every `--plain_every`-th. `continuous` is transformers' own continuous batching
(a paged KV cache), which step 1 would use if it were faster. Each figure comes from a process of its own,
`--runs` times, every second round in reverse order; loading does not count. The table has medians, and
medians of the rounds' ratios. Results go to benchmarks/results/generation_cpu.json after each figure.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import measuring
import torch
from measuring import median, row, title

from hopscotch_common.answers import EngineOptions
from hopscotch_common.answers.decoding import Answer
from hopscotch_common.answers.engines import ENGINES, vllm_obstacle
from hopscotch_common.files import read_jsonl
from hopscotch_common.loading.loader import read_config
from hopscotch_common.loading.models import model_ref
from hopscotch_common.loading.tokenization import load_tokenizer, stop_token_ids

KINDS = ("vllm", "transformers", "continuous")
RATES = {"tokens_per_second": "tokens/s", "tokens_per_cpu_second": "tokens a CPU second"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_ref, required=True)
    parser.add_argument("--input_file", type=Path, default=measuring.ROOT / "examples/math_problems.jsonl")
    parser.add_argument("--num_samples", type=int, default=64)
    parser.add_argument("--plain_every", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engines", nargs="+", choices=KINDS, default=list(KINDS[:2]))
    parser.add_argument("--runs", type=int, default=3)
    measuring.add_result_arguments(parser, "generation_cpu")
    return parser


def read_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids of the first prompts of the input file."""
    tokenizer = load_tokenizer(arguments.model)
    questions = [record["question"] for _, record in read_jsonl(arguments.input_file)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions[: arguments.num_samples]
    ]


def plain(arguments: argparse.Namespace) -> dict:
    """Stock `model.generate`, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model.folder(), dtype=arguments.dtype).eval()
    prompts = read_prompts(arguments)[:: arguments.plain_every]

    def answer(prompt: list[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        return output[0, len(prompt) :].tolist()

    answer(prompts[0], 4)  # warm up
    start = clocks()
    answers = [answer(prompt, arguments.max_tokens) for prompt in prompts]
    return rate(answers, start) | {"sample": digests(answers)}


class ContinuousBatching:
    """transformers' own continuous batching, behind the interface of the engines of step 1.

    On a CPU it has one attention kernel to offer: sdpa over all requests as one packed sequence, with
    a dense mask of all their queries by all their cached tokens, so the work of its attention grows
    with the square of the requests at once.
    """

    def __init__(self, ref, config, stop_ids: set[int], options: EngineOptions, longest: int):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            ref.folder(), dtype=options.dtype, attn_implementation="sdpa"
        ).eval()
        self.stop_ids = stop_ids

    def answers(self, prompts: Sequence[list[int]], limits: Sequence[int]) -> Iterator[Answer]:
        """Answer each prompt with at most its limit of tokens; yields answers as they end."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        generation = GenerationConfig(do_sample=False, eos_token_id=sorted(self.stop_ids), pad_token_id=0)
        # 32 requests were the fastest of 8, 16, 24, 32 and 64, in float32 and in bfloat16
        batching = ContinuousBatchingConfig(max_requests_per_batch=32, max_batch_tokens=512, num_blocks=64)
        with self.model.continuous_batching_context_manager(
            generation, continuous_batching_config=batching
        ) as m:
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
                m.add_request(prompt, request_id=str(index), max_new_tokens=limit)
            for _ in prompts:
                output = m.get_result()
                if output is None or output.error:
                    raise RuntimeError(f"continuous batching failed: {output and output.error}")
                stopped = output.generated_tokens[-1] in self.stop_ids
                yield Answer(int(output.request_id), output.generated_tokens, "stop" if stopped else "length")


def engine(arguments: argparse.Namespace, kind: str) -> dict:
    """An engine of step 1, all prompts at once, with the defaults of the script."""
    prompts = read_prompts(arguments)
    longest = max(map(len, prompts)) + arguments.max_tokens
    config = read_config(arguments.model)
    make = (ENGINES | {"continuous": ContinuousBatching})[kind]
    stop_ids = stop_token_ids(arguments.model.folder(), load_tokenizer(arguments.model))
    loaded = make(arguments.model, config, stop_ids, EngineOptions(dtype=arguments.dtype), longest)
    list(loaded.answers([[7] * 20], [4]))  # warm up, with nothing that a prefix cache could use
    start = clocks()
    answers = list(loaded.answers(prompts, [arguments.max_tokens] * len(prompts)))
    result = rate([answer.token_ids for answer in answers], start)
    by_index = {answer.index: answer.token_ids for answer in answers}
    sample = [by_index[index] for index in range(0, len(prompts), arguments.plain_every)]
    return result | {"sample": digests(sample)}


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds; the latter count all threads of the process, and say more on a busy machine."""
    return time.perf_counter(), time.process_time()


def rate(answers: list[list[int]], start: tuple[float, float]) -> dict:
    """Tokens a second since `start`."""
    seconds, cpu_seconds = (now - then for now, then in zip(clocks(), start, strict=True))
    tokens = sum(map(len, answers))
    return {
        "answers": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
    }


def digests(answers: list[list[int]]) -> list[str]:
    """What tells answers apart, shorter than their tokens."""
    return [hashlib.sha256(json.dumps(answer).encode()).hexdigest()[:12] for answer in answers]


def measure(arguments: argparse.Namespace, kind: str, expected: list[str] | None) -> dict:
    """The rates of one kind. expected: the sample of one prompt at a time, where it is known."""
    if kind == "plain":
        return measuring.apart(plain, arguments)
    found = measuring.apart(engine, arguments, kind)
    pairs = zip(found.pop("sample"), expected or (), strict=bool(expected))
    equal = [answer == other for answer, other in pairs]
    return found | {"equal_to_plain": f"{sum(equal)} of {len(equal)}"}


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each kind, medians over rounds; ratios are taken within a round."""
    runs: dict[str, dict[int, dict]] = {}
    for figure in figures:
        runs.setdefault(figure["of"]["kind"], {})[figure["of"]["run"]] = figure
    bases = [base for base in ("plain", "continuous") if base in runs]
    whats = ["", *(f", times {base}" for base in bases)]
    lines = title("engine", *(f"{rate}{what}" for rate in RATES.values() for what in whats), "as plain")
    for kind, own in runs.items():
        cells = []
        for rate in RATES:
            cells.append(f"{median([run[rate] for run in own.values()]):.1f}")
            for base in bases:
                both = own.keys() & runs[base].keys()
                cells.append(f"{median([own[run][rate] / runs[base][run][rate] for run in both]):.2f}")
        equal = dict.fromkeys(run.get("equal_to_plain", "-") for run in own.values())
        lines.append(row(kind, *cells, ", ".join(equal)))
    return lines


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    path = arguments.result or measuring.RESULTS / "generation_cpu.json"
    if not arguments.table:
        if "vllm" in arguments.engines and (obstacle := vllm_obstacle(read_config(arguments.model))):
            raise SystemExit(f"{obstacle}; leave it out with --engines transformers")
        names = "model input_file num_samples plain_every max_tokens dtype"
        results = measuring.Results(path, measuring.settings_of(arguments, names))
        kinds, expected = ["plain", *arguments.engines], None
        for number in range(arguments.runs):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                found = results.measure({"kind": kind, "run": number}, measure, arguments, kind, expected)
                expected = expected or found.get("sample")
    print("\n".join(table(measuring.figures_in(path))))


if __name__ == "__main__":
    main()
