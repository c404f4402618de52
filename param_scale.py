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
import sys
from pathlib import Path

from hopscotch_common import cli, report
from hopscotch_common.cli import InputError, logger
from hopscotch_common.models import QUANTIZATIONS, add_model_arguments, load_model, read_config


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--data_path", type=Path, required=True, help="processed data of step 2 (JSONL)")
    report.add_blocks_argument(parser)
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
    report.add_export_argument(
        parser, "also export the best epoch by held-out loss, or the last one without --validation_split"
    )
    return parser


def checkpoint_folder(output_dir: Path, name: str, epoch: int) -> Path:
    return output_dir / f"{name}_scaled_epoch_{epoch}"


def export_target(arguments: argparse.Namespace, output_dir: Path) -> Path:
    return output_dir / f"{arguments.model.name}_scaled"


def settings(arguments: argparse.Namespace, blocks: list[int], samples: list) -> dict:
    """What a run's results depend on; `--resume` demands the same."""
    from hopscotch_common.checkpoints import weights_fingerprint
    from hopscotch_common.data import fingerprint

    names = ("seed", "batch_size", "learning_rate", "validation_split", "dtype", "quantization")
    return {
        "model": arguments.model.source,
        "weights": weights_fingerprint(arguments.model.folder()),
        "data": fingerprint(samples),
        "blocks_to_skip": sorted(blocks),
        **{name: getattr(arguments, name) for name in names},
    }


def resumable_epochs(arguments: argparse.Namespace, output_dir: Path, wanted: dict) -> list[dict]:
    """The runs recorded by the epochs there are, in order, checked to be of this very training."""
    from hopscotch_common.checkpoints import RUN_FILE, read_run

    runs = []
    for path in output_dir.glob(f"{arguments.model.name}_scaled_epoch_*/{RUN_FILE}"):
        folder = path.parent
        runs.append(read_run(folder))
        for name, value in wanted.items():
            if runs[-1]["settings"].get(name) != value:
                raise InputError(
                    f"--resume: {folder} was trained with {name} = {runs[-1]['settings'].get(name)}, "
                    f"now it is {value}; repeat that setting or name another --output_dir"
                )
    return sorted(runs, key=lambda run: run["epoch"])


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output_dir = arguments.output_dir or Path(f"scaled_{arguments.model.name}_ckpts")
    config = read_config(arguments.model)
    blocks = report.blocks_from(arguments.blocks_to_skip, arguments.model, config, "--blocks_to_skip")

    from hopscotch_common import data

    samples = data.load_samples(
        arguments.data_path, config.vocab_size, arguments.max_tokens_per_batch, arguments.max_samples
    )
    training, held_out = data.split_samples(samples, arguments.validation_split, arguments.seed)
    cli.check_writable(output_dir)
    report.check_exports(arguments.export, config, export_target(arguments, output_dir))
    wanted = settings(arguments, blocks, samples)
    runs = resumable_epochs(arguments, output_dir, wanted) if arguments.resume else []

    from hopscotch_common import distributed

    processes = distributed.join_processes(arguments.device)
    runs = train(arguments, output_dir, blocks, training, held_out, wanted, runs, processes)
    if processes.rank == 0:
        finish(arguments, output_dir, runs)
    return 0


def train(
    arguments: argparse.Namespace,
    output_dir: Path,
    blocks: list[int],
    training: list,
    held_out: list,
    wanted: dict,
    runs: list[dict],
    processes,
) -> list[dict]:
    """Train and save the epochs that are missing; what is recorded of all of them."""
    from hopscotch_common import checkpoints, distributed, scales
    from hopscotch_common.training import ScaleState, ScaleTrainer, epoch_batches, evaluate, prepare_model

    cli.seed_everything(arguments.seed)
    rank, world_size = processes.rank, processes.count
    before = None
    if runs and rank == 0:
        last = checkpoint_folder(output_dir, arguments.model.name, runs[-1]["epoch"])
        before = ScaleState(checkpoints.load_training_state(last)["scale_state"])
    runs, before = processes.gather((runs, before))[0]  # only rank 0's disk is sure to hold the epochs
    model = load_model(
        arguments.model,
        arguments.dtype,
        arguments.device,
        arguments.attn_implementation,
        arguments.quantization,
    )
    prepare_model(model, arguments.gradient_checkpointing, arguments.compile)
    share = {"rank": rank, "world_size": world_size}
    reduce = distributed.sum_over_processes if world_size > 1 else None
    held_out_batches = epoch_batches(held_out, model, arguments, shuffle=False, **share) if held_out else []

    def held_out_loss(what: str, skipped: list[int] | None = None) -> float | None:
        """Held-out loss of the present model, or with `skipped` of one with scales of 1."""
        if not held_out_batches:
            return None
        if skipped is not None:
            scales.reset(model, skipped)
        with cli.progress(len(held_out_batches), f"held-out loss, {what}") as bar:
            return evaluate(model, held_out_batches, bar.update, reduce)

    if runs:
        baselines = runs[-1]["held_out"]
    else:
        baselines = {"original": held_out_loss("original", []), "unscaled": held_out_loss("unscaled", blocks)}

    trainer = ScaleTrainer(model, arguments.learning_rate, reduce)
    trainer.start(blocks, before)
    trainable, frozen = scales.count_parameters(model)
    logger.info(
        "%d scales train, %d weights are frozen; blocks skipped: %s; %d process(es)",
        trainable,
        frozen,
        blocks,
        world_size,
    )

    for epoch in range(runs[-1]["epoch"] + 1 if runs else 0, arguments.num_epochs):
        batches = epoch_batches(training, model, arguments, epoch, **share)
        with cli.progress(len(batches), f"epoch {epoch}") as bar:
            losses = trainer.run(batches, f"epoch {epoch}", on_batch=bar.update_loss)
        loss = sum(losses) / len(losses)
        held_out_now = {**baselines, "scaled": held_out_loss("scaled")}
        run = {
            "epoch": epoch,
            "base_model": arguments.model.source,
            "skipped_attention_blocks": sorted(blocks),
            "loss": loss,
            "batch_losses": losses,
            "held_out": held_out_now,
            "settings": wanted,
        } | report.describe_run(vars(arguments))
        if rank == 0:
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
    best = runs[-1]
    if best["held_out"]["scaled"] is not None:
        best = min(runs, key=lambda run: run["held_out"]["scaled"])
        figures = [f"{name} {best['held_out'][name]:.4f}" for name in ("original", "unscaled", "scaled")]
        print(f"Held-out loss: {', '.join(figures)} (epoch {best['epoch']})", flush=True)
    folder = checkpoint_folder(output_dir, arguments.model.name, best["epoch"])
    keys = ("epoch", "loss", "held_out")
    content = {
        "model": arguments.model.name,
        "skipped_blocks": best["skipped_attention_blocks"],
        "best_epoch": best["epoch"],
        "epochs": [{key: run[key] for key in keys} for run in runs],
        "exports": {},
    } | report.describe_run(vars(arguments))
    report.write_report(output_dir / "report.json", content)  # before an export, which may be refused
    if arguments.export:
        content["exports"] = report.run_exports(
            arguments.export, folder, export_target(arguments, output_dir)
        )
        report.write_report(output_dir / "report.json", content)


if __name__ == "__main__":
    sys.exit(main())
