"""Step 4a: train the scales of a model with some attention blocks skipped, a checkpoint an epoch.

    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip 15 8 --num_epochs 10
    python param_scale.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks_to_skip smollm_block_selection.json --validation_split 0.2 --export folded nemotron_nas
    accelerate launch --multi_gpu param_scale.py --model llama \\
        --data_path data/llama-processed-data/data.jsonl --blocks_to_skip llama_block_selection.json

Writes scaled_{model}_ckpts/{model}_scaled_epoch_{e}/ after each epoch e = 0, 1, 2, … and prints its
loss. With --validation_split it also prints the held-out loss of the original model, of the skips
without scales, and of the skips with them.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path

from hopscotch_common import cli, files
from hopscotch_common.errors import InputError, logger
from hopscotch_common.models import QUANTIZATIONS, load_model, read_config
from hopscotch_common.report.runs import describe_run


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--data_path", type=Path, required=True, help="processed data of step 2 (JSONL)")
    cli.add_blocks_argument(parser)
    parser.add_argument("--num_epochs", type=cli.positive_int, default=10, help="passes over the data")
    cli.add_training_arguments(parser, learning_rate=3e-3)
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="train on top of weights quantised to 8 or 4 bits; the checkpoint keeps the original weights",
    )
    parser.add_argument(
        "--validation_split",
        type=cli.fraction,
        default=0.0,
        help="share of the answers held out to measure loss, at least 0 and below 1",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="folder of the checkpoints (default: scaled_{model}_ckpts)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last epoch that --output_dir holds, if it holds any",
    )
    cli.add_export_argument(
        parser, "also export the best epoch by held-out loss, or the last one without --validation_split"
    )
    return parser


def checkpoint_folder(output_dir: Path, name: str, epoch: int) -> Path:
    return output_dir / f"{name}_scaled_epoch_{epoch}"


def export_target(arguments: argparse.Namespace, output_dir: Path) -> Path:
    return output_dir / f"{arguments.model.name}_scaled"


def run_settings(arguments: argparse.Namespace, blocks: list[int], samples: list) -> dict:
    """What a run's results depend on, and `--resume` demands again.

    Not the learning rate: it is what to change where training diverged. Each epoch records its own.
    """
    from hopscotch_common.checkpoints import weights_fingerprint
    from hopscotch_common.training.batches import fingerprint

    names = ("seed", "batch_size", "validation_split", "dtype", "quantization")
    return {
        "model": arguments.model.source,
        "weights": weights_fingerprint(arguments.model.folder()),
        "data": fingerprint(samples),
        "blocks_to_skip": sorted(blocks),
        **{name: getattr(arguments, name) for name in names},
    }


def resumable_epochs(arguments: argparse.Namespace, output_dir: Path, settings: dict) -> list[dict]:
    """The runs recorded by the epochs there are, in order, checked to be of this very training."""
    from hopscotch_common.checkpoints import read_run

    runs = []
    for epoch in saved_epochs(output_dir, arguments.model.name):
        folder = checkpoint_folder(output_dir, arguments.model.name, epoch)
        run = read_run(folder)
        if run.get("epoch") != epoch or not {"settings", "held_out", "loss", "weights"} <= run.keys():
            raise InputError(f"--resume: {folder} is not an epoch of this script; name another --output_dir")
        files.check_settings(run["settings"], settings, f"--resume: {folder}", "name another --output_dir")
        runs.append(run)
    return runs


def saved_epochs(output_dir: Path, name: str) -> list[int]:
    """Numbers of the epochs that a folder holds, in order; what a killed run had moved away is put back."""
    from hopscotch_common.checkpoints import RUN_FILE

    pattern = re.compile(rf"\.?{re.escape(name)}_scaled_epoch_(\d+)(\.old)?")
    found = set()
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            folder = checkpoint_folder(output_dir, name, int(match[1]))
            files.recover_folder(folder)
            if (folder / RUN_FILE).is_file():
                found.add(int(match[1]))
    return sorted(found)


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output_dir = arguments.output_dir or Path(f"scaled_{arguments.model.name}_ckpts")
    config = read_config(arguments.model)
    blocks = cli.blocks_from(arguments.blocks_to_skip, arguments.model, config, "--blocks_to_skip")
    files.check_writable(output_dir)
    files.check_output(output_dir / "report.json", "--output_dir", [arguments.data_path])

    from hopscotch_common import checkpoints
    from hopscotch_common.export.formats import check_exports
    from hopscotch_common.training.batches import load_samples, split_samples
    from hopscotch_common.training.distributed import check_launch, join_processes

    check_launch(arguments.device)
    samples = load_samples(
        arguments.data_path,
        config.vocab_size,
        config.max_position_embeddings,
        arguments.max_tokens_per_batch,
        arguments.max_samples,
    )
    training, held_out = split_samples(samples, arguments.validation_split, arguments.seed)
    check_exports(arguments.export, config, export_target(arguments, output_dir))
    for epoch in range(arguments.num_epochs):
        checkpoints.check_replaceable(checkpoint_folder(output_dir, arguments.model.name, epoch))
    settings = run_settings(arguments, blocks, samples)

    processes = join_processes(arguments.device)
    with contextlib.ExitStack() as resources:
        runs = []
        if processes.rank == 0:
            resources.enter_context(files.locked(output_dir / "report.json"))
            runs = resumable_epochs(arguments, output_dir, settings) if arguments.resume else []
        runs = processes.gather(runs)[0]  # only rank 0's disk is sure to hold the epochs
        runs = train(arguments, output_dir, blocks, training, held_out, settings, runs, processes)
        if processes.rank == 0:
            finish(arguments, output_dir, runs)
    return 0


def train(
    arguments: argparse.Namespace,
    output_dir: Path,
    blocks: list[int],
    training: list,
    held_out: list,
    settings: dict,
    runs: list[dict],
    processes,
) -> list[dict]:
    """Train and save the epochs that are missing; what is recorded of all of them."""
    from hopscotch_common import checkpoints, scales
    from hopscotch_common.training.trainer import (
        EpochBatches,
        ScaleState,
        ScaleTrainer,
        evaluate,
        prepare_model,
    )

    cli.seed_everything(arguments.seed)
    options = cli.training_options(arguments)
    before = None
    if runs and processes.rank == 0:
        last = checkpoint_folder(output_dir, arguments.model.name, runs[-1]["epoch"])
        before = ScaleState(checkpoints.load_training_state(last)["scale_state"])
    before = processes.gather(before)[0]
    model = load_model(
        arguments.model,
        arguments.dtype,
        arguments.device,
        arguments.attn_implementation,
        arguments.quantization,
    )
    prepare_model(model, options)
    group = processes.group(1)  # all share each batch
    share = {"rank": group.rank, "world_size": group.size}
    batches = EpochBatches(model, training, options)
    held_out_batches = []
    if held_out:
        held_out_batches = EpochBatches(model, held_out, options, shuffle=False).epoch(**share)

    def held_out_loss(what: str, skipped: list[int] | None = None) -> float | None:
        """Held-out loss of the present model, or with `skipped` of one with scales of 1."""
        if not held_out_batches:
            return None
        if skipped is not None:
            scales.reset(model, skipped)
        name = f"held-out loss, {what}"
        with cli.progress(len(held_out_batches), name) as bar:
            return evaluate(model, held_out_batches, name, bar.update, group.reduce)

    if runs:
        baselines = runs[-1]["held_out"]
    else:
        baselines = {"original": held_out_loss("original", []), "unscaled": held_out_loss("unscaled", blocks)}

    trainer = ScaleTrainer(model, options.learning_rate, blocks, before, group.reduce)
    trainable, frozen = scales.count_parameters(model)
    logger.info(
        "%d scales train, %d weights are frozen; blocks skipped: %s; %d process(es)",
        trainable,
        frozen,
        blocks,
        processes.count,
    )
    for epoch in range(runs[-1]["epoch"] + 1 if runs else 0, arguments.num_epochs):
        parts = batches.epoch(epoch, **share)
        with cli.progress(len(parts), f"epoch {epoch}") as bar:
            losses = trainer.run(parts, f"epoch {epoch}", on_batch=bar.update_loss)
        trainer.check_sound(parts, f"epoch {epoch}, batch {len(parts) - 1}")
        loss = sum(losses) / len(losses)
        held_out_now = {**baselines, "scaled": held_out_loss(f"epoch {epoch}")}
        run = {
            "epoch": epoch,
            "base_model": arguments.model.source,
            "skipped_attention_blocks": sorted(blocks),
            "learning_rate": options.learning_rate,
            "loss": loss,
            "batch_losses": losses,
            "held_out": held_out_now,
            "settings": settings,
        } | describe_run(vars(arguments))
        if processes.rank == 0:
            earlier = [checkpoint_folder(output_dir, arguments.model.name, run["epoch"]) for run in runs]
            checkpoints.save_checkpoint(
                checkpoint_folder(output_dir, arguments.model.name, epoch),
                arguments.model,
                blocks,
                scales.snapshot(model),
                run,
                {"scale_state": trainer.state().tensors},
                share_with=next((folder for folder in reversed(earlier) if folder.is_dir()), None),
            )
            tail = f", held-out {held_out_now['scaled']:.4f}" if held_out else ""
            print(f"Epoch {epoch}: loss {loss:.4f}{tail}", flush=True)
        runs.append(run)
    return runs


def finish(arguments: argparse.Namespace, output_dir: Path, runs: list[dict]) -> None:
    """Print the held-out losses, write the report, export."""
    from hopscotch_common.export.formats import run_exports

    best = runs[-1]
    if best["held_out"]["scaled"] is not None:
        best = min(runs, key=lambda run: run["held_out"]["scaled"])
    keys = ("epoch", "learning_rate", "loss", "held_out")
    content = {
        "model": arguments.model.name,
        "skipped_blocks": best["skipped_attention_blocks"],
        "best_epoch": best["epoch"],
        "epochs": [{key: run[key] for key in keys} for run in runs],
        "exports": {},
    } | describe_run(vars(arguments))
    files.write_json(output_dir / "report.json", content)  # before an export, which may be refused
    if best["held_out"]["scaled"] is not None:
        figures = [f"{name} {best['held_out'][name]:.4f}" for name in ("original", "unscaled", "scaled")]
        print(f"Held-out loss: {', '.join(figures)} (epoch {best['epoch']})", flush=True)
    if arguments.export:
        folder = checkpoint_folder(output_dir, arguments.model.name, best["epoch"])
        content["exports"] = run_exports(
            arguments.export, folder, export_target(arguments, output_dir), arguments.device
        )
        files.write_json(output_dir / "report.json", content)
        for name, report in content["exports"].items():
            print(f"Exported {name}: {report['folder']}")


if __name__ == "__main__":
    sys.exit(main())
