"""Held-out figures by how the scales, and maps in the skipped blocks' place, are trained.

    python benchmarks/training.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks 7 25 6 3 --answers 50 100 --settings layer-ce channel-kl channel-kl-rank16
    python benchmarks/training.py --model smollm --table

A setting is granularity-loss, followed by what differs from the defaults of `param_scale.py`: -rank16 (maps
of that rank in the blocks' place), -lr0.01 (Adam's learning rate for the scales). Each setting trains on the
first --answers of the data and is measured on the last --held_out ones, before training and after each epoch:
cross entropy, KL to the original model, agreement.
--counts takes so many of --blocks, the first ones; --seeds shuffles the data before it is split.
Results go to benchmarks/results/training_{model}.json after each training; the next run adds to it.
"""

import argparse
import dataclasses
import itertools
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import measuring
from measuring import row, title

from hopscotch_common import cli
from hopscotch_common.loading.loader import load_model
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Sample, load_samples
from hopscotch_common.training.trainer import EpochTraining

SETTING = re.compile(r"(layer|channel)-(ce|kl)(?:-rank(\d+))?(?:-lr([\d.]+))?")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How scales are trained. rank: of maps in the blocks' place, 0: none."""

    granularity: str
    loss: str
    rank: int
    learning_rate: float

    @staticmethod
    def named(name: str) -> "Setting":
        """For example channel-kl-rank16-lr0.01; ValueError where it is none."""
        match = SETTING.fullmatch(name)
        if match is None:
            raise ValueError(f"no setting: {name}")
        granularity, loss, rank, rate = match.groups()
        return Setting(granularity, loss, int(rank or 0), float(rate or 3e-3))

    def options(self, batch_size: int) -> TrainingOptions:
        return TrainingOptions(self.learning_rate, batch_size, loss=self.loss)

    def load(self, arguments: argparse.Namespace) -> tuple:
        """(model, samples), of --model and --data_path."""
        model = load_model(
            arguments.model,
            arguments.dtype,
            "cpu",
            scale_granularity=self.granularity,
            replacement_rank=self.rank,
        )
        return model, load_samples(arguments.data_path, model.config.vocab_size)


def setting_name(name: str) -> str:
    """An argparse type."""
    Setting.named(name)
    return name


def add_study_arguments(parser: argparse.ArgumentParser, held_out: int, epochs: int) -> None:
    parser.add_argument("--model", type=cli.model, required=True)
    parser.add_argument("--data_path", type=Path, help="processed data of step 2")
    parser.add_argument("--held_out", type=int, default=held_out, help="last answers, that nothing else sees")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_study_arguments(parser, held_out=48, epochs=2)
    parser.add_argument("--blocks", type=int, nargs="+", help="attention blocks to skip")
    parser.add_argument("--answers", type=int, nargs="+", default=[100], help="to train on")
    parser.add_argument("--counts", type=int, nargs="+", help="of --blocks, the first first; default: all")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of the order of the answers; default: the file's"
    )
    parser.add_argument(
        "--settings", type=setting_name, nargs="+", default=["layer-ce", "channel-kl"], metavar="SETTING"
    )
    measuring.add_result_arguments(parser, "training_{model}")
    return parser


def study(
    model,
    blocks: Sequence[int],
    training: Sequence[Sample],
    held_out: Sequence[Sample],
    setting: Setting,
    batch_size: int,
    epochs: int,
) -> dict:
    """Held-out figures of the original model, of the skips (with maps as fitted), and after each epoch."""
    options = setting.options(batch_size)
    trained = EpochTraining(model, blocks, training, held_out, options)
    if setting.rank:
        trained.fit_maps()
    figures = {which: dataclasses.asdict(found) for which, found in trained.baselines().items()}
    start = time.perf_counter()
    trained.start()
    runs = []
    for number in range(epochs):
        epoch = trained.epoch(number)
        runs.append({"loss": epoch.loss, "held_out": dataclasses.asdict(epoch.held_out)})
    return figures | {"epochs": runs, "seconds": time.perf_counter() - start}


def measure(
    arguments: argparse.Namespace, name: str, answers: int, count: int | None, seed: int | None
) -> dict:
    """`study` of a setting."""
    setting = Setting.named(name)
    model, samples = setting.load(arguments)
    if answers + arguments.held_out > len(samples):
        raise SystemExit(f"{arguments.data_path}: {len(samples)} answers, too few for {answers}")
    if seed is not None:
        random.Random(seed).shuffle(samples)
    held_out = samples[len(samples) - arguments.held_out :]
    how = (setting, arguments.batch_size, arguments.epochs)
    return study(model, sorted(arguments.blocks[:count]), samples[:answers], held_out, *how)


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: by blocks and seed, what is not trained, and a row for each training, after its last epoch.

    KL has its standard error over the held-out answers, where the file has it.
    """
    lines = title("setting", "answers", "blocks", "seed", "held-out cross entropy", "KL", "agreement")

    def add(name: str, answers: object, group: tuple, found: dict) -> None:
        agreement = f"{100 * found['agreement']:.1f} %"
        kl = f"{found['kl']:.4f}" + (f" ± {found['kl_error']:.4f}" if found.get("kl_error") else "")
        shown = ["-" if value is None else value for value in group]
        lines.append(row(name, answers, *shown, f"{found['cross_entropy']:.4f}", kl, agreement))

    groups: dict[tuple, list[dict]] = {}
    for figure in sorted(figures, key=lambda figure: (figure["of"]["setting"], figure["of"]["answers"])):
        of = figure["of"]
        groups.setdefault((of.get("blocks"), of.get("seed")), []).append(figure)
    for group in sorted(groups, key=str):
        for which in ("original", "unscaled"):
            plain = [f for f in groups[group] if which in f and "-rank" not in f["of"]["setting"]]
            for figure in plain[:1]:
                add(which, "-", group, figure[which])
        for figure in groups[group]:
            name, answers = figure["of"]["setting"], figure["of"]["answers"]
            if "-rank" in name:
                add(f"{name}, as fitted", answers, group, figure["unscaled"])
            add(name, answers, group, figure["epochs"][-1]["held_out"])
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / f"training_{arguments.model.name}.json"
    if not arguments.table:
        if not (arguments.data_path and arguments.blocks):
            parser.error("--data_path and --blocks are needed to measure")
        if max(arguments.counts or [0]) > len(arguments.blocks):
            parser.error(f"--counts: at most {len(arguments.blocks)}, as many as --blocks names")
        if not arguments.counts:
            arguments.blocks.sort()  # their order tells the results' file nothing then
        names = "model data_path blocks held_out epochs batch_size dtype"
        results = measuring.Results(path, measuring.settings_of(arguments, names))
        # an option that is not given leaves no trace, so that files from before it go on
        optional = {"blocks": arguments.counts or [None], "seed": arguments.seeds or [None]}
        for count, seed, answers, name in itertools.product(
            *optional.values(), arguments.answers, arguments.settings
        ):
            of = {"setting": name, "answers": answers, "blocks": count, "seed": seed}
            of = {key: value for key, value in of.items() if value is not None}
            results.measure(of, measure, arguments, name, answers, count, seed)
    print("\n".join(table(measuring.figures_in(path))))


if __name__ == "__main__":
    main()
