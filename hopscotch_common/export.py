"""Write a checkpoint in a format that other tools load: scales folded into the weights.

    python -m hopscotch_common.export scaled_smollm_ckpts/smollm_scaled_epoch_9 \\
        --format nemotron_nas --output smollm_vllm
    vllm serve smollm_vllm --trust-remote-code

Formats:
    folded        the stock architecture (LlamaForCausalLM, ...), skipped blocks with a zero o_proj:
                  loads anywhere, and is no faster
    nemotron_nas  the DeciLM format of vLLM and others: skipped blocks are not computed and take no
                  KV cache
    gguf          a file for llama.cpp, rewritten from the GGUF that its converter makes of `folded`

Every export is compared with its source on real tokens. Past the tolerance it is refused, and
leaves nothing behind.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

from hopscotch_common.cli import ArgumentParser, InputError, check_writable, command, logger, positive_float

FORMATS = ("folded", "nemotron_nas")  # those that are folders
REPORT_FILE = "hopscotch_export.json"
TOLERANCE_32_BIT = 1e-2
TOLERANCE_16_BIT = 0.1  # rounding the folded weights to bfloat16 alone is 0.03


def export_checkpoint(
    checkpoint: Path, format: str, output: Path, tolerance: float | None = None, device: str = "auto"
) -> dict:
    """Export a checkpoint to the folder `output`, atomically, and check it; the report.

    format: one of FORMATS. tolerance: the largest relative logit error (None: by dtype). device: where
    the check runs. Raises InputError for a checkpoint or scales that cannot be exported, and for
    an export past the tolerance; nothing is left behind then.
    """
    from hopscotch_common import checkpoints, exported

    config = checkpoints.checkpoint_config(checkpoint)
    output = output.resolve()
    check_output(output)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{checkpoint}: its weights are quantised, so scales cannot be folded into them")
    values = exported.read_scales(checkpoint, config.num_hidden_layers)
    with checkpoints.atomic_folder(output) as folder:
        checkpoints.copy_companions(checkpoint, folder)
        prepare = {"folded": exported.prepare_folded, "nemotron_nas": exported.prepare_nemotron_nas}[format]
        target = prepare(folder, config, values)
        exported.write_weights(checkpoint, folder, config, target)
        report = {
            "format": format,
            "checkpoint": str(checkpoint),
            "skipped_blocks": exported.skipped_blocks(config),
        }
        report |= _check(checkpoint, folder, format, tolerance, device)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    logger.info("%s: %s", output, report["summary"])
    return report


def check_output(output: Path) -> None:
    """Raise InputError unless an export may be written there: a new folder, or an earlier export's."""
    check_writable(output.parent)
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not empty and not (output / REPORT_FILE).is_file():
        raise InputError(f"{output} exists and is not an earlier export: name a new folder with --output")


def _check(checkpoint: Path, folder: Path, format: str, tolerance: float | None, device: str) -> dict:
    """Compare the export with its source; the figures. One model is in memory at a time."""
    from transformers.utils import logging as transformers_logging

    from hopscotch_common import checkpoints, comparison, exported
    from hopscotch_common.models import resolve_device

    transformers_logging.disable_progress_bar()
    resolved = resolve_device(device)
    options = {"dtype": "auto", "device_map": "auto" if resolved is None else {"": resolved}}
    source = checkpoints.load_checkpoint(checkpoint, **options)
    if tolerance is None:
        tolerance = TOLERANCE_32_BIT if source.dtype.itemsize == 4 else TOLERANCE_16_BIT
    prompts, real_text = comparison.check_prompts(folder, source.config.vocab_size)
    expected = comparison.ask(source, prompts)
    del source
    gc.collect()
    answers = comparison.ask(exported.load_exported(folder, format, **options), prompts)
    result = comparison.compare(expected, answers, real_text)
    comparison.check_tolerance(result, tolerance, format)
    return {"tolerance": tolerance, "summary": str(result)} | result.as_dict()


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="folder of a checkpoint (scaled, unscaled, or original)"
    )
    parser.add_argument("--format", choices=[*FORMATS, "gguf"], required=True, help="see below")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; a file for gguf")
    parser.add_argument(
        "--tolerance",
        type=positive_float,
        help="largest relative logit error against the checkpoint (default: 0.01 for float32, 0.1 for "
        "16-bit weights)",
    )
    parser.add_argument("--device", default="auto", help="where the check runs: cpu, cuda, auto or split")
    parser.add_argument(
        "--from", dest="folded_gguf", type=Path, help="gguf: what llama.cpp made of the folded checkpoint"
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if (arguments.format == "gguf") != (arguments.folded_gguf is not None):
        parser.error("--from goes with --format gguf, which needs it")
    if arguments.format == "gguf":
        from hopscotch_common.gguf import rewrite_gguf

        report = rewrite_gguf(arguments.checkpoint, arguments.folded_gguf, arguments.output)
        print(json.dumps(report))
        return 0
    report = export_checkpoint(
        arguments.checkpoint, arguments.format, arguments.output, arguments.tolerance, arguments.device
    )
    print(f"{arguments.output}: {report['summary']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
