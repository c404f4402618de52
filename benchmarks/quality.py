"""How good a model with skipped attention blocks still is: accuracy, held-out figures, by number of blocks.

    python benchmarks/quality.py --model ./qwen05 --data_path data/qwen05-processed-data/data.jsonl \\
        --selection qwen05_block_selection.json --test_file gsm8k_test.jsonl --dtype bfloat16
    python benchmarks/quality.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --selection smollm_block_selection.json --tasks --counts 4 8
    python benchmarks/quality.py --model ./qwen05 --table --plot quality_qwen05.svg

For each number of skipped blocks (the first of the selection) and each variant of the scales it runs the
project's own scripts: `unscaled_ckpt.py` or `param_scale.py`, which hold out the same answers each time,
and exports the best epoch (maps in skipped blocks' place: the checkpoint itself, by the plugin). vLLM then
answers with that, greedily: what is judged is what is served.

- gsm8k: problems of --test_file, in the model's chat template; the number is read out of the answer by
  `problems.parse_answer`: the last \\boxed{…}, else what follows "####", else the last number.
- puzzles: generated arithmetic and logic (`problems.puzzles`), which no scales were trained on.

Results go to benchmarks/results/quality_{model}.json, written after each figure; the same command goes on
where it was interrupted. Checkpoints and answers lie in --work. `--table` prints Markdown, `--plot` draws.
"""

import argparse
import hashlib
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
from growing import GrowingResults
from matplotlib.figure import Figure
from problems import Problem, gsm8k, parse_answer, puzzles

from hopscotch_common.answers.engines import kv_bytes_per_token
from hopscotch_common.answers.prompts import Prompt, tokenize
from hopscotch_common.errors import InputError
from hopscotch_common.loading import read_config
from hopscotch_common.models import model_ref
from hopscotch_common.report.drawing import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    VERMILION,
    WIDTH,
    legend_below,
    render,
    styled,
)
from hopscotch_common.tokenization import load_tokenizer, stop_token_ids
from hopscotch_common.writing import write_json

# What stands in for skipped blocks: nothing, trained scales, maps of a rank as fitted, both.
VARIANTS = ("unscaled", "layer-ce", "layer-kl", "channel-ce", "channel-kl", "rank16", "channel-kl-rank16")
TASKS = ("gsm8k", "puzzles")
CACHED_TOKENS = 49152  # of KV cache in vLLM
STDERR = 2  # the descriptor: where what is run here shall print


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", required=True, help="as the scripts take it; its name is that of the results"
    )
    parser.add_argument("--data_path", type=Path, help="processed data of step 2, to train and hold out")
    parser.add_argument("--selection", type=Path, help="report of block_selection.py")
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="blocks to skip")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--dtype", default="float32", help="of search, training and vLLM")
    group = parser.add_argument_group("training of the scales")
    group.add_argument("--max_samples", type=int, help="use the first so many answers")
    group.add_argument("--validation_split", type=float, default=0.2)
    group.add_argument("--num_epochs", type=int, default=2)
    group.add_argument("--learning_rate", type=float, default=3e-3)
    group.add_argument("--batch_size", type=int, default=4)
    group = parser.add_argument_group("answers")
    group.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS, help="none: held-out figures only")
    group.add_argument("--test_file", type=Path, help="GSM8K problems that nothing else uses (JSONL)")
    group.add_argument("--problems", type=int, default=300, help="the first so many of --test_file")
    group.add_argument("--puzzles", type=int, default=100)
    group.add_argument("--max_tokens", type=int, default=400)
    parser.add_argument("--work", type=Path, help="folder of checkpoints (default: quality_{model})")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/quality_{model}.json")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, measure nothing")
    parser.add_argument("--plot", type=Path, help="draw the results (PNG, PDF, SVG), measure nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
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


def rank_of(variant: str) -> int:
    return int(variant.partition("rank")[2] or 0)


def make_unscaled(arguments: argparse.Namespace, blocks: Sequence[int], variant: str, folder: Path) -> Path:
    """Make the checkpoint without trained scales; what is served: it, with maps, or its export."""
    words = ["--model", arguments.model.source, "--blocks_to_skip", *blocks, "--output_dir", folder]
    if rank_of(variant):
        words += ["--replacement_rank", rank_of(variant), "--data_path", arguments.data_path]
        run_script("unscaled_ckpt.py", *words, "--dtype", arguments.dtype)
        return folder / f"{arguments.model.name}_unscaled"
    run_script("unscaled_ckpt.py", *words, "--export", export_format(blocks))
    return folder / f"{arguments.model.name}_unscaled_{export_format(blocks)}"


def train_scales(
    arguments: argparse.Namespace, blocks: Sequence[int], variant: str, folder: Path, export: bool
) -> Path | None:
    """Train a variant of the scales, as far as it is not; the folder of what is served, if something is."""
    granularity, loss, *_ = variant.split("-")
    words = ["--model", arguments.model.source, "--data_path", arguments.data_path]
    words += ["--blocks_to_skip", *blocks, "--granularity", granularity, "--loss", loss]
    for name in ("num_epochs", "learning_rate", "batch_size", "validation_split", "max_samples", "dtype"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", getattr(arguments, name)]
    words += ["--output_dir", folder, "--resume"]
    if rank_of(variant):
        run_script("param_scale.py", *words, "--replacement_rank", rank_of(variant))
        best = json.loads((folder / "report.json").read_text())["best_epoch"]
        return folder / f"{arguments.model.name}_scaled_epoch_{best}" if export else None
    run_script("param_scale.py", *words, *(["--export", export_format(blocks)] if export else []))
    return folder / f"{arguments.model.name}_scaled_{export_format(blocks)}" if export else None


def held_out(report: dict, which: str) -> dict:
    """A report's held-out figures (original, unscaled or scaled) of the best epoch, and perplexity."""
    (figures,) = [e["held_out"][which] for e in report["epochs"] if e["epoch"] == report["best_epoch"]]
    return figures | {"perplexity": math.exp(figures["cross_entropy"])}


def all_problems(arguments: argparse.Namespace) -> dict[str, list[Problem]]:
    """The problems of each task that is asked."""
    found = {}
    if "gsm8k" in arguments.tasks:
        found["gsm8k"] = gsm8k(arguments.test_file, arguments.problems)
    if "puzzles" in arguments.tasks:
        found["puzzles"] = puzzles(arguments.puzzles)
    return found


def ask(arguments: argparse.Namespace, served: Path, problems: dict[str, list[Problem]], path: Path) -> None:
    """Let a served model answer; {task: [{text, tokens, finish_reason}]} goes to the file `path`."""
    tokenizer, config = load_tokenizer(arguments.model), read_config(arguments.model)
    prompts = {
        task: [Prompt([{"role": "user", "content": problem.question}], task) for problem in of_task]
        for task, of_task in problems.items()
    }
    job = {
        "served": str(served),
        "dtype": arguments.dtype,
        "prompts": {task: tokenize(of_task, tokenizer, config) for task, of_task in prompts.items()},
        "max_tokens": arguments.max_tokens,
        "stop_ids": sorted(stop_token_ids(arguments.model.folder(), tokenizer)),
        "kv_bytes": CACHED_TOKENS * kv_bytes_per_token(config, arguments.dtype),
        "answers": str(path),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    job_path = path.with_suffix(".job.json")
    job_path.write_text(json.dumps(job))
    command = [sys.executable, __file__, "--model", arguments.model.source, "--worker", str(job_path)]
    subprocess.run(command, check=True, stdout=STDERR)  # vLLM binds the process that it runs in
    job_path.unlink()


def run_worker(job: dict) -> None:
    """Answer a job's prompts with vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    longest = max(len(ids) for prompts in job["prompts"].values() for ids in prompts) + job["max_tokens"]
    settings = {}
    if current_platform.is_cpu():
        settings = {"kv_cache_memory_bytes": job["kv_bytes"], "gpu_memory_utilization": 0.05}
    llm = LLM(
        job["served"],
        dtype=job["dtype"],
        trust_remote_code=True,  # the config class of nemotron_nas
        max_model_len=longest,
        enforce_eager=True,
        **settings,
    )
    parameters = SamplingParams(temperature=0, max_tokens=job["max_tokens"], stop_token_ids=job["stop_ids"])
    answers = {}
    for task, prompts in job["prompts"].items():
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters)
        completions = [output.outputs[0] for output in outputs]
        answers[task] = [
            {"text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            for c in completions
        ]
    write_json(Path(job["answers"]), answers)


def score(problems: Sequence[Problem], answers: Sequence[dict]) -> dict:
    """Exact match of some answers: which are right ("1" a problem), and how many were cut off."""
    right = [
        parse_answer(reply["text"]) == problem.answer
        for problem, reply in zip(problems, answers, strict=True)
    ]
    return {
        "right": "".join("1" if r else "0" for r in right),
        "truncated": sum(reply["finish_reason"] == "length" for reply in answers),
        "mean_tokens": statistics.fmean(reply["tokens"] for reply in answers),
    }


def accuracy(right: str) -> tuple[float, float]:
    """(share, standard error) of "1" among "0" and "1"."""
    share = right.count("1") / len(right)
    return share, math.sqrt(share * (1 - share) / len(right))


def difference(right: str, reference: str) -> tuple[float, float]:
    """(mean, standard error) of the difference between answers to the same problems: pairs tell more."""
    differences = [int(a) - int(b) for a, b in zip(right, reference, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def figures_of(
    arguments: argparse.Namespace,
    blocks: Sequence[int],
    variant: str,
    problems: dict[str, list[Problem]],
    folder: Path,
) -> dict:
    """Train, export, ask, score: all figures of one variant. What lies in `folder` is not made again."""
    start = time.perf_counter()
    answers, figures = folder / "answers.json", {}
    missing = bool(problems) and not answers.is_file()
    served = None
    if variant == "original":
        served = arguments.model.folder()
    elif variant == "unscaled" or variant.startswith("rank"):
        served = make_unscaled(arguments, blocks, variant, folder) if missing else None
    else:
        served = train_scales(arguments, blocks, variant, folder, export=missing)
        report = json.loads((folder / "report.json").read_text())
        figures["best_epoch"] = report["best_epoch"]
        figures["held_out"] = {which: held_out(report, which) for which in ("original", "unscaled", "scaled")}
    if missing:
        ask(arguments, served, problems, answers)
        if variant != "original" and not rank_of(variant):
            shutil.rmtree(served)  # as large as the model, and quickly made again
    if problems:
        as_it_is = variant == "original" or rank_of(variant)
        figures["served"] = "as it is" if as_it_is else export_format(blocks)
        replies = json.loads(answers.read_text())
        figures |= {task: score(of_task, replies[task]) for task, of_task in problems.items()}
    return figures | {"seconds": time.perf_counter() - start}


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each number of blocks and variant; accuracies in percent with standard errors."""
    lines = [
        row(
            "blocks",
            "scales",
            "GSM8K, %",
            "less the original's",
            "puzzles, %",
            "less the original's",
            "perplexity",
            "KL",
            "agreement",
        ),
        "|---" * 9 + "|",
    ]
    original = next((f for f in figures if f["of"]["variant"] == "original"), {})
    for figure in sorted(figures, key=lambda f: (len(f["of"]["blocks"]), _position(f["of"]["variant"]))):
        blocks, variant = figure["of"]["blocks"], figure["of"]["variant"]
        cells = [len(blocks), variant.replace("-", ", ")]
        for task in TASKS:
            cells += _accuracy_cells(figure.get(task), original.get(task))
        lines.append(row(*cells, *_held_out_cells(_held_out_of(figures, blocks, variant))))
    return lines


def _position(variant: str) -> int:
    return VARIANTS.index(variant) if variant in VARIANTS else -1


def _accuracy_cells(task: dict | None, original: dict | None) -> list[str]:
    if task is None:
        return ["-", "-"]
    share, error = accuracy(task["right"])
    cells = [f"{100 * share:.1f} ± {100 * error:.1f}", "-"]
    if original is not None and original is not task:
        mean, error = difference(task["right"], original["right"])
        cells[1] = f"{100 * mean:+.1f} ± {100 * error:.1f}"
    return cells


def _held_out_of(figures: Sequence[dict], blocks: list[int], variant: str) -> dict | None:
    """Held-out figures; those of the original and of the unscaled skips stand with any trained variant."""
    for figure in figures:
        if "held_out" not in figure:
            continue
        if variant == "original":
            return figure["held_out"]["original"]
        if figure["of"]["blocks"] == blocks and variant in ("unscaled", figure["of"]["variant"]):
            return figure["held_out"]["unscaled" if variant == "unscaled" else "scaled"]
    return None


def _held_out_cells(figures: dict | None) -> tuple[str, ...]:
    if figures is None:
        return ("-",) * 3
    return f"{figures['perplexity']:.3f}", f"{figures['kl']:.4f}", f"{100 * figures['agreement']:.1f} %"


STYLES = {  # of the variants in a picture: label, colour, marker
    "unscaled": ("skipped, no scales", GREY, "o"),
    "layer-ce": ("four scales a layer, cross entropy", BLUE, "^"),
    "layer-kl": ("four scales a layer, KL", BLUE, "v"),
    "channel-ce": ("scales a channel, cross entropy", VERMILION, "D"),
    "channel-kl": ("scales a channel, KL", VERMILION, "s"),
    "rank16": ("maps of rank 16, as fitted", GREEN, "P"),
    "channel-kl-rank16": ("maps of rank 16 and scales a channel, KL", GREEN, "*"),
}


def draw(figures: Sequence[dict], model: str, path: Path) -> None:
    """Accuracy on GSM8K (with standard errors) and held-out KL over the blocks skipped, a line a variant.

    SystemExit where no accuracy was measured.
    """
    figure = quality_figure(figures, model)
    path.write_bytes(render(figure, path.suffix))


@styled
def quality_figure(figures: Sequence[dict], model: str) -> Figure:
    original = next((f for f in figures if f["of"]["variant"] == "original" and "gsm8k" in f), None)
    figures = [figure for figure in figures if "gsm8k" in figure]
    if original is None or len(figures) < 2:
        raise SystemExit("nothing to draw: measure gsm8k first, with --counts 0 and others")
    picture = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = picture.subplots(1, 2)
    measured = sorted({len(f["of"]["blocks"]) for f in figures} - {0})
    start, error = accuracy(original["gsm8k"]["right"])
    panels[0].axhspan(100 * (start - error), 100 * (start + error), color=FAINT)
    panels[0].axhline(100 * start, color=INK, linewidth=1, label="original (± standard error)")
    for number, (variant, (label, color, marker)) in enumerate(STYLES.items()):
        own = sorted(
            (f for f in figures if f["of"]["variant"] == variant), key=lambda f: len(f["of"]["blocks"])
        )
        if not own:
            continue
        counts = [len(f["of"]["blocks"]) for f in own]
        line = "-" if counts == measured else "none"  # none through what was not measured
        style = dict(color=color, marker=marker, label=label, markersize=6, linestyle=line)
        shares = [accuracy(f["gsm8k"]["right"]) for f in own]
        beside = [count + 0.06 * (number - 2) for count in counts]  # so that no error bar hides another
        centres, errors = ([100 * value for value in values] for values in zip(*shares, strict=True))
        panels[0].errorbar(beside, centres, yerr=errors, capsize=3, **style)
        kl = [(_held_out_of(figures, f["of"]["blocks"], variant) or {}).get("kl", math.nan) for f in own]
        panels[1].plot(counts, kl, **style)
    panels[0].set_ylabel(f"GSM8K, {len(original['gsm8k']['right'])} problems: right (%)")
    panels[1].set_ylabel("held out: KL to the original\n(nats per token)")
    for panel in panels:
        panel.set_xlabel("attention blocks skipped")
        panel.set_xticks(sorted({len(f["of"]["blocks"]) for f in figures}))
        panel.set_xlim(-0.3, max(len(f["of"]["blocks"]) for f in figures) + 0.3)
        panel.set_ylim(bottom=0)
    picture.suptitle(f"{model}: what is kept", x=0.01, ha="left")
    legend_below(picture, panels)
    return picture


def settings_of(arguments: argparse.Namespace) -> dict:
    """What all figures of a result file depend on."""
    names = ("dtype", "max_samples", "validation_split", "num_epochs", "learning_rate", "batch_size")
    names += ("tasks", "problems", "puzzles", "max_tokens")
    files = {"data": arguments.data_path, "test_file": arguments.test_file}
    return {
        "model": arguments.model.source,
        **{name: getattr(arguments, name) for name in names},
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path},
    }


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.worker:
        run_worker(json.loads(arguments.worker.read_text()))
        return
    name = Path(arguments.model).name.removesuffix(".gguf")
    result = arguments.result or measuring.RESULTS / f"quality_{name}.json"
    if arguments.table or arguments.plot:  # of a model that need not be here
        figures = json.loads(result.read_text())["figures"]
        if arguments.table:
            print("\n".join(table(figures)))
        if arguments.plot:
            draw(figures, name, arguments.plot)
        return
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
    results = GrowingResults(result, settings_of(arguments))
    problems = all_problems(arguments)
    work = arguments.work or Path(f"quality_{name}")
    for count in arguments.counts:
        for variant in arguments.variants if count else ["original"]:
            folder = work / f"{variant}_{count}"
            cell = (arguments, selected[:count], variant, problems, folder)
            results.measure(lambda cell=cell: figures_of(*cell), blocks=selected[:count], variant=variant)
            print("\n".join(table(results.figures)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
