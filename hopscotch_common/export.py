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
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hopscotch_common import checkpoints, comparison, decilm, scales
from hopscotch_common.cli import ArgumentParser, InputError, check_writable, command, logger, positive_float
from hopscotch_common.folding import absorb_granite, fold, fold_factors
from hopscotch_common.models import HOPSCOTCH_PREFIX, hopscotch_classes, resolve_device

FORMATS = ("folded", "nemotron_nas")  # those that are folders
REPORT_FILE = "hopscotch_export.json"
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}
OTHER_TOLERANCE = 0.1


@dataclass(frozen=True)
class Target:
    """What an export is made of.

    removed: blocks whose attention the target does not have. shapes: every tensor that it needs.
    """

    removed: set[int]
    factors: dict[str, float]
    shapes: dict[str, torch.Size]


def export_checkpoint(
    checkpoint: Path, format: str, output: Path, tolerance: float | None = None, device: str = "auto"
) -> dict:
    """Export a checkpoint to the folder `output`, atomically, and check it; the report.

    format: one of FORMATS. tolerance: the largest relative logit error (None: by dtype). device: where
    the check runs. Raises InputError for a checkpoint or scales that cannot be exported, and for
    an export past the tolerance; nothing is left behind then.
    """
    config = checkpoints.checkpoint_config(checkpoint)
    output = output.resolve()
    _check_output(output, checkpoint)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{checkpoint}: its weights are quantised, so scales cannot be folded into them")
    values = _read_scales(checkpoint, config.num_hidden_layers)
    with checkpoints.atomic_folder(output) as folder:
        checkpoints.copy_companions(checkpoint, folder)
        prepare = {"folded": _prepare_folded, "nemotron_nas": _prepare_nemotron_nas}[format]
        target = prepare(folder, config, values)
        _write_weights(checkpoint, folder, config, target)
        report = {"format": format, "checkpoint": str(checkpoint), "skipped_blocks": _skipped(config)}
        report |= _check(checkpoint, folder, format, tolerance, device)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    logger.info("%s: %s", output, report["summary"])
    return report


def _skipped(config) -> list[int]:
    return sorted(config.skipped_attention_blocks or ())


def _check_output(output: Path, checkpoint: Path) -> None:
    check_writable(output.parent)
    if output.exists() and not (output / REPORT_FILE).is_file():
        raise InputError(f"{output} exists and is not an earlier export: name a new folder with --output")
    if output in checkpoint.resolve().parents:
        raise InputError(f"{output} holds the checkpoint itself: name another folder with --output")


def _read_scales(checkpoint: Path, num_layers: int) -> torch.Tensor:
    """The scales [layers, 4], from their own file or (the original system) from among the weights."""
    if (checkpoint / checkpoints.SCALES_FILE).is_file():
        return checkpoints.load_scales(checkpoint, num_layers)
    wanted, found = scales.as_state_dict(torch.ones(num_layers, 4)), {}
    for path in checkpoints.weight_files(checkpoint):
        found |= {key: tensor for key, tensor in checkpoints.read_tensors(path).items() if key in wanted}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise InputError(f"{checkpoint}: {missing[0]} is missing, and {len(missing) - 1} other scales")
    return scales.from_state_dict(found, num_layers)


def _prepare_folded(folder: Path, config, values: torch.Tensor) -> Target:
    from transformers import AutoConfig, AutoModelForCausalLM

    own = ("model_type", "architectures", "auto_map", "skipped_attention_blocks", "transformers_version")
    kept = {key: value for key, value in config.to_dict().items() if key not in own}
    stock = AutoConfig.for_model(config.model_type.removeprefix(HOPSCOTCH_PREFIX), **kept)
    stock.dtype = config.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock)
    stock.architectures = [type(model).__name__]
    stock.save_pretrained(folder)
    return Target(set(), fold_factors(values, _skipped(config)), _shapes(model))


def _prepare_nemotron_nas(folder: Path, config, values: torch.Tensor) -> Target:
    decilm.check_representable(config)
    skipped = _skipped(config)
    if 0 in skipped:
        logger.warning("block 0 stays in nemotron_nas, with a zero o_proj: vLLM's code cannot leave it out")
    removed = set(skipped) - {0}
    values_of_config = decilm.decilm_config(config, removed)
    decilm.write_config(values_of_config, folder)
    factors = fold_factors(values, skipped, getattr(config, "residual_multiplier", 1.0))
    shaped = decilm.as_hopscotch_config(values_of_config)
    _, model_class = hopscotch_classes(shaped.model_type)
    with torch.device("meta"):
        model = model_class(shaped)
    return Target(removed, absorb_granite(factors, config), _shapes(model))


def _shapes(model) -> dict[str, torch.Size]:
    """The tensors that a model (on the meta device) reads from its weight files."""
    unread = set(model.all_tied_weights_keys) | {key for key, _ in _scales_of(model)}
    return {key: tensor.shape for key, tensor in model.state_dict().items() if key not in unread}


def _scales_of(model) -> Iterator[tuple[str, torch.Tensor]]:
    return scales.named_scales(model) if hasattr(model, "scaled_layer_class") else iter(())


def _write_weights(checkpoint: Path, folder: Path, config, target: Target) -> None:
    """Fold the weights, file by file: one file of the checkpoint is in memory at a time."""
    skipped = set(_skipped(config))
    sources = [p for p in checkpoints.weight_files(checkpoint) if p.name != checkpoints.SCALES_FILE]
    weight_map, total_bytes = {}, 0
    for number, path in enumerate(sources, 1):
        name = f"model-{number:05}-of-{len(sources):05}.safetensors"
        name = "model.safetensors" if len(sources) == 1 else name
        tensors = {}
        for key, tensor in checkpoints.read_tensors(path).items():
            if key not in target.shapes or checkpoints.is_skipped_weight(key, skipped):
                continue
            tensors[key] = fold(key, tensor, target.factors)
            if key.endswith(".mlp.down_proj.weight"):
                tensors |= _unused_attention(int(key.split(".")[2]), target, skipped, tensor.dtype)
        if tensors:
            checkpoints.save_tensors(tensors, folder / name)
            weight_map |= dict.fromkeys(tensors, name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    missing = sorted(set(target.shapes) - set(weight_map))
    if missing:
        raise InputError(f"{checkpoint}: {missing[0]} is missing, and {len(missing) - 1} other weights")
    if len(sources) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / checkpoints.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _unused_attention(layer: int, target: Target, skipped: set[int], dtype) -> dict[str, torch.Tensor]:
    """The attention weights of a skipped block, where the target has them all the same: it adds 0."""
    keys = [k for k in target.shapes if k.startswith(f"model.layers.{layer}.")]
    return {
        key: (torch.ones if re.search(r"norm\.weight$", key) else torch.zeros)(
            target.shapes[key], dtype=dtype
        )
        for key in keys
        if checkpoints.is_skipped_weight(key, skipped)
    }


def _check(checkpoint: Path, folder: Path, format: str, tolerance: float | None, device: str) -> dict:
    """Compare the export with its source; the figures. One model is in memory at a time."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    resolved = resolve_device(device)
    options = {"dtype": "auto", "device_map": "auto" if resolved is None else {"": resolved}}
    source = checkpoints.load_checkpoint(checkpoint, **options)
    if tolerance is None:
        tolerance = TOLERANCES.get(source.dtype, OTHER_TOLERANCE)
    prompts, real_text = comparison.check_prompts(folder, source.config.vocab_size)
    expected = comparison.ask(source, prompts)
    del source
    gc.collect()
    answers = comparison.ask(_load_exported(folder, format, **options), prompts)
    result = comparison.compare(expected, answers, real_text)
    comparison.check_tolerance(result, tolerance, format)
    return {"tolerance": tolerance, "summary": str(result)} | result.as_dict()


def _load_exported(folder: Path, format: str, **options):
    """An export as a transformers model; every tensor must be read, and none be missing."""
    from transformers import AutoModelForCausalLM

    if format == "folded":
        model_class = AutoModelForCausalLM
    else:
        shaped = decilm.as_hopscotch_config(json.loads((folder / "config.json").read_text()))
        _, model_class = hopscotch_classes(shaped.model_type)
        options |= {"config": shaped}
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    wrong = [f"{kind} {sorted(info[kind])[0]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]]
    assert not wrong, wrong
    return model.eval()


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
