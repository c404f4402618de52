"""Hopscotch checkpoints in vLLM, over its Transformers backend: attention only where a layer has it.

The backend builds the scaled base model of `modeling_hopscotch`, and puts its own linear layers,
norms, experts and paged attention into it. It expects an attention block in every layer; here a
skipped one has neither attention nor KV cache. Methods that vLLM may change in any release are
overridden, so `vllm_plugin` admits only versions that were tested.
"""

from torch import nn
from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
from vllm.model_executor.models.utils import maybe_prefix

from hopscotch_common.modeling_hopscotch import (
    PREFIX,
    ScaledDecoderLayer,
    attention_types,
    family_classes,
)
from hopscotch_common.vllm_plugin import family_obstacle


class AttentionWhereItIs:
    """Mixin over the backend's causal LMs: skipped attention blocks, scales and scaled logits."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        if obstacle := family_obstacle(config):
            raise ValueError(f"{obstacle}; run the checkpoint with transformers")
        config_class, base_class, _ = family_classes(config.model_type.removeprefix(PREFIX))
        AutoModel.register(config_class, base_class, exist_ok=True)
        config.in_vllm_plugin = True
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.pp_group.is_last_rank:  # the backend knows a `logit_scale` only, and no Granite
            self.logits_processor.scale /= getattr(config, "logits_scaling", None) or 1.0
        if not self.pp_group.is_first_rank and hasattr(self.model, "embedding_multiplier"):
            self.model.embedding_multiplier = 1.0  # what comes in has been multiplied on the first rank

    def recursive_replace(self) -> None:
        """Number attention blocks by their layers again, not by slots of transformers' cache."""
        for module in self.model.modules():
            plain = not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward
            assert plain, f"{type(module).__name__} belongs into MORE_THAN_LINEAR"
        for index, layer in enumerate(self.model.layers):
            if isinstance(layer, ScaledDecoderLayer) and not layer.skip_attention:  # else on another rank
                getattr(layer, layer.family.attention).layer_idx = index
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Give each attention block of this rank its vLLM attention, and with it its KV cache."""
        layers = enumerate(self.model.layers)
        present = {i for i, x in layers if isinstance(x, ScaledDecoderLayer) and not x.skip_attention}
        if present != set(self.attention_fusers):
            lost = sorted(present ^ set(self.attention_fusers))
            raise ValueError(f"vLLM finds no attention, or one too many, in layers {lost}")
        config, types = self.text_config, attention_types(self.text_config)
        for index, (name, fuser) in self.attention_fusers.items():
            module = self.get_submodule(name)
            size = self.model_config.model_arch_config[index]
            options = {}
            if types[index] == "sliding_attention":
                options["per_layer_sliding_window"] = config.sliding_window
            if (sinks := fuser.sinks(module)) is not None:
                options["sinks"] = sinks
            scale = fuser.scale(module)
            attention = Attention(
                num_heads=self.model_config.get_num_attention_heads(self.parallel_config, size),
                num_kv_heads=self.model_config.get_num_kv_heads(self.parallel_config, size),
                head_size=size.head_size,
                scale=size.head_size**-0.5 if scale is None else scale,
                logits_soft_cap=getattr(config, "attn_logit_softcapping", None),
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, f"{name}.{VLLM_ATTN_ATTR}"),
                **options,
            )
            setattr(module, VLLM_ATTN_ATTR, attention)


class Hopscotch(AttentionWhereItIs, TransformersForCausalLM):
    """A checkpoint of a family without experts."""


class HopscotchExperts(AttentionWhereItIs, TransformersMoEForCausalLM):
    """A checkpoint of a family with experts, which run in vLLM's fused kernels."""
