"""Step 3: find the attention blocks that a model can do without, one at a time, greedily.

    python block_selection.py --model smollm --data_path data/smollm-processed-data/data.jsonl
    python block_selection.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --starting_skipped_blocks 15 --num_blocks 2 --search race
    accelerate launch --multi_gpu block_selection.py --model llama \\
        --data_path data/llama-processed-data/data.jsonl

Prints a line for each block that it picks. The same command resumes an interrupted search where it
stopped.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

from tqdm import tqdm

from hopscotch_common import cli, files, inputs
from hopscotch_common.errors import InputError, logger
from hopscotch_common.report import describe_run, find_bend, plain
from hopscotch_common.resumable import ResumableLog

SCREENING = 0.33
FEW_BATCHES = 4  # with fewer in an epoch, its loss is mostly that before training
PLOT_FORMATS = (".png", ".pdf", ".svg")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    add("--data_path", type=cli.path, required=True, help="processed data of step 2 (JSONL)")
    what = "blocks that are skipped already: indices, or the path of a selection report"
    add("--starting_skipped_blocks", nargs="*", action="extend", default=[], metavar="BLOCK", help=what)
    what = "known losses of layers 0, 1, 2, …; a skipped layer's is ignored"
    add("--prev", nargs="*", action="extend", type=float, default=[], metavar="LOSS", help=what)
    group = parser.add_argument_group("how many blocks")
    number = group.add_mutually_exclusive_group()
    what = "most blocks to pick in this run (default: 1; with --max_loss_increase, no limit)"
    number.add_argument("--num_blocks", type=cli.positive_int, help=what)
    what = "pick blocks until the KV cache is at most this share of the whole model's; all layers count "
    what += "alike, even those with a sliding window"
    number.add_argument("--kv_budget", type=cli.between_0_and_1, metavar="SHARE", help=what)
    group.add_argument(
        "--max_loss_increase",
        type=cli.positive_float,
        metavar="SHARE",
        help="stop before the pick that would raise the loss (on held-out answers, if there are any) this "
        "share above the original model's (0.02: 2 %%); with --loss kl, the KL itself in nats per token",
    )
    cli.add_validation_argument(group, "each pick's loss, KL and agreement")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        choices=["full", "race", "untrained", "cosine"],
        default="full",
        help="full: train each candidate for an epoch; race: drop the worse ones early. Without training: "
        "untrained, by the loss with scales of 1, a third of an epoch for each candidate; "
        "cosine, by how little a block turns the residual stream, one pass over the answers",
    )
    what = "race: share of the candidates to train, at least 2: the best by loss before training (1: all)"
    group.add_argument("--screening", type=cli.above_0_at_most_1, default=SCREENING, help=what)
    cli.add_replacement_argument(parser)
    cli.add_training_arguments(parser, learning_rate=1e-2)
    what = "JSON report (default: {model}_block_selection.json); the journal is written beside it"
    add("--output", type=cli.path, help=what)
    what = "also draw every candidate's loss (PNG, PDF or SVG)"
    add("--plot", type=cli.path, metavar="FILE", help=what)
    return parser


def known_losses(prev: list[float], skipped: list[int], num_layers: int) -> dict[int, float]:
    """Return `--prev` as losses by block; raise InputError for too many, or for one that is not finite."""
    if len(prev) > num_layers:
        raise InputError(f"--prev: {len(prev)} losses, but the model has {num_layers} layers")
    known = {block: loss for block, loss in enumerate(prev) if block not in skipped}
    for block, loss in known.items():
        if not math.isfinite(loss):
            raise InputError(f"--prev: the loss of layer {block} is {loss}; give a finite number")
    return known


def most_blocks(arguments: argparse.Namespace, config, skipped: list[int]) -> int:
    """Return the most blocks that this run picks; raise InputError if the model does not have that many left.

    --kv_budget counts all attention layers alike, including those with a sliding window.
    """
    from hopscotch_common.scales.modeling_hopscotch import attention_blocks

    present, before = len(attention_blocks(config)), len(skipped)
    left = present - 1 - before  # one must stay; `check_skipped_blocks` says which may
    asked = arguments.num_blocks or (1 if arguments.max_loss_increase is None else max(left, 1))
    flag = f"--num_blocks {asked}"
    if arguments.kv_budget is not None:
        flag = f"--kv_budget {arguments.kv_budget}"
        asked = present - math.floor(arguments.kv_budget * present + 1e-9) - before
        if asked < 1:
            raise InputError(
                f"{flag}: with {before} of {present} blocks skipped already, the KV cache takes "
                f"{(present - before) / present:.3g} of it; give a smaller share"
            )
    if asked > left:
        raise InputError(f"{flag}: {before} blocks are skipped already, so at most {left} more can be")
    return asked


def journal_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".json") + ".journal.jsonl")


def check_outputs(arguments: argparse.Namespace, output: Path) -> None:
    """Raise InputError for outputs that could not be written or would replace something else."""
    sources = [arguments.data_path, *inputs.reports_among(arguments.starting_skipped_blocks)]
    files.check_output(output, "--output", sources)
    files.check_output(journal_path(output), "--output", sources)
    if output.exists() and "iterations" not in files.read_json(output, "name another --output"):
        raise InputError(f"--output {output}: exists and is not a report of this script; name another file")
    if arguments.plot:
        files.check_output(arguments.plot, "--plot", [*sources, output, journal_path(output)])
        if arguments.plot.suffix.lower() not in PLOT_FORMATS:
            endings = ", ".join(PLOT_FORMATS)
            raise InputError(f"--plot {arguments.plot}: give a file name that ends in {endings}")


def journal_settings(arguments: argparse.Namespace, weights: str, data: str) -> dict:
    """Return what a candidate's losses depend on, apart from the blocks skipped before.

    weights, data: fingerprints. The schedule is not included: a race only decides how far a candidate gets.
    """
    names = ("seed", "batch_size", "learning_rate", "dtype", "loss", "replacement_rank")
    same = {name: getattr(arguments, name) for name in names}
    return {"tensors": weights, "data": data} | same


def open_journal(path: Path, settings: dict, num_batches: int, processes, resources: contextlib.ExitStack):
    """Open the journal: rank 0 reads, writes and closes it (with `resources`); the others get its records."""
    from hopscotch_common.search import journal

    records, append = [], lambda record: None
    if processes.rank == 0:
        log = resources.enter_context(ResumableLog(path, settings, journal.KIND, journal.REMEDY))
        records, append = [(f"{path}, line {number}", record) for number, record in log.records], log.append
    return journal.Journal(processes.gather(records)[0], append, num_batches)  # only rank 0's disk is certain


def load_trainer(arguments: argparse.Namespace, training: list, held_out: list, processes):
    """Load the model and return the `CandidateTrainer` that trains candidates on it."""
    from hopscotch_common.search.candidates import CandidateTrainer

    model = cli.load_model(arguments)
    options = cli.training_options(arguments)
    trainer = CandidateTrainer(model, training, options, held_out, processes.everyone)
    if arguments.replacement_rank:
        trainer.fit_maps()
    return trainer


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output = arguments.output or Path(f"{arguments.model.name}_block_selection.json")

    from hopscotch_common import checkpoints
    from hopscotch_common.loading import weights
    from hopscotch_common.loading.loader import read_config
    from hopscotch_common.scales.modeling_hopscotch import attention_blocks
    from hopscotch_common.search import schedule
    from hopscotch_common.search.progress import SearchBar
    from hopscotch_common.search.search import Picks, Search
    from hopscotch_common.training import batches
    from hopscotch_common.training.distributed import join_processes

    config = read_config(arguments.model)
    skipped = inputs.blocks_from(arguments, config, "--starting_skipped_blocks")
    num_blocks = most_blocks(arguments, config, skipped)
    if arguments.search != "race" and arguments.screening != SCREENING:
        logger.warning("--screening has no effect without --search race")
    if arguments.prev and (arguments.search in ("untrained", "cosine") or arguments.validation_split):
        raise InputError("--prev: the scales behind its losses are not known, which this search needs")
    known = known_losses(arguments.prev, skipped, config.num_hidden_layers)
    check_outputs(arguments, output)
    weights.check_weights(arguments.model.folder(), config, arguments.attn_implementation)
    checkpoints.check_base(arguments.model, config)
    samples = inputs.load_samples(arguments, config)
    training, held_out = batches.split_samples(samples, arguments.validation_split, arguments.seed)
    data = batches.describe(training, arguments.data_path)
    settings = journal_settings(arguments, weights.fingerprint(arguments.model.folder()), data["sha256"])
    with contextlib.ExitStack() as resources:
        processes = resources.enter_context(join_processes(arguments.device))
        alike = settings | {"skipped blocks": skipped, "--prev": known}
        processes.check_alike(cli.flags_of_all(arguments) | alike)
        most = math.ceil(len(training) / arguments.batch_size)
        journal = open_journal(journal_path(output), settings, most, processes, resources)
        trainer = load_trainer(arguments, training, held_out, processes)
        logger.info(
            f"{len(training)} answers in {trainer.num_batches} batches, {data['loss_counted_tokens']} "
            f"loss-counted tokens; {config.num_hidden_layers} layers, skipped already: {skipped or 'none'}; "
            f"{processes.count} process(es)"
        )
        if arguments.search in ("full", "race") and trainer.num_batches < FEW_BATCHES:
            logger.warning(
                "an epoch has %d batch(es) only, and a batch's loss is taken before its step: these losses "
                "tell little of training; give a smaller --batch_size, or --search untrained",
                trainer.num_batches,
            )
        rule = schedule.named(arguments.search, trainer.num_batches, arguments.screening)
        bar = resources.enter_context(SearchBar(num_blocks, rule, processes))
        picks = Picks(Search(trainer, rule, journal, processes, bar), arguments.max_loss_increase)
        report = {
            "model": arguments.model.name,
            "num_layers": config.num_hidden_layers,
            "kv_cache_blocks": len(attention_blocks(config)),
            "skipped_blocks": skipped,
            "iterations": [],
            "original_held_out": plain(picks.original),
            "data": data,
        } | describe_run(vars(arguments))
        for number in range(num_blocks):
            pick = picks.next(report["skipped_blocks"], {} if number else known)
            stops = picks.costs_too_much(pick)
            add_pick(report, pick, stops)
            if processes.rank == 0:
                write_results(output, report, arguments.plot)
                with tqdm.external_write_mode():  # moves the bar out of the way
                    cli.result(line_of(pick, stops, arguments.max_loss_increase))
            if stops:
                break
        bar.total = bar.n  # batches that a race did not need are not left to do
    return 0


def add_pick(report: dict, pick, stops: bool) -> None:
    """Add an iteration to the report, as `stopped_before` if it stops the search."""
    iteration = dataclasses.asdict(dataclasses.replace(pick, state=None))
    del iteration["state"]  # of a search, not of a checkpoint
    if stops:
        report["stopped_before"] = iteration
        return
    report["skipped_blocks"] = [*report["skipped_blocks"], pick.block]
    report["iterations"].append(iteration)
    losses = {len(found["skipped_before"]) + 1: found["loss"] for found in report["iterations"]}
    report["bend"] = find_bend(losses)


def line_of(pick, stops: bool, most_increase: float | None) -> str:
    """Return the line about a pick for stdout."""
    figures = [f"loss: {pick.loss:.4f}"]
    if pick.held_out is not None:
        of = "held-out loss: {cross_entropy:.4f}, KL: {kl:.4f}, agreement: {agreement:.4f}"
        figures.append(of.format(**vars(pick.held_out)))
    if pick.loss_increase is not None:
        figures.append(f"increase: {pick.loss_increase:.4f}")
    said = f"Best block to remove: {pick.block}"
    if stops:
        limit = f"--max_loss_increase {most_increase:g}"
        said = f"Stopped: without block {pick.block} as well, the loss would be above {limit}"
    return f"{said} ({', '.join(figures)})"


def write_results(output: Path, report: dict, plot: Path | None) -> None:
    """Write the JSON report and, once there is a pick to draw, the plot if one is requested."""
    files.write_json(output, report)
    if plot and report["iterations"]:
        from hopscotch_common.report.plots import plot_search  # importing matplotlib takes a second

        plot_search(plot, report)


if __name__ == "__main__":
    sys.exit(main())
