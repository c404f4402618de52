"""The first tokens that all samples of a batch share, computed once for the batch.

A chat template begins every conversation alike, often with a system prompt. Attention is causal,
so these tokens have the same keys and values in every sample. They are computed once, put into the
KV cache before each minibatch, and the gradients that arrive there go back through them once.
"""

import torch
from transformers import DynamicCache


class SharedPrefix:
    """Keys and values of a batch's common first tokens, for its minibatches to attend to.

    input_ids: [1, tokens]. `cache` serves any number of minibatches, each of which may be run
    backward; `backward` comes after the last of them.
    """

    def __init__(self, model, input_ids: torch.Tensor):
        computed = model.model(input_ids=input_ids, past_key_values=DynamicCache(), use_cache=True)
        self.length = input_ids.shape[1]
        self.computed: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []  # keys and values in turn, detached; gradients gather here
        self.slots: list[int] = []
        for slot, layer in enumerate(computed.past_key_values.layers):
            if layer.is_initialized:
                self.slots.append(slot)
                self.computed += [layer.keys, layer.values]
        for tensor in self.computed:
            self.leaves.append(tensor.detach().requires_grad_(tensor.requires_grad))

    def cache(self, rows: int) -> DynamicCache:
        """A KV cache that begins with the prefix in each of so many rows."""
        cache = DynamicCache()
        for slot, keys, values in zip(self.slots, self.leaves[::2], self.leaves[1::2], strict=True):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), slot)
        return cache

    def extended_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A minibatch's attention mask [rows, length] with the prefix before it."""
        if mask is None:
            return None
        return torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)

    def backward(self) -> None:
        """Take the gradients that the minibatches left back through the prefix."""
        pairs = [(t, leaf.grad) for t, leaf in zip(self.computed, self.leaves, strict=True)]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
