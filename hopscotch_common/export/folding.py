"""Fold the scales into the weights, file by file: the same function, computed by a model without scales.

A norm's output does not change when its input is multiplied by a positive constant (up to its eps). So the
residual stream may be stored divided by a running factor C, which starts at 1. At each residual connection

    C *= s;  stored = (b * branch + s * C_before * stored_before) / C = (b / C) * branch + stored_before

and what a branch adds takes the factor b / C. The factor goes into the weight of the norm after the branch,
if there is one (Gemma's norms multiply by 1 + weight), or else into the branch's last matrix with its bias
(o_proj, down_proj, those of all experts): into all of it if b is a number, or as b[i] / C into row i if b has
a value per channel. If C is negative, the norm that reads the stream changes the sign of its weight. If no
norm reads the stream (OLMo 2), the first matrices of the branch take the factor C, and so read what they
always did.

`fold_factors` turns the scales into StreamFactors (C and b / C of each layer). From these, a Folding says
what becomes of each tensor (a Product). A format's `prepare` puts the Folding into a Target, with what
differs in that format, and `write_weights` writes the tensors accordingly.

formats.py calls `check`, `prepare` and `load` for the format `folded`, and `write_weights` for both formats.
"""

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hopscotch_common import checkpoints
from hopscotch_common.checkpoints.folders import SCALES_FILE
from hopscotch_common.errors import InputError
from hopscotch_common.loading import weights
from hopscotch_common.loading.loader import load_whole
from hopscotch_common.scales import columns
from hopscotch_common.scales.modeling_hopscotch import (
    FAMILIES,
    OWN_KEYS,
    REPLACEMENT_NAMES,
    SCALE_NAMES,
    Family,
    attention_blocks,
    head_dim_of,
    stock_type,
)

SMALLEST_S = 1e-3  # below it the residual stream is all but wiped out

Factor = float | torch.Tensor  # a number, or float64 [1], or [hidden], one per channel

# Tensors of a layer as weight files name them, and the axis along which they hold the hidden channels.
# Experts are stored one by one, or all in one tensor [experts, hidden, width].
ATTENTION_INPUTS = r"self_attn\.(q|k|v|qkv)_proj\.weight"
MLP_INPUTS = r"mlp\.(gate|up|gate_up)_proj\.weight"
ATTENTION_OUTPUTS = {r"(self_attn\.o_proj|mamba\.out_proj|linear_attn\.out_proj)\.(weight|bias)": 0}
MLP_OUTPUTS = {
    r"mlp\.(down_proj|c_proj)\.(weight|bias)": 0,
    r"(mlp\.shared_expert\.down_proj|shared_mlp\.output_linear)\.weight": 0,
    r"(mlp|block_sparse_moe)\.experts\.\d+\.(w2|down_proj)\.weight": 0,
    r"((mlp|block_sparse_moe)\.experts\.down_proj|block_sparse_moe\.output_linear\.weight)": 1,
}
TRANSPOSED_EXPERTS = {r"mlp\.experts\.down_proj": 2, r"mlp\.experts\.down_proj_bias": 1}
TRANSPOSING = ("gpt_oss",)  # [experts, width, hidden]
PHI3_FACTORS = ("short_factor", "long_factor")  # of longrope
ONE_PLUS = ("gemma", "gemma2", "gemma3_text", "qwen3_next", "qwen3_5_text")  # norms multiply by 1 + weight


@dataclass(frozen=True)
class LayerFactors:
    """A layer's scales, folded: C where a branch reads the stream, and the factor of what it adds."""

    attention_reads: float
    attention_adds: Factor
    mlp_reads: float
    mlp_adds: Factor


@dataclass(frozen=True)
class StreamFactors:
    """The factors of all layers, and C where the last norm reads the stream."""

    layers: tuple[LayerFactors, ...]
    last_reads: float


@dataclass(frozen=True)
class Product:
    """What becomes of a tensor w: (added + w) * factor - added; a factor per channel runs along `axis`."""

    factor: Factor
    axis: int = 0
    added: float = 0.0


def check(config, replacement_rank: int) -> None:
    """Raise InputError for maps, which stock classes have no place for; the scales of every family fold."""
    if replacement_rank:
        raise InputError(
            "folded has no place for maps (--replacement_rank), as the stock class has none; export "
            "nemotron_nas for mlx-lm, serve the checkpoint itself, with vLLM or transformers, or make a GGUF "
            "of it, whose first step is `hopscotch_common.export --format folded --without_maps`"
        )


def fold_factors(
    values: torch.Tensor,
    skipped: Iterable[int],
    residual_multiplier: float = 1.0,
    replaced: Collection[int] = (),
) -> StreamFactors:
    """Turn the scales into the factors of all layers.

    values: the scales [layers, width], finite. skipped: blocks without attention; those in `replaced` have a
    map in their place, and b_attn is the map's. residual_multiplier: folded into the weights as well, for a
    target that has none of its own (Granite's); a map includes it already. Raises InputError for an s too
    close to 0 to divide by.
    """
    skipped = set(skipped) - set(replaced)
    carried, layers = 1.0, []
    by_name = columns(values.double())
    for layer in range(len(values)):
        row = {name: by_name[name][layer] for name in SCALE_NAMES}
        _check_scales(layer, row)
        b_attn, b_mlp = row["b_scale_attn"], row["b_scale_mlp"]
        before = carried
        between = before * row["s_scale_attn"].item()
        carried = between * row["s_scale_mlp"].item()
        attention_adds = 0.0 if layer in skipped else residual_multiplier * b_attn / between
        if layer in replaced:
            attention_adds = b_attn / between
        layers.append(LayerFactors(before, attention_adds, between, residual_multiplier * b_mlp / carried))
    return StreamFactors(tuple(layers), carried)


def as_one_matrix(block: int, maps: dict[str, torch.Tensor], factors: StreamFactors) -> torch.Tensor:
    """Return a block's map up down as one float64 [hidden, hidden], row i times the factor of channel i."""
    down, up = (maps[f"model.layers.{block}.{name}"].double() for name in REPLACEMENT_NAMES)
    return torch.as_tensor(factors.layers[block].attention_adds).double().view(-1, 1) * (up @ down)


def _check_scales(layer: int, row: dict[str, torch.Tensor]) -> None:
    for name, scale in row.items():
        if name.startswith("s") and abs(s := scale.item()) < SMALLEST_S:
            raise InputError(
                f"{name} of layer {layer} is {s:g}, which all but wipes out the residual stream, and "
                f"cannot be folded (at least {SMALLEST_S:g} is needed); train with a smaller learning rate"
            )


def granite_multipliers(config) -> dict[str, float]:
    """Return factors, by tensor, that fold Granite's other multipliers into the weights; then all are 1.

    The embeddings take theirs, the queries that of attention (over the usual 1 / sqrt(head_dim)), and the
    final norm takes the logits' scaling, as lm_head may be tied to the embeddings. If it is, the final norm
    also undoes the embeddings' factor. config: any family's; one without multipliers changes nothing.
    """
    head_dim = head_dim_of(config)
    embedding = getattr(config, "embedding_multiplier", 1.0)
    norm = 1 / getattr(config, "logits_scaling", 1.0)
    factors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": norm / embedding if config.tie_word_embeddings else norm,
    }
    if hasattr(config, "attention_multiplier"):
        for layer in range(config.num_hidden_layers):
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.q_proj.{part}"
                factors[name] = config.attention_multiplier * head_dim**0.5
    return factors


class Folding:
    """The factor of every tensor of a model; tensors that it does not know stay unchanged.

    config: the model's, stock or Hopscotch. more: further factors by tensor name, for norms and matrices
    that multiply as they are stored.
    """

    def __init__(self, config, factors: StreamFactors, more: dict[str, float] | None = None):
        model_type = stock_type(config)
        self.family, added = FAMILIES[model_type], 1.0 if model_type in ONE_PLUS else 0.0
        experts = TRANSPOSED_EXPERTS if model_type in TRANSPOSING else {}
        self.layers = [_layer_products(self.family, layer, added, experts) for layer in factors.layers]
        self.last = Product(math.copysign(1.0, factors.last_reads), added=added)
        self.more = more or {}

    def product(self, key: str) -> Product:
        """Return what becomes of a tensor of this name (in a weight file or a state dict)."""
        product = Product(1.0)
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key):
            products = self.layers[int(layer[1])]
            product = next(
                (found for pattern, found in products.items() if re.fullmatch(pattern, layer[2])), product
            )
        elif key == "model.norm.weight":
            product = self.last
        return Product(product.factor * self.more.get(key, 1.0), product.axis, product.added)

    def fold(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Fold the scales into a tensor, in its own dtype; raise InputError if that cannot hold it."""
        return multiplied(key, tensor, self.product(key))


def _layer_products(
    family: Family, factors: LayerFactors, added: float, experts: dict[str, int]
) -> dict[str, Product]:
    """Return what becomes of a layer's tensors, by patterns of their names in the layer."""
    found = {}
    for norm, inputs, reads in (
        (family.norm_before_attention, ATTENTION_INPUTS, factors.attention_reads),
        (family.norm_before_mlp, MLP_INPUTS, factors.mlp_reads),
    ):
        if norm is None:
            found[inputs] = Product(reads)
        else:
            found[rf"{norm}\.weight"] = Product(math.copysign(1.0, reads), added=added)
    for norm, outputs, adds in (
        (family.norm_after_attention, ATTENTION_OUTPUTS, factors.attention_adds),
        (family.norm_after_mlp, experts | MLP_OUTPUTS, factors.mlp_adds),
    ):
        if norm is None:
            found |= {pattern: Product(adds, axis) for pattern, axis in outputs.items()}
        else:
            found[rf"{norm}\.weight"] = Product(adds, added=added)
    return found


def multiplied(key: str, tensor: torch.Tensor, product: Product) -> torch.Tensor:
    """Apply a product in float64, then cast to the tensor's dtype; raise InputError if that overflows."""
    factor = torch.as_tensor(product.factor, dtype=torch.float64)
    if bool((factor == 1.0).all()):
        return tensor
    along = [1] * tensor.dim()
    along[product.axis] = -1
    folded = (tensor.double() + product.added) * factor.view(along) - product.added
    folded = folded.to(tensor.dtype)
    if not bool(folded.isfinite().all()):
        largest = factor.abs().max().item()
        raise InputError(
            f"{key} times {largest:g} is not finite in {tensor.dtype}: the scales are too extreme to fold; "
            "train with a smaller learning rate"
        )
    return folded


# Weight files


@dataclass(frozen=True)
class Target:
    """An export's weights: what becomes of each tensor, and which tensors it needs.

    renamed: whether weight files name some tensors differently from the model (experts). linear: matrices
    [hidden, hidden] in attention's place, by name.
    """

    folding: Folding
    shapes: dict[str, torch.Size]
    renamed: bool = False
    linear: dict[str, torch.Tensor] = field(default_factory=dict)


def skipped_blocks(config) -> list[int]:
    """Indices of the blocks without attention."""
    return sorted(config.skipped_attention_blocks or ())


def prepare(folder: Path, config, values: torch.Tensor, maps: dict[str, torch.Tensor]) -> Target:
    """Write the stock architecture's config, which has no place for maps; return what its weights are."""
    assert not maps
    own = ("model_type", "architectures", "auto_map", "skipped_attention_blocks", "scale_granularity")
    own += ("replacement_rank", "transformers_version")
    kept = {key: value for key, value in config.to_dict().items() if key not in own}
    stock = AutoConfig.for_model(stock_type(config), **kept)
    stock.dtype = config.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock)
    stock.architectures = [type(model).__name__]
    stock.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | old_names(stock)
    if tuple(getattr(stock, "time_step_limit", None) or ()) == (0.0, math.inf):  # the default, but not JSON
        written.pop("time_step_limit", None)
    path.write_text(json.dumps(written, indent=2) + "\n")
    folding = Folding(stock, fold_factors(values, skipped_blocks(config)))
    renamed = get_checkpoint_conversion_mapping(stock.model_type) is not None
    return Target(folding, shapes_of(model), renamed)


def old_names(config) -> dict:
    """Return what readers from before transformers 5 look for in a config.json instead of taking defaults."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = {"torch_dtype": str(config.dtype).removeprefix("torch.")}
    if config.model_type == "gemma3_text":
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope.get("full_attention", rope)  # some families have one for each kind of layer
    if "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaled = scaling.get("rope_type", "default") != "default"
        if config.model_type == "phi3" and scaled:  # only these three were allowed
            scaling = {"type": scaling["rope_type"]} | {key: scaling[key] for key in PHI3_FACTORS}
        found |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}
        found |= {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    if config.model_type == "qwen3_moe":
        found["num_experts"] = config.num_local_experts
    if config.model_type == "granitemoehybrid":
        present = attention_blocks(config)
        kinds = ("attention" if layer in present else "mamba" for layer in range(config.num_hidden_layers))
        found["layer_types"] = list(kinds)
    return found


def shapes_of(model) -> dict[str, torch.Size]:
    """Return the shapes of the tensors that a model (on the meta device) reads from its weight files."""
    return {
        key: tensor.shape
        for key, tensor in model.state_dict().items()
        if key not in model.all_tied_weights_keys and not re.search(OWN_KEYS, key)
    }


def write_weights(checkpoint: Path, folder: Path, config, target: Target) -> None:
    """Write the folded weights file by file, with one file of the checkpoint in memory at a time."""
    sources = [p for p in weights.weight_files(checkpoint) if p.name != SCALES_FILE]
    family = target.folding.family
    beside = f".{family.norm_before_mlp or family.norm_after_mlp}.weight"  # every layer has one
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
                own = f"model.layers.{layer}."
                tensors |= {k: m.to(tensor.dtype) for k, m in target.linear.items() if k.startswith(own)}
        if tensors:
            weights.save_tensors(tensors, folder / name)
    if len(sources) > 1:
        weights.write_index(folder)


def _filled_up(tensor: torch.Tensor, shape: torch.Size | None) -> torch.Tensor:
    """Append zeros to a tensor's rows and columns if the target's MLP is wider.

    Channels whose gate, up and down projections are zero add nothing. A tensor larger than the target's stays
    unchanged; the check of the export names it. shape: None if the target names its tensors differently, and
    is no wider.
    """
    if shape is None:
        return tensor
    missing = [wanted - size for size, wanted in zip(tensor.shape, shape, strict=True)]
    if not any(missing) or min(missing) < 0:
        return tensor
    return pad(tensor, [n for size in reversed(missing) for n in (0, size)])


def _unused_attention(layer: int, target: Target, config, dtype) -> dict[str, torch.Tensor]:
    """Return attention weights that add 0, for a skipped block if the target still has its attention."""
    keys = [k for k in target.shapes if k.startswith(f"model.layers.{layer}.")]
    return {
        key: (torch.ones if re.search(r"norm\.weight$", key) else torch.zeros)(
            target.shapes[key], dtype=dtype
        )
        for key in keys
        if checkpoints.is_skipped_weight(key, config) and key not in target.linear
    }


def load(folder: Path, **options):
    """Load an export as a transformers model; every tensor must be read and none may be missing."""
    if FAMILIES[AutoConfig.from_pretrained(folder).model_type].caps_attention:
        options |= {"attn_implementation": "eager"}
    return load_whole(AutoModelForCausalLM, folder, **options)
