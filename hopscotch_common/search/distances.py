"""How much each attention block changes what passes through it: a criterion without any loss.

The cosine distance of the residual stream before and after the block, as in LLM-Drop (arXiv
2406.15786). A block that hardly turns the stream is taken to matter little.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import send_to_device
from torch.nn.functional import cosine_similarity

from hopscotch_common import scales
from hopscotch_common.training.batches import Batch, Minibatch, MinibatchRunner
from hopscotch_common.training.replacement import layer_calls


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # as `untrained_losses`
def stream_distances(
    model, batches: Sequence[Batch], skipped: Sequence[int], blocks: Sequence[int], runner: MinibatchRunner
) -> dict[int, float]:
    """1 - cosine similarity at each of the blocks, a mean over all tokens, with `skipped` skipped.

    All scales are 1. Raises TrainingError when a single answer does not fit into memory.
    """
    scales.reset(model, skipped)
    total, tokens = torch.zeros(len(blocks)), 0

    def sums_of(minibatch: Minibatch) -> torch.Tensor:
        on_device = minibatch.to(model.device)
        calls = layer_calls(model, on_device)
        mask = on_device.attention_mask
        sums = []
        for block in blocks:
            layer = model.model.layers[block]
            before, keywords = send_to_device(calls[block], layer.s_scale_attn.device)  # of a split model
            after = layer.after_attention(before, **keywords)
            distance = 1 - cosine_similarity(before.float(), after.float(), dim=-1)  # [rows, length]
            sums.append((distance if mask is None else distance * mask.to(distance.device)).sum().cpu())
        return torch.stack(sums)

    for batch in batches:
        minibatches = [minibatch.whole() for minibatch in batch.minibatches]
        for minibatch, sums in runner.run(minibatches, sums_of, "cosine distances"):
            total += sums
            tokens += sum(len(sample) for sample in minibatch.samples)
    return dict(zip(blocks, (total / tokens).tolist(), strict=True))
