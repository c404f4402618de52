"""Step 4a: train the scales of a model with some attention blocks skipped, one checkpoint per epoch.

    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip 15 8 --num_epochs 10
    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip smollm_block_selection.json --validation_split 0.2 --export folded nemotron_nas
    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip smollm_block_selection.json --granularity channel --loss kl
    accelerate launch --multi_gpu param_scale.py --model llama \\
        --data_path data/llama-processed-data/data.jsonl --blocks_to_skip llama_block_selection.json

Writes scaled_{model}_ckpts/{model}_scaled_epoch_{e}/ after each epoch e = 0, 1, 2, … and prints its
loss. With --validation_split it also prints held-out figures of the original model, and of the model
with the blocks skipped, without and with scales: loss (cross entropy), KL (divergence from the original
model's distributions; both in nats per token) and agreement (share of the answers' tokens that are the
model's first choice).
"""

import argparse
import contextlib
import sys
from pathlib import Path

from hopscotch_common import cli, files, inputs
from hopscotch_common.errors import InputError, TrainingError, logger
from hopscotch_common.loading.models import QUANTIZATIONS
from hopscotch_common.report import describe_run, plain, with_error
from hopscotch_common.training import MEASURES


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--data_path", type=cli.path, required=True, help="processed data of step 2 (JSONL)")
    cli.add_blocks_argument(parser)
    cli.add_replacement_argument(parser)
    parser.add_argument("--num_epochs", type=cli.positive_int, default=10, help="passes over the data")
    cli.add_training_arguments(parser, learning_rate=3e-3)
    parser.add_argument(
        "--granularity",
        choices=["layer", "channel"],
        default="layer",
        help="b_attn and b_mlp: one number per layer, or one per channel of the hidden state",
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="train on top of weights quantised to 8 or 4 bits; the checkpoint keeps the original weights",
    )
    cli.add_validation_argument(parser, "loss, KL and agreement")
    parser.add_argument(
        "--output_dir", type=cli.path, help="folder of the checkpoints (default: scaled_{model}_ckpts)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue after the last epoch in --output_dir, if there is one",
    )
    cli.add_export_argument(
        parser,
        "also export the best epoch by the held-out value of --loss, or the last one without "
        "--validation_split",
    )
    return parser


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    arguments.output_dir = arguments.output_dir or Path(f"scaled_{arguments.model.name}_ckpts")

    from hopscotch_common.training.distributed import join_processes

    report_path = arguments.output_dir / "report.json"
    blocks, samples, parts = checked(arguments, report_path)
    settings = run_settings(arguments, blocks, samples, parts[1])
    with join_processes(arguments.device) as processes:
        processes.check_alike(cli.flags_of_all(arguments) | settings)
        with files.locked(report_path) if processes.rank == 0 else contextlib.nullcontext():
            runs = train(arguments, blocks, parts, settings, processes)
            if processes.rank == 0:
                report = final_report(arguments, runs)
                files.write_json(report_path, report)  # before an export, which may be refused
                print_held_out(report)
                export(arguments, report)
                files.write_json(report_path, report)
    return 0


def checked(arguments: argparse.Namespace, report_path: Path) -> tuple[list[int], list, tuple[list, list]]:
    """Return (blocks to skip, samples, (training, held-out) samples) after all checks that can fail early."""
    from hopscotch_common import checkpoints
    from hopscotch_common.export.formats import check_exports
    from hopscotch_common.loading import weights
    from hopscotch_common.loading.loader import read_config
    from hopscotch_common.training.batches import split_samples

    config = read_config(arguments.model)
    blocks = inputs.blocks_from(arguments, config, "--blocks_to_skip")
    files.check_writable(arguments.output_dir)
    sources = [arguments.data_path, *inputs.reports_among(arguments.blocks_to_skip)]
    files.check_output(report_path, "--output_dir", sources)
    if report_path.exists() and "best_epoch" not in files.read_json(report_path, "name another --output_dir"):
        raise InputError(f"{report_path}: is not a report of this script; name another --output_dir")
    weights.check_weights(arguments.model.folder(), config, arguments.attn_implementation)
    checkpoints.check_base(arguments.model, config)
    samples = inputs.load_samples(arguments, config)
    parts = split_samples(samples, arguments.validation_split, arguments.seed)
    check_exports(arguments.export, config, export_folder(arguments), arguments.replacement_rank)
    return blocks, samples, parts


def epoch_folder(arguments: argparse.Namespace, epoch: int) -> Path:
    from hopscotch_common.checkpoints import epochs

    return epochs.epoch_folder(arguments.output_dir, arguments.model.name, epoch)


def export_folder(arguments: argparse.Namespace) -> Path:
    return arguments.output_dir / f"{arguments.model.name}_scaled"


def run_settings(arguments: argparse.Namespace, blocks: list[int], samples: list, held_out: list) -> dict:
    """Return the settings that a run's results depend on, which must be the same with `--resume`.

    Not the learning rate, which is what to change if training diverged; each epoch records its own.
    """
    from hopscotch_common.loading import weights
    from hopscotch_common.training import batches

    names = ("seed", "batch_size", "validation_split", "dtype", "quantization", "granularity", "loss")
    names += ("replacement_rank",)
    return {
        "tensors": weights.fingerprint(arguments.model.folder()),
        "data": batches.fingerprint(samples),
        "blocks_to_skip": sorted(blocks),
        **{name: getattr(arguments, name) for name in names},
        "held_out_data": batches.fingerprint(held_out),
    }


def train(
    arguments: argparse.Namespace, blocks: list[int], parts: tuple[list, list], settings: dict, processes
) -> list[dict]:
    """Train epoch by epoch, or resume after the last saved epoch; return what each epoch recorded."""
    from hopscotch_common import checkpoints
    from hopscotch_common.checkpoints import epochs, folders
    from hopscotch_common.training.trainer import EpochTraining

    runs, state = [], None
    if arguments.resume and processes.rank == 0:
        runs = epochs.resumable_epochs(arguments.output_dir, arguments.model.name, settings)
        if runs:
            state = epochs.load_training_state(epoch_folder(arguments, runs[-1]["epoch"]))
    elif processes.rank == 0:
        saved = epochs.saved_epochs(arguments.output_dir, arguments.model.name)
        if later := [epoch for epoch in saved if epoch >= arguments.num_epochs]:
            folder = epoch_folder(arguments, later[0])
            logger.warning("%s and later epochs there are of an earlier training, and stay", folder)
    earlier = (epoch_folder(arguments, run["epoch"]) for run in runs)
    if processes.rank == 0 and not any(map(checkpoints.has_weights, earlier)):
        rank = arguments.replacement_rank
        checkpoints.check_space(arguments.output_dir, arguments.model, blocks, rank)
    if arguments.batch_size < processes.count:
        logger.warning(
            "--batch_size %d is fewer than the %d processes, so some never have an answer to train on",
            arguments.batch_size,
            processes.count,
        )
    runs, state = processes.gather((runs, state))[0]  # only rank 0's disk is sure to hold the epochs
    left = range(runs[-1]["epoch"] + 1 if runs else 0, arguments.num_epochs)
    for number in left:
        folders.check_replaceable(epoch_folder(arguments, number))
    if not left:
        rate = runs[-1]["learning_rate"]
        if rate != arguments.learning_rate:
            raise InputError(
                f"--resume: all epochs are there, the last trained at {rate:g}, and none is left "
                f"for --learning_rate {arguments.learning_rate:g}; name another --output_dir, or more "
                "--num_epochs"
            )
        logger.warning("--resume: all epochs are there, so none is trained")
        return runs
    model = cli.load_model(arguments)
    options = cli.training_options(arguments)
    trained = EpochTraining(model, blocks, *parts, options, processes.everyone)
    if arguments.replacement_rank and not runs:
        trained.fit_maps()
    baselines = runs[-1]["held_out"] if runs else {k: plain(v) for k, v in trained.baselines().items()}
    trained.start(state)
    trains, all_in = model.num_parameters(only_trainable=True), model.num_parameters()
    counts = (trains, all_in - trains, blocks, processes.count)
    logger.info("%d parameters train, %d are frozen; blocks skipped: %s; %d process(es)", *counts)
    for number in left:
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
        runs.append(run)
        if processes.rank == 0:
            save_epoch(arguments, runs, epoch.state)
    return runs


def save_epoch(arguments: argparse.Namespace, runs: list[dict], state) -> None:
    """Write the last epoch's checkpoint, which shares its weights with an earlier one, and print its loss."""
    from hopscotch_common import checkpoints
    from hopscotch_common.loading import weights

    folders = [epoch_folder(arguments, run["epoch"]) for run in runs]
    earlier, folder = folders[:-1], folders[-1]
    share_with = next(filter(checkpoints.has_weights, reversed(earlier)), None)
    run, blocks, values = runs[-1], runs[-1]["skipped_attention_blocks"], state.tensors[0]
    if share_with is None and weights.fingerprint(arguments.model.folder()) != run["settings"]["tensors"]:
        raise TrainingError(
            f"{arguments.model.source}: its files changed during training, so no checkpoint can be made of "
            "them; train again"
        )
    maps = {key: rows[0] for key, rows in state.maps.items()}
    kept = state.as_tensors()
    checkpoints.save_checkpoint(folder, arguments.model, blocks, values, run, kept, share_with, maps)
    if not earlier:  # an earlier training's report would seem to be about these epochs
        (arguments.output_dir / "report.json").unlink(missing_ok=True)
    scaled = run["held_out"]["scaled"]
    tail = f", held-out {scaled[MEASURES[arguments.loss]]:.4f}" if scaled else ""
    cli.result(f"Epoch {run['epoch']}: loss {run['loss']:.4f}{tail}")


def final_report(arguments: argparse.Namespace, runs: list[dict]) -> dict:
    """Return the content of report.json: all epochs, and which is the best.

    The best has the lowest held-out value of the loss trained on or, if nothing is held out, is the last.
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
        **checkpoint_figures(epoch_folder(arguments, best["epoch"])),
        "exports": {},
    } | describe_run(vars(arguments))


def checkpoint_figures(folder: Path) -> dict:
    """Return a checkpoint's path, its `weights`, and the mean and deviation of its scales by layer."""
    from hopscotch_common import checkpoints, scales
    from hopscotch_common.checkpoints import folders

    needed = (folder / folders.SCALES_FILE, folder / folders.RUN_FILE)
    if not all(path.is_file() for path in needed):  # removed, to save space, while later epochs trained
        return {}
    spreads = {}
    values, _ = checkpoints.load_scales(folder)
    for name, rows in scales.columns(values.double()).items():
        deviation = rows.std(1, correction=0).tolist() if rows.shape[1] > 1 else []
        spreads[name.replace("_scale", "")] = {"mean": rows.mean(1).tolist(), "deviation": deviation}
    weights = checkpoints.read_run(folder)["weights"]
    return {"checkpoint": str(folder), "weights": weights, "scales": spreads}


def print_held_out(report: dict) -> None:
    """Print a line for each held-out figure of the best epoch, if there are any."""
    (held_out,) = [e["held_out"] for e in report["epochs"] if e["epoch"] == report["best_epoch"]]
    if held_out["scaled"] is None:
        return
    for measure, title in (("cross_entropy", "loss"), ("kl", "KL"), ("agreement", "agreement")):
        names = ("original", "unscaled", "scaled")
        figures = [f"{name} {with_error(held_out[name], measure)}" for name in names]
        cli.result(f"Held-out {title}: {', '.join(figures)} (epoch {report['best_epoch']})")
    measure = MEASURES[report["arguments"]["loss"]]
    if held_out["scaled"][measure] > held_out["unscaled"][measure]:
        logger.warning(
            "training left the held-out loss worse than it was before it: give a lower --learning_rate, or "
            "take what unscaled_ckpt.py makes"
        )


def export(arguments: argparse.Namespace, report: dict) -> None:
    """Export the best epoch as `--export` says, and add the exports to the report."""
    from hopscotch_common.export.formats import run_exports

    best = epoch_folder(arguments, report["best_epoch"])
    report["exports"] = run_exports(arguments.export, best, export_folder(arguments), arguments.device)
    for kind, exported in report["exports"].items():
        cli.result(f"Exported {kind}: {exported['folder']}")


if __name__ == "__main__":
    sys.exit(main())
