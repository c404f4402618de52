"""Fold the scales into the weights: the same function, computed by a model without scales.

RMSNorm does not change when its input is multiplied by a positive constant (up to its eps). So the
residual stream may be stored divided by a running factor C, which starts at 1. At each residual

    C *= s;  stored = (b * branch + s * C_before * stored_before) / C = (b / C) * branch + stored_before

and the branch's last matrix (o_proj, down_proj, with bias) takes the factor b / C: all of it where
b is a number, row i the factor b[i] / C where b has one a channel. Where C is negative, the norm that
reads the stream changes the sign of its weight.
"""

import math
from collections.abc import Iterable

import torch

from hopscotch_common.errors import InputError
from hopscotch_common.modeling_hopscotch import PREFIX, SCALE_NAMES
from hopscotch_common.scales import columns

# Families whose branches end in o_proj and down_proj, with RMSNorms before both and none behind them.
FOLDABLE = ("llama", "qwen2", "granite", "mistral", "qwen3")
SMALLEST_S = 1e-3  # below it the residual stream is as good as gone

Factor = float | torch.Tensor  # of a weight and its bias: a number, or float64 [1], or [rows], one a row


def check_foldable(config) -> None:
    """Raise InputError unless the scales of a (stock or Hopscotch) config's model fold into its weights."""
    family = config.model_type.removeprefix(PREFIX)
    if family not in FOLDABLE:
        raise InputError(
            f"the scales of {family} cannot be folded yet (only those of {', '.join(FOLDABLE)}); "
            "serve the checkpoint itself with transformers"
        )


def fold_factors(
    values: torch.Tensor, skipped: Iterable[int], residual_multiplier: float = 1.0
) -> dict[str, Factor]:
    """What every weight and bias of a module is multiplied by; modules not named keep theirs.

    values: the scales [layers, width]. skipped: blocks without attention. residual_multiplier: taken
    into the weights as well, for a target that has none of its own (Granite's). Raises InputError
    for scales that are not finite, and for an s too close to 0 to divide by.
    """
    skipped = set(skipped)
    carried, factors = 1.0, {}
    by_name = columns(values.double())
    for layer in range(len(values)):
        row = {name: by_name[name][layer] for name in SCALE_NAMES}
        _check_scales(layer, row)
        b_attn, b_mlp = row["b_scale_attn"], row["b_scale_mlp"]
        s_attn, s_mlp = row["s_scale_attn"].item(), row["s_scale_mlp"].item()
        prefix = f"model.layers.{layer}"
        if layer not in skipped:
            factors[f"{prefix}.input_layernorm"] = math.copysign(1.0, carried)
            factors[f"{prefix}.self_attn.o_proj"] = residual_multiplier * b_attn / (carried * s_attn)
        carried *= s_attn
        factors[f"{prefix}.post_attention_layernorm"] = math.copysign(1.0, carried)
        carried *= s_mlp
        factors[f"{prefix}.mlp.down_proj"] = residual_multiplier * b_mlp / carried
    factors["model.norm"] = math.copysign(1.0, carried)
    return factors


def _check_scales(layer: int, row: dict[str, torch.Tensor]) -> None:
    for name, scale in row.items():
        if not bool(scale.isfinite().all()):
            bad = scale[~scale.isfinite()][0].item()
            raise InputError(f"{name} of layer {layer} is {bad}: this checkpoint cannot work; train it again")
        if name.startswith("s") and abs(s := scale.item()) < SMALLEST_S:
            raise InputError(
                f"{name} of layer {layer} is {s:g}, which all but wipes out the residual stream, and "
                f"cannot be folded (at least {SMALLEST_S:g} is needed); train with a smaller learning rate"
            )


def absorb_granite(factors: dict[str, Factor], config) -> dict[str, Factor]:
    """Take Granite's other multipliers into the weights too, so that they are all 1 afterwards.

    The embeddings take theirs, the queries that of attention (over the usual 1 / sqrt(head_dim)),
    and the final norm takes the logits' scaling: lm_head may be tied to the embeddings, and a tied
    one is undone what the embeddings took. config: any family's; those without multipliers change
    nothing.
    """
    factors = dict(factors)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = getattr(config, "embedding_multiplier", 1.0)
    factors["model.embed_tokens"] = embedding
    factors["model.norm"] /= getattr(config, "logits_scaling", 1.0)
    if config.tie_word_embeddings:
        factors["model.norm"] /= embedding
    if hasattr(config, "attention_multiplier"):
        for layer in range(config.num_hidden_layers):
            factors[f"model.layers.{layer}.self_attn.q_proj"] = config.attention_multiplier * head_dim**0.5
    return factors


def fold(key: str, tensor: torch.Tensor, factors: dict[str, Factor]) -> torch.Tensor:
    """A weight [rows, columns] or bias [rows] times its module's factor: in float64, then its own dtype.

    Raises InputError when the dtype cannot hold the product.
    """
    factor = torch.as_tensor(factors.get(key.rpartition(".")[0], 1.0), dtype=torch.float64)
    if bool((factor == 1.0).all()):
        return tensor
    by_row = factor.view(-1, *[1] * (tensor.dim() - 1))
    folded = (tensor.double() * by_row).to(tensor.dtype)
    if not bool(folded.isfinite().all()):
        largest = factor.abs().max().item()
        raise InputError(
            f"{key} times {largest:g} is not finite in {tensor.dtype}: the scales are too extreme to fold; "
            "train with a smaller learning rate"
        )
    return folded
