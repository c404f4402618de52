"""The config class of the DeciLM format: a Llama whose blocks differ from layer to layer.

A copy of this file travels in every `nemotron_nas` export, because runtimes read `block_configs`
by attribute, and transformers has no class of its own for the format. It therefore imports
transformers only.
"""

from transformers.models.llama.configuration_llama import LlamaConfig


class Block(dict):
    """A dictionary whose keys are also attributes, and which JSON writes as a plain dictionary."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """`block_configs[layer]` has `attention` (no_op, n_heads_in_group) and `ffn` (ffn_mult)."""

    model_type = "nemotron-nas"
    block_configs: list[dict] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()}) for block in self.block_configs or ()
        ]
