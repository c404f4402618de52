"""The loss of a minibatch: no logits where none count, and no matrix of all tokens by the vocabulary."""

import torch
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss
from transformers import DynamicCache

from hopscotch_common.modeling_hopscotch import scaled_logits, scaled_logits_slope
from hopscotch_common.training.batches import Minibatch

LOGIT_ROWS = 256  # rows of logits alive at once


class HeadCrossEntropy(torch.autograd.Function):
    """Cross entropy of a frozen LM head's logits, summed in float32; a few rows of logits at a time.

    hidden: [tokens, hidden]; weight: [vocabulary, hidden]; bias: [vocabulary] or None; targets: [tokens];
    config: the model's, which may scale logits or cap them. The gradient is made with the loss, as the
    logits do not live until backward. (torch's linear_cross_entropy sums in the dtype of its input:
    in bfloat16 a sum of 800 is a multiple of 4.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, config):
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            logits = scaled_logits(config, linear(hidden[rows], weight, bias))
            log_probabilities = log_softmax(logits, dim=-1, dtype=torch.float32)
            total += nll_loss(log_probabilities, targets[rows], reduction="sum")
            if gradient is not None:
                probabilities = log_probabilities.exp_()
                positions = torch.arange(len(probabilities), device=hidden.device)
                probabilities[positions, targets[rows]] -= 1
                probabilities *= scaled_logits_slope(config, logits)
                torch.matmul(probabilities.to(weight.dtype), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


class SharedPrefix:
    """The first tokens that all samples of a batch share, computed once for the batch.

    A chat template begins every conversation alike, often with a system prompt. Attention is causal,
    so these tokens have the same keys and values in every sample. They are computed once, put into
    the KV cache before each minibatch, and the gradients that arrive there go back through them once.

    input_ids: [1, tokens]. `cache` serves any number of minibatches. `leaves` are the keys and values
    through which a gradient may come, detached; `computed` are the same with their graph.
    """

    def __init__(self, model, input_ids: torch.Tensor):
        output = model.model(input_ids=input_ids, past_key_values=DynamicCache(), use_cache=True)
        self.length = input_ids.shape[1]
        self.computed: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []
        self._slots: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for slot, layer in enumerate(output.past_key_values.layers):
            if layer.is_initialized:
                self._slots.append((slot, self._leaf(layer.keys), self._leaf(layer.values)))

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        self.computed.append(tensor)
        self.leaves.append(leaf)
        return leaf

    def cache(self, rows: int) -> DynamicCache:
        """A KV cache that begins with the prefix in each of so many rows."""
        cache = DynamicCache()
        for slot, keys, values in self._slots:
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), slot)
        return cache

    def extended_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A minibatch's attention mask [rows, length] with the prefix before it."""
        if mask is None:
            return None
        return torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)


def summed_loss(model, minibatch: Minibatch, prefix: SharedPrefix | None = None) -> torch.Tensor:
    """Cross entropy summed over the minibatch's loss-counted tokens, a float32 scalar.

    The minibatch is on the model's device. prefix: what its batch shares, where it does.
    """
    inputs = minibatch.inputs
    if prefix is not None:
        inputs = inputs | {
            "attention_mask": prefix.extended_mask(minibatch.attention_mask),
            "past_key_values": prefix.cache(len(minibatch.samples)),
        }
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return summed_head_loss(model, hidden, minibatch)


def summed_head_loss(model, hidden: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
    """`summed_loss` from the base model's output [rows, length, hidden].

    Only hidden states that predict a loss-counted token reach the LM head, and their logits are
    made and consumed a few rows at a time, so the full [tokens, vocabulary] matrix never exists. Of
    a model that is spread over devices, the loss is on the LM head's.
    """
    hidden = hidden.flatten(0, 1)[minibatch.predicting.to(hidden.device)]
    head, config = model.lm_head, model.config
    weight = head.weight
    hidden, targets = hidden.to(weight.device), minibatch.targets.to(weight.device)
    if type(weight) is not torch.nn.Parameter:  # quantised: only the module knows how to multiply
        return cross_entropy(scaled_logits(config, head(hidden)).float(), targets, reduction="sum")
    return HeadCrossEntropy.apply(hidden, weight, head.bias, targets, config)
