"""vLLM's entry point (`vllm.general_plugins`): Hopscotch checkpoints as models that vLLM runs itself.

    pip install --no-deps .
    vllm serve scaled_smollm_ckpts/smollm_scaled_epoch_2

vLLM calls `register` in each of its processes. No code of a checkpoint runs: configs and models come
from this project. vLLM's own model code is not imported until it asks for a checkpoint's class.

The models are based on vLLM's Transformers backend, which builds the scaled base model of
`modeling_hopscotch` and puts its own linear layers, norms, experts and paged attention into it. The backend
expects an attention block in every layer; here a skipped block has neither attention nor KV cache.
"""

from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from hopscotch_common.scales.modeling_hopscotch import (
    CLASS_PREFIX,
    FAMILIES,
    PREFIX,
    RECURRENT_TYPES,
    ScaledDecoderLayer,
    attention_blocks,
    attention_types,
    family_classes,
    family_config,
    known_families,
    stock_names,
    stock_type,
)

TESTED = "0.32."  # the models override methods that vLLM may change in any release
MORE_THAN_LINEAR = {"phimoe": "router"}
# The models' classes: without experts, and with experts, which run in vLLM's fused kernels.
BACKENDS = {"Hopscotch": "TransformersForCausalLM", "HopscotchExperts": "TransformersMoEForCausalLM"}


def version_obstacle() -> str | None:
    """Why the installed vLLM cannot run checkpoints; None if it can."""
    import vllm

    if vllm.__version__.startswith(TESTED):
        return None
    return (
        f"Hopscotch checkpoints run in vLLM {TESTED}*, and this is vLLM {vllm.__version__} (install that "
        "one, or export the checkpoint: python -m hopscotch_common.export)"
    )


def family_obstacle(config) -> str | None:
    """Why vLLM's Transformers backend cannot run a checkpoint of this config; None if it can."""
    family = stock_type(config)
    if len(attention_blocks(config)) < config.num_hidden_layers:
        kind = next(kind for kind in attention_types(config) if kind in RECURRENT_TYPES)
        return f"{family}: layers that are recurrent ({kind}) have no state in vLLM's Transformers backend"
    if family in MORE_THAN_LINEAR:
        return (
            f"{family}: its {MORE_THAN_LINEAR[family]} is more than the linear layer that vLLM's "
            "Transformers backend would make of it"
        )
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
        return f"{family}: vLLM's Transformers backend has no MXFP4"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("longrope", "dynamic"):
        return (
            f"{family}: its rope ({rope}) turns positions by the longest text of a batch, which vLLM cannot "
            "compile, and which without compiling changes the texts beside it"
        )
    return None


def register() -> None:
    """Register every family's config with transformers, and its model with vLLM.

    With an untested version of vLLM, other models are left alone, and a checkpoint is refused with one
    line as soon as its config is read. What vLLM refuses for a stock type (float16 if a family overflows
    in it) it also refuses for ours.
    """
    from vllm import ModelRegistry

    obstacle = version_obstacle()
    if not obstacle:
        from vllm.config import model as vllm_models  # of the tested version

        guards = vllm_models._FLOAT16_NOT_SUPPORTED_MODELS
        guards |= {PREFIX + name: reason for name, reason in guards.items() if name in FAMILIES}
    for name in FAMILIES if obstacle else known_families():
        config = refusing_config(name, obstacle) if obstacle else family_config(name)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if obstacle:
            continue
        # vLLM has no kernel for the experts of families in which some layers are recurrent.
        experts = FAMILIES[name].recurrent is None and hasattr(config, "num_experts_per_tok")
        causal = CLASS_PREFIX + stock_names(name)[-1]
        ModelRegistry.register_model(causal, f"{__name__}:Hopscotch{'Experts' if experts else ''}")


def refusing_config(name: str, obstacle: str) -> type:
    """Make a family's config class that raises RuntimeError when a checkpoint's config is read."""

    def from_dict(cls, *args, **kwargs):
        raise RuntimeError(obstacle)

    return type(
        "Refused", (PreTrainedConfig,), {"model_type": PREFIX + name, "from_dict": classmethod(from_dict)}
    )


class AttentionWhereItIs:
    """Mixin for the backend's causal LMs: skipped attention blocks, scales and scaled logits."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        if obstacle := family_obstacle(config):
            raise ValueError(f"{obstacle}; run the checkpoint with transformers")
        config_class, base_class, _ = family_classes(stock_type(config))
        AutoModel.register(config_class, base_class, exist_ok=True)
        config.in_vllm_plugin = True
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.pp_group.is_last_rank:  # the backend knows only `logit_scale`, not Granite's
            self.logits_processor.scale /= getattr(config, "logits_scaling", None) or 1.0
        if not self.pp_group.is_first_rank and hasattr(self.model, "embedding_multiplier"):
            self.model.embedding_multiplier = 1.0  # the first rank has already applied it

    def recursive_replace(self) -> None:
        """Number attention blocks by layer again, not by slots of transformers' cache."""
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
        if not present:
            raise ValueError(
                "a pipeline stage has no attention block left, which vLLM's cache cannot represent: set "
                "VLLM_PP_LAYER_PARTITION so that each stage has one, or lower --pipeline-parallel-size"
            )
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
        from vllm.model_executor.models.utils import maybe_prefix

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


def __getattr__(name: str) -> type:
    """Return a class of BACKENDS, derived from vLLM's own, which is made when vLLM asks for it."""
    if name not in BACKENDS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm.model_executor.models import transformers as backend

    return globals().setdefault(name, type(name, (AttentionWhereItIs, getattr(backend, BACKENDS[name])), {}))
