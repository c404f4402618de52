"""The losses of many candidates before any training, for a fraction of a training step each.

All scales are 1 then, so candidates differ only in the one layer whose attention they skip. What
lies below that layer is the same for all of them and is computed once: half of the work. Nothing
is kept for a backward pass.
"""

import math
from collections.abc import Callable, Sequence

import torch

from hopscotch_common import scales
from hopscotch_common.training.batches import Batch, Minibatch, MinibatchRunner
from hopscotch_common.training.loss import Originals, summed_head_loss
from hopscotch_common.training.replacement import layer_calls


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # to compile the layers again, without gradients, takes longer
def untrained_losses(
    model,
    batch: Batch,
    skipped: Sequence[int],
    blocks: Sequence[int],
    where: str,
    on_screened: Callable[[float], None] = lambda share: None,
    runner: MinibatchRunner | None = None,
    originals: Originals | None = None,
) -> dict[int, float]:
    """The batch's mean loss with each of `blocks` skipped besides `skipped`, at scales of 1.

    The same as the loss of a first training step on that batch; infinite where it is not finite.
    originals: the loss is the divergence from them; None: cross entropy.
    where: named in the errors, for example "screening, batch 3". on_screened gets the share of the
    batch that a block was run on, each time. Raises TrainingError when a single answer does not fit
    into memory.
    """
    scales.reset(model, skipped)
    totals = torch.zeros(len(blocks), device=model.device)
    minibatches = [minibatch.whole() for minibatch in batch.minibatches]
    num_samples = sum(len(minibatch.samples) for minibatch in minibatches)

    def losses_of(minibatch: Minibatch) -> torch.Tensor:
        original = None if originals is None else originals(minibatch)
        calls = layer_calls(model, minibatch.to(model.device))
        losses = [_loss_without(model, block, calls, minibatch, original) for block in blocks]
        return torch.stack([loss.to(model.device) for loss in losses])

    for minibatch, losses in (runner or MinibatchRunner()).run(minibatches, losses_of, where):
        totals += losses
        on_screened(len(blocks) * len(minibatch.samples) / num_samples)
    means = (totals / batch.num_loss_counted_tokens).tolist()
    return {b: mean if math.isfinite(mean) else math.inf for b, mean in zip(blocks, means, strict=True)}


def _loss_without(
    model, block: int, calls: list[tuple], minibatch: Minibatch, original: torch.Tensor | None
) -> torch.Tensor:
    """Summed loss with one attention block more skipped, from that block's layer on."""
    layers = model.model.layers
    hidden, _ = calls[block]
    layers[block].skip_attention = True
    try:
        for layer, (_, keywords) in zip(layers[block:], calls[block:], strict=True):
            hidden = layer(hidden, **keywords)
    finally:
        layers[block].skip_attention = False
    return summed_head_loss(model, model.model.norm(hidden), minibatch, original)
