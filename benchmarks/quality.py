"""How good a model with skipped attention blocks still is: accuracy, held-out figures, by number of blocks.

    python benchmarks/quality.py --model ./qwen05 --data_path data/qwen05-processed-data/data.jsonl \\
        --selection qwen05_block_selection.json --test_file gsm8k_test.jsonl --dtype bfloat16
    python benchmarks/quality.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --selection smollm_block_selection.json --tasks --counts 4 8
    python benchmarks/quality.py --model ./qwen05 --table --plot quality_qwen05.svg
    python benchmarks/quality.py --model ./qwen05 --table --less unscaled

For each number of skipped blocks (the first of the selection) and each variant of the scales, it runs the
project's own scripts, `unscaled_ckpt.py` or `param_scale.py`, which hold out the same answers each time, and
exports the best epoch. vLLM then answers greedily with the export, or, with maps in the skipped blocks'
place, with the checkpoint itself, by the plugin: what is judged is what is served.

- gsm8k: problems of --test_file, in the model's chat template; the number is read out of the answer by
  `problems.parse_answer`: the last \\boxed{…}, else what follows "####", else the last number.
- puzzles: generated arithmetic and logic (`problems.puzzles`), which no scales were trained on.
- functions: Python to write (`functions`), which nothing was trained on either. The code runs here, in
  processes of its own: with limits, but not in a sandbox.

Results go to benchmarks/results/quality_{model}.json, written after each figure; after an interruption the
same command continues. Checkpoints and answers are kept in --work, and what is there is not asked again.
`--table` prints Markdown, `--plot` draws.
Differences are over the same problems, from the original or, with --less, from a variant with as many blocks
skipped (in another result file with --less_in).
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import measuring
from functions import FunctionProblem, functions
from problems import Problem, gsm8k, puzzles
from quality_tables import TASKS, VARIANTS, draw, rank_of, table

from hopscotch_common.answers.engines import kv_bytes_per_token
from hopscotch_common.answers.prompts import Prompt, tokenize
from hopscotch_common.errors import InputError
from hopscotch_common.files import write_json, write_lines
from hopscotch_common.loading.loader import read_config
from hopscotch_common.loading.models import model_ref
from hopscotch_common.loading.tokenization import load_tokenizer, stop_token_ids
from hopscotch_common.report import plots
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import load_samples, split_samples

Task = Sequence[Problem | FunctionProblem]
CACHED_TOKENS = 49152  # of KV cache in vLLM
STDERR = 2  # the descriptor: where what is run here shall print


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="as the scripts take it; its name is the results'")
    parser.add_argument("--data_path", type=Path, help="processed data of step 2, to train and hold out")
    parser.add_argument("--selection", type=Path, help="report of block_selection.py")
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="blocks to skip")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", default="float32", help="of search, training and vLLM")
    group = parser.add_argument_group("training of the scales")
    group.add_argument("--max_samples", type=int, help="use the first so many answers")
    group.add_argument("--validation_split", type=float, default=0.2)
    group.add_argument("--num_epochs", type=int, default=2)
    group.add_argument("--learning_rate", type=float, default=3e-3)
    group.add_argument("--batch_size", type=int, default=4)
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="none: held-out figures only"
    )
    group.add_argument("--test_file", type=Path, help="GSM8K problems that nothing else uses (JSONL)")
    group.add_argument("--problems", type=int, default=300, help="the first so many of --test_file")
    group.add_argument("--puzzles", type=int, default=100)
    group.add_argument("--functions", type=int, default=120)
    group.add_argument("--max_tokens", type=int, default=400)
    parser.add_argument("--work", type=Path, help="folder of checkpoints (default: quality_{model})")
    measuring.add_result_arguments(parser, "quality_{model}")
    parser.add_argument(
        "--less", choices=VARIANTS, help="table: what differences are to, if not the original"
    )
    parser.add_argument("--less_in", type=Path, help="table: the result file of --less, if another")
    parser.add_argument("--plot", type=Path, help="draw the results (PNG, PDF, SVG), measure nothing")
    return parser


def run_script(*words: object) -> None:
    """Run one of the project's scripts as a user would; SystemExit with its complaint where it fails."""
    command = [sys.executable, str(measuring.ROOT / str(words[0])), *map(str, words[1:])]
    print("+", *command[1:], file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=STDERR).returncode:
        raise SystemExit(f"{words[0]} failed, see above")


def export_format(blocks: Sequence[int]) -> str:
    """nemotron_nas, which leaves the blocks out; it cannot leave out block 0, so that is served folded."""
    return "folded" if 0 in blocks else "nemotron_nas"


def make(arguments: argparse.Namespace, blocks: list[int], variant: str, folder: Path, export: bool) -> Path:
    """Make a variant, as far as it is not there; what is served: its export, or with maps the checkpoint."""
    name, rank = arguments.model.name, rank_of(variant)
    words = ["--model", arguments.model.source, "--blocks_to_skip", *blocks, "--output_dir", folder]
    words += ["--replacement_rank", rank] if rank else ["--export", export_format(blocks)] if export else []
    exported = "" if rank else f"_{export_format(blocks)}"
    if variant == "unscaled" or variant.startswith("rank"):
        words += ["--data_path", trained_on(arguments, folder), "--dtype", arguments.dtype] if rank else []
        run_script("unscaled_ckpt.py", *words)
        return folder / f"{name}_unscaled{exported}"
    granularity, loss, *_ = variant.split("-")
    words += ["--data_path", arguments.data_path, "--granularity", granularity, "--loss", loss, "--resume"]
    for option in ("num_epochs", "learning_rate", "batch_size", "validation_split", "max_samples", "dtype"):
        if getattr(arguments, option) is not None:
            words += [f"--{option}", getattr(arguments, option)]
    run_script("param_scale.py", *words)
    best = json.loads((folder / "report.json").read_text())["best_epoch"]
    return folder / f"{name}_scaled{exported or f'_epoch_{best}'}"


def trained_on(arguments: argparse.Namespace, folder: Path) -> Path:
    """A file of the answers that `param_scale.py` trains on, so that fitted maps are what it starts from."""
    config = read_config(arguments.model)
    samples = load_samples(arguments.data_path, config.vocab_size, max_samples=arguments.max_samples)
    training, _ = split_samples(samples, arguments.validation_split, TrainingOptions.seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trained_on.jsonl"
    write_lines(path, [{"input_ids": each.input_ids, "labels": each.labels} for each in training])
    return path


def held_out(report: dict) -> dict[str, dict]:
    """A report's held-out figures of the best epoch: original, unscaled and scaled, with perplexity."""
    (epoch,) = [e["held_out"] for e in report["epochs"] if e["epoch"] == report["best_epoch"]]
    return {of: found | {"perplexity": math.exp(found["cross_entropy"])} for of, found in epoch.items()}


def ask(arguments: argparse.Namespace, served: Path, problems: dict[str, Task]) -> dict[str, list]:
    """Let a served model answer: {task: [{text, tokens, finish_reason}]}."""
    tokenizer, config = load_tokenizer(arguments.model), read_config(arguments.model)
    prompts = {
        task: tokenize(
            [Prompt([{"role": "user", "content": p.question}], task) for p in of_task], tokenizer, config
        )
        for task, of_task in problems.items()
    }
    longest = max(len(ids) for of_task in prompts.values() for ids in of_task) + arguments.max_tokens
    settings = {"dtype": arguments.dtype, "max_model_len": longest}
    cache = CACHED_TOKENS * kv_bytes_per_token(config, arguments.dtype)
    stop = sorted(stop_token_ids(arguments.model.folder(), tokenizer))
    sampling = {"temperature": 0, "max_tokens": arguments.max_tokens, "stop_token_ids": stop}
    # vLLM binds the process that it runs in
    return measuring.apart(answer_with_vllm, str(served), settings, cache, sampling, prompts)


def answer_with_vllm(
    served: str, settings: dict, kv_bytes: int, sampling: dict, prompts: dict[str, list[list[int]]]
) -> dict[str, list]:
    """What `ask` returns. settings: of LLM; kv_bytes: of its cache on a CPU; sampling: of SamplingParams."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        settings = settings | {"kv_cache_memory_bytes": kv_bytes, "gpu_memory_utilization": 0.05}
    # remote code: the config class of nemotron_nas
    llm = LLM(served, trust_remote_code=True, enforce_eager=True, **settings)
    answers = {}
    for task, of_task in prompts.items():
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in of_task], SamplingParams(**sampling))
        completions = [output.outputs[0] for output in outputs]
        answers[task] = [
            {"text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            for c in completions
        ]
    return answers


def score(problems: Task, answers: Sequence[dict]) -> dict:
    """Which answers are right ("1" a problem), and how many were cut off."""
    right = [problem.is_right(reply["text"]) for problem, reply in zip(problems, answers, strict=True)]
    return {
        "right": "".join("1" if r else "0" for r in right),
        "truncated": sum(reply["finish_reason"] == "length" for reply in answers),
        "mean_tokens": statistics.fmean(reply["tokens"] for reply in answers),
    }


def made_with(arguments: argparse.Namespace, blocks: list[int], variant: str) -> dict:
    """What the answers of a variant depend on, so that none of another run are taken for them."""
    names = "dtype problems puzzles functions max_tokens test_file"
    if variant != "original":
        names += " data_path max_samples validation_split" if rank_of(variant) or "-" in variant else ""
        names += " num_epochs learning_rate batch_size" if "-" in variant else ""
    return measuring.settings_of(arguments, f"model {names}") | {"blocks": blocks}


def figures_of(
    arguments: argparse.Namespace,
    blocks: list[int],
    variant: str,
    problems: dict[str, Task],
    folder: Path,
) -> dict:
    """Train, export, ask, score: all figures of one variant. What lies in `folder` is not made again."""
    start = time.perf_counter()
    answers, figures, served = folder / "answers.json", {}, arguments.model.folder()
    depends_on = made_with(arguments, blocks, variant)
    replies = json.loads(answers.read_text()) if answers.is_file() else {"made with": depends_on}
    if replies.get("made with") != depends_on:
        raise SystemExit(f"{answers}: of other settings than these; move it away, or name another --work")
    missing = {task: of_task for task, of_task in problems.items() if task not in replies}
    trained = "-" in variant
    if trained or missing and variant != "original":
        served = make(arguments, blocks, variant, folder, bool(missing))
    if trained:
        report = json.loads((folder / "report.json").read_text())
        figures = {"best_epoch": report["best_epoch"], "held_out": held_out(report)}
    exported = variant != "original" and not rank_of(variant)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        replies |= ask(arguments, served, missing)
        write_json(answers, replies)
        if exported:
            shutil.rmtree(served)  # as large as the model, and quickly made again
    if problems:
        figures["served"] = export_format(blocks) if exported else "as it is"
        figures |= {task: score(of_task, replies[task]) for task, of_task in problems.items()}
    return figures | {"seconds": time.perf_counter() - start}


def measure(arguments: argparse.Namespace, parser: argparse.ArgumentParser, path: Path) -> None:
    """Measure what `path` lacks."""
    try:
        arguments.model = model_ref(arguments.model)
    except InputError as error:
        parser.error(str(error))
    if not arguments.data_path or (max(arguments.counts) and not arguments.selection):
        parser.error("--data_path and --selection are needed to measure")
    if "gsm8k" in arguments.tasks and not arguments.test_file:
        parser.error("--test_file is needed for gsm8k; --tasks without a word asks nothing")
    selected = json.loads(arguments.selection.read_text())["skipped_blocks"] if arguments.selection else []
    if max(arguments.counts) > len(selected):
        raise SystemExit(f"{arguments.selection}: only {len(selected)} blocks")
    names = "model dtype max_samples validation_split num_epochs learning_rate batch_size"
    names += " tasks problems puzzles max_tokens data_path test_file"
    names += " functions" if "functions" in arguments.tasks else ""
    results = measuring.Results(path, measuring.settings_of(arguments, names))
    problems = {}
    if "gsm8k" in arguments.tasks:
        problems["gsm8k"] = gsm8k(arguments.test_file, arguments.problems)
    if "puzzles" in arguments.tasks:
        problems["puzzles"] = puzzles(arguments.puzzles)
    if "functions" in arguments.tasks:
        problems["functions"] = functions(arguments.functions)
    for count in arguments.counts:
        for variant in arguments.variants if count else ["original"]:
            blocks, work = selected[:count], arguments.work or Path(f"quality_{arguments.model.name}")
            cell = (arguments, blocks, variant, problems, work / f"{variant}_{count}")
            results.measure({"blocks": blocks, "variant": variant}, figures_of, *cell)


def paired(path: Path, other: Path) -> list[dict]:
    """The figures of another result file; SystemExit unless they are of the same problems, asked alike."""
    ours, theirs = (json.loads(file.read_text())["settings"] for file in (path, other))
    for name in ("model", "dtype", "test_file", "problems", "puzzles", "functions", "max_tokens"):
        values = ours.get(name), theirs.get(name)
        if None not in values and values[0] != values[1]:
            raise SystemExit(f"{other}: of another {name} than {path}; name a file of the same in --less_in")
    return measuring.figures_in(other)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    name, path = measuring.result_of(arguments, "quality")
    if not (arguments.table or arguments.plot):
        measure(arguments, parser, path)
    figures = measuring.figures_in(path)
    if arguments.table or not arguments.plot:
        others = paired(path, arguments.less_in) if arguments.less_in else ()
        print("\n".join(table(figures, arguments.less or "original", others)))
    if arguments.plot:
        arguments.plot.write_bytes(plots.render(draw(figures, name), arguments.plot.suffix))


if __name__ == "__main__":
    main()
