"""Decoder layers with trainable scales and an attention block that can be skipped.

    x1   = b_attn * Attention(Norm(x_in)) + s_attn * x_in
    xout = b_mlp  * MLP(Norm(x1))         + s_mlp  * x1           (arXiv 2506.03303)

If attention is skipped, its place is empty (b_attn = 0) or taken by a low-rank map of the same input:
x1 = b_attn * up down Norm(x_in) + s_attn * x_in, down: [rank, hidden], up: [hidden, rank].

A copy of this file travels in every saved checkpoint, so that `AutoModelForCausalLM.from_pretrained(
path, trust_remote_code=True)` works where this project is not installed. It therefore imports only
torch and transformers, and nothing from its own package. Of transformers' models, it imports only
those of the requested family.

`FAMILIES` describes each family's decoder layer, and a single forward method follows the description.
From a stock `LlamaConfig`, `LlamaModel` and `LlamaForCausalLM` come `HopscotchLlamaConfig`,
`HopscotchLlamaModel` and `HopscotchLlamaForCausalLM`, made when this module is first asked for them.
A family whose layer has Llama's shape needs only its name in `LLAMA_SHAPED`.
"""

import functools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import initialization
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils.versions import require_version

OLDEST_TRANSFORMERS = "5.16"  # earlier caches of hybrid models have a slot for each layer, skipped or not
CODE = Path(__file__)
SCALES_FILE = "scales.safetensors"  # beside the weights in a checkpoint of the scripts
PREFIX = "hopscotch_"  # of the model types
CLASS_PREFIX = "Hopscotch"
SCALE_NAMES = ("b_scale_attn", "s_scale_attn", "b_scale_mlp", "s_scale_mlp")
REPLACEMENT_NAMES = ("replacement_down", "replacement_up")
OWN_KEYS = r"\.([bs]_scale_(attn|mlp)|replacement_(down|up))$"  # of what this file adds to a layer
GRANULARITIES = ("layer", "channel")
ATTENTION_ARGUMENTS = (
    "attention_mask",
    "cache",  # newer versions of transformers call it so, and older ones past_key_values
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "use_cache",
)
RECURRENT_TYPES = ("linear_attention",)  # layers of these types have no attention and no KV cache


@dataclass(frozen=True)
class Family:
    """Attribute names for the parts of a family's decoder layer, None for parts that it does not have.

    The defaults are Llama's. A `residual_multiplier` of the layer needs no mention, nor does anything that a
    module returns besides its output (attention weights, router logits).
    """

    norm_before_attention: str | None = "input_layernorm"
    attention: str = "self_attn"
    norm_after_attention: str | None = None
    norm_before_mlp: str | None = "post_attention_layernorm"
    mlp: tuple[str, ...] = ("mlp",)  # their outputs are added; a layer may have only some of them
    norm_after_mlp: str | None = None
    recurrent: str | None = None  # what layers without attention have in its place
    caps_attention: bool = False  # caps attention's logits softly, which sdpa would leave out

    def skipped_modules(self, replaced: bool) -> tuple[str, ...]:
        """The modules that a layer with skipped attention lacks. replaced: a map reads the normed input."""
        before = None if replaced else self.norm_before_attention
        names = (before, self.attention, self.norm_after_attention)
        return tuple(name for name in names if name is not None)


FOUR_NORMS = Family(
    norm_after_attention="post_attention_layernorm",
    norm_before_mlp="pre_feedforward_layernorm",
    norm_after_mlp="post_feedforward_layernorm",
)
NORMS_AFTER = Family(
    norm_before_attention=None,
    norm_after_attention="post_attention_layernorm",
    norm_before_mlp=None,
    norm_after_mlp="post_feedforward_layernorm",
)
LLAMA_SHAPED = (
    "llama", "mistral", "ministral3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "granite",
    "granite_swa", "phi3", "phimoe", "gemma", "olmoe", "gpt_oss", "glm", "seed_oss", "starcoder2",
)  # fmt: skip
FAMILIES = dict.fromkeys(LLAMA_SHAPED, Family()) | {
    "qwen3_next": Family(recurrent="linear_attn"),
    "qwen3_5_text": Family(recurrent="linear_attn"),
    "granitemoehybrid": Family(mlp=("block_sparse_moe", "shared_mlp"), recurrent="mamba"),
    "gemma2": replace(FOUR_NORMS, caps_attention=True),
    "gemma3_text": FOUR_NORMS,
    "olmo2": NORMS_AFTER,
    "olmo3": NORMS_AFTER,
    "exaone4": NORMS_AFTER,
    "glm4": Family(norm_after_attention="post_self_attn_layernorm", norm_after_mlp="post_mlp_layernorm"),
}
PARALLEL = "attention and MLP stand side by side in its layers, so that the method's equations do not apply"
REFUSED = dict.fromkeys(("cohere", "cohere2", "falcon", "gpt_neox", "gptj", "phi", "stablelm"), PARALLEL)


def rows_at_once(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a tensor [..., features] into parts of a few rows, [rows, features]; views if it is contiguous.

    Rows are few enough that what is made of a part in float32 takes little memory, and no fewer, since each
    part costs the launch of all its kernels.
    """
    elements = 2**20 if tensor.device.type == "cpu" else 2**23
    return tensor.reshape(-1, tensor.shape[-1]).split(max(1, elements // tensor.shape[-1]))


def product(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale * tensor`, computed in float32 and rounded once to the tensor's dtype."""
    if tensor.device.type == "cpu" and scale.numel() == 1 and not torch.compiler.is_compiling():
        return tensor * scale.view(())  # the same in one pass: the CPU's kernel multiplies in float32
    return (scale * tensor).to(tensor.dtype)


class Scaled(torch.autograd.Function):
    """`product(tensor, scale)`, which saves the tensor itself, without a copy in float32.

    The scale's gradient is a sum over all that it multiplies, in float32, a few rows at a time.
    """

    @staticmethod
    def forward(ctx, tensor, scale):
        ctx.save_for_backward(tensor, scale)
        return product(tensor, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        tensor, scale = ctx.saved_tensors
        gradient = product(upstream, scale) if ctx.needs_input_grad[0] else None
        total = torch.zeros_like(scale)
        for left, right in zip(rows_at_once(upstream), rows_at_once(tensor), strict=True):
            if scale.numel() == 1:
                total += torch.dot(left.float().flatten(), right.float().flatten())
            else:
                total += (left.float() * right).sum(0)
        return gradient, total


def scaled(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale * tensor` for activations [..., hidden] and a float32 scale, [1] or [hidden].

    The result has the tensor's dtype; a scale of 1 changes nothing, bit for bit.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and scale.requires_grad):
        return product(tensor, scale)
    return Scaled.apply(tensor, scale)


def output_of(module: nn.Module, *args, **kwargs) -> torch.Tensor:
    """Return a module's output, without what some modules return besides it."""
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


class ScaledDecoderLayer:
    """Mixin for a stock decoder layer: float32 scales, all 1, and `skip_attention`."""

    family: Family

    def add_scales(self, config, layer_idx: int) -> None:
        """Complete a stock layer whose class was changed to a scaled one."""
        for name in SCALE_NAMES:
            by_channel = config.scale_granularity == "channel" and name.startswith("b")
            size = config.hidden_size if by_channel else 1
            setattr(self, name, nn.Parameter(torch.ones(size, dtype=torch.float32)))
        size = self.b_scale_attn.shape
        self.skip_attention = layer_idx in (config.skipped_attention_blocks or ())
        rank, hidden = config.replacement_rank, config.hidden_size
        # If blocks are still to be skipped, each may need its map.
        has_map = rank and (
            self.skip_attention
            or (config.new_scales and getattr(self, self.family.attention, None) is not None)
        )
        if self.skip_attention and not has_map:  # a 0 that multiplies nothing cannot train
            del self.b_scale_attn
            self.register_buffer("b_scale_attn", torch.zeros(size, dtype=torch.float32))
        for name, shape in zip(REPLACEMENT_NAMES, ((rank, hidden), (hidden, rank)), strict=True):
            made = nn.Parameter(torch.zeros(shape, dtype=torch.float32)) if has_map else None
            self.register_parameter(name, made)
        if self.skip_attention:  # a checkpoint's skip is permanent: it keeps no weights for it
            for name in self.family.skipped_modules(bool(rank)):
                delattr(self, name)

    def _apply(self, fn, recurse=True):
        """Do as the stock layer, but keep scales and maps float32 when `model.to(torch.bfloat16)` casts."""
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        exact = {name: tensor.detach() for name, tensor in own.items()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            if now.dtype.itemsize < before.dtype.itemsize:
                now.data = before.to(now.device)
        return self

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Run the decoder layer. hidden_states: [batch, sequence, hidden]; kwargs go to attention."""
        stream = self.after_attention(hidden_states, **kwargs)
        return scaled(stream, self.s_scale_mlp) + scaled(self._mlp_branch(stream), self.b_scale_mlp)

    def after_attention(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return the residual stream between the layer's two blocks; arguments and shape are the layer's."""
        stream = scaled(hidden_states, self.s_scale_attn)
        if not self.skip_attention:
            branch = self.attention_branch(hidden_states, kwargs)
        elif self.replacement_up is not None:
            branch = self._replacement(hidden_states)
        else:
            return stream
        return stream + scaled(branch, self.b_scale_attn)

    def attention_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what attention, or the map in its place, reads from a stream [batch, sequence, hidden]."""
        return self._normed(self.family.norm_before_attention, hidden_states)

    def _replacement(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return up down Norm(x) in the activations' dtype; the maps are float32, as the scales are."""
        normed = self.attention_input(hidden_states)
        down, up = self.replacement_down.to(normed.dtype), self.replacement_up.to(normed.dtype)
        return linear(linear(normed, down), up)

    def attention_branch(self, hidden_states: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """Return what the layer's attention adds to the stream at b_attn = 1, in the stream's shape."""
        family = self.family
        normed = self.attention_input(hidden_states)
        attention = getattr(self, family.attention, None)
        if attention is not None:
            output = output_of(attention, hidden_states=normed, **kwargs)
        else:
            others = {key: value for key, value in kwargs.items() if key not in ATTENTION_ARGUMENTS}
            others["attention_mask"] = kwargs.get("attention_mask")
            if "cache" in kwargs:
                others["cache"] = kwargs["cache"]
            else:
                others["cache_params"] = kwargs.get("past_key_values")
            output = output_of(getattr(self, family.recurrent), hidden_states=normed, **others)
        return self._multiplied(self._normed(family.norm_after_attention, output))

    def _mlp_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        family = self.family
        normed = self._normed(family.norm_before_mlp, hidden_states)
        modules = [getattr(self, name) for name in family.mlp]
        modules = [module for module in modules if module is not None]
        output = output_of(modules[0], normed)
        for module in modules[1:]:
            output = output + output_of(module, normed)
        return self._multiplied(self._normed(family.norm_after_mlp, output))

    def _normed(self, name: str | None, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if name is None else getattr(self, name)(hidden_states)

    def _multiplied(self, branch: torch.Tensor) -> torch.Tensor:
        """Multiply a branch by Granite's constant, if there is one, before it joins the residual stream."""
        multiplier = getattr(self, "residual_multiplier", None)
        return branch if multiplier is None else branch * multiplier


class HopscotchConfig:
    """Mixin for a stock config: `skipped_attention_blocks`, `scale_granularity`, `replacement_rank`.

    new_scales: whether the weights to be read have no scales yet, so that these start at 1, as with a base
    model's weights. in_vllm_plugin: whether vLLM builds the model through this project's plugin.
    uncached_layers: those that a model skips at present. These three are never saved.
    """

    new_scales = False
    in_vllm_plugin = False
    uncached_layers = None

    def get_text_config(self, decoder=None, **options):
        """Return the config or, for a cache (`decoder`), a view of the layers that keep anything.

        transformers' caches (cache_utils) call it with `decoder=True`, and get as many layers as it says.
        """
        if not decoder or self.in_vllm_plugin or not self._uncached():
            return super().get_text_config(decoder=decoder, **options)
        view = object.__new__(type(self).cached_layers)
        view.__dict__ = self.__dict__  # what is set in the one is set in the other
        return view

    def _uncached(self) -> tuple[int, ...]:
        now = self.__dict__.get("uncached_layers")
        return tuple(self.skipped_attention_blocks or ()) if now is None else now

    def to_json_file(self, json_file_path, *arguments, **options):
        """Write the config as the stock class, and beside it a copy of this file, which `auto_map` names.

        Configs and models are saved through it, before anything is uploaded, and only if files are written.
        """
        self.auto_map = auto_map(stock_type(self))
        super().to_json_file(json_file_path, *arguments, **options)
        target = Path(json_file_path).parent / CODE.name
        if not (target.exists() and target.samefile(CODE)):
            shutil.copyfile(CODE, target)

    def to_dict(self) -> dict:
        values = super().to_dict()
        for name in ("new_scales", "in_vllm_plugin", "uncached_layers"):
            values.pop(name, None)
        if not values.get("replacement_rank"):
            values.pop("replacement_rank", None)
        return values


def cached_layers_config(config_class: type) -> type:
    """Make a config class with only those layers of another one that have a slot in the cache.

    With 4 layers, of which block 1 is skipped, the model sees `num_hidden_layers` 4, and a cache sees 3.
    """

    def kept(config) -> list[int]:
        uncached = config._uncached()
        return [i for i in range(config.__dict__["num_hidden_layers"]) if i not in uncached]

    def kept_types(config) -> list[str] | None:
        types = config.__dict__.get("layer_types")
        return types and [types[i] for i in kept(config)]

    def viewed(name: str, get) -> property:
        return property(get, lambda config, value: config.__dict__.__setitem__(name, value))

    members = {
        "num_hidden_layers": viewed("num_hidden_layers", lambda config: len(kept(config))),
        "layer_types": viewed("layer_types", kept_types),
    }
    return type(config_class.__name__, (config_class,), members)


class HopscotchPreTrained:
    """What base model and causal LM share: how their scales are kept and read."""

    _keep_in_fp32_modules_strict = SCALE_NAMES + REPLACEMENT_NAMES

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as the stock class; raise ValueError for a checkpoint's folder, whose index would remain."""
        if (Path(save_directory) / SCALES_FILE).is_file():
            raise ValueError(f"{save_directory}: holds a checkpoint with {SCALES_FILE}; name a new folder")
        super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module):
        """Raise ValueError for weights without scales, unless `config.new_scales` expects just that."""
        super()._init_weights(module)
        if not isinstance(module, ScaledDecoderLayer):
            return
        read = {name for name, tensor in module.named_parameters() if hasattr(tensor, "_is_hf_initialized")}
        maps = [name for name in REPLACEMENT_NAMES if getattr(module, name) is not None]
        if read and not read.issuperset([*SCALE_NAMES, *maps]) and not self.config.new_scales:
            raise ValueError(
                f"{self.config.name_or_path}: a layer's scales are missing "
                f"({', '.join((*SCALE_NAMES, *maps))}), and without them it would be another model"
            )
        for name in SCALE_NAMES:
            initialization.ones_(getattr(module, name))  # leaves alone what was read
        for name in maps:
            initialization.zeros_(getattr(module, name))


class HopscotchModel(HopscotchPreTrained):
    """Mixin for a stock base model: its decoder layers become scaled ones."""

    family: Family

    def __init__(self, config):
        super().__init__(config)
        self.scale_layers()
        self.post_init()

    def scale_layers(self) -> None:
        """Turn the stock layers into scaled ones, and leave out skipped attention blocks."""
        config = self.config
        if config._attn_implementation == "vllm" and not config.in_vllm_plugin:
            raise ValueError(
                "vLLM runs a Hopscotch checkpoint by this project's plugin, which is not installed, not "
                "loaded (see VLLM_PLUGINS) or passed over (by --model-impl: leave it out): run "
                "`pip install --no-deps .` in the project's folder"
            )
        if config.scale_granularity not in GRANULARITIES:
            raise ValueError(f"scale_granularity {config.scale_granularity!r}: one of {GRANULARITIES}")
        skipped = config.skipped_attention_blocks or ()
        check_skipped_blocks(skipped, config)
        present = attention_blocks(config)
        for index, layer in enumerate(self.layers):
            if (getattr(layer, self.family.attention, None) is not None) != (index in present):
                raise ValueError(
                    f"layer {index} is {attention_types(config)[index]!r} by config.json, and transformers "
                    f"{transformers.__version__} builds another: install the version that config.json names"
                )
            layer.__class__ = scaled_layer_class(type(layer), self.family)
            layer.add_scales(config, index)
        self._no_split_modules = {type(layer).__name__ for layer in self.layers}
        modules = "|".join(self.family.skipped_modules(bool(config.replacement_rank)))
        unexpected = {rf"layers\.{index}\.({modules})\." for index in skipped}
        self._keys_to_ignore_on_load_unexpected |= unexpected
        if config.new_scales:
            self._keys_to_ignore_on_load_missing |= {OWN_KEYS}
        self.number_cache_slots()

    def number_cache_slots(self) -> None:
        """Number the layers that keep anything 0, 1, 2, …: a cache has no slot for a skipped block.

        transformers reads the past length from the cache's first slot (of each attention type, if a model
        mixes full and sliding attention), and treats all slots of a cache alike.
        """
        skipped = [i for i, layer in enumerate(self.layers) if layer.skip_attention]
        check_skipped_blocks(skipped, self.config)
        self.config.uncached_layers = tuple(skipped)
        kept = [layer for layer in self.layers if not layer.skip_attention]
        for slot, layer in enumerate(kept):
            mixer = getattr(layer, self.family.attention, None) or getattr(layer, self.family.recurrent)
            mixer.layer_idx = slot


class HopscotchForCausalLM(HopscotchPreTrained):
    """Mixin for a stock causal LM, with a scaled base model."""

    base_class: type

    def __init__(self, config):
        super().__init__(config)
        self.model = None  # drops the stock one first, so that memory never holds two
        self.model = self.base_class(config)
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Do as the stock class; raise ValueError if it would mix up full and sliding layers.

        It knows them by their numbers.
        """
        if self.config._uncached() and len(set(attention_types(self.config))) > 1:
            raise ValueError(
                "transformers' continuous batching cannot skip blocks of a model that mixes full and sliding "
                "attention: use generate(), or vLLM"
            )
        return super().init_continuous_batching(*args, **kwargs)


def stock_type(config) -> str:
    """The stock model type of a config, stock or of this file."""
    return config.model_type.removeprefix(PREFIX)


def head_dim_of(config) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_types(config) -> list[str]:
    """Each layer's kind of attention, as transformers names it."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def attention_blocks(config) -> list[int]:
    """The layers that have attention."""
    return [i for i, kind in enumerate(attention_types(config)) if kind not in RECURRENT_TYPES]


def check_skipped_blocks(blocks, config) -> None:
    """Raise ValueError unless `blocks` are distinct layer indices that can all be skipped."""
    num_layers, types, present = config.num_hidden_layers, attention_types(config), attention_blocks(config)
    for block in blocks:
        if not 0 <= block < num_layers:
            raise ValueError(f"block {block} does not exist: the model has blocks 0 to {num_layers - 1}")
        if block not in present:
            raise ValueError(f"block {block} has no attention ({types[block]}): only blocks {present} have")
    if len(set(blocks)) != len(blocks):
        twice = sorted({block for block in blocks if list(blocks).count(block) > 1})
        raise ValueError(f"block {twice[0]} is named twice")
    if blocks and len(blocks) >= len(present):
        raise ValueError(f"all {len(present)} attention blocks would be skipped: keep at least one")
    needed = [i for i in present if types[i] == types[present[0]]]
    if blocks and set(needed) <= set(blocks):
        raise ValueError(
            f"every {types[needed[0]]} block is skipped, which the KV cache cannot represent: "
            f"keep at least one of blocks {needed}"
        )


@functools.cache
def scaled_layer_class(stock: type, family: Family) -> type:
    """The scaled class of a stock decoder layer."""
    return type(f"{CLASS_PREFIX}{stock.__name__}", (ScaledDecoderLayer, stock), {"family": family})


def known_families() -> list[str]:
    """The families in FAMILIES that this version of transformers has."""
    return [name for name in FAMILIES if name in CONFIG_MAPPING_NAMES and name in MODEL_MAPPING_NAMES]


def stock_names(model_type: str) -> tuple[str, str, str]:
    """Names of a stock family's config, base model and causal LM in transformers."""
    return tuple(
        names[model_type]
        for names in (CONFIG_MAPPING_NAMES, MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )


@functools.cache
def family_config(model_type: str) -> type:
    """Return the Hopscotch config class of a stock family; no model code is imported.

    Raises ImportError for a transformers whose caches would not know of skipped blocks.
    """
    require_version(f"transformers>={OLDEST_TRANSFORMERS}")
    stock = getattr(transformers, stock_names(model_type)[0])
    kinds = {"skipped_attention_blocks": list[int] | None, "scale_granularity": str, "replacement_rank": int}
    defaults = {"skipped_attention_blocks": None, "scale_granularity": "layer", "replacement_rank": 0}
    members = {"__annotations__": kinds, "model_type": PREFIX + model_type, **defaults}
    made = type(f"{CLASS_PREFIX}{stock.__name__}", (HopscotchConfig, stock), members)
    made.cached_layers = cached_layers_config(made)  # here, as torch.compile cannot trace making a class
    return made


@functools.cache
def family_classes(model_type: str) -> tuple[type, type, type]:
    """Return the Hopscotch (config, base model, causal LM) classes of a stock family."""
    family, config = FAMILIES[model_type], family_config(model_type)
    stock_base, stock_causal = (getattr(transformers, name) for name in stock_names(model_type)[1:])
    members = {"family": family, "config_class": config}
    # transformers looks for it in the source of a class's own module; without it, experts run one by one
    members["_can_set_experts_implementation_cached_value"] = stock_causal._can_set_experts_implementation()
    if family.caps_attention:
        members["_supports_sdpa"] = False
    base = type(f"{CLASS_PREFIX}{stock_base.__name__}", (HopscotchModel, stock_base), members)
    members = members | {"base_class": base}
    causal = type(f"{CLASS_PREFIX}{stock_causal.__name__}", (HopscotchForCausalLM, stock_causal), members)
    conversion = get_checkpoint_conversion_mapping(model_type)  # how weights from the hub are read: experts
    if conversion is not None:
        register_checkpoint_conversion_mapping(PREFIX + model_type, conversion, overwrite=True)
    return config, base, causal


def auto_map(model_type: str) -> dict[str, str]:
    """Return what a checkpoint's config says of its code, for a stock model type."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {
        name: f"{CODE.stem}.{CLASS_PREFIX}{stock}"
        for name, stock in zip(names, stock_names(model_type), strict=True)
    }


def __getattr__(name: str) -> type:
    """Return a family's class by name, as a checkpoint's `auto_map` asks for it."""
    for model_type in known_families() if name.startswith(CLASS_PREFIX) else ():
        names = [CLASS_PREFIX + stock for stock in stock_names(model_type)]
        if name in names:
            return family_classes(model_type)[names.index(name)]
    raise AttributeError(f"module {__name__} has no attribute {name}")
