"""Other ways to a smaller KV cache, put into a stock model: `alternatives.py` lists and compares them.

A way replaces forward methods of some layers (`in_place`). `Observed` is what it needs to know about the
original, to choose these layers and to fit what takes their place.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import cosine_similarity, linear

from hopscotch_common.scales.modeling_hopscotch import FAMILIES, head_dim_of
from hopscotch_common.training import IGNORE_INDEX
from hopscotch_common.training.batches import Sample

WAYS = {  # in words, for pictures
    "search-window-256": "our blocks, windows of 256 tokens",
    "search-window-64": "our blocks, windows of 64 tokens",
    "search-window-4": "our blocks, windows of 4 tokens",
    "search-nbl": "our blocks, full linear maps",
    "search": "our blocks, nothing in their place",
    "cosine-window-64": "LLM-Drop's blocks, windows of 64 tokens",
    "cosine": "LLM-Drop's blocks, nothing in their place",
    "nbl": "NBL's blocks, full linear maps",
    "consecutive": "consecutive whole layers",
    "layers": "whole layers (ShortGPT's)",
    "cache-8": "a KV cache in 8 bits",
    "cache-4": "a KV cache in 4 bits",
}
SINKS = 4
WINDOW = re.compile(r"(search|cosine)-window-(\d+)")
BITS = re.compile(r"cache-(\d+)")
GROUP = 64  # at most so many channels of a head share a step and a smallest value, of 16 bits each


def check_family(config) -> None:
    """SystemExit unless a layer adds to the stream what attention returns: so all ways take it."""
    multiplied = getattr(config, "residual_multiplier", 1) != 1
    if multiplied or FAMILIES[config.model_type].norm_after_attention:
        what = "is multiplied" if multiplied else "goes through a norm"
        raise SystemExit(
            f"{config.model_type}: what attention returns {what} first; only --ways without a word"
        )


class Observed:
    """What the original does with some answers: [layers] figures of how the stream turns, and NBL's moments.

    turned_by_attention, turned_by_layer: one less the mean cosine similarity of the stream before and after.
    last: [answers, layers + 1, hidden], the stream before each layer and behind the last one, of the token
    before an answer's last counted one, which is the end of turn.
    moments: of each layer (n, sum x, sum y, xx', yx', yy'), x the stream before the attention block and y
    what the block adds, float64.
    """

    def __init__(self, model, answers: Sequence[Sample]):
        layers = model.model.layers
        size = model.config.hidden_size
        self.turned_by_attention = torch.zeros(len(layers))
        self.turned_by_layer = torch.zeros(len(layers))
        self.last = torch.zeros(len(answers), len(layers) + 1, size)
        shapes = ((), (size,), (size,), *[(size, size)] * 3)
        self.moments = [[torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in layers]
        for number, answer in enumerate(answers):
            last = max(i for i, label in enumerate(answer.labels) if label != IGNORE_INDEX) - 1
            for index, (before, added, behind) in enumerate(streams(model, answer)):
                self._add(index, before, added, behind)
                self.last[number, index], self.last[number, index + 1] = before[last], behind[last]
        tokens = sum(len(answer.input_ids) for answer in answers)
        self.turned_by_attention /= tokens
        self.turned_by_layer /= tokens

    def _add(self, index: int, before: torch.Tensor, added: torch.Tensor, behind: torch.Tensor) -> None:
        self.turned_by_attention[index] += (1 - cosine_similarity(before, before + added, -1)).sum()
        self.turned_by_layer[index] += (1 - cosine_similarity(before, behind, -1)).sum()
        x, y = before.double(), added.double()
        count, sum_x, sum_y, xx, yx, yy = self.moments[index]
        count += len(x)
        sum_x += x.sum(0)
        sum_y += y.sum(0)
        for total, left, right in ((xx, x, x), (yx, y, x), (yy, y, y)):
            total.addmm_(left.T, right)


@torch.no_grad()
def streams(model, answer: Sample) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer, [tokens, hidden] float32: the stream before, what attention adds, the stream behind."""
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = []
    for seen, layer in zip(found, model.model.layers, strict=True):

        def keep_attention(_, arguments, output, seen=seen) -> None:
            seen.append(output[0])

        def keep_layer(_, arguments, output, seen=seen) -> None:
            seen[:] = arguments[0], *seen, output

        hooks.append(layer.self_attn.register_forward_hook(keep_attention))
        hooks.append(layer.register_forward_hook(keep_layer))
    try:
        model.model(input_ids=torch.tensor([answer.input_ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(tensor[0].float() for tensor in seen) for seen in found]


def covariances(moments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(C_xx, C_yx, C_yy), [hidden, hidden], of a layer's moments."""
    count, x, y, xx, yx, yy = moments
    outer = torch.outer
    return tuple((m - outer(a, b) / count) / (count - 1) for m, a, b in ((xx, x, x), (yx, y, x), (yy, y, y)))


def canonical_bound(moments: Sequence[torch.Tensor]) -> float:
    """NBL's criterion: the sum of 1 - rho², rho the canonical correlations of the stream before and after.

    Directions in which either does not vary (eigenvalues below 1e-10 of the largest) count as 1.
    """
    c_xx, c_yx, c_yy = covariances(moments)
    after = c_yy + c_yx + c_yx.T + c_xx
    correlation = inverse_root(after) @ (c_yx + c_xx) @ inverse_root(c_xx)
    return (len(c_xx) - correlation.square().sum()).item()


def inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    powers = torch.where(values > 1e-10 * values[-1], values.clamp_min(1e-300).rsqrt(), 0.0)
    return vectors * powers @ vectors.T


def least_squares(moments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [hidden, hidden], bias [hidden]) of the best linear map from x to y."""
    count, x, y, *_ = moments
    c_xx, c_yx, _ = covariances(moments)
    weight = c_yx @ torch.linalg.pinv(c_xx, rtol=1e-10, hermitian=True)
    return weight, (y - weight @ x) / count


def nothing(hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None


def linear_map(weight: torch.Tensor, bias: torch.Tensor, hidden_states: torch.Tensor, **_):
    return linear(hidden_states, weight, bias), None


def windowed(attention: Callable, window: int) -> Callable:
    """An attention module's forward that sees the first SINKS tokens and the last `window`."""

    def forward(hidden_states: torch.Tensor, **keywords):
        place = torch.arange(hidden_states.shape[1])
        distance = place[:, None] - place
        seen = (distance >= 0) & ((distance < window) | (place < SINKS))
        mask = torch.zeros(seen.shape, dtype=hidden_states.dtype).masked_fill(~seen, -math.inf)
        return attention(hidden_states, **keywords | {"attention_mask": mask[None, None]})

    return forward


class RoundedCache:
    """Takes a KV cache's place in an attention module, whose keys and values are then of a few bits."""

    def __init__(self, bits: int):
        self.bits = bits

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        return rounded(keys, self.bits), rounded(values, self.bits)


def rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Each group of the last dimension in so many bits, evenly from its smallest to its largest value."""
    groups = tensor.float().unflatten(-1, (-1, group_size(tensor.shape[-1])))
    least, most = groups.aminmax(dim=-1, keepdim=True)
    step = ((most - least) / (2**bits - 1)).clamp_min(1e-12)
    return (((groups - least) / step).round() * step + least).flatten(-2).to(tensor.dtype)


def group_size(head_size: int) -> int:
    """The largest equal parts of a head that are no larger than GROUP."""
    return max(size for size in range(1, GROUP + 1) if head_size % size == 0)


def with_cache(attention: Callable, cache: RoundedCache) -> Callable:
    """An attention module's forward with that cache."""

    def forward(hidden_states: torch.Tensor, **keywords):
        name = "cache" if "cache" in keywords else "past_key_values"  # as this transformers calls it
        return attention(hidden_states, **keywords | {name: cache})

    return forward


def replaced(
    model, way: str, blocks: Sequence[int], observed: Observed
) -> list[tuple[torch.nn.Module, Callable]]:
    """(module, its new forward method) of a way."""
    layers = [model.model.layers[block] for block in blocks]
    if way in ("layers", "consecutive"):
        return [(layer, lambda hidden_states, **_: hidden_states) for layer in layers]
    if match := WINDOW.fullmatch(way):
        return [(each.self_attn, windowed(each.self_attn.forward, int(match[2]))) for each in layers]
    if match := BITS.fullmatch(way):
        cache = RoundedCache(int(match[1]))
        modules = [layer.self_attn for layer in model.model.layers]
        return [(each, with_cache(each.forward, cache)) for each in modules]
    if "nbl" not in way:
        return [(layer.self_attn, nothing) for layer in layers]
    found = []
    for block, layer in zip(blocks, layers, strict=True):
        # the map is of the stream, so the norm before attention lets it pass
        weight, bias = (t.to(model.dtype) for t in least_squares(observed.moments[block]))
        found.append((layer.input_layernorm, lambda hidden_states: hidden_states))
        found.append((layer.self_attn, functools.partial(linear_map, weight, bias)))
    return found


@contextlib.contextmanager
def in_place(forwards: Sequence[tuple[torch.nn.Module, Callable]]) -> Iterator[None]:
    """Modules with other forward methods."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward


def choose(way: str, count: int, picks: Sequence[int], observed: Observed) -> list[int]:
    """The blocks or layers that a way leaves out."""
    if way.startswith("search"):
        return list(picks[:count])
    if way == "consecutive":
        first, behind = observed.last[:, :-count], observed.last[:, count:]
        angles = cosine_similarity(first, behind, -1).clamp(-1, 1).arccos().mean(0)
        start = int(angles.argmin())
        return list(range(start, start + count))
    if way == "nbl":
        scores = torch.tensor([canonical_bound(moments) for moments in observed.moments])
    else:
        scores = observed.turned_by_layer if way == "layers" else observed.turned_by_attention
    return scores.argsort()[:count].tolist()


def left(model, way: str, blocks: Sequence[int], context: int = 0) -> dict[str, float]:
    """Shares of the original's KV cache and weights that are left; context: in tokens, for windows."""
    if match := BITS.fullmatch(way):
        own = 32 / group_size(head_dim_of(model.config))
        return {"kv_cache": (int(match[1]) + own) / 16, "weights": 1.0}
    layers = model.model.layers
    kept = 1 - len(blocks) / len(layers)
    if match := WINDOW.fullmatch(way):
        kept += len(blocks) / len(layers) * min(1, (SINKS + int(match[2])) / context)
        return {"kv_cache": kept, "weights": 1.0}
    size = model.config.hidden_size
    parts = layers if way in ("layers", "consecutive") else [layer.self_attn for layer in layers]
    removed = sum(parameter.numel() for b in blocks for parameter in parts[b].parameters())
    added = len(blocks) * (size + 1) * size if "nbl" in way else 0
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"kv_cache": kept, "weights": 1 - (removed - added) / total}
