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
from hopscotch_common.report.runs import describe_run

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
    parser.add_argument("--num_blocks", type=cli.positive_int, default=1, help="blocks to pick in this run")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        choices=["full", "race"],
        default="full",
        help="full: an epoch for each candidate; race: the worse ones drop out early, and the pick can be "
        "another one that is about as good",
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
    }


@cli.command
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    output = arguments.output or Path(f"{arguments.model.name}_block_selection.json")

    from hopscotch_common import weights
    from hopscotch_common.loading import load_model, read_config
    from hopscotch_common.search import journal, schedule
    from hopscotch_common.search.candidates import CandidateTrainer
    from hopscotch_common.search.progress import SearchBar
    from hopscotch_common.search.search import Search
    from hopscotch_common.training import batches
    from hopscotch_common.training.distributed import check_launch, join_processes
    from hopscotch_common.training.trainer import prepare_model

    config = read_config(arguments.model)
    num_layers = config.num_hidden_layers
    skipped = cli.blocks_from(
        arguments.starting_skipped_blocks, arguments.model, config, "--starting_skipped_blocks"
    )
    if len(skipped) + arguments.num_blocks >= num_layers:
        raise InputError(
            f"--num_blocks {arguments.num_blocks}: {len(skipped)} of {num_layers} are skipped already, "
            f"so at most {num_layers - 1 - len(skipped)} more can be"
        )
    if arguments.search == "full":
        for flag in ("screening", "first_look", "confidence"):
            if getattr(arguments, flag) != parser.get_default(flag):
                logger.warning("--%s has no effect without --search race", flag)
    known = known_losses(arguments.prev, skipped, num_layers)
    check_outputs(arguments, output)

    check_launch(arguments.device)
    weights.check_weights(arguments.model.folder(), config, arguments.attn_implementation)
    samples = cli.load_samples(arguments, config)
    data = {
        "path": str(arguments.data_path),
        "sha256": batches.fingerprint(samples),
        "samples": len(samples),
        "tokens": sum(len(sample) for sample in samples),
        "loss_counted_tokens": sum(sample.num_loss_counted_tokens for sample in samples),
    }
    cli.seed_everything(arguments.seed)
    processes = join_processes(arguments.device)
    options = cli.training_options(arguments)
    with contextlib.ExitStack() as resources:
        records, append = [], lambda record: None
        if processes.rank == 0:
            fingerprint = weights.fingerprint(arguments.model.folder())
            settings = journal_settings(arguments, fingerprint, data["sha256"])
            log = Log(journal_path(output), settings, journal.KIND, journal.REMEDY)
            resources.enter_context(log)
            records, append = [(f"{log.path}, line {n}", record) for n, record in log.records], log.append
        records = processes.gather(records)[0]  # only rank 0's disk is sure
        known_before = journal.Journal(records, append, math.ceil(len(samples) / arguments.batch_size))
        model = load_model(arguments.model, arguments.dtype, arguments.device, arguments.attn_implementation)
        prepare_model(model, options)
        trainer = CandidateTrainer(model, samples, options)
        logger.info(
            "%d answers in %d batches, %d loss-counted tokens; %d layers, skipped already: %s; "
            "%d process(es)",
            len(samples),
            trainer.num_batches,
            data["loss_counted_tokens"],
            num_layers,
            skipped or "none",
            processes.count,
        )
        rule = schedule.FULL
        if arguments.search == "race":
            first_look = arguments.first_look or schedule.default_first_look(trainer.num_batches)
            rule = schedule.Schedule(first_look, arguments.confidence, arguments.screening)
        bar = SearchBar(arguments.num_blocks, rule, processes)
        resources.callback(bar.close)
        search = Search(trainer, rule, known_before, processes, bar)
        iterations = []
        for _ in range(arguments.num_blocks):
            found = search.next_block(skipped, known)
            skipped, known = [*skipped, found.block], {}
            iterations.append(found)
            if processes.rank == 0:
                write_results(output, arguments, data, num_layers, skipped, iterations)
                with bar.out_of_the_way():
                    cli.result(f"Best block to remove: {found.block} (loss: {found.loss:.4f})")
        bar.finish()
    return 0


def write_results(
    output: Path,
    arguments: argparse.Namespace,
    data: dict,
    num_layers: int,
    skipped: list[int],
    iterations: list,
) -> None:
    """The JSON report, and the plot if one is asked for."""
    content = {
        "model": arguments.model.name,
        "num_layers": num_layers,
        "skipped_blocks": skipped,
        "iterations": [dataclasses.asdict(iteration) for iteration in iterations],
        "data": data,
    } | describe_run(vars(arguments))
    writing.write_json(output, content)
    if arguments.plot:
        from hopscotch_common.report.search_plots import plot_search  # matplotlib takes a second

        plot_search(arguments.plot, content)


if __name__ == "__main__":
    sys.exit(main())
