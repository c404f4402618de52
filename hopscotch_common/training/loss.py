"""The loss of a minibatch: no logits where none count, and no matrix of all tokens by the vocabulary."""

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import DynamicCache

from hopscotch_common.modeling_hopscotch import scaled_logits, scaled_logits_slope
from hopscotch_common.training.batches import Minibatch

LOGIT_ROWS = 256  # rows of logits alive at once


class HeadLoss(torch.autograd.Function):
    """How far a frozen LM head's distributions P are from target ones, summed in float32.

    The sum of KL(target || P) over positions, a few rows of logits at a time. The target is one token,
    which makes it the cross entropy, or what the head makes of the original model's hidden states.

    hidden: [tokens, hidden]; targets: token ids [tokens]; original: None, or hidden states
    [tokens, hidden] whose distributions take the tokens' place; config: the model's, which may scale
    logits or cap them. The gradient, P - target by the logits, is made with the loss, as the logits do
    not live until backward. (torch's linear_cross_entropy sums in the dtype of its input: in bfloat16
    a sum of 800 is a multiple of 4.)
    """

    @staticmethod
    def forward(ctx, hidden, head, config, targets, original):
        trains = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if trains else None
        for rows in _few_rows(hidden):
            states = hidden[rows].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains):  # of the product alone, which a quantised head knows best
                product = head(states)
            logits = scaled_logits(config, product.detach())
            ours = log_softmax(logits, dim=-1, dtype=torch.float32)
            if original is None:
                total += nll_loss(ours, targets[rows], reduction="sum")
            else:
                theirs = _log_probabilities(head, config, original[rows])
                total += _divergence(theirs, ours)
            if trains:
                difference = ours.exp_()
                if original is None:
                    difference[torch.arange(len(ours), device=hidden.device), targets[rows]] -= 1
                else:
                    difference -= theirs.exp_()
                difference *= scaled_logits_slope(config, logits)
                (gradient[rows],) = torch.autograd.grad(product, states, difference.to(product.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def _few_rows(hidden: torch.Tensor) -> list[slice]:
    return [slice(start, start + LOGIT_ROWS) for start in range(0, len(hidden), LOGIT_ROWS)]


def _log_probabilities(head, config, hidden: torch.Tensor) -> torch.Tensor:
    """[rows, vocabulary], float32."""
    return log_softmax(scaled_logits(config, head(hidden)), dim=-1, dtype=torch.float32)


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) summed over rows of log probabilities."""
    return kl_div(ours, theirs, reduction="sum", log_target=True)


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


def summed_loss(
    model, minibatch: Minibatch, prefix: SharedPrefix | None = None, original: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss summed over the minibatch's loss-counted tokens, a float32 scalar.

    Cross entropy, or given the original model's states (`Originals`), KL(original || model). The
    minibatch is on the model's device. prefix: what its batch shares, where it does.
    """
    return summed_head_loss(model, _last_hidden_state(model, minibatch, prefix), minibatch, original)


def summed_head_loss(
    model, hidden: torch.Tensor, minibatch: Minibatch, original: torch.Tensor | None = None
) -> torch.Tensor:
    """`summed_loss` from the base model's output [rows, length, hidden].

    Only hidden states that predict a loss-counted token reach the LM head, and their logits are
    made and consumed a few rows at a time, so the full [tokens, vocabulary] matrix never exists. Of
    a model that is spread over devices, the loss is on the LM head's.
    """
    hidden, targets = _counted(model, hidden, minibatch), minibatch.targets.to(model.lm_head.weight.device)
    return HeadLoss.apply(hidden, model.lm_head, model.config, targets, original)


@torch.no_grad()
def summed_figures(
    model, minibatch: Minibatch, original: torch.Tensor, prefix: SharedPrefix | None = None
) -> torch.Tensor:
    """Sums over the minibatch's loss-counted tokens, float32 [3]: cross entropy, KL, agreement.

    original: the original model's states (`Originals`), for KL(original || model). Agreement counts the
    positions where the model's most likely token is the target. The minibatch is on the model's device.
    """
    head, config = model.lm_head, model.config
    hidden = counted_states(model, minibatch, prefix)
    targets = minibatch.targets.to(hidden.device)
    total = torch.zeros(3, device=hidden.device)
    for rows in _few_rows(hidden):
        ours = _log_probabilities(head, config, hidden[rows])
        total[0] += nll_loss(ours, targets[rows], reduction="sum")
        total[1] += _divergence(_log_probabilities(head, config, original[rows]), ours)
        total[2] += (ours.argmax(dim=-1) == targets[rows]).sum()
    return total


def counted_states(model, minibatch: Minibatch, prefix: SharedPrefix | None = None) -> torch.Tensor:
    """What reaches the LM head, [loss-counted tokens, hidden], on its device, in the minibatch's order."""
    return _counted(model, _last_hidden_state(model, minibatch, prefix), minibatch)


def _last_hidden_state(model, minibatch: Minibatch, prefix: SharedPrefix | None = None) -> torch.Tensor:
    inputs = minibatch.inputs
    if prefix is not None:
        inputs = inputs | {
            "attention_mask": prefix.extended_mask(minibatch.attention_mask),
            "past_key_values": prefix.cache(len(minibatch.samples)),
        }
    return model.model(**inputs, use_cache=False).last_hidden_state


def _counted(model, hidden: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
    """The rows of [rows, length, hidden] that predict a loss-counted token, on the LM head's device."""
    return hidden.flatten(0, 1)[minibatch.predicting.to(hidden.device)].to(model.lm_head.weight.device)
