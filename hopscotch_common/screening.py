"""The losses of many candidates before any training, for a fraction of a training step each.

All scales are 1 then, so candidates differ only in the one layer whose attention they skip. What
lies below that layer is the same for all of them and is computed once: half of the work. Nothing
is kept for a backward pass.
"""

import math
from collections.abc import Callable, Sequence

import torch

from hopscotch_common import scales
from hopscotch_common.cli import TrainingError
from hopscotch_common.data import Batch, Minibatch
from hopscotch_common.training import naming_minibatch, summed_head_loss


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # to compile the layers again, without gradients, takes longer
def untrained_losses(
    model,
    batch: Batch,
    skipped: Sequence[int],
    blocks: Sequence[int],
    where: str,
    on_screened: Callable[[float], None] = lambda share: None,
) -> dict[int, float]:
    """The batch's mean loss with each of `blocks` skipped besides `skipped`, at scales of 1.

    The same as the loss of a first training step on that batch. where: named in the errors, for
    example "screening, batch 3". on_screened gets the share of the batch that a block was run on,
    each time. Raises TrainingError when a minibatch does not fit into memory, or at a loss that is
    not finite.
    """
    scales.reset(model, skipped)
    totals = {block: torch.zeros((), device=model.device) for block in blocks}
    minibatches = batch.whole_minibatches()
    for number, minibatch in enumerate(minibatches):
        minibatch = minibatch.to(model.device)
        with naming_minibatch(where, number, minibatch, "lower --max_tokens_per_batch"):
            calls = _layer_calls(model, minibatch)
            for block in blocks:
                loss = _loss_without(model, block, calls, minibatch)
                totals[block] += loss.to(model.device)
                on_screened(1 / len(minibatches))
    losses = {block: total.item() / batch.num_loss_counted_tokens for block, total in totals.items()}
    for block, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(
                f"{where}: without block {block} the loss is {loss} before any training; use --dtype float32"
            )
    return losses


def _loss_without(model, block: int, calls: list[tuple], minibatch: Minibatch) -> torch.Tensor:
    """Summed loss with one attention block more skipped, from that block's layer on."""
    layers = model.model.layers
    hidden, _ = calls[block]
    layers[block].skip_attention = True
    try:
        for layer, (_, keywords) in zip(layers[block:], calls[block:], strict=True):
            hidden = layer(hidden, **keywords)
    finally:
        layers[block].skip_attention = False
    return summed_head_loss(model, model.model.norm(hidden), minibatch)


def _layer_calls(model, minibatch: Minibatch) -> list[tuple[torch.Tensor, dict]]:
    """(input [rows, length, hidden], keyword arguments) of every decoder layer in a forward pass."""
    calls: list[tuple[torch.Tensor, dict]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, arguments, keywords: calls.append((arguments[0], keywords)), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    try:
        model.model(
            input_ids=minibatch.input_ids,
            attention_mask=minibatch.attention_mask,
            position_ids=minibatch.position_ids,
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return calls
