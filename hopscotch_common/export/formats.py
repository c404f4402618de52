"""Write a checkpoint in a format that other tools load, and check that it computes the same."""

import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from hopscotch_common import checkpoints, files, weights
from hopscotch_common.checkpoints import card
from hopscotch_common.errors import HopscotchError, InputError, logger
from hopscotch_common.export import check, decilm, folders, folding
from hopscotch_common.loading import device_map, resolve_device
from hopscotch_common.tokenization import copy_tokenizer
from hopscotch_common.training.batches import is_out_of_memory

REPORT_FILE = "hopscotch_export.json"
TOLERANCE = 1e-2  # relative logit error in float32, which folding adds


@dataclass(frozen=True)
class Format:
    """A format that is a folder. prepare writes its config and says what its weights are.

    check_config: raises InputError for a (stock or Hopscotch) config that the format cannot hold.
    """

    prepare: Callable[[Path, object, torch.Tensor, dict], folders.Target]
    check_config: Callable[[object], None]


FORMATS = {
    "folded": Format(folders.prepare_folded, folding.check_foldable),
    "nemotron_nas": Format(folders.prepare_nemotron_nas, decilm.check_representable),
}


def check_exports(formats: Sequence[str], config, target: Path, replacement_rank: int = 0) -> None:
    """Raise InputError where `run_exports` is bound to fail for a model of this (stock) config."""
    for name in formats:
        check_maps(name, replacement_rank)
        check_output(export_folder(target, name))
        FORMATS[name].check_config(config)


def check_maps(format: str, replacement_rank: int) -> None:
    """Raise InputError where a checkpoint has maps and the format cannot hold them."""
    if replacement_rank and format == "folded":
        raise InputError(
            "folded has no place for maps (--replacement_rank), as the stock class has none; export "
            "nemotron_nas for mlx-lm, or serve the checkpoint itself, with vLLM or transformers"
        )


def export_folder(target: Path, format: str) -> Path:
    return target.with_name(f"{target.name}_{format}")


def run_exports(formats: Sequence[str], checkpoint: Path, target: Path, device: str = "auto") -> dict:
    """Export a checkpoint to `{target}_{format}` for each format; the exports' reports by format."""
    results = {}
    for name in formats:
        folder = export_folder(target, name)
        report = export_checkpoint(checkpoint, name, folder, device=device)
        results[name] = {"folder": str(folder)} | report
    return results


def check_output(output: Path) -> None:
    """Raise InputError unless an export may be written there: a new folder, or an earlier export's."""
    files.check_name(output, "--output")
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not empty and not (output / REPORT_FILE).is_file():
        raise InputError(f"{output} exists and is not an earlier export: name a new folder with --output")


def export_checkpoint(
    checkpoint: Path, format: str, output: Path, tolerance: float | None = None, device: str = "auto"
) -> dict:
    """Export a checkpoint to the folder `output`, atomically, and check it; the report.

    format: one of FORMATS. tolerance: the largest relative logit error in float32 (None: TOLERANCE, and
    for 16-bit weights the error that computing in 16 bits makes anyway). device: where the check
    runs. Raises InputError for a checkpoint or scales that cannot be exported, and for an export past
    the tolerance; nothing is left behind then.
    """
    config, values = checkpoints.read_checkpoint(checkpoint)
    run = checkpoints.read_run(checkpoint) if (checkpoint / checkpoints.RUN_FILE).is_file() else {}
    check_output(output)
    check_maps(format, config.replacement_rank)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{checkpoint}: its weights are quantised, so scales cannot be folded into them")
    FORMATS[format].check_config(config)
    if config.dtype is None:
        config.dtype = weights.stored_dtype(checkpoint)
    if weights.has_own_head(checkpoint):
        config.tie_word_embeddings = False  # else the export would have one matrix for both
    with files.atomic_folder(output) as folder:
        checkpoints.copy_companions(checkpoint, folder)
        target = FORMATS[format].prepare(folder, config, values, checkpoints.load_maps(checkpoint))
        folders.write_weights(checkpoint, folder, config, target)
        wanted = checkpoints.tokenizer_probe(checkpoint)
        copy_tokenizer(checkpoint, folder, wanted=wanted)
        report = {
            "format": format,
            "checkpoint": str(checkpoint),
            "skipped_blocks": folders.skipped_blocks(config),
        }
        report |= _check(checkpoint, config, folder, format, tolerance, device)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        origin = card.inherited(checkpoint)
        card.write_card(folder, output.name, format, origin, config, values, run, report["summary"])
    logger.info("%s: %s", output, report["summary"])
    return report


def _check(checkpoint: Path, config, folder: Path, format: str, tolerance: float | None, device: str) -> dict:
    """Compare the export with its source in float32; the figures. One model is in memory at a time."""
    transformers_logging.disable_progress_bar()
    place = device_map(resolve_device(device))
    prompts, real_text = check.check_prompts(folder, config.vocab_size)

    def ask(load: Callable, *where, dtype) -> check.Answers:
        gc.collect()
        return check.ask(load(*where, dtype=dtype, device_map=place), prompts)

    try:
        source = ask(checkpoints.load_checkpoint, checkpoint, dtype=torch.float32)
        exported = ask(folders.load_exported, folder, format, dtype=torch.float32)
        result = check.compare(source, exported, real_text)
        noise = 0.0
        if tolerance is None and not result.relative_logit_error <= TOLERANCE:
            own = ask(checkpoints.load_checkpoint, checkpoint, dtype="auto")
            noise = check.compare(source, own, real_text).relative_logit_error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise HopscotchError(
            f"{folder.name}: out of memory in the check of the export, which runs in float32; "
            "export again with --device cpu or split"
        ) from error
    tolerance = TOLERANCE + noise if tolerance is None else tolerance
    check_tolerance(result, tolerance, format)
    return {"tolerance": tolerance, "dtype_noise": noise, "summary": str(result)} | result.as_dict()


def check_tolerance(comparison: check.Comparison, tolerance: float, what: str) -> None:
    """Raise InputError when the logits are further apart than the tolerance, or not numbers."""
    error = comparison.relative_logit_error
    if not (error <= tolerance and math.isfinite(error)):
        raise InputError(
            f"{what} is not exact enough and was not written: {comparison}; the tolerance is "
            f"{tolerance:.2g}. Scales far from 1 fold badly: train with a smaller learning rate, or accept "
            "it with --tolerance"
        )
