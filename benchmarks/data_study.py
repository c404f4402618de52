"""How many answers do the scales need, and which granularity and loss keep most?

    python benchmarks/data_study.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks 7 25 6 3 --answers 100 --variants layer-ce layer-kl channel-ce channel-kl
    python benchmarks/data_study.py … --answers 25 50 200 --variants layer-kl channel-kl
    python benchmarks/data_study.py --model smollm --table

Trains scales with the same blocks skipped on the first 25, 50, … answers of the data, and measures
them on its last `--held_out` ones after each epoch: cross entropy, KL to the original model, agreement.
The file benchmarks/results/data_study_{model}.json is written after each training; the next run adds to
it. `--table` prints it as Markdown.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import measuring
from growing import GrowingResults

from hopscotch_common import cli
from hopscotch_common.loading import load_model
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Sample, load_samples
from hopscotch_common.training.epochs import EpochTraining

VARIANTS = ("layer-ce", "layer-kl", "channel-ce", "channel-kl")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=cli.model, required=True)
    parser.add_argument("--data_path", type=Path, help="processed data of step 2")
    parser.add_argument("--blocks", type=int, nargs="+", help="attention blocks to skip")
    parser.add_argument("--answers", type=int, nargs="+", default=[25, 50, 100, 200], help="to train on")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="granularity-loss")
    parser.add_argument("--held_out", type=int, default=48, help="answers that no training sees")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/data_study_{model}.json")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, measure nothing")
    return parser


def baselines(model, blocks: Sequence[int], held_out: Sequence[Sample], options: TrainingOptions) -> dict:
    """Held-out figures without training: of the original model, and with the blocks skipped."""
    found = EpochTraining(model, blocks, held_out, held_out, options, bar=cli.progress).baselines()
    return {name: dataclasses.asdict(figures) for name, figures in found.items()}


def train(trained: EpochTraining, epochs: int) -> dict:
    """The loss of each epoch from the start on, and the held-out figures after it."""
    start = time.perf_counter()
    trained.start()
    runs = []
    for number in range(epochs):
        epoch = trained.epoch(number)
        runs.append({"loss": epoch.loss, "held_out": dataclasses.asdict(epoch.held_out)})
    return {"epochs": runs, "seconds": time.perf_counter() - start}


def table(content: dict) -> list[str]:
    """Markdown: a row for each training, the figures after its last epoch."""

    def row(*cells) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    def cells(figures: dict) -> tuple[str, ...]:
        return (
            f"{figures['cross_entropy']:.4f}",
            f"{figures['kl']:.4f}",
            f"{100 * figures['agreement']:.1f} %",
        )

    trained = [figure for figure in content["figures"] if "epochs" in figure]
    (untrained,) = [figure for figure in content["figures"] if "epochs" not in figure]
    lines = [row("scales", "loss", "answers", "held-out cross entropy", "KL", "agreement"), "|---" * 6 + "|"]
    for name in ("original", "unscaled"):
        lines.append(row(name, "-", "-", *cells(untrained[name])))
    for figure in sorted(trained, key=lambda f: (VARIANTS.index(f["of"]["variant"]), f["of"]["answers"])):
        granularity, loss = figure["of"]["variant"].split("-")
        lines.append(
            row(granularity, loss, figure["of"]["answers"], *cells(figure["epochs"][-1]["held_out"]))
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / f"data_study_{arguments.model.name}.json"
    if arguments.table:
        print("\n".join(table(json.loads(path.read_text()))))
        return
    if not (arguments.data_path and arguments.blocks):
        parser.error("--data_path and --blocks are needed to measure")
    settings = {
        "model": arguments.model.source,
        "data": hashlib.sha256(arguments.data_path.read_bytes()).hexdigest(),
        "blocks": sorted(arguments.blocks),
    }
    for name in ("held_out", "epochs", "learning_rate", "batch_size", "dtype"):
        settings[name] = getattr(arguments, name)
    results = GrowingResults(path, settings)
    samples, model, loaded = [], None, None
    for answers, variant in itertools.product(arguments.answers, arguments.variants):
        granularity, loss = variant.split("-")
        if granularity != loaded:
            model = load_model(arguments.model, arguments.dtype, "cpu", scale_granularity=granularity)
            samples, loaded = load_samples(arguments.data_path, model.config.vocab_size), granularity
        if answers + arguments.held_out > len(samples):
            raise SystemExit(f"{arguments.data_path}: {len(samples)} answers, too few for {answers}")
        held_out = samples[len(samples) - arguments.held_out :]
        options = TrainingOptions(arguments.learning_rate, arguments.batch_size, loss=loss)
        untrained = (model, arguments.blocks, held_out, options)
        results.measure(lambda work=untrained: baselines(*work), variant="none")
        setting = (model, arguments.blocks, samples[:answers], held_out, options)
        figure = results.measure(
            lambda setting=setting: train(EpochTraining(*setting, bar=cli.progress), arguments.epochs),
            variant=variant,
            answers=answers,
        )
        print(variant, answers, figure["epochs"][-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
