"""What stands in a skipped block's place: nothing, or maps of several ranks, as fitted and trained.

    python benchmarks/replacement.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks 7 25 6 3 28 5 10 23
    python benchmarks/replacement.py --model smollm --table

Each is trained with channel scales on KL, on the first --answers of the data, and measured on the last
--held_out ones before training and after each epoch. Results go to
benchmarks/results/replacement_{model}.json after each training; the next run adds to it.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import measuring
from data_study import train
from growing import GrowingResults

from hopscotch_common import cli
from hopscotch_common.loading import load_model
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import load_samples
from hopscotch_common.training.epochs import EpochTraining


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=cli.model, required=True)
    parser.add_argument("--data_path", type=Path, help="processed data of step 2")
    parser.add_argument("--blocks", type=int, nargs="+", help="attention blocks to skip")
    parser.add_argument("--counts", type=int, nargs="+", help="skip the first so many (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 4, 16, 64])
    parser.add_argument("--map_learning_rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--answers", type=int, nargs="+", default=[60], help="to fit and to train on")
    parser.add_argument("--held_out", type=int, default=40, help="answers that nothing else sees")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/replacement_{model}.json")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, measure nothing")
    return parser


def measure(arguments: argparse.Namespace, blocks: list[int], rank: int, rate: float, answers: int) -> dict:
    """Held-out figures of the fitted maps and scales of 1, then after each epoch."""
    model = load_model(
        arguments.model, arguments.dtype, "cpu", scale_granularity="channel", replacement_rank=rank
    )
    samples = load_samples(arguments.data_path, model.config.vocab_size)
    if answers + arguments.held_out > len(samples):
        raise SystemExit(f"{arguments.data_path}: {len(samples)} answers are too few")
    options = TrainingOptions(
        arguments.learning_rate, arguments.batch_size, loss="kl", map_learning_rate=rate if rank else None
    )
    held_out = samples[len(samples) - arguments.held_out :]
    trained = EpochTraining(model, blocks, samples[:answers], held_out, options, bar=cli.progress)
    if rank:
        trained.fit_maps()
    fitted = dataclasses.asdict(trained.baselines()["unscaled"])
    return {"fitted": fitted} | train(trained, arguments.epochs)


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: two rows for each setting, before training and after its last epoch."""
    lines = ["| blocks | in their place | answers | trained | KL | agreement |", "|---" * 6 + "|"]
    for figure in figures:
        of = figure["of"]
        place = f"rank {of['rank']}" if of["rank"] else "nothing"
        last = figure["epochs"][-1]["held_out"]
        rate = f"{len(figure['epochs'])} epochs" + (f", maps at {of['rate']:g}" if of["rank"] else "")
        for trained, found in (("no", figure["fitted"]), (rate, last)):
            lines.append(
                f"| {of['blocks']} | {place} | {of['answers']} | {trained} | {found['kl']:.4f} "
                f"| {100 * found['agreement']:.1f} % |"
            )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / f"replacement_{arguments.model.name}.json"
    if arguments.table:
        print("\n".join(table(json.loads(path.read_text())["figures"])))
        return
    if not (arguments.data_path and arguments.blocks):
        parser.error("--data_path and --blocks are needed to measure")
    settings = {
        "model": arguments.model.name,
        "data": hashlib.sha256(arguments.data_path.read_bytes()).hexdigest(),
        "blocks": arguments.blocks,
    }
    names = ("learning_rate", "held_out", "epochs", "batch_size", "dtype")
    results = GrowingResults(path, settings | {name: getattr(arguments, name) for name in names})
    counts = arguments.counts or [len(arguments.blocks)]
    for count, answers, rank in itertools.product(counts, arguments.answers, arguments.ranks):
        for rate in arguments.map_learning_rates if rank else [None]:
            work = (arguments, arguments.blocks[:count], rank, rate, answers)
            of = {"blocks": count, "rank": rank, "rate": rate, "answers": answers}
            figure = results.measure(lambda work=work: measure(*work), **of)
            print(of, figure["fitted"], figure["epochs"][-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
