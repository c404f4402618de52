"""Step 4b: a checkpoint with attention blocks skipped and all scales 1: no training, no data.

    python unscaled_ckpt.py --model smollm --blocks_to_skip 15 8
    python unscaled_ckpt.py --model smollm --blocks_to_skip smollm_block_selection.json --export folded

Writes unscaled_{model}_ckpts/{model}_unscaled/. Only files are copied; a model is loaded
to check an --export, and for nothing else.
"""

import argparse
import sys
from pathlib import Path

from hopscotch_common import cli, files
from hopscotch_common.report.runs import describe_run


def build_parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser, load=False)
    cli.add_blocks_argument(parser)
    parser.add_argument(
        "--output_dir", type=Path, help="folder of the checkpoint (default: unscaled_{model}_ckpts)"
    )
    cli.add_export_argument(parser, "also export the checkpoint")
    parser.add_argument(
        "--device", default="auto", help="where an export's check runs: cpu, cuda, auto or split"
    )
    return parser


@cli.command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output_dir = arguments.output_dir or Path(f"unscaled_{arguments.model.name}_ckpts")

    import torch

    from hopscotch_common import checkpoints, weights
    from hopscotch_common.export.formats import check_exports, run_exports
    from hopscotch_common.loading import read_config, resolve_device
    from hopscotch_common.modeling_hopscotch import SCALE_NAMES

    config = read_config(arguments.model)
    blocks = cli.blocks_from(arguments.blocks_to_skip, arguments.model, config, "--blocks_to_skip")
    files.check_writable(output_dir)
    folder = output_dir / f"{arguments.model.name}_unscaled"
    resolve_device(arguments.device)
    checkpoints.check_replaceable(folder)
    check_exports(arguments.export, config, folder)
    weights.check_weights(arguments.model.folder(), config)
    values = torch.ones(config.num_hidden_layers, len(SCALE_NAMES))
    values[blocks, SCALE_NAMES.index("b_scale_attn")] = 0.0
    run = {"base_model": arguments.model.source, "skipped_attention_blocks": sorted(blocks)}
    checkpoints.save_checkpoint(folder, arguments.model, blocks, values, run | describe_run(vars(arguments)))
    cli.result(str(folder))
    for name, report in run_exports(arguments.export, folder, folder, arguments.device).items():
        cli.result(f"Exported {name}: {report['folder']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
