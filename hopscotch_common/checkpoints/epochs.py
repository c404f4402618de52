"""The epochs of one training, checkpoints side by side in a folder: how to find and resume them."""

import re
from pathlib import Path

from hopscotch_common.checkpoints import load_scales, read_run
from hopscotch_common.checkpoints.folders import OLD_STATE_FILE, RUN_FILE, STATE_FILE
from hopscotch_common.errors import InputError, logger
from hopscotch_common.files import check_name, locked, recover_folder
from hopscotch_common.loading import weights
from hopscotch_common.resumable import check_settings
from hopscotch_common.training.trainer import ScaleState


def epoch_folder(output_dir: Path, name: str, epoch: int) -> Path:
    """Return the folder of an epoch's checkpoint."""
    return output_dir / f"{name}_scaled_epoch_{epoch}"


def saved_epochs(output_dir: Path, name: str) -> list[int]:
    """Return the numbers of the epochs that a folder holds, in order.

    Puts back what a killed run had moved away, and removes its locks. Raises InputError if a run is writing
    there.
    """
    pattern = re.compile(rf"\.?{re.escape(name)}_scaled_epoch_(\d+)(\.old|\.lock)?")
    found = set()
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            folder = epoch_folder(output_dir, name, int(match[1]))
            if match[2]:
                check_name(folder, "--output_dir")
                with locked(folder):
                    recover_folder(folder)
            if (folder / RUN_FILE).is_file():
                found.add(int(match[1]))
    return sorted(found)


def resumable_epochs(output_dir: Path, name: str, settings: dict) -> list[dict]:
    """Return what the saved epochs recorded, in order; raise InputError for settings of another training.

    Each epoch continues the one before it: epochs that an earlier training left behind these are left out.
    """
    runs = []
    for epoch in saved_epochs(output_dir, name):
        folder = epoch_folder(output_dir, name, epoch)
        run = read_run(folder)
        if (
            run.get("epoch") != epoch
            or not isinstance(run.get("settings"), dict)
            or not {"held_out", "loss", "weights", "learning_rates"} <= run.keys()
        ):
            raise InputError(f"--resume: {folder} is not an epoch of this script; name another --output_dir")
        check_settings(run["settings"], settings, f"--resume: {folder}", "name another --output_dir")
        before = runs[-1]["learning_rates"] if runs else []
        if run["learning_rates"][: len(before)] != before:
            logger.warning("%s and later epochs there are of an earlier training: not gone on with", folder)
            break
        runs.append(run)
    return runs


def load_training_state(folder: Path) -> ScaleState:
    """Return the state to resume training from; raise InputError if none fits the scales and maps."""
    remedy = "so training cannot resume from it; train anew into another --output_dir"
    path = next(filter(Path.is_file, (folder / STATE_FILE, folder / OLD_STATE_FILE)), None)
    if path is None:
        raise InputError(f"{folder}: no {STATE_FILE}, {remedy}")
    state = weights.read_tensors(path)
    trained = ScaleState(*load_scales(folder)).as_tensors()
    shapes = {key: (4, *tensor.shape) for key, tensor in trained.items()}
    finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
    if {key: tuple(tensor.shape) for key, tensor in state.items()} != shapes or not finite:
        raise InputError(f"{path}: not finite numbers for each of the scales, {remedy}")
    return ScaleState.from_tensors(state)
