"""The search against the plain way: time for a candidate, memory, share of the machine's rate.

    python benchmarks/search.py --model smollm --data_path data/smollm-processed-data/data.jsonl --runs 3

Each figure comes from a process of its own, the kinds in turn, `--runs` times; medians are
reported. `--race` also runs a whole iteration with `--search race`. Writes
benchmarks/results/search_cpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import measuring

from hopscotch_common.loading import load_model
from hopscotch_common.models import model_ref
from hopscotch_common.training import TrainingOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_ref, required=True)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--max_samples", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--candidate", type=int, default=5, help="the block whose epoch is timed")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--race", action="store_true", help="also time one whole iteration of a race")
    parser.add_argument(
        "--worker", choices=["reference", "ours", "race", "screening", "matmul"], help=argparse.SUPPRESS
    )
    return parser


def reference(arguments: argparse.Namespace) -> dict:
    """One candidate the plain way, loading included, as that way loads a model a candidate."""
    import reference_search

    samples = reference_search.read_samples(arguments.data_path)[: arguments.max_samples]
    folder, weights = arguments.model.folder(), 0

    def load(*args, original=reference_search.load):
        nonlocal weights
        result = original(*args)
        weights = measuring.reset_peak_memory(result[0])
        return result

    reference_search.load = load
    start = time.perf_counter()
    losses = reference_search.epoch_losses(
        folder, samples, {arguments.candidate}, arguments.batch_size, 1e-2, 42
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": sum(losses) / len(losses), "bytes": measuring.peak_memory() - weights}


def prepared(arguments: argparse.Namespace):
    """What trains the candidates of the search."""
    from hopscotch_common.search.candidates import CandidateTrainer
    from hopscotch_common.training.batches import load_samples

    model = load_model(arguments.model, device="cpu")
    samples = load_samples(arguments.data_path, model.config.vocab_size, max_samples=arguments.max_samples)
    return CandidateTrainer(model, samples, TrainingOptions(1e-2, arguments.batch_size))


def ours(arguments: argparse.Namespace) -> dict:
    """One candidate of the search; the model is loaded once for all, so its loading does not count."""
    from hopscotch_common.training.trainer import ScaleTrainer

    trainer = prepared(arguments)
    batches = trainer.batches.epoch()
    weights = measuring.reset_peak_memory(trainer.model)
    start = time.perf_counter()
    losses = ScaleTrainer(trainer.model, 1e-2, [arguments.candidate]).run(batches, "epoch 0")
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "loss": sum(losses) / len(losses),
        "bytes": measuring.peak_memory() - weights,
        "flops": measuring.count_flops(trainer.model, batches, skipped=1),
    }


def race(arguments: argparse.Namespace) -> dict:
    """A whole iteration of the race with the default settings."""
    from hopscotch_common.search.search import Search

    trainer = prepared(arguments)
    rule = measuring.default_race(trainer.num_batches)
    start = time.perf_counter()
    found = Search(trainer, rule).next_block([])
    return {
        "seconds": time.perf_counter() - start,
        "block": found.block,
        "loss": found.loss,
        "candidate_epochs": found.candidate_epochs,
        "candidates": len(found.untrained_losses),
    }


def screening(arguments: argparse.Namespace) -> dict:
    """Screening every candidate on two batches, against a training step of one on the same batches."""
    from hopscotch_common.search.screening import untrained_losses
    from hopscotch_common.training.trainer import ScaleTrainer

    trainer = prepared(arguments)
    model = trainer.model
    blocks = trainer.candidates([])
    seconds = {"training": 0.0, "screening": 0.0}
    for batch in trainer.batches.epoch()[:2]:
        scales = ScaleTrainer(model, 1e-2, [arguments.candidate])
        start = time.perf_counter()
        scales.run([batch] * 3, "epoch 0")
        seconds["training"] += time.perf_counter() - start
        start = time.perf_counter()
        untrained_losses(model, batch, [], blocks, "batch")
        seconds["screening"] += time.perf_counter() - start
    return {"cost_of_a_training_step": seconds["screening"] / len(blocks) / (seconds["training"] / 3)}


def matmul(arguments: argparse.Namespace) -> dict:
    """FLOP/s of the model's own matrix products, forward and input gradient, by dtype."""
    import torch

    trainer = prepared(arguments)
    model = trainer.model
    rows = sorted(part.num_tokens for batch in trainer.batches.epoch() for part in batch.minibatches)
    rows = rows[len(rows) // 2]
    layer = model.model.layers[0]
    shapes = [m.weight.shape for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    shapes = shapes * model.config.num_hidden_layers + [model.lm_head.weight.shape]
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates[str(dtype).removeprefix("torch.")] = measuring.matmul_rate(shapes[-8:], rows, dtype)
    return {"rows": rows, "flops_per_second": rates}


def run_worker(kind: str) -> dict:
    command = [sys.executable, *sys.argv, "--worker", kind]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    print(f"{kind}: {result.stdout.strip()}", file=sys.stderr)
    return json.loads(result.stdout)


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.worker:
        print(json.dumps(globals()[arguments.worker](arguments)))
        return
    runs = {"reference": [], "ours": [], "matmul": []}
    for _ in range(arguments.runs):
        for kind, results in runs.items():
            results.append(run_worker(kind))
    seconds = {kind: measuring.median([r["seconds"] for r in runs[kind]]) for kind in ("reference", "ours")}
    memory = {kind: measuring.median([r["bytes"] for r in runs[kind]]) for kind in ("reference", "ours")}
    shares = [
        run["flops"] / run["seconds"] / max(product["flops_per_second"].values())
        for run, product in zip(runs["ours"], runs["matmul"], strict=True)
    ]
    content = {
        "reference_seconds_per_candidate": seconds["reference"],
        "seconds_per_candidate": seconds["ours"],
        "speedup_per_candidate": seconds["reference"] / seconds["ours"],
        "reference_bytes_above_weights": memory["reference"],
        "bytes_above_weights": memory["ours"],
        "memory_share": memory["ours"] / memory["reference"],
        "share_of_matmul_rate": measuring.median(shares),
        "loss_difference": abs(runs["ours"][0]["loss"] - runs["reference"][0]["loss"]),
        "runs": runs,
    }
    if arguments.race:
        costs = [run_worker("screening")["cost_of_a_training_step"] for _ in range(arguments.runs)]
        content["screening_cost_of_a_training_step"] = measuring.median(costs)
        whole = run_worker("race")
        content["race"] = whole | {
            "speedup_of_an_iteration": seconds["reference"] * whole["candidates"] / whole["seconds"],
            "note": "against the median reference candidate times the number of candidates",
        }
    measuring.save("search_cpu", content)
    print(json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=2))


if __name__ == "__main__":
    main()
