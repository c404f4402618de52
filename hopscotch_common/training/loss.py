"""The loss of minibatches and batches, on the answers' tokens or against the original model.

Logits are computed only where they count, and never as a matrix of all tokens by the vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import DynamicCache

from hopscotch_common import scales
from hopscotch_common.errors import Diverged, is_out_of_memory, progress
from hopscotch_common.training.batches import Batch, Batches, Minibatch, MinibatchRunner, Sample
from hopscotch_common.training.distributed import Reduce

LOGIT_ROWS = 256  # rows of logits in memory at once
KEPT_BYTES = 2 * 2**30  # of main memory, in each process, for the original model's states


class HeadLoss(torch.autograd.Function):
    """How far a frozen LM head's distributions P are from target ones, summed in float32.

    This is the sum of KL(target || P) over positions, a few rows of logits at a time. The target is one
    token, which makes it the cross entropy, or what the head makes of the original model's hidden states.

    hidden: [tokens, hidden]; targets: token ids [tokens]; original: None, or hidden states [tokens, hidden]
    whose distributions take the tokens' place; config: the model's, which may scale logits or cap them. The
    gradient with respect to the logits, P - target, is computed with the loss, as the logits are not kept
    until backward. (torch's linear_cross_entropy sums in the dtype of its input: in bfloat16 a sum of 800 is
    a multiple of 4.)
    """

    @staticmethod
    def forward(ctx, hidden, head, config, targets, original):
        trains = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if trains else None
        for rows in _few_rows(hidden):
            states = hidden[rows].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                logits = scaled_logits(config, head(states))
            ours = log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
            if original is None:
                total += nll_loss(ours, targets[rows], reduction="sum")
            else:
                theirs = _log_probabilities(head, config, original[rows])
                total += kl_div(ours, theirs, reduction="sum", log_target=True)
            if trains:
                difference = ours.exp_()
                if original is None:
                    difference[torch.arange(len(ours), device=hidden.device), targets[rows]] -= 1
                else:
                    difference -= theirs.exp_()
                (gradient[rows],) = torch.autograd.grad(logits, states, difference.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def scaled_logits(config, logits: torch.Tensor) -> torch.Tensor:
    """Scale the LM head's output as the family does: Granite divides it, Gemma 2 caps it softly."""
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if scaling != 1.0:
        logits = logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _few_rows(hidden: torch.Tensor) -> list[slice]:
    return [slice(start, start + LOGIT_ROWS) for start in range(0, len(hidden), LOGIT_ROWS)]


def _log_probabilities(head, config, hidden: torch.Tensor) -> torch.Tensor:
    """Log probabilities [rows, vocabulary], float32."""
    return log_softmax(scaled_logits(config, head(hidden)), dim=-1, dtype=torch.float32)


# The loss of a minibatch


def summed_loss(
    model,
    minibatch: Minibatch,
    prefix: "SharedPrefix | None" = None,
    original: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss summed over the minibatch's loss-counted tokens, a float32 scalar.

    The loss is cross entropy or, given the original model's states (`Originals`), KL(original || model).
    The minibatch is on the model's device. prefix: what its batch shares, if anything.
    """
    return summed_head_loss(model, _last_hidden_state(model, minibatch, prefix), minibatch, original)


def summed_head_loss(
    model, hidden: torch.Tensor, minibatch: Minibatch, original: torch.Tensor | None = None
) -> torch.Tensor:
    """`summed_loss` from the base model's output [rows, length, hidden].

    Only hidden states that predict a loss-counted token reach the LM head, and their logits are
    made and consumed a few rows at a time, so the full [tokens, vocabulary] matrix never exists. If
    a model is spread over devices, the loss is on the LM head's.
    """
    hidden, targets = _counted(model, hidden, minibatch)
    return HeadLoss.apply(hidden, model.lm_head, model.config, targets, original)


@torch.no_grad()
def summed_figures(
    model, minibatch: Minibatch, prefix: "SharedPrefix | None", original: torch.Tensor
) -> torch.Tensor:
    """Return sums over each answer's loss-counted tokens, float32 [answers, 3]: cross entropy, KL, agreement.

    The arguments are those of `summed_loss`. Agreement counts the positions where the model's most likely
    token is the target.
    """
    hidden, targets = _counted(model, _last_hidden_state(model, minibatch, prefix), minibatch)
    figures = []
    for rows in _few_rows(hidden):
        ours, theirs = (_log_probabilities(model.lm_head, model.config, h[rows]) for h in (hidden, original))
        loss = nll_loss(ours, targets[rows], reduction="none")
        divergence = kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
        figures.append(torch.stack([loss, divergence, ours.argmax(dim=-1) == targets[rows]], dim=-1))
    parts = torch.cat(figures).split([sample.num_loss_counted_tokens for sample in minibatch.samples])
    return torch.stack([part.sum(dim=0) for part in parts])


def _last_hidden_state(model, minibatch: Minibatch, prefix: "SharedPrefix | None" = None) -> torch.Tensor:
    inputs = minibatch.inputs if prefix is None else prefix.followed_by(minibatch)
    return model.model(**inputs, use_cache=False).last_hidden_state


def _counted(model, hidden: torch.Tensor, minibatch: Minibatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (states [tokens, hidden] predicting loss-counted tokens, these tokens) on the head's device."""
    device = model.lm_head.weight.device
    counted = hidden.flatten(0, 1)[minibatch.predicting.to(hidden.device)]
    return counted.to(device), minibatch.targets.to(device)


class SharedPrefix:
    """The first tokens that all samples of a batch share, computed once for the batch.

    A chat template begins every conversation alike, often with a system prompt. Attention is causal,
    so these tokens have the same keys and values in every sample. They are computed once, put into
    the KV cache before each minibatch, and the gradients that arrive there go back through them once.

    input_ids: [1, tokens]. `leaves` are the keys and values at which a gradient may arrive, detached.
    """

    def __init__(self, model, input_ids: torch.Tensor):
        output = model.model(input_ids=input_ids, past_key_values=DynamicCache(), use_cache=True)
        self.length = input_ids.shape[1]
        self._computed: list[torch.Tensor] = []  # the leaves with their graph
        self.leaves: list[torch.Tensor] = []
        self._slots: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for slot, layer in enumerate(output.past_key_values.layers):
            if layer.is_initialized:
                self._slots.append((slot, self._leaf(layer.keys), self._leaf(layer.values)))

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        self._computed.append(tensor)
        self.leaves.append(tensor.detach().requires_grad_())
        return self.leaves[-1]

    def followed_by(self, minibatch: Minibatch) -> dict:
        """Return the base model's inputs for a minibatch after the prefix: with its mask and its KV cache."""
        cache, mask, rows = DynamicCache(), minibatch.attention_mask, len(minibatch.samples)
        for slot, keys, values in self._slots:
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), slot)
        if mask is not None:
            mask = torch.cat([mask.new_ones(rows, self.length), mask], dim=1)
        return minibatch.inputs | {"attention_mask": mask, "past_key_values": cache}

    def gradients(self, inputs: Sequence[torch.Tensor], arrived: Sequence[torch.Tensor]) -> tuple:
        """Return gradients for `inputs` through the prefix, given those that arrived at the leaves."""
        arrived = [found.to(leaf.dtype) for found, leaf in zip(arrived, self.leaves, strict=True)]
        return torch.autograd.grad(self._computed, inputs, arrived, materialize_grads=True)


def compute_prefix(model, batch: Batch) -> tuple[SharedPrefix | None, list[Minibatch]]:
    """Compute what the batch's samples share; return it and the minibatches to run after it.

    Without a prefix, or if there is no memory to keep one, these hold whole samples.
    """
    if batch.prefix is None:
        return None, batch.minibatches
    try:
        return SharedPrefix(model, batch.prefix.to(model.device)), batch.minibatches
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None, [minibatch.whole() for minibatch in batch.minibatches]


# The original model's states for the same tokens


class Originals:
    """What the original model hands to its LM head at positions where a loss-counted token follows.

    The original is the same loaded model with nothing skipped and all scales 1, so its states are the
    same in every epoch and for every candidate.
    """

    def __init__(self, model):
        self.model = model
        self._kept: dict[int, tuple[Sample, torch.Tensor]] = {}

    def keep(self, batches: Batches) -> None:
        """Compute the states of all samples of the batches now, unless all kept would take over KEPT_BYTES.

        They are computed in the given batches, so the same ones give the same bits.
        """
        tokens = batches.num_loss_counted_tokens
        tokens += sum(len(rows) for _, rows in self._kept.values())
        if tokens * self.model.config.hidden_size * self.model.dtype.itemsize > KEPT_BYTES:
            return
        runner = MinibatchRunner()
        for batch in progress(batches, "the original model's states"):
            for minibatch, states in runner.run(batch.minibatches, self._compute, "the original model"):
                counts = [sample.num_loss_counted_tokens for sample in minibatch.samples]
                for sample, rows in zip(minibatch.samples, states.cpu().split(counts), strict=True):
                    self._kept[id(sample)] = (sample, rows.clone())  # holds it, so that no other gets its id

    def __call__(self, minibatch: Minibatch) -> torch.Tensor:
        """Return the states of a minibatch's samples in order, [tokens, hidden], on the LM head's device."""
        kept = [self._kept.get(id(sample)) for sample in minibatch.samples]
        if None in kept:
            return self._compute(minibatch)
        return torch.cat([rows for _, rows in kept]).to(self.model.lm_head.weight.device)

    @torch.no_grad()
    def _compute(self, minibatch: Minibatch) -> torch.Tensor:
        """Run whole samples, without a shared prefix. The minibatch is not on the device yet."""
        with scales.neutral(self.model):
            whole = minibatch.whole().to(self.model.device)
            return _counted(self.model, _last_hidden_state(self.model, whole), whole)[0]


# Means over batches


@dataclass(frozen=True)
class HeldOut:
    """Means over the loss-counted tokens of answers that were not trained on.

    cross_entropy: of the answers' tokens; kl: divergence from the original model's distributions; both
    in nats per token. agreement: share of positions where the most likely token is the answer's. kl_error:
    the standard error of kl over other answers of the same kind, if they are independent; None for a single
    answer. answers: how many they are.
    """

    cross_entropy: float
    kl: float
    agreement: float
    kl_error: float | None = None
    answers: int | None = None


@torch.no_grad()
def evaluate(
    model,
    batches: Iterable[Batch],
    where: str,
    reduce: Reduce | None = None,
    originals: Originals | None = None,
) -> HeldOut:
    """Return figures over all loss-counted tokens of the batches (of all processes).

    originals: kept by the caller, if the same batches come again. Raises TrainingError if a single answer
    does not fit into memory, Diverged if a figure is not finite.
    """
    originals, runner = originals or Originals(model), MinibatchRunner()
    total = torch.zeros(8, dtype=torch.float64)  # on the CPU: answers may differ little, and MPS has none
    for batch in batches:
        prefix, minibatches = compute_prefix(model, batch)

        def sums_of(minibatch: Minibatch, prefix=prefix) -> torch.Tensor:
            return summed_figures(model, minibatch.to(model.device), prefix, originals(minibatch))

        for minibatch, sums in runner.run(minibatches, sums_of, where):
            sums = sums.cpu().double()
            tokens = sums.new_tensor([sample.num_loss_counted_tokens for sample in minibatch.samples])
            kl = sums[:, 1]
            moments = torch.stack(
                [tokens, kl * kl, kl * tokens, tokens * tokens, torch.ones_like(tokens)], -1
            )
            total += torch.cat([sums, moments], -1).sum(dim=0)
    *sums, tokens, squares, products, token_squares, answers = (
        total if reduce is None else reduce(total.to(model.device))
    ).tolist()
    means = [value / tokens for value in sums]
    if not all(map(math.isfinite, means)):
        remedy = "lower --learning_rate, or use --dtype float32"
        raise Diverged(f"{where}: loss, KL and agreement are {means}; {remedy}")
    error = None
    if answers > 1:  # for a ratio of sums, the answers' KL over their tokens
        spread = squares - 2 * means[1] * products + means[1] ** 2 * token_squares
        error = math.sqrt(max(0.0, spread) * answers / (answers - 1)) / tokens
    return HeldOut(*means, error, int(answers))
