"""vLLM's entry point (`vllm.general_plugins`): Hopscotch checkpoints as models that vLLM runs itself.

    pip install --no-deps .
    vllm serve scaled_smollm_ckpts/smollm_scaled_epoch_2

vLLM calls `register` in each of its processes. No code of a checkpoint runs: configs and models come
from this project. What needs vLLM's model code stands in `vllm_model`, which vLLM imports once it
is asked for a checkpoint.
"""

from transformers import AutoConfig, PreTrainedConfig

from hopscotch_common.modeling_hopscotch import (
    CLASS_PREFIX,
    FAMILIES,
    PREFIX,
    RECURRENT_TYPES,
    attention_blocks,
    attention_types,
    family_config,
    known_families,
    stock_names,
)

TESTED = "0.32."  # vllm_model is built on methods that vLLM may change in any release
MORE_THAN_LINEAR = {"phimoe": "router"}
MODEL, EXPERTS_MODEL = (f"hopscotch_common.vllm_model:{name}" for name in ("Hopscotch", "HopscotchExperts"))


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
    family = config.model_type.removeprefix(PREFIX)
    if len(attention_blocks(config)) < config.num_hidden_layers:
        kind = next(kind for kind in attention_types(config) if kind in RECURRENT_TYPES)
        return f"{family}: layers that are recurrent ({kind}) have no state in vLLM's Transformers backend"
    if family in MORE_THAN_LINEAR:
        return (
            f"{family}: its {MORE_THAN_LINEAR[family]} is more than the linear layer that vLLM's "
            "Transformers backend would make of it"
        )
    return None


def register() -> None:
    """Register every family's config with transformers, and its model with vLLM.

    Where vLLM's version is none that was tested, other models are left alone, and a checkpoint is
    refused with one line as soon as its config is read. What vLLM refuses of a stock type (float16 where a
    family overflows in it) it then refuses of ours.
    """
    from vllm import ModelRegistry
    from vllm.config import model as vllm_models

    obstacle = version_obstacle()
    if not obstacle:
        guards = vllm_models._FLOAT16_NOT_SUPPORTED_MODELS
        guards |= {PREFIX + name: reason for name, reason in guards.items() if name in FAMILIES}
    for name in FAMILIES if obstacle else known_families():
        config = refusing_config(name, obstacle) if obstacle else family_config(name)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if obstacle:
            continue
        # Where some layers are recurrent, experts are no modules that vLLM has a kernel for.
        experts = FAMILIES[name].recurrent is None and hasattr(config, "num_experts_per_tok")
        causal = CLASS_PREFIX + stock_names(name)[-1]
        ModelRegistry.register_model(causal, EXPERTS_MODEL if experts else MODEL)


def refusing_config(name: str, obstacle: str) -> type:
    """A config class of a family that raises RuntimeError when a checkpoint's config is read."""

    def from_dict(cls, *args, **kwargs):
        raise RuntimeError(obstacle)

    return type(
        "Refused", (PreTrainedConfig,), {"model_type": PREFIX + name, "from_dict": classmethod(from_dict)}
    )
