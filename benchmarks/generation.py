"""Answers a second: both engines of step 1, and transformers' own batching, against one prompt at a time.

    python benchmarks/generation.py --model smollm --runs 3
    python benchmarks/generation.py --model smollm --engines transformers continuous --dtype bfloat16 \\
        --result generation_bfloat16_cpu

One prompt at a time is stock `model.generate` in transformers. Its tokens/s do not depend on how
many prompts there are, so it answers every `--plain_every`-th of them. `continuous` is transformers'
own continuous batching (a paged KV cache), which step 1 would use if it were faster. Each figure comes
from a process of its own, `--runs` times, every second round in reverse order; loading does not count.
Medians and the median of the rounds' ratios go to benchmarks/results/.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import measuring

from hopscotch_common.answers import EngineOptions
from hopscotch_common.answers.decoding import Answer
from hopscotch_common.answers.engines import ENGINES, vllm_obstacle
from hopscotch_common.loading.loader import read_config
from hopscotch_common.loading.models import model_ref
from hopscotch_common.loading.tokenization import load_tokenizer, stop_token_ids

BARS = {"vllm": 8, "transformers": 4}  # times the rate of one prompt at a time, on 2 cores
KINDS = [*BARS, "continuous"]
RATES = ("tokens_per_second", "tokens_per_cpu_second")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_ref, required=True)
    parser.add_argument("--input_file", type=Path, default=measuring.ROOT / "examples/math_problems.jsonl")
    parser.add_argument("--num_samples", type=int, default=64)
    parser.add_argument("--plain_every", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engines", nargs="+", choices=KINDS, default=list(BARS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--result", default="generation_cpu", help="name of the file in benchmarks/results/")
    parser.add_argument("--worker", choices=["plain", *KINDS], help=argparse.SUPPRESS)
    return parser


def read_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids of the first prompts of the input file."""
    from hopscotch_common.files import read_jsonl

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
    import torch
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
    return rate(answers, start) | {"sample": answers}


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


def engine(arguments: argparse.Namespace) -> dict:
    """An engine of step 1, all prompts at once, with the defaults of the script."""
    prompts = read_prompts(arguments)
    longest = max(map(len, prompts)) + arguments.max_tokens
    config = read_config(arguments.model)
    make = (ENGINES | {"continuous": ContinuousBatching})[arguments.worker]
    stop_ids = stop_token_ids(arguments.model.folder(), load_tokenizer(arguments.model))
    loaded = make(arguments.model, config, stop_ids, EngineOptions(dtype=arguments.dtype), longest)
    list(loaded.answers([[7] * 20], [4]))  # warm up, with nothing that a prefix cache could use
    start = clocks()
    answers = list(loaded.answers(prompts, [arguments.max_tokens] * len(prompts)))
    result = rate([answer.token_ids for answer in answers], start)
    by_index = {answer.index: answer.token_ids for answer in answers}
    return result | {"sample": [by_index[index] for index in range(0, len(prompts), arguments.plain_every)]}


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds; the latter count all threads of the process, and say more on a busy machine."""
    return time.perf_counter(), time.process_time()


def rate(answers: list[list[int]], start: tuple[float, float]) -> dict:
    """Tokens a second since `start`."""
    import torch

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


def count_equal(answers: list[list[int]], others: list[list[int]]) -> str:
    """How many answers are the same tokens."""
    equal = sum(answer == other for answer, other in zip(answers, others, strict=True))
    return f"{equal} of {len(answers)}"


def run_worker(kind: str) -> dict:
    command = [sys.executable, *sys.argv, "--worker", kind]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    measured = json.loads(result.stdout.splitlines()[-1])
    rates = (
        f"{measured['tokens_per_second']:.1f} tokens/s, {measured['tokens_per_cpu_second']:.1f} a CPU second"
    )
    print(f"{kind}: {rates}", file=sys.stderr)
    return measured


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.worker:
        print(json.dumps(plain(arguments) if arguments.worker == "plain" else engine(arguments)))
        return
    if "vllm" in arguments.engines and (obstacle := vllm_obstacle(read_config(arguments.model))):
        sys.exit(f"{obstacle}; leave it out with --engines transformers")
    kinds = ["plain", *arguments.engines]
    runs = {kind: [] for kind in kinds}
    for number in range(arguments.runs):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            runs[kind].append(run_worker(kind))

    def ratio(kind: str, other: str, rate: str) -> float:
        return measuring.median([a[rate] / b[rate] for a, b in zip(runs[kind], runs[other], strict=True)])

    content = {
        "prompts": arguments.num_samples,
        "options": dataclasses.asdict(EngineOptions(dtype=arguments.dtype)),
        "tokens_per_second": {
            kind: measuring.median([run["tokens_per_second"] for run in runs[kind]]) for kind in kinds
        },
        **{
            f"times_{base}": {
                rate: {kind: ratio(kind, base, rate) for kind in kinds if kind != base} for rate in RATES
            }
            for base in ("plain", "continuous")
            if base in kinds
        },
        "bars": {kind: BARS[kind] for kind in arguments.engines if kind in BARS},
        "answers_equal_to_plain": {
            kind: [count_equal(run["sample"], runs["plain"][0]["sample"]) for run in runs[kind]]
            for kind in arguments.engines
        },
        "runs": {
            kind: [{k: v for k, v in run.items() if k != "sample"} for run in runs[kind]] for kind in kinds
        },
    }
    measuring.save(arguments.result, content)
    print(json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=2))


if __name__ == "__main__":
    main()
