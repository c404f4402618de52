"""Reports read back: which kind a file is, and whether it holds what tables and pictures need.

What `read_report` takes is whatever lies on a disk, so everything is checked here, once: a report
that cannot be read is an InputError that names the file, what is wrong and what to do.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hopscotch_common import files
from hopscotch_common.errors import InputError
from hopscotch_common.report import fields
from hopscotch_common.report.records import (
    CountsRun,
    Drop,
    Epoch,
    Iteration,
    Run,
    ScaleMap,
    ScalingRun,
    SearchRun,
)

REMEDY = "make it again, or give a report of one of the five scripts, or param_scale.py's output folder"
SCALE_KEY = re.compile(r"model\.layers\.(\d+)\.([bs]_scale_(?:attn|mlp))")


def read_report(path: Path) -> Run:
    """The run that `path` tells of: a JSON report, or a folder that holds report.json.

    Raises InputError for anything else.
    """
    if path.is_dir():
        names = ("report.json", "data_report.json")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the output folder of param_scale.py, or a report")
    content = files.read_json(path, REMEDY)
    try:
        if "iterations" in content:
            return parse_search(content, path)
        if "best_epoch" in content:
            return _parse_scaling(content, path)
        for what, key in (("answers", "prompts"), ("data", "kept")):
            if key in content and "arguments" in content:
                return _parse_counts(content, path, what)
    except InputError:  # of a file beside the report
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}; {REMEDY}") from error
    raise InputError(f"{path}: not a report that can be shown; {REMEDY}")


def parse_search(content: dict, path: Path = Path()) -> SearchRun:
    """A report of block_selection.py, read or about to be written; ValueError says what is wrong."""
    num_layers = fields.get(content, "num_layers", int)
    iterations = tuple(
        _parse_iteration(item, f"iterations[{number}].", num_layers)
        for number, item in enumerate(fields.get(content, "iterations", Sequence))
    )
    if not iterations:
        raise ValueError("iterations is empty")
    skipped = fields.blocks(content, "skipped_blocks", "", num_layers)
    data = fields.get(content, "data", Mapping, default={})
    refused = content.get("stopped_before")
    return SearchRun(
        **_run(content, path),
        num_layers=num_layers,
        skipped=skipped,
        iterations=iterations,
        data=data,
        original=_measures(content, "original_held_out", ""),
        stopped_before=refused and _parse_iteration(refused, "stopped_before.", num_layers),
    )


def _measures(content: Mapping, key: str, where: str) -> dict[str, float]:
    """Held-out figures where there are any, else none."""
    return fields.measures_of(content[key], f"{where}{key}") if content.get(key) is not None else {}


def _parse_iteration(item: object, where: str, num_layers: int) -> Iteration:
    dropped = {
        block: Drop(
            fields.get(drop, "after_batches", int, f"{where}dropped[{block}]."),
            fields.loss(
                fields.get(drop, "mean_loss", object, f"{where}dropped[{block}]."), f"{where}dropped[{block}]"
            ),
        )
        for block, drop in fields.by_block(item, "dropped", where, num_layers).items()
    }
    diverged = fields.checked_blocks(
        list(fields.get(item, "diverged", Mapping, where, default={})), f"{where}diverged", num_layers
    )
    (block,) = fields.checked_blocks([fields.get(item, "block", object, where)], f"{where}block", num_layers)
    return Iteration(
        skipped_before=fields.blocks(item, "skipped_before", where, num_layers),
        block=block,
        loss=fields.number(item, "loss", where),
        losses=fields.losses(item, "losses", where, num_layers) | dict.fromkeys(diverged, math.inf),
        dropped=dropped,
        untrained=fields.losses(item, "untrained_losses", where, num_layers),
        distances=fields.losses(item, "distances", where, num_layers) if item.get("distances") else {},
        candidate_epochs=fields.number(item, "candidate_epochs", where),
        held_out=_measures(item, "held_out", where),
    )


def _parse_scaling(content: dict, path: Path) -> ScalingRun:
    run = _run(content, path)
    best = fields.get(content, "best_epoch", int)
    epochs, baselines = [], {}
    for place, item in enumerate(fields.get(content, "epochs", Sequence)):
        epoch, compared = _parse_epoch(item, f"epochs[{place}].")
        epochs.append(epoch)
        baselines |= compared
    if best not in [epoch.number for epoch in epochs]:
        raise ValueError(f"best_epoch is {best}, which epochs does not hold")
    # Beside the report, whatever it says of its model.
    checkpoint = path.parent / f"{Path(run['model']).name}_scaled_epoch_{best}"
    weights = scales = None
    if (checkpoint / "hopscotch.json").is_file() and (checkpoint / "scales.safetensors").is_file():
        weights = _read_weights(checkpoint / "hopscotch.json")
        scales = read_scales(checkpoint / "scales.safetensors")
        fields.blocks(content, "skipped_blocks", "", len(scales.mean))
    return ScalingRun(
        **run,
        skipped=fields.blocks(content, "skipped_blocks", ""),
        best_epoch=best,
        epochs=tuple(epochs),
        baselines=baselines,
        checkpoint=checkpoint,
        weights=weights,
        scales=scales,
        exports=fields.get(content, "exports", Mapping, default={}),
    )


def _parse_epoch(item: object, where: str) -> tuple[Epoch, dict[str, dict[str, float]]]:
    """The epoch, and the held-out figures of the models that it is compared with."""
    held_out = {
        name: fields.measures_of(value, f"{where}held_out.{name}")
        for name, value in fields.get(item, "held_out", Mapping, where).items()
        if value is not None
    }
    scaled = held_out.pop("scaled", {})
    number = fields.get(item, "epoch", int, where)
    return Epoch(number, fields.number(item, "loss", where), scaled), held_out


def _read_weights(path: Path) -> dict[str, int]:
    keys = ("parameters", "parameters_removed", "kv_cache_blocks", "kv_cache_blocks_removed")
    content = files.read_json(path, REMEDY)
    try:
        weights = fields.get(content, "weights", Mapping)
        counts = {key: fields.get(weights, key, int, "weights.") for key in keys}
        if min(counts["parameters"], counts["kv_cache_blocks"]) < 1:
            raise ValueError("weights: no parameters or no blocks")
    except ValueError as error:
        raise InputError(f"{path}: {error}; {REMEDY}") from error
    return counts


def read_scales(path: Path) -> ScaleMap:
    """The scales of a checkpoint's scales.safetensors; InputError where it is not one."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    found = {}
    for key, tensor in tensors.items():
        if (match := SCALE_KEY.fullmatch(key)) and tensor.size:
            found[int(match[1]), match[2]] = tensor.astype(np.float64).ravel()
    # by branch, attention first, and in it b before s
    names = sorted({name for _, name in found}, key=lambda name: (name.split("_")[-1], name))
    layers = sorted({layer for layer, _ in found})
    if (
        "b_scale_attn" not in names
        or layers != list(range(len(layers)))
        or len(found) != len(layers) * len(names)
    ):
        raise InputError(f"{path}: not the scales of every layer; {REMEDY}")
    if not all(np.isfinite(values).all() for values in found.values()):
        raise InputError(f"{path}: a scale is not a finite number; train again at a lower --learning_rate")
    return ScaleMap(
        names=tuple(name.replace("_scale", "") for name in names),
        mean=np.array([[found[layer, name].mean() for name in names] for layer in layers]),
        spread=np.array([[found[layer, name].std() for name in names] for layer in layers]),
        vectors=tuple(any(found[layer, name].size > 1 for layer in layers) for name in names),
    )


def _parse_counts(content: dict, path: Path, what: str) -> CountsRun:
    arguments = fields.get(content, "arguments", Mapping)
    figures = {
        name: value
        for name, value in content.items()
        if name not in ("arguments", "versions", "script") and isinstance(value, (str, int, float))
    }
    model = Path(str(arguments.get("model", "model"))).name  # of an id or a folder, the last part
    return CountsRun(**_run({"model": model} | content, path), what=what, figures=figures)


def _run(content: dict, path: Path) -> dict:
    return {
        "path": path,
        "model": fields.get(content, "model", str),
        "arguments": fields.get(content, "arguments", Mapping, default={}),
        "versions": fields.get(content, "versions", Mapping, default={}),
    }
