"""Step 4a: train the scales of a model with some attention blocks skipped, a checkpoint an epoch.

    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip 15 8 --num_epochs 10
    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip smollm_block_selection.json --validation_split 0.2 --export folded nemotron_nas
    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip smollm_block_selection.json --granularity channel --loss kl
    accelerate launch --multi_gpu param_scale.py --model llama \\
        --data_path data/llama-processed-data/data.jsonl --blocks_to_skip llama_block_selection.json

Writes scaled_{model}_ckpts/{model}_scaled_epoch_{e}/ after each epoch e = 0, 1, 2, … and prints its
loss. With --validation_split it also prints held-out figures of the original model, of the skips
without scales, and of the skips with them: loss (cross entropy), KL (divergence from the original
model's distributions; both in nats a token) and agreement (share of the answers' tokens that are the
model's first choice).
"""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from hopscotch_common import cli, files, writing
from hopscotch_common.errors import logger
from hopscotch_common.models import QUANTIZATIONS
from hopscotch_common.report import describe_run, plain
from hopscotch_common.training import MEASURES

MAP_LEARNING_RATE = 1e-3


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--data_path", type=Path, required=True, help="processed data of step 2 (JSONL)")
    cli.add_blocks_argument(parser)
    cli.add_replacement_argument(parser)
    parser.add_argument("--num_epochs", type=cli.positive_int, default=10, help="passes over the data")
    cli.add_training_arguments(parser, learning_rate=3e-3)
    parser.add_argument(
        "--granularity",
        choices=["layer", "channel"],
        default="layer",
        help="what b_attn and b_mlp are: one number a layer, or one for each channel of the hidden state",
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="train on top of weights quantised to 8 or 4 bits; the checkpoint keeps the original weights",
    )
    cli.add_validation_argument(parser, "loss, KL and agreement")
    parser.add_argument(
        "--output_dir", type=Path, help="folder of the checkpoints (default: scaled_{model}_ckpts)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last epoch that --output_dir holds, if it holds any",
    )
    cli.add_export_argument(
        parser,
        "also export the best epoch by the held-out value of --loss, or the last one without "
        "--validation_split",
    )
    return parser


def export_target(output_dir: Path, name: str) -> Path:
    return output_dir / f"{name}_scaled"


def run_settings(arguments: argparse.Namespace, blocks: list[int], weights: str, data: str) -> dict:
    """What a run's results depend on, and `--resume` demands again. weights, data: fingerprints.

    Not the learning rate: it is what to change where training diverged. Each epoch records its own.
    """
    names = ("seed", "batch_size", "validation_split", "dtype", "quantization", "granularity", "loss")
    return {
        "model": arguments.model.source,
        "weights": weights,
        "data": data,
        "blocks_to_skip": sorted(blocks),
        "replacement_rank": arguments.replacement_rank or None,
        **{name: getattr(arguments, name) for name in names},
    }


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    name = arguments.model.name
    output_dir = arguments.output_dir or Path(f"scaled_{name}_ckpts")

    from hopscotch_common import checkpoints, scales, weights
    from hopscotch_common.export.formats import check_exports, run_exports
    from hopscotch_common.loading import load_model, read_config
    from hopscotch_common.training import batches
    from hopscotch_common.training.distributed import check_launch, join_processes
    from hopscotch_common.training.epochs import EpochTraining
    from hopscotch_common.training.trainer import ScaleState, prepare_model

    config = read_config(arguments.model)
    blocks = cli.blocks_from(arguments.blocks_to_skip, arguments.model, config, "--blocks_to_skip")
    cli.check_rank(arguments.replacement_rank, config)
    files.check_writable(output_dir)
    inputs = [arguments.data_path, *cli.reports_among(arguments.blocks_to_skip)]
    files.check_output(output_dir / "report.json", "--output_dir", inputs)

    check_launch(arguments.device)
    weights.check_weights(arguments.model.folder(), config, arguments.attn_implementation)
    checkpoints.check_base(arguments.model, config)
    samples = cli.load_samples(arguments, config)
    training, held_out = batches.split_samples(samples, arguments.validation_split, arguments.seed)
    check_exports(arguments.export, config, export_target(output_dir, name), arguments.replacement_rank)
    for epoch in range(arguments.num_epochs):
        checkpoints.check_replaceable(checkpoints.epoch_folder(output_dir, name, epoch))
    settings = run_settings(
        arguments, blocks, weights.fingerprint(arguments.model.folder()), batches.fingerprint(samples)
    )
    cli.seed_everything(arguments.seed)
    with contextlib.ExitStack() as resources:
        processes = resources.enter_context(join_processes(arguments.device))
        processes.check_alike(cli.flags_of_all(arguments) | settings | {"model": None})
        runs, before = [], None
        if processes.rank == 0:
            resources.enter_context(writing.locked(output_dir / "report.json"))
            if arguments.resume:
                runs = checkpoints.resumable_epochs(output_dir, name, settings)
            if runs:
                last = checkpoints.epoch_folder(output_dir, name, runs[-1]["epoch"])
                state = checkpoints.load_training_state(last)
                before = ScaleState(state.pop("scale_state"), state)
        runs, before = processes.gather((runs, before))[0]  # only rank 0's disk is sure to hold the epochs
        model = load_model(
            arguments.model,
            arguments.dtype,
            arguments.device,
            arguments.attn_implementation,
            arguments.quantization,
            arguments.granularity,
            arguments.replacement_rank,
        )
        options = dataclasses.replace(cli.training_options(arguments), map_learning_rate=MAP_LEARNING_RATE)
        prepare_model(model, options)
        trained = EpochTraining(model, blocks, training, held_out, options, processes.group(1), cli.progress)
        if arguments.replacement_rank and not runs:
            trained.fit_maps()
        if runs:
            baselines = runs[-1]["held_out"]
        else:
            baselines = {name: plain(figures) for name, figures in trained.baselines().items()}
        trained.start(before)
        logger.info(
            "%d scales train, %d weights are frozen; blocks skipped: %s; %d process(es)",
            *scales.count_parameters(model),
            blocks,
            processes.count,
        )
        for number in range(runs[-1]["epoch"] + 1 if runs else 0, arguments.num_epochs):
            epoch = trained.epoch(number)
            run = {
                "epoch": number,
                "base_model": arguments.model.source,
                "skipped_attention_blocks": sorted(blocks),
                "learning_rate": options.learning_rate,
                "learning_rates": [*(runs[-1]["learning_rates"] if runs else ()), options.learning_rate],
                "loss": epoch.loss,
                "batch_losses": epoch.losses,
                "held_out": baselines | {"scaled": plain(epoch.held_out)},
                "settings": settings,
            } | describe_run(vars(arguments))
            if processes.rank == 0:
                earlier = [checkpoints.epoch_folder(output_dir, name, run["epoch"]) for run in runs]
                checkpoints.save_checkpoint(
                    checkpoints.epoch_folder(output_dir, name, number),
                    arguments.model,
                    blocks,
                    epoch.values,
                    run,
                    {"scale_state": epoch.state.tensors} | epoch.state.maps,
                    share_with=next((folder for folder in reversed(earlier) if folder.is_dir()), None),
                    maps=epoch.maps,
                )
                scaled = run["held_out"]["scaled"]
                tail = f", held-out {scaled[MEASURES[options.loss]]:.4f}" if scaled else ""
                cli.result(f"Epoch {number}: loss {epoch.loss:.4f}{tail}")
            runs.append(run)
        if processes.rank == 0:
            report = final_report(arguments, runs)
            writing.write_json(output_dir / "report.json", report)  # before an export, which may be refused
            print_held_out(report)
            if arguments.export:
                folder = checkpoints.epoch_folder(output_dir, name, report["best_epoch"])
                report["exports"] = run_exports(
                    arguments.export, folder, export_target(output_dir, name), arguments.device
                )
                writing.write_json(output_dir / "report.json", report)
                for kind, exported in report["exports"].items():
                    cli.result(f"Exported {kind}: {exported['folder']}")
    return 0


def final_report(arguments: argparse.Namespace, runs: list[dict]) -> dict:
    """What report.json tells of all epochs, and which is the best.

    That is the one with the lowest held-out value of the loss trained on, or else the last.
    """
    best, measure = runs[-1], MEASURES[arguments.loss]
    if best["held_out"]["scaled"] is not None:
        best = min(runs, key=lambda run: run["held_out"]["scaled"][measure])
    keys = ("epoch", "learning_rate", "loss", "held_out")
    return {
        "model": arguments.model.name,
        "skipped_blocks": best["skipped_attention_blocks"],
        "best_epoch": best["epoch"],
        "epochs": [{key: run[key] for key in keys} for run in runs],
        "exports": {},
    } | describe_run(vars(arguments))


def print_held_out(report: dict) -> None:
    """A line for each held-out figure of the best epoch, where there are any."""
    (held_out,) = [e["held_out"] for e in report["epochs"] if e["epoch"] == report["best_epoch"]]
    if held_out["scaled"] is None:
        return
    for measure, title in (("cross_entropy", "loss"), ("kl", "KL"), ("agreement", "agreement")):
        figures = [f"{name} {held_out[name][measure]:.4f}" for name in ("original", "unscaled", "scaled")]
        cli.result(f"Held-out {title}: {', '.join(figures)} (epoch {report['best_epoch']})")


if __name__ == "__main__":
    sys.exit(main())
