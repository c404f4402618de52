"""Checkpoints: the base model's own weights without the skipped blocks, plus a file of scales.

A checkpoint folder holds

    config.json, modeling_hopscotch.py     what `trust_remote_code=True` needs, nothing else
    base-0000i-of-0000n.safetensors        the base weights, bit for bit as they were read
    scales.safetensors                     four scales a layer, float32
    model.safetensors.index.json           which tensor is in which file
    hopscotch.json                         the run that made it: arguments, losses, versions
    tokenizer files, generation_config.json

Checkpoints of one run share the base weights by hard links (copies where links do not work), so an
epoch costs little more than a tokenizer, and deleting or editing one never changes another.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from hopscotch_common import modeling_hopscotch, scales
from hopscotch_common.errors import InputError
from hopscotch_common.files import atomic_folder, link_or_copy, read_json
from hopscotch_common.models import (
    FAMILIES,
    HOPSCOTCH_PREFIX,
    ModelRef,
    hopscotch_classes,
    hopscotch_config,
    load_whole,
    read_config,
)

SCALES_FILE = "scales.safetensors"
STATE_FILE = "training_state.safetensors"
RUN_FILE = "hopscotch.json"
INDEX_FILE = "model.safetensors.index.json"
OWN_FILES = (SCALES_FILE, STATE_FILE, RUN_FILE)  # of each checkpoint
SHARED_FILES = "base-*.safetensors"
SAMPLES_OF_A_FILE, SAMPLE_BYTES = 64, 4096
COMPANION_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as the umask allows."""
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(None, str(error), str(path)) from error
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def weight_files(folder: Path) -> list[Path]:
    """A model folder's weight files: what its index names, else its only file.

    Raises InputError for a folder without weights, or an index that is none or names what is not there.
    """
    for index in (INDEX_FILE, "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return [folder / name for name in sorted(set(_weight_map(folder / index).values()))]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(
        f"{folder}: no weights (model*.safetensors or pytorch_model*.bin) in it; give a folder with them"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index, every file checked to be there, in the index's own folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f"{index}: names no weight files in its 'weight_map'; fetch the model again")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise InputError(
                f"{index}: names {name!r}, which is not a file of its own folder; do not trust it"
            )
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name}, which is missing; fetch the model again")
    return names


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's config and of samples of its weights: quick, whatever their size."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(SAMPLES_OF_A_FILE):
                file.seek(size * part // SAMPLES_OF_A_FILE)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file, memory mapped where the format allows.

    A .bin file is read as weights only, so nothing in it runs. Raises InputError for a broken file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a whole file of weights ({reason}); fetch the model again") from error


def tensor_shapes(path: Path) -> dict[str, torch.Size]:
    """The shapes of a weight file's tensors, by name, without reading them where the format allows."""
    if path.suffix != ".safetensors":
        return {key: tensor.shape for key, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole file of weights ({error}); fetch the model again") from error


def check_weights(folder: Path, config) -> None:
    """Raise InputError unless a folder's weight files hold exactly what its (stock) config says."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None):
        return  # other tensors stand for the weights then
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found: dict[str, torch.Size] = {}
    for path in weight_files(folder):
        found |= tensor_shapes(path)
    found = {k: shape for k, shape in found.items() if not k.endswith("rotary_emb.inv_freq")}
    wrong = {
        "is missing": set(expected) - set(found) - tied,
        "is no part of it": set(found) - set(expected),
        "has another shape": {key for key in expected if key in found and found[key] != expected[key]},
    }
    for what, keys in wrong.items():
        if keys:
            raise InputError(f"{folder}: {min(keys)} {what} ({len(keys)} such): both must be one model's")


def is_skipped_weight(key: str, skipped: set[int]) -> bool:
    """Whether a base weight belongs to an attention block that is skipped."""
    parts = key.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 5:
        return False
    return int(parts[2]) in skipped and parts[3] in modeling_hopscotch.SKIPPED_ATTENTION_MODULES


def save_checkpoint(
    folder: Path,
    base: ModelRef,
    skipped: list[int],
    values: torch.Tensor,
    run: dict,
    training_state: dict[str, torch.Tensor] | None = None,
    share_with: Path | None = None,
) -> None:
    """Write a checkpoint, atomically.

    values: the scales [layers, 4]. run: what goes into hopscotch.json. training_state: optimizer
    moments for resuming. share_with: an earlier checkpoint of the same base and skips, whose
    weights are linked instead of written again.
    """
    check_replaceable(folder)
    with atomic_folder(folder) as target:
        if share_with is None:
            run = run | {"weights": _write_base(target, base, skipped, len(values))}
        else:
            run = run | {"weights": read_run(share_with)["weights"]}
            for path in share_with.iterdir():
                if path.match(SHARED_FILES):
                    link_or_copy(path, target / path.name)
                elif path.name not in OWN_FILES:
                    shutil.copyfile(path, target / path.name)
        save_tensors(scales.as_state_dict(values), target / SCALES_FILE)
        if training_state is not None:
            save_tensors(training_state, target / STATE_FILE)
        (target / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")


def _write_base(target: Path, base: ModelRef, skipped: list[int], num_layers: int) -> dict:
    """Write everything that checkpoints of one run share; counts of weights kept and removed."""
    source, stock = base.folder(), read_config(base)
    check_weights(source, stock)
    config = hopscotch_config(stock, sorted(skipped))
    _, model_class = hopscotch_classes(config.model_type)
    code = Path(modeling_hopscotch.__file__)
    config.architectures = [model_class.__name__]
    config.auto_map = {
        "AutoConfig": f"{code.stem}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{code.stem}.{model_class.__name__}",
    }
    config.save_pretrained(target)
    shutil.copyfile(code, target / code.name)
    copy_companions(source, target)

    files = weight_files(source)
    weight_map, total, removed, total_bytes = {}, 0, 0, 0
    for number, path in enumerate(tqdm(files, "writing weights", delay=2, dynamic_ncols=True), 1):
        name = f"base-{number:05}-of-{len(files):05}.safetensors"
        kept = {}
        for key, tensor in read_tensors(path).items():
            total += tensor.numel()
            if is_skipped_weight(key, set(skipped)):
                removed += tensor.numel()
            else:
                kept[key] = tensor
                total_bytes += tensor.nbytes
        if kept:
            save_tensors(kept, target / name)
            weight_map |= dict.fromkeys(kept, name)
    scale_keys = scales.as_state_dict(torch.ones(num_layers, len(modeling_hopscotch.SCALE_NAMES)))
    weight_map |= dict.fromkeys(scale_keys, SCALES_FILE)
    index = {"metadata": {"total_size": total_bytes + 4 * len(scale_keys)}, "weight_map": weight_map}
    (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return {
        "parameters": total,
        "parameters_removed": removed,
        "kv_cache_blocks": num_layers,
        "kv_cache_blocks_removed": len(skipped),
    }


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence from a model folder."""
    for pattern in COMPANION_FILES:
        for path in source.glob(pattern):
            own = path.name in ("config.json", RUN_FILE) or path.name.endswith(".index.json")
            if not own:
                shutil.copyfile(path, target / path.name)


def check_replaceable(folder: Path) -> None:
    """Raise InputError unless a checkpoint may be written there: a new folder, or an earlier one's."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if (folder.exists() or folder.is_symlink()) and not empty and not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder} exists and is not a checkpoint of ours: name another --output_dir")


def read_run(folder: Path) -> dict:
    """hopscotch.json of a checkpoint."""
    return read_json(folder / RUN_FILE)


def load_scales(folder: Path, num_layers: int) -> torch.Tensor:
    """The scales [layers, 4] of a checkpoint, without its weights.

    They stand in a file of their own or (the original system) among the weights. Raises InputError
    where one is missing, is not a number, or is not finite.
    """
    wanted = scales.as_state_dict(torch.ones(num_layers, len(modeling_hopscotch.SCALE_NAMES)))
    own = folder / SCALES_FILE
    found: dict[str, torch.Tensor] = {}
    for path in [own] if own.is_file() else weight_files(folder):
        found |= {key: tensor for key, tensor in read_tensors(path).items() if key in wanted}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise InputError(
            f"{folder}: {missing[0]} is missing, and {len(missing) - 1} other scales; save it again"
        )
    for key, tensor in found.items():
        if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
            raise InputError(f"{folder}: {key} is {tensor.tolist()}, not one finite number; train it again")
    return scales.from_state_dict(found, num_layers)


def load_training_state(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer moments of a checkpoint; InputError when it has none."""
    if not (folder / STATE_FILE).is_file():
        raise InputError(f"{folder}: no {STATE_FILE}, so training cannot resume from it")
    return read_tensors(folder / STATE_FILE)


def checkpoint_config(folder: Path):
    """The Hopscotch config of a checkpoint, or of a folder that the original system wrote.

    The original keeps a stock config and the full weights, with four scales a layer among them;
    there a skipped block is one whose b_scale_attn is 0. Raises InputError for other folders.
    """
    from transformers import PretrainedConfig

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json, so not a checkpoint")
    values, _ = PretrainedConfig.get_config_dict(folder)
    model_type = values.get("model_type", "")
    if model_type.removeprefix(HOPSCOTCH_PREFIX) not in FAMILIES:
        raise InputError(f"{folder}: architecture {model_type!r} is not a supported one")
    if model_type.startswith(HOPSCOTCH_PREFIX):
        config_class, _ = hopscotch_classes(model_type)
        return config_class.from_pretrained(folder)
    skipped = _skipped_by_original(folder)
    return hopscotch_config(read_config(ModelRef(folder.name, str(folder))), skipped)


def _skipped_by_original(folder: Path) -> list[int]:
    found: dict[str, float] = {}
    for path in weight_files(folder):
        found |= {
            key: float(tensor)
            for key, tensor in read_tensors(path).items()
            if key.endswith(modeling_hopscotch.SCALE_NAMES)
        }
    if not found:
        raise InputError(f"{folder}: not a Hopscotch checkpoint, it has no scales")
    skipped = []
    for key, value in found.items():
        if key.endswith("b_scale_attn") and value == 0:
            layer = int(key.split(".")[2])
            if found.get(key.replace("b_scale_attn", "s_scale_attn"), 1.0) == 0:
                raise InputError(
                    f"{folder}: s_scale_attn of layer {layer} is 0 as well as b_scale_attn, which wipes "
                    "out the residual stream: this checkpoint cannot work; train it again"
                )
            skipped.append(layer)
    return sorted(skipped)


def load_checkpoint(folder: Path, **options):
    """A checkpoint as a model in eval mode; options go to `from_pretrained` (dtype, device_map, …)."""
    config = checkpoint_config(folder)
    _, model_class = hopscotch_classes(config.model_type)
    values = load_scales(folder, config.num_hidden_layers)
    model = load_whole(model_class, folder, config=config, **options)
    scales.restore(model, values)  # a scale that is missing would have been 1
    scales.freeze_base(model)
    return model
