"""Low-rank maps in the place of skipped attention blocks, fitted in closed form.

Let X be a block's normed inputs and Y what it adds to the stream, both [tokens, hidden] of the original
model. Ridge regression gives S = (X'X + lambda I)^-1 X'Y. The `rank` leading eigenvectors P of the fitted
outputs' covariance S'(X'X)S give the best map of that rank: down = (S P)', up = P (reduced-rank regression).
NBL (arXiv 2505.21077) uses full maps, fitted in the same way.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device

from hopscotch_common import scales
from hopscotch_common.errors import TrainingError, logger
from hopscotch_common.training.batches import Batch, Minibatch, MinibatchRunner
from hopscotch_common.training.distributed import Reduce

RIDGE = 1e-3  # lambda, in units of the mean of X'X's diagonal
FEW_TOKENS = 4  # per channel: with fewer, maps follow what they were fitted on more than the block


class Sums(NamedTuple):
    """Sums over tokens for one block, float32 on its layer's device: X'X and X'Y, [hidden, hidden].

    energies: [3], the trace of Y'Y, the squared norms of the stream after the block, and the number of
    tokens.
    """

    inputs: torch.Tensor
    products: torch.Tensor
    energies: torch.Tensor


@torch.no_grad()
def fit_maps(
    model, batches: Iterable[Batch], blocks: Sequence[int], reduce: Reduce | None = None
) -> dict[int, float]:
    """Fit the maps of `blocks` to the original model on all tokens of some batches, and put them in place.

    The batches run once. For each block two float32 [hidden, hidden] sums are kept: 134 MB with 4096
    channels. reduce: sums over the processes, each of which has a part of every batch.
    Returns the share of the stream after each block that its map gets wrong: the squared norm of the
    difference over that of the stream. Warns if there are few tokens. Raises TrainingError for states that
    are not finite.
    """
    sums = collect(model, batches, blocks)
    left = {}
    for block in blocks:
        layer, found = model.model.layers[block], sums.pop(block)
        if reduce is not None:
            for tensor in found:
                reduce(tensor)
        tokens = found.energies[2].item()
        if block == blocks[0] and tokens < FEW_TOKENS * model.config.hidden_size:
            logger.warning(
                "maps are fitted on %d tokens, fewer than %d for each of %d channels: give more answers",
                *(tokens, FEW_TOKENS, model.config.hidden_size),
            )
        rank = len(layer.replacement_down)
        try:
            down, up, wrong = solve(found, rank)
        except torch.linalg.LinAlgError as error:
            raise TrainingError(
                f"block {block}: no map can be fitted ({error}); use --dtype float32, or leave "
                "--replacement_rank out"
            ) from error
        layer.replacement_down.copy_(down)
        layer.replacement_up.copy_(up)
        left[block] = wrong
    return left


@torch.no_grad()
def collect(model, batches: Iterable[Batch], blocks: Sequence[int]) -> dict[int, Sums]:
    """Return the sums of blocks over all tokens of some batches, in the original model."""
    scales.reset(model)
    square = (model.config.hidden_size,) * 2
    sums = {}
    for block in blocks:
        device = model.model.layers[block].s_scale_attn.device
        sums[block] = Sums(*(torch.zeros(shape, device=device) for shape in (square, square, 3)))

    def add(minibatch: Minibatch) -> bool:
        on_device = minibatch.to(model.device)
        calls = layer_calls(model, on_device)
        parts = [_part(model.model.layers[b], *calls[b], on_device.attention_mask) for b in blocks]
        for block, part in zip(blocks, parts, strict=True):  # all or none, as what does not fit runs again
            for tensor, more in zip(sums[block], part, strict=True):
                tensor += more
        return True

    runner = MinibatchRunner()
    for batch in batches:
        for _ in runner.run([each.whole() for each in batch.minibatches], add, "fitting the maps"):
            pass
    return sums


def _part(layer, stream: torch.Tensor, keywords: dict, mask: torch.Tensor | None) -> Sums:
    """Return a minibatch's part of a layer's sums; mask: [rows, length], 0 at padding."""
    stream, keywords = send_to_device((stream, keywords), layer.s_scale_attn.device)  # of a split model
    rows = slice(None) if mask is None else mask.to(stream.device).bool()
    x, y = layer.attention_input(stream)[rows].float(), layer.attention_branch(stream, keywords)[rows].float()
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    behind = stream[rows].float().flatten(0, -2) + y
    energies = [y.square().sum(), behind.square().sum(), torch.ones_like(x[:, 0]).sum()]
    return Sums(x.T @ x, x.T @ y, torch.stack(energies))


def solve(sums: Sums, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return (down [rank, hidden], up [hidden, rank], share of the stream that they get wrong), in float64.

    Raises LinAlgError if the sums are not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in sums):  # eigh would silently return NaNs
        raise torch.linalg.LinAlgError("sums that are not finite")
    inputs, products, energies = (tensor.double() for tensor in sums)
    ridge = RIDGE * inputs.diagonal().mean()
    factor = torch.linalg.cholesky(inputs + ridge * torch.eye(len(inputs)).to(inputs))
    whole = torch.cholesky_solve(products, factor)
    _, directions = torch.linalg.eigh(whole.T @ inputs @ whole)
    up = directions[:, -rank:]
    down = (whole @ up).T
    fitted = down @ products @ up
    wrong = energies[0] - 2 * fitted.trace() + (down @ inputs @ down.T).trace()
    return down, up, (wrong / energies[1]).item()


def layer_calls(model, minibatch: Minibatch) -> list[tuple[torch.Tensor, dict]]:
    """Return (input [rows, length, hidden], keyword arguments) of every decoder layer in a forward pass."""
    calls: list[tuple[torch.Tensor, dict]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, arguments, keywords: calls.append((arguments[0], keywords)), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    try:
        model.model(**minibatch.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
