"""The scales of each decoder layer: which parameters they are, and what is done to them.

This module decides once, for search, training, saving and export, what a scale is, which scales train,
and what skipping an attention block does to them.

Outside a model all scales are one float32 tensor [layers, width]. A row holds a layer's scales one
after another in SCALE_NAMES order: 4 numbers if each is a scalar, and 2 * hidden + 2 if b is a
vector (`scale_granularity: channel`). `columns` splits it by name.

A block is skipped in one of three ways:

    in search and training   `reset` sets the layer's switch and b_attn to 0; the block stays in memory
    in a checkpoint          the config names it (`skipped_attention_blocks`); the block is not even made
    with maps                the config has a `replacement_rank`: a low-rank map is where the block was,
                             and b_attn is the map's
"""

import contextlib
from collections.abc import Iterator

import torch

from hopscotch_common.scales.modeling_hopscotch import REPLACEMENT_NAMES, SCALE_NAMES, check_skipped_blocks
from hopscotch_common.scales.recomputation import recompute_elementwise


def named_scales(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (state-dict key, parameter [1] or [hidden]) of every scale, by layer and in SCALE_NAMES order."""
    for index, layer in enumerate(model.model.layers):
        for name in SCALE_NAMES:
            yield f"model.layers.{index}.{name}", getattr(layer, name)


def named_maps(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (state-dict key, parameter) of skipped blocks' maps: down [rank, hidden], up [hidden, rank]."""
    for index, layer in enumerate(model.model.layers):
        if layer.skip_attention and layer.replacement_up is not None:
            for name in REPLACEMENT_NAMES:
                yield f"model.layers.{index}.{name}", getattr(layer, name)


def maps_of(model) -> dict[str, torch.Tensor]:
    """Copies of `named_maps` on the CPU, by state-dict key."""
    return {key: parameter.detach().cpu().clone() for key, parameter in named_maps(model)}


def rank_of(maps: dict[str, torch.Tensor]) -> int:
    """The config's `replacement_rank` for maps by state-dict key: 0 if there are none."""
    return next((len(tensor) for key, tensor in maps.items() if key.endswith(REPLACEMENT_NAMES[0])), 0)


def freeze_base(model) -> None:
    """Freeze every parameter but the scales, and b_scale_attn if attention's place is empty.

    Norms and gated MLPs change their class, to keep less for the backward pass (`recompute_elementwise`).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        for name in SCALE_NAMES:
            getattr(layer, name).requires_grad_(name != "b_scale_attn" or not _empty(layer))
    recompute_elementwise(model)


def _empty(layer) -> bool:
    """Whether nothing is in the place of a layer's attention."""
    return layer.skip_attention and layer.replacement_up is None


def skippable_blocks(model, skipped) -> list[int]:
    """The attention blocks that could each be skipped in addition to `skipped`."""

    def possible(block: int) -> bool:
        try:
            check_skipped_blocks([*skipped, block], model.config)
        except ValueError:  # skipped already, or the last one that the KV cache needs
            return False
        return True

    return [block for block in range(len(model.model.layers)) if possible(block)]


@torch.no_grad()
def reset(model, skipped=()) -> None:
    """Set all scales to 1 and skip exactly the attention blocks in `skipped`. Maps stay as they are.

    A skipped block has b_attn fixed at 0 and its attention not computed or, if the model has maps, b_attn = 1
    for the map. s_attn of that layer stays trainable: if it were 0 as well, the residual stream would be
    wiped out. The base is already frozen (`freeze_base`).
    """
    skipped = set(skipped)
    for index, layer in enumerate(model.model.layers):
        layer.skip_attention = index in skipped
        for name in SCALE_NAMES:
            getattr(layer, name).fill_(1.0)
        layer.b_scale_attn.requires_grad_(not _empty(layer))
        if _empty(layer):
            layer.b_scale_attn.zero_()
    model.model.number_cache_slots()


@contextlib.contextmanager
def neutral(model) -> Iterator[None]:
    """Make the model the original one within the context: all scales 1, no block skipped. Then restore it.

    The parameters are exchanged, not overwritten, so that a graph through the present ones can still run
    backward. Only for models whose skips are switches, not for a checkpoint without the weights.
    """
    assert not model.config.skipped_attention_blocks, "the skipped blocks' weights are not there"
    layers = model.model.layers
    before = [
        (layer.skip_attention, {name: getattr(layer, name) for name in SCALE_NAMES}) for layer in layers
    ]
    try:
        for layer, (_, own) in zip(layers, before, strict=True):
            layer.skip_attention = False
            for name, scale in own.items():
                setattr(layer, name, torch.nn.Parameter(torch.ones_like(scale), requires_grad=False))
        model.model.number_cache_slots()
        yield
    finally:
        for layer, (skips, own) in zip(layers, before, strict=True):
            layer.skip_attention = skips
            for name, scale in own.items():
                setattr(layer, name, scale)
        model.model.number_cache_slots()


def columns(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split the scales [layers, width] by name into views, [layers, 1] or [layers, hidden] each."""
    b_size = (values.shape[1] - 2) // 2
    sizes = [b_size if name.startswith("b") else 1 for name in SCALE_NAMES]
    return dict(zip(SCALE_NAMES, values.split(sizes, dim=1), strict=True))


def ones(config) -> torch.Tensor:
    """Scales of 1, [layers, width], for a Hopscotch config."""
    b_size = config.hidden_size if config.scale_granularity == "channel" else 1
    return torch.ones(config.num_hidden_layers, 2 * b_size + 2)


def granularity(values: torch.Tensor) -> str:
    """The config's `scale_granularity` for scales [layers, width]."""
    return "layer" if values.shape[1] == len(SCALE_NAMES) else "channel"


def snapshot(model) -> torch.Tensor:
    """A copy of all scales, [layers, width], float32 on the CPU."""
    tensors = {key: scale.detach().cpu() for key, scale in named_scales(model)}
    return from_state_dict(tensors, len(model.model.layers))


@torch.no_grad()
def restore(model, values: torch.Tensor) -> None:
    """Set all scales from a snapshot [layers, width]. Which blocks are skipped does not change."""
    by_key = as_state_dict(values)
    for key, scale in named_scales(model):
        scale.copy_(by_key[key])


def as_state_dict(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a snapshot [layers, width] as a checkpoint's tensors [1] or [hidden], by state-dict key."""
    by_name = columns(values)
    return {
        f"model.layers.{layer}.{name}": by_name[name][layer].clone()
        for layer in range(len(values))
        for name in SCALE_NAMES
    }


def from_state_dict(tensors: dict[str, torch.Tensor], num_layers: int) -> torch.Tensor:
    """Do the reverse of `as_state_dict`; a KeyError names a missing scale."""
    rows = [
        torch.cat([tensors[f"model.layers.{layer}.{name}"].reshape(-1).float() for name in SCALE_NAMES])
        for layer in range(num_layers)
    ]
    return torch.stack(rows)
