"""Decoder layers with four trainable scalars and an attention block that can be skipped.

    x1   = b_attn * Attention(Norm(x_in)) + s_attn * x_in
    xout = b_mlp  * MLP(Norm(x1))         + s_mlp  * x1           (arXiv 2506.03303)

A copy of this file travels in every saved checkpoint, so that
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` works where this project is
not installed. It therefore imports torch and transformers only, and nothing of its own package.

A new family is one row in `hopscotch_common/models.py` and three short classes at the end of this
file. Its decoder layer must have the Llama shape: `input_layernorm`, `self_attn`,
`post_attention_layernorm`, `mlp`, and an optional `residual_multiplier`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

SCALE_NAMES = ("b_scale_attn", "s_scale_attn", "b_scale_mlp", "s_scale_mlp")
SCALE_KEYS = r"\.[bs]_scale_(attn|mlp)$"
SKIPPED_ATTENTION_MODULES = ("self_attn", "input_layernorm")  # a skipped layer has neither


def rows_at_once(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A tensor [..., features] in parts of a few rows each, [rows, features]; views if it is contiguous.

    Few enough that what is made of a part in float32 takes little memory, and no fewer, since each
    part costs the start of all its kernels.
    """
    elements = 2**20 if tensor.device.type == "cpu" else 2**23
    return tensor.reshape(-1, tensor.shape[-1]).split(max(1, elements // tensor.shape[-1]))


def product(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale * tensor`, taken in float32 and rounded once to the tensor's dtype."""
    if tensor.device.type == "cpu" and scale.numel() == 1 and not torch.compiler.is_compiling():
        return tensor * scale.view(())  # the same in one pass: the CPU's kernel multiplies in float32
    return (scale * tensor).to(tensor.dtype)


class Scaled(torch.autograd.Function):
    """`product(tensor, scale)`, which saves the tensor as it is, without a copy in float32.

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

    Has the tensor's dtype; a scale of 1 changes nothing, bit for bit.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and scale.requires_grad):
        return product(tensor, scale)
    return Scaled.apply(tensor, scale)


class ScaledDecoderLayer:
    """Mixin over a stock decoder layer: four float32 scales [1], all 1, and `skip_attention`."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        for name in SCALE_NAMES:
            setattr(self, name, nn.Parameter(torch.ones(1, dtype=torch.float32)))
        self.skip_attention = layer_idx in (config.skipped_attention_blocks or ())
        if self.skip_attention:  # a checkpoint's skip is for good: no weights are held for it
            for name in SKIPPED_ATTENTION_MODULES:
                delattr(self, name)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """One decoder layer. hidden_states: [batch, sequence, hidden]; kwargs go to attention."""
        if self.skip_attention:
            hidden_states = scaled(hidden_states, self.s_scale_attn)
        else:
            attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            branch = scaled(self._branch(attention), self.b_scale_attn)
            hidden_states = scaled(hidden_states, self.s_scale_attn) + branch
        mlp = self.mlp(self.post_attention_layernorm(hidden_states))
        return scaled(hidden_states, self.s_scale_mlp) + scaled(self._branch(mlp), self.b_scale_mlp)

    def _branch(self, output: torch.Tensor) -> torch.Tensor:
        """Granite multiplies both branches by a constant before they join the residual stream."""
        multiplier = getattr(self, "residual_multiplier", None)
        return output if multiplier is None else output * multiplier


class HopscotchForCausalLM:
    """Mixin over a stock causal LM: puts scaled decoder layers in place of the stock ones."""

    scaled_layer_class: type
    _keep_in_fp32_modules_strict = SCALE_NAMES
    _keys_to_ignore_on_load_missing = [SCALE_KEYS]

    def __init__(self, config):
        super().__init__(config)
        check_skipped_blocks(config.skipped_attention_blocks or (), config)
        layers = self.model.layers
        for index in range(len(layers)):
            layers[index] = self.scaled_layer_class(config, index)
        self.model._no_split_modules = {self.scaled_layer_class.__name__}
        self._keys_to_ignore_on_load_unexpected = [
            rf"layers\.{index}\.({'|'.join(SKIPPED_ATTENTION_MODULES)})\."
            for index in config.skipped_attention_blocks or ()
        ]
        self.number_cache_slots()
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self):
        super().initialize_weights()
        for layer in self.model.layers:
            if isinstance(layer, ScaledDecoderLayer):  # a first call comes before ours are in place
                for name in SCALE_NAMES:  # leaves alone what was read from a checkpoint
                    initialization.ones_(getattr(layer, name))

    def number_cache_slots(self) -> None:
        """Number the attention blocks that are computed 0, 1, 2, … in the KV cache.

        transformers reads the past length from the cache's first slot (of each attention type,
        where a model mixes full and sliding attention), so that slot must be one that is filled,
        even when block 0 is skipped.
        """
        layers = self.model.layers
        check_skipped_blocks([i for i, layer in enumerate(layers) if layer.skip_attention], self.config)
        types = attention_types(self.config)
        slots = {kind: iter([i for i, t in enumerate(types) if t == kind]) for kind in set(types)}
        for layer, kind in zip(layers, types, strict=True):
            if not layer.skip_attention:
                layer.self_attn.layer_idx = next(slots[kind])


def attention_types(config) -> list[str]:
    """Each layer's kind of attention, as transformers names it."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def check_skipped_blocks(blocks, config) -> None:
    """Raise ValueError unless `blocks` are distinct layer indices that can all be skipped."""
    num_layers, types = config.num_hidden_layers, attention_types(config)
    for block in blocks:
        if not 0 <= block < num_layers:
            raise ValueError(f"block {block} does not exist: the model has blocks 0 to {num_layers - 1}")
    if len(set(blocks)) != len(blocks):
        twice = sorted({block for block in blocks if list(blocks).count(block) > 1})
        raise ValueError(f"block {twice[0]} is named twice")
    if len(blocks) >= num_layers:
        raise ValueError(f"all {num_layers} attention blocks would be skipped: keep at least one")
    needed = [i for i, kind in enumerate(types) if kind == types[0]]
    if set(needed) <= set(blocks):
        raise ValueError(
            f"every {types[0]} block is skipped, which the KV cache cannot represent: "
            f"keep at least one of blocks {needed}"
        )


class HopscotchLlamaConfig(LlamaConfig):
    model_type = "hopscotch_llama"
    skipped_attention_blocks: list[int] | None = None


class HopscotchLlamaDecoderLayer(ScaledDecoderLayer, LlamaDecoderLayer):
    pass


class HopscotchLlamaForCausalLM(HopscotchForCausalLM, LlamaForCausalLM):
    config_class = HopscotchLlamaConfig
    scaled_layer_class = HopscotchLlamaDecoderLayer


class HopscotchQwen2Config(Qwen2Config):
    model_type = "hopscotch_qwen2"
    skipped_attention_blocks: list[int] | None = None


class HopscotchQwen2DecoderLayer(ScaledDecoderLayer, Qwen2DecoderLayer):
    pass


class HopscotchQwen2ForCausalLM(HopscotchForCausalLM, Qwen2ForCausalLM):
    config_class = HopscotchQwen2Config
    scaled_layer_class = HopscotchQwen2DecoderLayer


class HopscotchGraniteConfig(GraniteConfig):
    model_type = "hopscotch_granite"
    skipped_attention_blocks: list[int] | None = None


class HopscotchGraniteDecoderLayer(ScaledDecoderLayer, GraniteDecoderLayer):
    pass


class HopscotchGraniteForCausalLM(HopscotchForCausalLM, GraniteForCausalLM):
    config_class = HopscotchGraniteConfig
    scaled_layer_class = HopscotchGraniteDecoderLayer


class HopscotchMistralConfig(MistralConfig):
    model_type = "hopscotch_mistral"
    skipped_attention_blocks: list[int] | None = None


class HopscotchMistralDecoderLayer(ScaledDecoderLayer, MistralDecoderLayer):
    pass


class HopscotchMistralForCausalLM(HopscotchForCausalLM, MistralForCausalLM):
    config_class = HopscotchMistralConfig
    scaled_layer_class = HopscotchMistralDecoderLayer


class HopscotchQwen3Config(Qwen3Config):
    model_type = "hopscotch_qwen3"
    skipped_attention_blocks: list[int] | None = None


class HopscotchQwen3DecoderLayer(ScaledDecoderLayer, Qwen3DecoderLayer):
    pass


class HopscotchQwen3ForCausalLM(HopscotchForCausalLM, Qwen3ForCausalLM):
    config_class = HopscotchQwen3Config
    scaled_layer_class = HopscotchQwen3DecoderLayer
