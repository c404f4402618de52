"""Answers a second: both engines of step 1 against one prompt at a time.

    python benchmarks/generation.py --model smollm --runs 3
    python benchmarks/generation.py --model smollm --engines transformers --runs 3

One prompt at a time is stock `model.generate` in transformers. Its tokens/s do not depend on how
many prompts there are, so it answers every `--plain_every`-th of them. Each figure comes from a
process of its own, plain and engine in turn, `--runs` times; loading does not count. Medians and
the median of the rounds' ratios go to benchmarks/results/generation_cpu.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import measuring

from hopscotch_common.answers.engines import ENGINES, EngineOptions, vllm_obstacle
from hopscotch_common.models import load_tokenizer, model_ref, read_config

BARS = {"vllm": 8, "transformers": 4}  # times the rate of one prompt at a time, on 2 cores


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_ref, required=True)
    parser.add_argument("--input_file", type=Path, default=measuring.ROOT / "examples/math_problems.jsonl")
    parser.add_argument("--num_samples", type=int, default=64)
    parser.add_argument("--plain_every", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--engines", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--worker", choices=["plain", *BARS], help=argparse.SUPPRESS)
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

    model = AutoModelForCausalLM.from_pretrained(arguments.model.folder(), dtype="auto").eval()
    prompts = read_prompts(arguments)[:: arguments.plain_every]

    def answer(prompt: list[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        return output[0, len(prompt) :].tolist()

    answer(prompts[0], 4)  # warm up
    start = time.perf_counter()
    answers = [answer(prompt, arguments.max_tokens) for prompt in prompts]
    return rate(answers, time.perf_counter() - start) | {"first": answers[0]}


def engine(arguments: argparse.Namespace) -> dict:
    """An engine of step 1, all prompts at once, with the defaults of the script."""
    prompts = read_prompts(arguments)
    longest = max(map(len, prompts)) + arguments.max_tokens
    config = read_config(arguments.model)
    loaded = ENGINES[arguments.worker](
        arguments.model, config, EngineOptions(backend=arguments.worker), longest
    )
    list(loaded.answers([[7] * 20], [4]))  # warm up, with nothing that a prefix cache could use
    start = time.perf_counter()
    answers = list(loaded.answers(prompts, [arguments.max_tokens] * len(prompts)))
    result = rate([answer.token_ids for answer in answers], time.perf_counter() - start)
    return result | {"first": next(answer.token_ids for answer in answers if answer.index == 0)}


def rate(answers: list[list[int]], seconds: float) -> dict:
    tokens = sum(map(len, answers))
    return {
        "answers": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "load_average": os.getloadavg()[0],
    }


def run_worker(kind: str) -> dict:
    command = [sys.executable, *sys.argv, "--worker", kind]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    measured = json.loads(result.stdout.splitlines()[-1])
    print(f"{kind}: {measured['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    return measured


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.worker:
        print(json.dumps(plain(arguments) if arguments.worker == "plain" else engine(arguments)))
        return
    if "vllm" in arguments.engines and (obstacle := vllm_obstacle()):
        sys.exit(f"{obstacle}; leave it out with --engines transformers")
    kinds = ["plain", *arguments.engines]
    runs = {kind: [] for kind in kinds}
    for _ in range(arguments.runs):
        for kind in kinds:
            runs[kind].append(run_worker(kind))
    rates = {kind: [run["tokens_per_second"] for run in runs[kind]] for kind in kinds}
    content = {
        "prompts": arguments.num_samples,
        "options": dataclasses.asdict(EngineOptions()),
        "tokens_per_second": {kind: measuring.median(values) for kind, values in rates.items()},
        "times_one_prompt_at_a_time": {
            kind: measuring.median(
                [ours / one for ours, one in zip(rates[kind], rates["plain"], strict=True)]
            )
            for kind in arguments.engines
        },
        "bars": {kind: BARS[kind] for kind in arguments.engines},
        "same_first_answer": {
            kind: all(run["first"] == runs["plain"][0]["first"] for run in runs[kind])
            for kind in arguments.engines
        },
        "runs": {
            kind: [{k: v for k, v in run.items() if k != "first"} for run in runs[kind]] for kind in kinds
        },
    }
    measuring.save("generation_cpu", content)
    print(json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=2))


if __name__ == "__main__":
    main()
