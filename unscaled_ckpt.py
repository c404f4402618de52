"""Step 4b: write a checkpoint with attention blocks skipped and all scales 1; nothing is trained.

    python unscaled_ckpt.py --model smollm --blocks_to_skip 15 8
    python unscaled_ckpt.py --model smollm --blocks_to_skip smollm_block_selection.json --export folded
    python unscaled_ckpt.py --model smollm --blocks_to_skip smollm_block_selection.json \\
        --replacement_rank 16 --data_path data/smollm-processed-data/data.jsonl

Writes unscaled_{model}_ckpts/{model}_unscaled/. Files are copied; a model is loaded only to fit the maps
of --replacement_rank or to check an --export.
"""

import argparse
import sys
from pathlib import Path

from hopscotch_common import cli, files, inputs
from hopscotch_common.errors import InputError, logger
from hopscotch_common.report import describe_run


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    cli.add_blocks_argument(parser)
    cli.add_replacement_argument(parser)
    parser.add_argument(
        "--data_path",
        type=cli.path,
        help="processed data of step 2, to fit the maps of --replacement_rank on",
    )
    parser.add_argument(
        "--max_samples", type=cli.positive_int, help="fit on only the first N answers (default: all)"
    )
    parser.add_argument(
        "--output_dir", type=cli.path, help="folder of the checkpoint (default: unscaled_{model}_ckpts)"
    )
    cli.add_export_argument(parser, "also export the checkpoint")
    return parser


def fitted_maps(arguments: argparse.Namespace, config, blocks: list[int]) -> dict:
    """Return the maps in the blocks' place, by state-dict key, fitted on the answers of `--data_path`."""
    from hopscotch_common import scales
    from hopscotch_common.training import TrainingOptions
    from hopscotch_common.training.trainer import EpochTraining

    samples = inputs.load_samples(arguments, config)
    model = cli.load_model(arguments)
    EpochTraining(model, blocks, samples, [], TrainingOptions(0.0)).fit_maps()
    scales.reset(model, blocks)  # `maps_of` returns those of skipped blocks
    return scales.maps_of(model)


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output_dir = arguments.output_dir or Path(f"unscaled_{arguments.model.name}_ckpts")

    import torch

    from hopscotch_common import checkpoints, scales
    from hopscotch_common.export.formats import check_exports, run_exports
    from hopscotch_common.loading import weights
    from hopscotch_common.loading.loader import read_config, resolve_device
    from hopscotch_common.scales.modeling_hopscotch import SCALE_NAMES

    config = read_config(arguments.model)
    blocks = inputs.blocks_from(arguments, config, "--blocks_to_skip")
    if arguments.replacement_rank and not arguments.data_path:
        raise InputError("--replacement_rank: its maps are fitted on data; give --data_path, too")
    if arguments.data_path and not arguments.replacement_rank:
        logger.warning("--data_path has no effect without --replacement_rank, whose maps are fitted on it")
    files.check_writable(output_dir)
    folder = output_dir / f"{arguments.model.name}_unscaled"
    resolve_device(arguments.device)
    checkpoints.check_replaceable(folder)
    check_exports(arguments.export, config, folder, arguments.replacement_rank)
    weights.check_weights(arguments.model.folder(), config, arguments.attn_implementation)
    checkpoints.check_base(arguments.model, config)
    checkpoints.check_space(output_dir, arguments.model, blocks, arguments.replacement_rank)
    values = torch.ones(config.num_hidden_layers, len(SCALE_NAMES))
    maps = {}
    if arguments.replacement_rank:
        maps = fitted_maps(arguments, config, blocks)
    else:
        scales.columns(values)["b_scale_attn"][blocks] = 0.0
    run = {"base_model": arguments.model.source, "skipped_attention_blocks": sorted(blocks)}
    run |= describe_run(vars(arguments))
    checkpoints.save_checkpoint(folder, arguments.model, blocks, values, run, maps=maps)
    cli.result(str(folder))
    for name, report in run_exports(arguments.export, folder, folder, arguments.device).items():
        cli.result(f"Exported {name}: {report['folder']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
