"""Whether a checkpoint is what it says: its code this project's, its files whole, its scales finite.

Nothing of the checkpoint runs: its code is compared byte by byte, never imported.
"""

import hashlib
from pathlib import Path

import torch

from hopscotch_common import modeling_hopscotch
from hopscotch_common.checkpoints import RUN_FILE, SCALES_FILE, STATE_FILE, load_scales, read_run
from hopscotch_common.errors import InputError
from hopscotch_common.files import read_json
from hopscotch_common.models import HOPSCOTCH_PREFIX, hopscotch_classes
from hopscotch_common.weights import INDEX_FILE, tensor_shapes, weight_map

CODE = Path(modeling_hopscotch.__file__)
# SHA-256 of the modeling_hopscotch.py of earlier releases, whose checkpoints are as good as ever.
RELEASED: tuple[str, ...] = ()
EXECUTABLE = {".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def verify(folder: Path) -> None:
    """Raise InputError, naming the first thing that is wrong, unless a checkpoint is sound."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give that of a checkpoint")
    config = read_json(folder / "config.json", "give the folder of a checkpoint")
    _check_code(folder, config)
    model = _empty_model(folder, config)
    shapes = _check_index(folder)
    # On a meta device nothing is read; scales stand in float32, the rest in whatever dtype it has.
    tied = set(model.all_tied_weights_keys)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if key in expected and key not in shapes and key not in tied:
            raise InputError(f"{folder}: {key} is missing; make the checkpoint again")
        if key in shapes and shapes[key] != expected.get(key, shapes[key]):
            raise InputError(f"{folder}: {key} has another shape than config.json says; make it again")
        if key in shapes and key not in expected:
            raise InputError(f"{folder}: {key} is no part of the model of its config.json; make it again")
    load_scales(folder, model.config)
    read_run(folder)


def _check_code(folder: Path, config: dict) -> None:
    """Raise InputError unless all that could run from a folder is a known modeling_hopscotch.py."""
    code = folder / CODE.name
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise InputError(f"{path}: is a link, and what it leads to may change; copy the file itself")
        if path.suffix in EXECUTABLE and path != code or path.is_dir():
            raise InputError(f"{path}: is no part of a checkpoint, and may run; do not trust this folder")
    if not code.is_file():
        raise InputError(f"{code}: is missing; make the checkpoint again")
    content = code.read_bytes()
    if content != CODE.read_bytes() and hashlib.sha256(content).hexdigest() not in RELEASED:
        raise InputError(f"{code}: differs from this project's file of that name; do not run it")
    for name, target in (config.get("auto_map") or {}).items():
        if not str(target).startswith(f"{CODE.stem}.Hopscotch"):
            raise InputError(f"{folder / 'config.json'}: auto_map names {target!r} for {name}; do not run it")
    for other in ("tokenizer_config.json", "generation_config.json", "processor_config.json"):
        if (folder / other).is_file() and "auto_map" in read_json(folder / other):
            raise InputError(f"{folder / other}: has an auto_map, so it names code to run; do not trust it")


def _empty_model(folder: Path, config: dict):
    """The model of a config.json, by this project's own classes, without weights."""
    if not str(config.get("model_type", "")).startswith(HOPSCOTCH_PREFIX):
        raise InputError(f"{folder}: config.json is not a checkpoint's; give the folder of one")
    try:
        config_class, model_class = hopscotch_classes(config["model_type"])
        with torch.device("meta"):
            return model_class(config_class.from_dict(config))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder / 'config.json'}: describes no model ({reason}); make it again") from error


def _check_index(folder: Path) -> dict[str, torch.Size]:
    """The shapes of all tensors; InputError unless each lies where the index says, and only there."""
    index = weight_map(folder / INDEX_FILE)
    shapes: dict[str, torch.Size] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == STATE_FILE:
            continue
        for key, shape in tensor_shapes(path).items():
            if index.get(key) != path.name:
                raise InputError(
                    f"{folder / INDEX_FILE}: {key} lies in {path.name}, the index says {index.get(key)}; "
                    "make the checkpoint again"
                )
            shapes[key] = shape
    for key, name in index.items():
        if key not in shapes:
            raise InputError(f"{folder / INDEX_FILE}: {key} is not in {name}; make the checkpoint again")
    if SCALES_FILE not in index.values() or not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder}: holds no {SCALES_FILE} or no {RUN_FILE}; make the checkpoint again")
    return shapes
