"""Weight files of a model folder: read, checked against its config, and written."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hopscotch_common.errors import InputError, as_os_error
from hopscotch_common.files import check_input, read_json
from hopscotch_common.loading.loader import load_whole
from hopscotch_common.scales.modeling_hopscotch import FAMILIES, stock_type

INDEX_FILE = "model.safetensors.index.json"
# transformers reads the first of these that is there.
WEIGHT_NAMES = ("model.safetensors", INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_FILE = "adapter_config.json"
SAMPLE_BYTES = 4096


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that others may read if the umask allows it."""
    stored, unshared = set(), {}
    for key, tensor in tensors.items():  # tied weights share one storage, which the format cannot express
        place = tensor.untyped_storage().data_ptr()
        unshared[key] = tensor.clone() if place in stored else tensor.contiguous()
        stored.add(place)
    try:
        save_file(unshared, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := as_os_error(error, path):
            raise found from error
        raise
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder that transformers reads: one file, or those in an index.

    Raises InputError for a folder without weights, an index that is not one or names missing files, a file
    without read permission, and an adapter, which transformers would add to the weights.
    """
    if (folder / ADAPTER_FILE).exists():
        raise InputError(
            f"{folder / ADAPTER_FILE}: an adapter beside the weights would be loaded on top of them; merge "
            "it into them, or give a folder without it"
        )
    found = _weights_or_index(folder)
    is_index = found.suffix == ".json"
    paths = [folder / name for name in sorted(set(weight_map(found).values()))] if is_index else [found]
    for path in paths:  # safetensors would call an unreadable file missing
        check_input(path, "make it readable, or give another folder")
    return paths


def _weights_or_index(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: no weights (model*.safetensors or pytorch_model*.bin) in it; give a folder with them"
    )


def weight_map(index: Path) -> dict[str, str]:
    """Return {tensor: file} of an index; every file is checked to be there, in the index's own folder."""
    names = read_json(index, "fetch the model again").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f"{index}: names no weight files in its 'weight_map'; fetch the model again")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise InputError(
                f"{index}: names {name!r}, which is not a file of its own folder; do not trust it, "
                "give another folder"
            )
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name}, which is missing; fetch the model again")
    return {_plain_name(key): name for key, name in names.items()}


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's config and, to be quick, of only the ends and the middle of each tensor."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        for key, tensor in sorted(read_tensors(path).items()):
            digest.update(f"{path.name} {key} {tensor.dtype} {list(tensor.shape)}".encode())
            content = tensor.contiguous().flatten().view(torch.uint8)
            last = max(len(content) - SAMPLE_BYTES, 0)
            for start in (0, last // 2, last):
                digest.update(content[start : start + SAMPLE_BYTES].numpy())
    return digest.hexdigest()


def save_in_shards(folder: Path, plan: StateDictSplit, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a model's tensors to the weight files of a plan, each file once all its tensors have arrived."""
    held: dict[str, dict[str, torch.Tensor]] = {name: {} for name in plan.filename_to_tensors}
    for key, tensor in tensors:
        name = plan.tensor_to_filename[key]
        held[name][key] = tensor
        if len(held[name]) == len(plan.filename_to_tensors[name]):
            save_tensors(held.pop(name), folder / name)
    if plan.is_sharded:
        write_index(folder)


def write_index(folder: Path) -> None:
    """Write the index of the safetensors files that a folder holds: which tensor is in which."""
    found = {path.name: read_tensors(path) for path in sorted(folder.glob("*.safetensors"))}
    total_bytes = sum(tensor.nbytes for tensors in found.values() for tensor in tensors.values())
    places = {key: name for name, tensors in found.items() for key in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _plain_name(key: str) -> str:
    """A tensor's name, without what qwen3_5_text adds to it when saved as a vision-language model."""
    return key.replace("model.language_model.", "model.", 1)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file, memory mapped where the format allows.

    A .bin file is read as weights only, so nothing in it runs. Raises InputError for a broken file.
    """
    try:
        is_bin = path.suffix == ".bin"
        found = torch.load(path, weights_only=True, mmap=True) if is_bin else load_file(path)
        return {_plain_name(key): tensor for key, tensor in found.items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a whole file of weights ({reason}); fetch the model again") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a folder's first weights, for a config that names none."""
    return next(t.dtype for t in read_tensors(weight_files(folder)[0]).values() if t.is_floating_point())


def has_own_head(folder: Path) -> bool:
    """Whether the LM head in a folder's weight files is a different matrix from the embeddings.

    transformers then keeps both, even if the config says that they are tied.
    """
    found = {}
    for path in weight_files(folder):
        found |= read_tensors(path)
    head, embeddings = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    return head is not None and embeddings is not None and not torch.equal(head, embeddings)


def check_weights(folder: Path, config, attn_implementation: str = "auto") -> None:
    """Raise InputError unless a folder's weight files hold exactly what its (stock) config says.

    Also raises it unless the attention kernel that the model is to run with is installed.
    """
    options = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    family = FAMILIES[stock_type(config)]
    if family.caps_attention and attn_implementation == "sdpa":
        raise InputError(
            f"--attn_implementation sdpa: leaves out that {config.model_type} caps its attention's logits, "
            "so it would be another model; give eager, flash_attention_2 or flex_attention"
        )
    if quantization := getattr(config, "quantization_config", None):
        from transformers.quantizers.auto import AutoHfQuantizer  # it prints torchao's messages

        # Other tensors then represent the weights. For an unknown kind, transformers would make up all.
        if isinstance(quantization, dict) and "quant_method" in quantization:
            if AutoHfQuantizer.supports_quant_method(quantization):
                return
        raise InputError(
            f"{folder / 'config.json'}: quantization_config is of no known kind; give another model"
        )
    check_tensors(folder, AutoModelForCausalLM, config, **options)


def check_tensors(folder: Path, model_class, config, **options) -> None:
    """Raise InputError unless a folder's weights are exactly those that a model has, with its shapes.

    transformers loads them as it will later, but to no device, so that it reads none.
    """
    check_names(folder, more_in_index=True)
    if getattr(config, "transformers_weights", None):
        raise InputError(
            f"{folder / 'config.json'}: transformers_weights names weight files of other names, which "
            "is not supported; give them their usual names"
        )
    options |= {"config": config, "device_map": "meta", "ignore_mismatched_sizes": True}  # reported anyway
    load_whole(model_class, folder, **options)


def check_names(folder: Path, more_in_index: bool = False) -> None:
    """Raise InputError unless each of a folder's weights is in the file that its index, if any, says.

    Also raises it for the names of a model without a head, which transformers takes for the same.
    more_in_index: whether the index may name others, which are in no file, as old ones do
    (rotary_emb.inv_freq).
    """
    index = _weights_or_index(folder)
    is_index = index.suffix == ".json"
    places = weight_map(index) if is_index else {}
    for path in weight_files(folder):
        for name in sorted(read_tensors(path)):
            if is_index and places.pop(name, None) != path.name:
                raise InputError(
                    f"{index}: does not say that {name} lies in {path.name}; make or fetch it again"
                )
            if name.startswith("layers."):
                raise InputError(f"{path}: {name} is of a model without a head; give a causal language model")
    if places and not more_in_index:
        raise InputError(f"{index}: {min(places)} is not in {places[min(places)]}; make or fetch it again")
