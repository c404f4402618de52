"""Step 3: find the attention blocks that a model can do without, one at a time, greedily.

    python block_selection.py --model smollm --data_path data/smollm-processed-data/data.jsonl
    python block_selection.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --starting_skipped_blocks 15 --num_blocks 2 --search race
    accelerate launch --multi_gpu block_selection.py --model llama \\
        --data_path data/llama-processed-data/data.jsonl

Prints a line for each block that it picks. An interrupted search goes on where it was when the
same command is given again.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

from hopscotch_common import cli, files, writing
from hopscotch_common.errors import InputError, logger
from hopscotch_common.log import Log
from hopscotch_common.report import describe_run, find_bend, plain

SEARCHES = ("full", "race", "untrained", "cosine")
PLOT_FORMATS = (".png", ".pdf", ".svg")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--data_path", type=Path, required=True, help="processed data of step 2 (JSONL)")
    parser.add_argument(
        "--starting_skipped_blocks",
        nargs="*",
        default=[],
        metavar="BLOCK",
        help="blocks selected before: indices, or the path of a selection report",
    )
    parser.add_argument(
        "--prev",
        nargs="*",
        type=float,
        default=[],
        metavar="LOSS",
        help="losses of layers 0, 1, 2, … of this iteration that are known already; "
        "a number in the place of a skipped layer is ignored",
    )
    group = parser.add_argument_group("how many blocks")
    number = group.add_mutually_exclusive_group()
    number.add_argument(
        "--num_blocks",
        type=cli.positive_int,
        help="blocks to pick in this run, at most (default: 1; with --max_loss_increase, all that can be)",
    )
    number.add_argument(
        "--kv_budget",
        type=cli.part,
        metavar="SHARE",
        help="pick as many as leave the KV cache at most this share of the whole model's, at most",
    )
    group.add_argument(
        "--max_loss_increase",
        type=cli.positive_float,
        metavar="SHARE",
        help="stop before the pick that would bring the loss this share above the original model's (0.02: "
        "2 %%); of --loss kl, which is 0 for the original, the KL itself in nats a token. Of the held-out "
        "answers with --validation_split, else of the training's",
    )
    cli.add_validation_argument(group, "each pick's loss, KL and agreement")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        choices=list(SEARCHES),
        default="full",
        help="full: an epoch for each candidate; race: the worse ones drop out early, and the pick can be "
        "another one that is about as good. Without training: untrained, by the loss that a skip costs with "
        "scales of 1, a third of an epoch for each candidate; cosine, in seconds, by how little a block "
        "turns the residual stream",
    )
    group.add_argument(
        "--screening",
        type=cli.share,
        default=0.33,
        help="race: share of the candidates that is trained at all (at least 2 are), chosen by their losses "
        "on the first --first_look batches before training; 1 trains all",
    )
    group.add_argument(
        "--first_look",
        type=cli.positive_int,
        help="race: batches before the first comparison, after which at most about half of all candidates go "
        "on, and about 1/(1+n) after n times as many (default: a 32nd of an epoch, at least 1)",
    )
    group.add_argument(
        "--confidence",
        type=cli.positive_float,
        default=3.0,
        help="race: a candidate that is this many standard errors worse than the leader drops out sooner",
    )
    cli.add_replacement_argument(parser)
    cli.add_training_arguments(parser, learning_rate=1e-2)
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON report (default: {model}_block_selection.json); the journal stands beside it",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw every candidate's loss (PNG, PDF or SVG)"
    )
    return parser


def known_losses(prev: list[float], skipped: list[int], num_layers: int) -> dict[int, float]:
    """`--prev` as losses by block; InputError for too many, or for one that is not finite."""
    if len(prev) > num_layers:
        raise InputError(f"--prev: {len(prev)} losses, but the model has {num_layers} layers")
    known = {block: loss for block, loss in enumerate(prev) if block not in skipped}
    for block, loss in known.items():
        if not math.isfinite(loss):
            raise InputError(f"--prev: the loss of layer {block} is {loss}; give a finite number")
    return known


def check_outputs(arguments: argparse.Namespace, output: Path) -> None:
    """InputError for outputs that could not be written, or would take the place of something else."""
    inputs = [arguments.data_path, *cli.reports_among(arguments.starting_skipped_blocks)]
    files.check_output(output, "--output", inputs)
    files.check_output(journal_path(output), "--output", inputs)
    if output.exists() and not is_selection_report(output):
        raise InputError(f"--output {output}: exists and is not a report of this script; name another file")
    if arguments.plot:
        files.check_output(arguments.plot, "--plot", [*inputs, output, journal_path(output)])
        if arguments.plot.suffix.lower() not in PLOT_FORMATS:
            raise InputError(
                f"--plot {arguments.plot}: give a file name that ends in {', '.join(PLOT_FORMATS)}"
            )


def is_selection_report(path: Path) -> bool:
    """Whether a file is an earlier report of this script, which may be replaced."""
    try:
        return "skipped_blocks" in files.read_json(path)
    except InputError:
        return False


def journal_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".json") + ".journal.jsonl")


def journal_settings(arguments: argparse.Namespace, weights: str, data: str) -> dict:
    """What a candidate's losses depend on, besides the blocks skipped before. weights, data: fingerprints.

    Not the schedule: a race only decides how far a candidate gets.
    """
    return {
        "model": arguments.model.source,
        "weights": weights,
        "data": data,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "dtype": arguments.dtype,
        "loss": arguments.loss,
        "replacement_rank": arguments.replacement_rank or None,  # a journal without it had no maps
    }


def most_blocks(arguments: argparse.Namespace, config, skipped: list[int]) -> int:
    """How many blocks this run picks at most; InputError where so many are not there."""
    from hopscotch_common.search.limits import most_picks, picks_for_kv_budget

    left = most_picks(config, skipped)
    if arguments.kv_budget is not None:
        flag, wanted = "kv_budget", picks_for_kv_budget(arguments.kv_budget, config, skipped)
    elif arguments.num_blocks is None and arguments.max_loss_increase is not None:
        flag, wanted = "max_loss_increase", max(left, 1)
    else:
        flag, wanted = "num_blocks", arguments.num_blocks or 1
    if wanted > left:
        raise InputError(
            f"--{flag} {getattr(arguments, flag) or wanted}: {len(skipped)} of {config.num_hidden_layers} "
            f"are skipped already, so at most {left} more can be"
        )
    return wanted


@cli.command
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    output = arguments.output or Path(f"{arguments.model.name}_block_selection.json")

    from hopscotch_common import weights
    from hopscotch_common.loading import load_model, read_config
    from hopscotch_common.search import journal
    from hopscotch_common.search.candidates import CandidateTrainer
    from hopscotch_common.search.picks import Picks
    from hopscotch_common.search.progress import SearchBar
    from hopscotch_common.search.search import Search
    from hopscotch_common.training import batches
    from hopscotch_common.training.distributed import check_launch, join_processes
    from hopscotch_common.training.trainer import prepare_model

    config = read_config(arguments.model)
    skipped = cli.blocks_from(
        arguments.starting_skipped_blocks, arguments.model, config, "--starting_skipped_blocks"
    )
    num_blocks = most_blocks(arguments, config, skipped)
    if arguments.search != "race":
        for flag in ("screening", "first_look", "confidence"):
            if getattr(arguments, flag) != parser.get_default(flag):
                logger.warning("--%s has no effect without --search race", flag)
    if arguments.prev and (arguments.search in ("untrained", "cosine") or arguments.validation_split):
        raise InputError("--prev: the scales behind its losses are not known, which this search needs")
    known = known_losses(arguments.prev, skipped, config.num_hidden_layers)
    check_outputs(arguments, output)
    cli.check_rank(arguments.replacement_rank, config)

    check_launch(arguments.device)
    weights.check_weights(arguments.model.folder(), config, arguments.attn_implementation)
    samples = cli.load_samples(arguments, config)
    training, held_out = batches.split_samples(samples, arguments.validation_split, arguments.seed)
    data = batches.describe(training, arguments.data_path)
    cli.seed_everything(arguments.seed)
    options = cli.training_options(arguments)
    with contextlib.ExitStack() as resources:
        processes = resources.enter_context(join_processes(arguments.device))
        fingerprint = weights.fingerprint(arguments.model.folder())
        found = {"weights": fingerprint, "data": data["sha256"], "skipped blocks": skipped, "--prev": known}
        processes.check_alike(cli.flags_of_all(arguments) | found)
        records, append = [], lambda record: None
        if processes.rank == 0:
            settings = journal_settings(arguments, fingerprint, data["sha256"])
            log = Log(journal_path(output), settings, journal.KIND, journal.REMEDY)
            resources.enter_context(log)
            records, append = [(f"{log.path}, line {n}", record) for n, record in log.records], log.append
        records = processes.gather(records)[0]  # only rank 0's disk is sure
        known_before = journal.Journal(records, append, math.ceil(len(training) / arguments.batch_size))
        model = load_model(
            arguments.model,
            arguments.dtype,
            arguments.device,
            arguments.attn_implementation,
            replacement_rank=arguments.replacement_rank,
        )
        prepare_model(model, options)
        trainer = CandidateTrainer(model, training, options, held_out)
        if arguments.replacement_rank:
            trainer.fit_maps(processes.group(1))
        logger.info(
            "%d answers in %d batches, %d loss-counted tokens; %d layers, skipped already: %s; "
            "%d process(es)",
            len(training),
            trainer.num_batches,
            data["loss_counted_tokens"],
            config.num_hidden_layers,
            skipped or "none",
            processes.count,
        )
        rule = schedule_of(arguments, trainer.num_batches)
        bar = SearchBar(num_blocks, rule, processes)
        resources.callback(bar.close)
        picks = Picks(Search(trainer, rule, known_before, processes, bar), arguments.max_loss_increase)
        report = {
            "model": arguments.model.name,
            "num_layers": config.num_hidden_layers,
            "skipped_blocks": skipped,
            "iterations": [],
            "original_held_out": plain(picks.original),
            "data": data,
        } | describe_run(vars(arguments))
        for _ in range(num_blocks):
            pick = picks.next(report["skipped_blocks"], known)
            known = {}
            stops = picks.costs_too_much(pick)
            add_pick(report, pick, stops)
            if processes.rank == 0:
                write_results(output, report, arguments.plot)
                with bar.out_of_the_way():
                    cli.result(line_of(pick, stops, arguments.max_loss_increase))
            if stops:
                break
        bar.finish()
    return 0


def schedule_of(arguments: argparse.Namespace, num_batches: int):
    """The `Schedule` of `--search`."""
    from hopscotch_common.search import schedule

    if arguments.search != "race":
        return {"full": schedule.FULL, "untrained": schedule.UNTRAINED, "cosine": schedule.COSINE}[
            arguments.search
        ]
    first_look = arguments.first_look or schedule.default_first_look(num_batches)
    return schedule.Schedule(first_look, arguments.confidence, arguments.screening)


def add_pick(report: dict, pick, stops: bool) -> None:
    """Add an iteration to the report, or what it would have been where it stops the search."""
    iteration = dataclasses.asdict(dataclasses.replace(pick.iteration, state=None))
    del iteration["state"]  # of a search, not of a checkpoint
    iteration |= {"held_out": plain(pick.held_out), "loss_increase": pick.increase}
    if stops:
        report["stopped_before"] = iteration
        return
    report["skipped_blocks"] = [*report["skipped_blocks"], pick.iteration.block]
    report["iterations"].append(iteration)
    losses = {len(found["skipped_before"]) + 1: found["loss"] for found in report["iterations"]}
    report["bend"] = find_bend(losses)


def line_of(pick, stops: bool, most_increase: float | None) -> str:
    """What stdout says of a pick."""
    found = pick.iteration
    held_out = ""
    if pick.held_out is not None:
        figures = pick.held_out
        held_out = (
            f", held-out loss: {figures.cross_entropy:.4f}, KL: {figures.kl:.4f}, "
            f"agreement: {figures.agreement:.4f}"
        )
    increase = "" if pick.increase is None else f", increase: {pick.increase:.4f}"
    if stops:
        return (
            f"Stopped: without block {found.block} as well, the loss would be above --max_loss_increase "
            f"{most_increase:g} (loss: {found.loss:.4f}{held_out}{increase})"
        )
    return f"Best block to remove: {found.block} (loss: {found.loss:.4f}{held_out}{increase})"


def write_results(output: Path, report: dict, plot: Path | None) -> None:
    """The JSON report, and the plot if one is asked for, once there is a pick to draw."""
    writing.write_json(output, report)
    if plot and report["iterations"]:
        from hopscotch_common.report.plots import plot_search  # matplotlib takes a second

        plot_search(plot, report)


if __name__ == "__main__":
    sys.exit(main())
