"""Checkpoints: the base model's own weights without the skipped blocks, plus a file of scales.

A checkpoint folder holds

    config.json, modeling_hopscotch.py     what `trust_remote_code=True` needs, nothing else
    base-0000i-of-0000n.safetensors        the base weights, bit for bit as they were read
    scales.safetensors                     the scales of each layer, and maps of skipped blocks, float32
    model.safetensors.index.json           which tensor is in which file
    hopscotch.json                         the run that made it: arguments, losses, versions
    README.md                              the model card
    tokenizer files, generation_config.json

Checkpoints of one run share the base weights by hard links (copies where links do not work), so an
epoch takes little more space than a tokenizer, and deleting one, or replacing one of its files, never changes
another.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import CHAT_TEMPLATE_DIR, GENERATION_CONFIG_NAME

from hopscotch_common import scales
from hopscotch_common.checkpoints import card
from hopscotch_common.checkpoints.folders import (
    DESCRIPTION_FILES,
    RUN_FILE,
    SCALES_FILE,
    SHARED_FILES,
    STATE_FILE,
    check_replaceable,
    companions,
    copy_companions,
)
from hopscotch_common.errors import HopscotchError, InputError, progress, reason_of, warn_once
from hopscotch_common.files import atomic_folder, check_input, link_or_copy, read_json
from hopscotch_common.loading import loader, weights
from hopscotch_common.loading.models import ModelRef
from hopscotch_common.loading.tokenization import check_copies, copy_tokenizer
from hopscotch_common.scales import modeling_hopscotch
from hopscotch_common.scales.modeling_hopscotch import (
    CODE,
    FAMILIES,
    PREFIX,
    REPLACEMENT_NAMES,
    SCALE_NAMES,
    stock_type,
)

MANY_BYTES = 100e6  # copies of fewer are not worth a warning
LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(\w+)\.")


def is_skipped_weight(key: str, config) -> bool:
    """Whether a weight belongs to an attention block that a Hopscotch config skips."""
    match = LAYER_KEY.match(key)
    family = FAMILIES[stock_type(config)]
    modules = family.skipped_modules(bool(config.replacement_rank))
    return bool(match) and int(match[1]) in (config.skipped_attention_blocks or ()) and match[2] in modules


def save_checkpoint(
    folder: Path,
    base: ModelRef,
    skipped: list[int],
    values: torch.Tensor,
    run: dict,
    training_state: dict[str, torch.Tensor] | None = None,
    share_with: Path | None = None,
    maps: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint atomically.

    values: the scales [layers, width]. maps: those in the skipped blocks' place (`scales.maps_of`).
    run: what goes into hopscotch.json. training_state: optimizer moments for resuming. share_with: an earlier
    checkpoint of the same base and skips, whose weights are linked instead of written again.
    """
    check_replaceable(folder)
    with atomic_folder(folder) as target:
        weights.save_tensors(scales.as_state_dict(values) | (maps or {}), target / SCALES_FILE)
        if share_with is None:
            run = run | _write_base(target, base, skipped, values, maps or {})
        else:
            shared = read_run(share_with)
            run = run | {key: shared[key] for key in ("weights", "tokenizer") if key in shared}
            copy_companions(share_with, target)
            copied = 0
            for path in share_with.iterdir():
                if path.match(SHARED_FILES):
                    copied += link_or_copy(path, target / path.name)
                elif path.name == CHAT_TEMPLATE_DIR:
                    shutil.copytree(path, target / path.name)
                elif path.name in DESCRIPTION_FILES:  # an earlier version's code may lack corrections
                    shutil.copyfile(CODE if path.name == CODE.name else path, target / path.name)
            if copied > MANY_BYTES:
                said = "%s: no hard links here, so each epoch takes %.2f GB of its own"
                warn_once(said, folder.parent, copied / 1e9)
        if training_state is not None:
            weights.save_tensors(training_state, target / STATE_FILE)
        (target / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
        origin = share_with and card.inherited(share_with) or card.origin_of(base)
        card.write_card(target, folder.name, "checkpoint", origin, checkpoint_config(target), values, run)


def has_weights(folder: Path) -> bool:
    """Whether a checkpoint exists with all of its weight files, so that another can share them."""
    try:
        weights.check_names(folder)
    except InputError:
        return False
    return True


def check_space(output_dir: Path, base: ModelRef, skipped: list[int], replacement_rank: int) -> None:
    """Raise HopscotchError unless a folder's disk has room for a checkpoint that shares no weights."""
    stock = loader.read_config(base)
    config = loader.hopscotch_config(stock, skipped, replacement_rank=replacement_rank)
    needed = 0
    for path in weights.weight_files(base.folder()):
        found = weights.read_tensors(path)
        needed += sum(tensor.nbytes for key, tensor in found.items() if not is_skipped_weight(key, config))
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    disk = shutil.disk_usage(existing)
    if disk.free < needed and disk.total:  # some network file systems report neither
        raise HopscotchError(
            f"{output_dir}: too little disk space: the first checkpoint takes {needed / 1e9:.2f} GB, and "
            f"{disk.free / 1e9:.2f} GB are free; free some, or name another --output_dir"
        )


def check_base(base: ModelRef, config) -> None:
    """Raise InputError early if a model's checkpoint could not be loaded or would read text differently."""
    if loader.quantized_by(config) == "torchao":
        raise InputError(
            f"{base.source}: its weights are quantised by torchao, which loads them from whole files only, "
            "not from a checkpoint's; give the model that it was made of (--quantization trains over "
            "quantised weights)"
        )
    for path in companions(base.folder()):
        check_input(path, "make it readable, or give another model")
    check_copies(base)


def _write_base(
    target: Path, base: ModelRef, skipped: list[int], values: torch.Tensor, maps: dict[str, torch.Tensor]
) -> dict:
    """Write what the checkpoints of one run share, beside the scales; return its part of hopscotch.json.

    In it, `weights` counts what is there, removed and added; `tokenizer` is a `tokenization.probe`.
    """
    source, stock = base.folder(), loader.read_config(base)
    weights.check_weights(source, stock)
    if stock.tie_word_embeddings and weights.has_own_head(source):  # vLLM would drop it if the config ties
        stock.tie_word_embeddings = False
    config = loader.hopscotch_config(stock, sorted(skipped), scales.granularity(values), scales.rank_of(maps))
    _, _, model_class = modeling_hopscotch.family_classes(stock.model_type)
    config.dtype = config.dtype or weights.stored_dtype(source)  # else vLLM would go by the float32 scales
    config.architectures = [model_class.__name__]
    config.save_pretrained(target)
    copy_companions(source, target)
    _keep_generation_parameters(source, target)
    tokenizer = copy_tokenizer(source, target, base.source)

    files = weights.weight_files(source)
    for number, path in enumerate(progress(files, "writing weights"), 1):
        name = f"base-{number:05}-of-{len(files):05}.safetensors"
        tensors = weights.read_tensors(path)
        if kept := {key: tensor for key, tensor in tensors.items() if not is_skipped_weight(key, config)}:
            weights.save_tensors(kept, target / name)
    weights.write_index(target)
    with torch.device("meta"):  # a quantised model's files hold other counts
        model = AutoModelForCausalLM.from_config(stock)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    counts = {
        "parameters": sum(sizes.values()),
        "parameters_removed": sum(n for key, n in sizes.items() if is_skipped_weight(key, config)),
        "parameters_added": values.numel() + sum(tensor.numel() for tensor in maps.values()),
        "kv_cache_blocks": len(modeling_hopscotch.attention_blocks(config)),
        "kv_cache_blocks_removed": len(skipped),
    }
    return {"weights": counts, "tokenizer": tokenizer}


def _keep_generation_parameters(source: Path, target: Path) -> None:
    """Keep generation parameters that only a model's config.json has: configs no longer save them."""
    own, saved = (
        GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
        for folder in (source, target)
    )
    if not (target / GENERATION_CONFIG_NAME).exists() and own != saved:
        own._from_model_config = None
        own.to_json_file(target / GENERATION_CONFIG_NAME)  # save_pretrained would refuse some that load


def read_run(folder: Path) -> dict:
    """hopscotch.json of a checkpoint."""
    return read_json(folder / RUN_FILE)


def load_scales(folder: Path, config=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a checkpoint's (scales [layers, width], maps in skipped blocks' place by state-dict key).

    They are in a file of their own or, if a model was saved again or by the original system, among the
    weights. config: the checkpoint's, if at hand. Raises InputError if a scale is missing or of another size
    than the config says, or if a number is not finite.
    """
    config = config or checkpoint_config(folder)
    wanted = scales.as_state_dict(scales.ones(config))
    found: dict[str, torch.Tensor] = {}
    maps: dict[str, torch.Tensor] = {}
    for path in _scale_files(folder):
        for key, tensor in weights.read_tensors(path).items():
            if key in wanted:
                found[key] = tensor
            elif config.replacement_rank and key.endswith(REPLACEMENT_NAMES):
                maps[key] = tensor
    missing = sorted(set(wanted) - set(found))
    if not found:
        raise InputError(f"{folder}: has no scales, so it is not a Hopscotch checkpoint; give one")
    if missing:
        raise InputError(
            f"{folder}: {missing[0]} is missing, and {len(missing) - 1} other scales; save it again"
        )
    for key, tensor in found.items():
        size = wanted[key].numel()
        if tensor.numel() != size or not bool(tensor.isfinite().all()):
            what = "one finite number" if size == 1 else f"{size} finite numbers"
            shown = tensor.tolist() if tensor.numel() == 1 else f"of shape {list(tensor.shape)}"
            raise InputError(f"{folder}: {key} is {shown}, not {what}; train it again")
    for key, tensor in maps.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{folder}: {key} is not finite; train it again")
    return scales.from_state_dict(found, config.num_hidden_layers), maps


def _scale_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's scales, not the old one if a model was saved again into it."""
    own, index = folder / SCALES_FILE, folder / weights.INDEX_FILE
    named = index.is_file() and SCALES_FILE in index.read_text(errors="replace")
    as_made = named and own.is_file() and not (folder / "model.safetensors").exists()
    return [own] if as_made else weights.weight_files(folder)


def checkpoint_config(folder: Path):
    """Return the Hopscotch config of a checkpoint, or of a folder that the original system wrote.

    The original system keeps a stock config and the full weights, with four scales per layer among them; a
    block is skipped if its b_scale_attn is 0. Raises InputError for other folders.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json, so not a checkpoint")
    model_type = str(read_json(path, "give the folder of a checkpoint").get("model_type"))
    if model_type.removeprefix(PREFIX) not in FAMILIES:
        raise InputError(f"{folder}: architecture {model_type!r} is not a supported one")
    if not model_type.startswith(PREFIX):
        stock = loader.read_config(ModelRef(folder.name, str(folder)))
        return loader.hopscotch_config(stock, _skipped_by_original(folder, loader.hopscotch_config(stock)))
    try:
        return loader.hopscotch_classes(model_type)[0].from_pretrained(folder)
    except Exception as error:  # transformers checks some fields, and stumbles over others
        raise InputError(f"{path}: describes no model ({reason_of(error)}); make it again") from error


def _skipped_by_original(folder: Path, config) -> list[int]:
    skipped = []
    for layer, scale in enumerate(load_scales(folder, config)[0]):
        b_attn, s_attn = (scale[SCALE_NAMES.index(name)] for name in ("b_scale_attn", "s_scale_attn"))
        if b_attn == 0 == s_attn:
            raise InputError(
                f"{folder}: s_scale_attn of layer {layer} is 0 as well as b_scale_attn, which wipes "
                "out the residual stream: this checkpoint cannot work; train it again"
            )
        if b_attn == 0:
            skipped.append(layer)
    return skipped


def read_checkpoint(folder: Path) -> tuple[PretrainedConfig, torch.Tensor, dict[str, torch.Tensor]]:
    """Return a checkpoint's config, scales and maps (`load_scales`); raise InputError for unsound weights."""
    config = checkpoint_config(folder)
    _, model_class = loader.hopscotch_classes(config.model_type)
    weights.check_names(folder)
    values, maps = load_scales(folder, config)
    if not getattr(config, "quantization_config", None):  # then other tensors represent the weights
        weights.check_tensors(folder, model_class, config)
    return config, values, maps


def load_checkpoint(folder: Path, **options):
    """Load a checkpoint as a model in eval mode; options go to `from_pretrained` (dtype, device_map, …)."""
    config, *_ = read_checkpoint(folder)
    _, model_class = loader.hopscotch_classes(config.model_type)
    model = loader.load_whole(model_class, folder, config=config, **options)
    scales.freeze_base(model)
    return model
