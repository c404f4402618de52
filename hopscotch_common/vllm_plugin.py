"""vLLM's entry point (`vllm.general_plugins`): Hopscotch checkpoints as models that vLLM runs itself.

    pip install --no-deps .
    vllm serve scaled_smollm_ckpts/smollm_scaled_epoch_2

vLLM calls `register` in each of its processes. No code of a checkpoint runs: configs and models come
from this project. What needs vLLM's model code stands in `vllm_model`, which vLLM imports once it
is asked for a checkpoint.
"""

from transformers import AutoConfig, PreTrainedConfig

from hopscotch_common.modeling_hopscotch import CLASS_PREFIX, FAMILIES, PREFIX, family_config, stock_names

TESTED = "0.32."  # vllm_model is built on methods that vLLM may change in any release
MODEL, EXPERTS_MODEL = (f"hopscotch_common.vllm_model:{name}" for name in ("Hopscotch", "HopscotchExperts"))


def register() -> None:
    """Register every family's config with transformers, and its model with vLLM.

    Where vLLM's version is none that was tested, other models are left alone, and a checkpoint is
    refused with one line as soon as its config is read.
    """
    import vllm
    from vllm import ModelRegistry

    fits = vllm.__version__.startswith(TESTED)
    for name, family in FAMILIES.items():
        config = family_config(name) if fits else refusing_config(name, vllm.__version__)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        # Where some layers are recurrent, experts are no modules that vLLM has a kernel for.
        experts = family.recurrent is None and hasattr(config, "num_experts_per_tok")
        causal = CLASS_PREFIX + stock_names(name)[-1]
        ModelRegistry.register_model(causal, EXPERTS_MODEL if experts else MODEL)


def refusing_config(name: str, version: str) -> type:
    """A config class of a family that raises RuntimeError when a checkpoint's config is read."""

    def from_dict(cls, *args, **kwargs):
        raise RuntimeError(
            f"Hopscotch checkpoints run in vLLM {TESTED}*, and this is vLLM {version}: "
            "install that one, or export the checkpoint (python -m hopscotch_common.export)"
        )

    return type(
        "Refused", (PreTrainedConfig,), {"model_type": PREFIX + name, "from_dict": classmethod(from_dict)}
    )
