"""An export's folder: its config, its weights with the scales folded in, and reading it back."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hopscotch_common import checkpoints, scales, weights
from hopscotch_common.errors import InputError, logger
from hopscotch_common.export import decilm
from hopscotch_common.export.folding import Factor, Folding, fold_factors, granite_multipliers
from hopscotch_common.loading import hopscotch_classes, load_whole
from hopscotch_common.modeling_hopscotch import FAMILIES, OWN_KEYS, PREFIX, REPLACEMENT_NAMES


@dataclass(frozen=True)
class Target:
    """What an export's weights are: what becomes of each, and all that it needs.

    renamed: whether weight files name some tensors otherwise than the model does (experts). linear: matrices
    [hidden, hidden] by layer that stand in attention's place.
    """

    folding: Folding
    shapes: dict[str, torch.Size]
    renamed: bool = False
    linear: dict[int, torch.Tensor] = field(default_factory=dict)


def skipped_blocks(config) -> list[int]:
    """Indices of the blocks without attention."""
    return sorted(config.skipped_attention_blocks or ())


def prepare_folded(folder: Path, config, values: torch.Tensor, maps: dict[str, torch.Tensor]) -> Target:
    """Write the config of the stock architecture; what its weights are. It has no place for maps."""
    assert not maps
    own = ("model_type", "architectures", "auto_map", "skipped_attention_blocks", "scale_granularity")
    own += ("transformers_version",)
    kept = {key: value for key, value in config.to_dict().items() if key not in own}
    stock = AutoConfig.for_model(config.model_type.removeprefix(PREFIX), **kept)
    stock.dtype = config.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock)
    stock.architectures = [type(model).__name__]
    # transformers 5.19 reads this key and acts on it in no model. One that does will leave out what is zero.
    stock.per_layer_config = {block: {"skip": ["attention"]} for block in skipped_blocks(config)} or None
    stock.save_pretrained(folder)
    folding = Folding(stock, fold_factors(values, skipped_blocks(config)))
    renamed = get_checkpoint_conversion_mapping(stock.model_type) is not None
    return Target(folding, _shapes(model), renamed)


def prepare_nemotron_nas(folder: Path, config, values: torch.Tensor, maps: dict[str, torch.Tensor]) -> Target:
    """Write the DeciLM config and its class; what its weights are. InputError if it cannot hold the model."""
    decilm.check_representable(config)
    skipped = skipped_blocks(config)
    replaced = skipped if maps else []
    if 0 in skipped and not maps:
        logger.warning("block 0 stays in nemotron_nas, with a zero o_proj: vLLM's code cannot leave it out")
    values_of_config = decilm.decilm_config(config, set(skipped) - set(replaced) - {0}, replaced)
    decilm.write_config(values_of_config, folder)
    factors = fold_factors(values, skipped, getattr(config, "residual_multiplier", 1.0), replaced)
    linear = {block: _as_one_matrix(block, maps, factors.layers[block].attention_adds) for block in replaced}
    shaped = decilm.as_hopscotch_config(values_of_config)
    _, model_class = hopscotch_classes(shaped.model_type)
    with torch.device("meta"):
        model = model_class(shaped)
    shapes = _shapes(model) | {decilm.linear_key(block): matrix.shape for block, matrix in linear.items()}
    return Target(Folding(config, factors, granite_multipliers(config)), shapes, linear=linear)


def _as_one_matrix(block: int, maps: dict[str, torch.Tensor], factor: Factor) -> torch.Tensor:
    """up down of a block's map [hidden, hidden], row i times the factor that its channel i has."""
    down, up = (maps[f"model.layers.{block}.{name}"].double() for name in REPLACEMENT_NAMES)
    return torch.as_tensor(factor).double().view(-1, 1) * (up @ down)


def _shapes(model) -> dict[str, torch.Size]:
    """The tensors that a model (on the meta device) reads from its weight files."""
    return {
        key: tensor.shape
        for key, tensor in model.state_dict().items()
        if key not in model.all_tied_weights_keys and not re.search(OWN_KEYS, key)
    }


def write_weights(checkpoint: Path, folder: Path, config, target: Target) -> None:
    """Fold the weights, file by file: one file of the checkpoint is in memory at a time."""
    sources = [p for p in weights.weight_files(checkpoint) if p.name != checkpoints.SCALES_FILE]
    family = target.folding.family
    beside = f".{family.norm_before_mlp or family.norm_after_mlp}.weight"  # every layer has one
    weight_map, total_bytes = {}, 0
    for number, path in enumerate(sources, 1):
        name = f"model-{number:05}-of-{len(sources):05}.safetensors"
        name = "model.safetensors" if len(sources) == 1 else name
        tensors = {}
        for key, tensor in weights.read_tensors(path).items():
            known = key in target.shapes or (target.renamed and not re.search(OWN_KEYS, key))
            if not known or checkpoints.is_skipped_weight(key, config):
                continue
            tensors[key] = _filled_up(target.folding.fold(key, tensor), target.shapes.get(key))
            if key.endswith(beside):
                layer = int(key.split(".")[2])
                tensors |= _unused_attention(layer, target, config, tensor.dtype)
                if layer in target.linear:
                    tensors[decilm.linear_key(layer)] = target.linear[layer].to(tensor.dtype)
        if tensors:
            weights.save_tensors(tensors, folder / name)
            weight_map |= dict.fromkeys(tensors, name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    missing = sorted(set(target.shapes) - set(weight_map))
    if missing and not target.renamed:  # of those, loading finds out
        raise InputError(f"{checkpoint}: {missing[0]} is missing, and {len(missing) - 1} other weights")
    target.folding.check_complete(weight_map, skipped_blocks(config))
    if len(sources) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / weights.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _filled_up(tensor: torch.Tensor, shape: torch.Size | None) -> torch.Tensor:
    """A tensor with zeros behind its rows and columns, where the target's MLP is wider.

    Channels that gate, up and down projection hold zeros for add nothing. A tensor that is larger than
    the target's stays as it is: the check of the export names it. shape: None where the target names its
    tensors otherwise, and is no wider.
    """
    if shape is None:
        return tensor
    missing = [wanted - size for size, wanted in zip(tensor.shape, shape, strict=True)]
    if not any(missing) or min(missing) < 0:
        return tensor
    return pad(tensor, [n for size in reversed(missing) for n in (0, size)])


def _unused_attention(layer: int, target: Target, config, dtype) -> dict[str, torch.Tensor]:
    """The attention weights of a skipped block, where the target has them all the same: it adds 0."""
    keys = [k for k in target.shapes if k.startswith(f"model.layers.{layer}.")]
    return {
        key: (torch.ones if re.search(r"norm\.weight$", key) else torch.zeros)(
            target.shapes[key], dtype=dtype
        )
        for key in keys
        if checkpoints.is_skipped_weight(key, config) and layer not in target.linear
    }


def load_exported(folder: Path, format: str, **options):
    """An export as a transformers model; every tensor must be read, and none be missing."""
    if format == "folded":
        model_class = AutoModelForCausalLM
        kind = AutoConfig.from_pretrained(folder).model_type
        if FAMILIES[kind].caps_attention:
            options |= {"attn_implementation": "eager"}
    else:
        shaped = decilm.as_hopscotch_config(json.loads((folder / "config.json").read_text()))
        _, model_class = hopscotch_classes(shaped.model_type)
        # A matrix in attention's place is a map of full rank, whose other half is the identity.
        names = {r"self_attn\.linear\.weight": REPLACEMENT_NAMES[1]}
        options |= {"config": shaped} | ({"key_mapping": names} if shaped.replacement_rank else {})
    model = load_whole(model_class, folder, **options)
    for key, parameter in scales.named_maps(model) if format != "folded" else ():
        if key.endswith(REPLACEMENT_NAMES[0]):
            torch.nn.init.eye_(parameter)
    return model
