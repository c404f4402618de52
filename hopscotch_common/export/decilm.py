"""The DeciLM format (`nemotron_nas`), which vLLM and others load: its config, and reading it back.

A block without attention is marked `block_configs[layer].attention.no_op`; it has no weights and takes no
KV cache. The MLP's width is `ffn_mult`, in units of 1.5 hidden sizes, rounded up to a multiple of 256,
which is all that SGLang, TensorRT-LLM and mlx-lm read. A width between two multiples is therefore padded with
zero channels, which change nothing.

formats.py calls `check`, `prepare` and `load` for this format.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
import transformers

from hopscotch_common import scales
from hopscotch_common.errors import InputError, logger
from hopscotch_common.export import configuration_decilm
from hopscotch_common.export.folding import (
    Folding,
    Target,
    as_one_matrix,
    fold_factors,
    granite_multipliers,
    old_names,
    shapes_of,
    skipped_blocks,
)
from hopscotch_common.loading.loader import hopscotch_classes, load_whole
from hopscotch_common.scales.modeling_hopscotch import PREFIX, REPLACEMENT_NAMES, head_dim_of

CODE = Path(configuration_decilm.__file__)
LLAMA_SHAPED = ("llama", "mistral", "qwen2", "granite")
WIDTH_STEP = 256
# The format's fields for a block beyond what a Llama layer needs; some runtimes read them all.
ATTENTION_DEFAULTS = {
    "no_op": False,
    "replace_with_linear": False,
    "sparsify": None,
    "n_heads_in_group": None,
    "window_length": None,
    "num_sink_tokens": None,
    "use_prefill_window_in_sink_attention": False,
    "unshifted_sink": False,
}
FFN_DEFAULTS = {"no_op": False, "replace_with_linear": False, "sparsify": None}
SAME_IN_BOTH = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings "
    "bos_token_id eos_token_id pad_token_id rope_parameters"
).split()


def check(config, replacement_rank: int) -> None:
    """Raise InputError for a (stock or Hopscotch) config that the format cannot hold."""
    remedy = "export it as folded, or serve the checkpoint itself, with vLLM or transformers"
    family = config.model_type.removeprefix(PREFIX)
    if family not in LLAMA_SHAPED:
        raise InputError(
            f"nemotron_nas holds layers of Llama's shape, and those of {family} are not; {remedy}"
        )
    if replacement_rank and getattr(config, "attention_bias", False):
        raise InputError(f"nemotron_nas gives a map a bias where attention has one; {remedy}")
    if replacement_rank and family == "qwen2":
        raise InputError(
            "nemotron_nas with maps runs in mlx-lm alone, which does not read qwen2's biases; serve the "
            "checkpoint itself, with vLLM or transformers, or leave --replacement_rank out"
        )
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"]
    slides = "sliding_attention" in types if family == "qwen2" else window is not None
    if slides and window < config.max_position_embeddings:
        raise InputError(f"nemotron_nas has no sliding window, and this model has one of {window}; {remedy}")
    if config.hidden_act != "silu":
        raise InputError(
            f"nemotron_nas needs an MLP with silu, and this model has {config.hidden_act}; {remedy}"
        )


def decilm_config(config, skipped: set[int], replaced: Collection[int] = ()) -> dict:
    """Return the config.json of a Hopscotch config's DeciLM form, with Granite's multipliers all 1.

    skipped: the no_op blocks, without block 0, which runtimes cannot leave out. replaced: the blocks with a
    matrix in their place.
    """
    assert 0 not in skipped
    bias = bool(getattr(config, "attention_bias", False))
    group = config.num_attention_heads // config.num_key_value_heads
    width = -(-config.intermediate_size // WIDTH_STEP) * WIDTH_STEP

    def attention(layer: int) -> dict:
        if layer in replaced:
            return {"replace_with_linear": True}
        return {"no_op": True} if layer in skipped else {"n_heads_in_group": group}

    return {name: getattr(config, name) for name in SAME_IN_BOTH} | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.stem}.{configuration_decilm.DeciLMConfig.__name__}"},
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "intermediate_size": width,
        "head_dim": head_dim_of(config),
        "attention_bias": bias,
        "qkv_bias": bias or config.model_type.endswith("qwen2"),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "transformers_version": transformers.__version__,  # else transformers warns about the tokenizer
        "dtype": str(config.dtype).removeprefix("torch."),
        **old_names(config),
        "block_configs": [
            {
                "attention": ATTENTION_DEFAULTS | attention(layer),
                "ffn": FFN_DEFAULTS | {"ffn_mult": 1.5 * width / config.hidden_size},
            }
            for layer in range(config.num_hidden_layers)
        ],
    }


def write_config(config: dict, target: Path) -> None:
    """Write config.json and the file of its class into an export."""
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(CODE, target / CODE.name)


def as_hopscotch_config(values: dict):
    """Return the Hopscotch config that computes what a DeciLM config.json says, with all scales 1.

    It follows the format, not the way this project fills it in, and so checks the export.
    """
    blocks = values["block_configs"]
    replaced = [i for i, block in enumerate(blocks) if block["attention"]["replace_with_linear"]]
    skipped = [i for i, block in enumerate(blocks) if block["attention"]["no_op"] or i in replaced]
    groups = {b["attention"]["n_heads_in_group"] for i, b in enumerate(blocks) if i not in skipped}
    widths = {ffn_width(block["ffn"]["ffn_mult"], values["hidden_size"]) for block in blocks}
    assert len(groups) == len(widths) == 1, "every block of an export has the same shape"
    qkv_bias_only = values["qkv_bias"] and not values["attention_bias"]
    config_class, _ = hopscotch_classes("qwen2" if qkv_bias_only else "llama")
    own = {"architectures", "auto_map", "model_type", "block_configs", "qkv_bias", "torch_dtype"}
    config = config_class(
        **{key: value for key, value in values.items() if key not in own}
        | {
            "num_key_value_heads": values["num_attention_heads"] // groups.pop(),
            "intermediate_size": widths.pop(),
            "skipped_attention_blocks": skipped or None,
            "replacement_rank": values["hidden_size"] if replaced else 0,
        }
    )
    config.new_scales = True  # an export has none
    return config


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """The MLP's width, as every reader of the format computes it."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // WIDTH_STEP) * WIDTH_STEP


def prepare(folder: Path, config, values: torch.Tensor, maps: dict[str, torch.Tensor]) -> Target:
    """Write the DeciLM config and its class; return what its weights are."""
    skipped = skipped_blocks(config)
    replaced = skipped if maps else []
    if 0 in skipped and not maps:
        logger.warning("block 0 stays in nemotron_nas, with a zero o_proj: vLLM's code cannot leave it out")
    values_of_config = decilm_config(config, set(skipped) - set(replaced) - {0}, replaced)
    write_config(values_of_config, folder)
    factors = fold_factors(values, skipped, getattr(config, "residual_multiplier", 1.0), replaced)
    linear = {
        f"model.layers.{block}.self_attn.linear.weight": as_one_matrix(block, maps, factors)
        for block in replaced
    }
    shaped = as_hopscotch_config(values_of_config)
    _, model_class = hopscotch_classes(shaped.model_type)
    with torch.device("meta"):
        model = model_class(shaped)
    shapes = shapes_of(model) | {key: matrix.shape for key, matrix in linear.items()}
    return Target(Folding(config, factors, granite_multipliers(config)), shapes, linear=linear)


def load(folder: Path, **options):
    """Load an export as a transformers model; every tensor must be read and none may be missing."""
    shaped = as_hopscotch_config(json.loads((folder / "config.json").read_text()))
    _, model_class = hopscotch_classes(shaped.model_type)
    # A matrix in attention's place is a map of full rank, whose other half is the identity.
    names = {r"self_attn\.linear\.weight": REPLACEMENT_NAMES[1]}
    options |= {"config": shaped} | ({"key_mapping": names} if shaped.replacement_rank else {})
    model = load_whole(model_class, folder, **options)
    for key, parameter in scales.named_maps(model):
        if key.endswith(REPLACEMENT_NAMES[0]):
            torch.nn.init.eye_(parameter)
    return model
