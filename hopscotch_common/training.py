"""The loss, and training the scales: the search and the final training both call this."""

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

from hopscotch_common import scales
from hopscotch_common.cli import TrainingError
from hopscotch_common.data import Batch, Minibatch, Sample, make_batches
from hopscotch_common.modeling_hopscotch import SCALE_NAMES
from hopscotch_common.shared_prefix import SharedPrefix

LOGIT_ROWS = 256  # rows of logits alive at once


def prepare_model(model, gradient_checkpointing: bool = False, compile_layers: bool = False) -> None:
    """Switch on what only training wants."""
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True  # the layer alone: its attention must not start dropping out
    if compile_layers:
        # A layer comes skipped or not, with padding or without, first or later: more than torch's 8.
        torch._dynamo.config.recompile_limit = 32
        for layer in model.model.layers:
            layer.compile(dynamic=True)


def packs(model) -> bool:
    """Whether rows may be joined without padding: flash attention reads borders off positions."""
    return "flash" in (model.config._attn_implementation or "")


def token_budget(samples: Sequence[Sample], model, requested: int | None) -> int:
    """Tokens that run at once: as requested, else by device, and never below the longest sample.

    On a CPU few answers at a time are as fast as many, waste less on padding and need less memory.
    """
    if requested is not None:
        return requested
    default = 512 if model.device.type == "cpu" else 16384
    return max(default, max(len(sample) for sample in samples))


def epoch_batches(samples: Sequence[Sample], model, arguments, epoch: int = 0, **options) -> list[Batch]:
    """An epoch's batches for a model, by the flags of `cli.add_training_arguments` and `--seed`."""
    return make_batches(
        samples,
        arguments.batch_size,
        token_budget(samples, model, arguments.max_tokens_per_batch),
        seed=arguments.seed,
        epoch=epoch,
        packed=packs(model),
        share_prefix=not (packs(model) or arguments.gradient_checkpointing or arguments.compile),
        pad_token_id=model.config.pad_token_id or 0,
        **options,
    )


class HeadCrossEntropy(torch.autograd.Function):
    """Cross entropy of a frozen LM head's logits, summed in float32; a few rows of logits at a time.

    hidden: [tokens, hidden]; weight: [vocabulary, hidden]; targets: [tokens]. The gradient is made
    with the loss, as the logits do not live until backward. (torch's linear_cross_entropy sums in
    the dtype of its input: in bfloat16 a sum of 800 is a multiple of 4.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            log_probabilities = log_softmax(hidden[rows] @ weight.T, dim=-1, dtype=torch.float32)
            total += nll_loss(log_probabilities, targets[rows], reduction="sum")
            if gradient is not None:
                probabilities = log_probabilities.exp_()
                positions = torch.arange(len(probabilities), device=hidden.device)
                probabilities[positions, targets[rows]] -= 1
                torch.matmul(probabilities.to(weight.dtype), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def prefix_of(model, batch: Batch) -> SharedPrefix | None:
    """What the batch's samples share, computed; None where they share nothing."""
    return None if batch.prefix is None else SharedPrefix(model, batch.prefix.to(model.device))


def summed_loss(model, minibatch: Minibatch, prefix: SharedPrefix | None = None) -> torch.Tensor:
    """Cross entropy summed over the minibatch's loss-counted tokens, a float32 scalar.

    prefix: the `prefix_of` its batch.
    """
    mask = minibatch.attention_mask
    hidden = model.model(
        input_ids=minibatch.input_ids,
        attention_mask=mask if prefix is None else prefix.extended_mask(mask),
        position_ids=minibatch.position_ids,
        past_key_values=None if prefix is None else prefix.cache(len(minibatch.input_ids)),
        use_cache=False,
    ).last_hidden_state
    return summed_head_loss(model, hidden, minibatch)


def summed_head_loss(model, hidden: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
    """`summed_loss` from the base model's output [rows, length, hidden].

    Only hidden states that predict a loss-counted token reach the LM head, and their logits are
    made and consumed a few rows at a time, so the full [tokens, vocabulary] matrix never exists. Of
    a model that is spread over devices, the loss is on the LM head's.
    """
    hidden = hidden.flatten(0, 1)[minibatch.predicting.to(hidden.device)]
    logits_scaling = getattr(model.config, "logits_scaling", None)  # Granite divides its logits
    if logits_scaling is not None:
        hidden = hidden / logits_scaling
    weight = model.lm_head.weight
    hidden, targets = hidden.to(weight.device), minibatch.targets.to(weight.device)
    if type(weight) is not torch.nn.Parameter:  # quantised: only the module knows how to multiply
        return cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")
    return HeadCrossEntropy.apply(hidden, weight, targets)


Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over processes


@torch.no_grad()
def evaluate(
    model, batches: Sequence[Batch], on_batch: Callable[[], None] = lambda: None, reduce: Reduce | None = None
) -> float:
    """Mean loss, in nats a token, over all loss-counted tokens of the batches (of all processes)."""
    total, tokens = torch.zeros(1, device=model.device), 0
    for batch in batches:
        prefix = prefix_of(model, batch)
        for minibatch in batch.minibatches:
            total += summed_loss(model, minibatch.to(model.device), prefix).to(total.device)
        tokens += batch.num_loss_counted_tokens
        on_batch()
    return (total if reduce is None else reduce(total)).item() / tokens


@dataclass(frozen=True)
class ScaleState:
    """All that distinguishes one training run of the scales from another: [4, layers, 4] float32.

    Rows: values, Adam's first and second moments, and step counts. Small enough to keep for every
    candidate of a search, so pausing one costs nothing.
    """

    tensors: torch.Tensor

    def encode(self) -> str:
        """As ASCII, exactly."""
        return base64.b64encode(self.tensors.numpy().tobytes()).decode()

    @staticmethod
    def decode(text: str) -> "ScaleState":
        buffer = bytearray(base64.b64decode(text))
        return ScaleState(torch.frombuffer(buffer, dtype=torch.float32).view(4, -1, len(SCALE_NAMES)))


class ScaleTrainer:
    """Trains the scales of one model with Adam; its state can be taken out and put back.

    reduce: sums a tensor over the processes that share each batch (data parallel).
    """

    def __init__(
        self, model, learning_rate: float, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    ):
        self.model = model
        self.learning_rate = learning_rate
        self.reduce = reduce

    def start(self, skipped: Sequence[int], state: ScaleState | None = None) -> None:
        """Skip exactly `skipped`; go on from `state`, or start from scales of 1."""
        scales.reset(self.model, skipped)
        self.parameters = scales.trainable_scales(self.model)
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.learning_rate)
        if state is None:
            return
        scales.restore(self.model, state.tensors[0])
        rows = state.tensors[1:].flatten(1).unbind(1)
        for (_, scale), (first, second, step) in zip(scales.named_scales(self.model), rows, strict=True):
            if scale.requires_grad:
                self.optimizer.state[scale] = {
                    "step": step.clone(),
                    "exp_avg": first.reshape(1).to(scale.device, copy=True),
                    "exp_avg_sq": second.reshape(1).to(scale.device, copy=True),
                }

    def state(self) -> ScaleState:
        """The present state, a copy."""
        values = scales.snapshot(self.model)
        moments = torch.zeros(3, values.numel())
        for column, (_, scale) in enumerate(scales.named_scales(self.model)):
            adam = self.optimizer.state.get(scale)
            if adam:
                for row, key in enumerate(("exp_avg", "exp_avg_sq", "step")):
                    moments[row, column] = adam[key].item()
        return ScaleState(torch.cat([values[None], moments.view(3, *values.shape)]))

    def step(self, batch: Batch, where: str) -> torch.Tensor:
        """One optimizer step; the batch's mean loss, a detached scalar on the model's device.

        The loss and its gradient are those of the whole batch, however it was split into
        minibatches and over processes. where: named in the errors, for example "epoch 0, batch 3".
        Raises TrainingError when a minibatch does not fit into memory.
        """
        device = self.model.device
        total = torch.zeros((), device=device)
        remedy = "lower --max_tokens_per_batch, or use --gradient_checkpointing"
        with _naming_shared_prefix(where):
            prefix = prefix_of(self.model, batch)
        for number, minibatch in enumerate(batch.minibatches):
            with naming_minibatch(where, number, minibatch, remedy):
                loss = summed_loss(self.model, minibatch.to(device), prefix)
                loss.backward()
                total += loss.detach().to(device)
        if prefix is not None:
            with _naming_shared_prefix(where):
                prefix.backward()
        if self.reduce is not None:
            total = self._reduce_gradients(total)
        for parameter in self.parameters:  # divided only now: the mean's gradients underflow in float16
            if parameter.grad is not None:
                parameter.grad /= batch.num_loss_counted_tokens
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / batch.num_loss_counted_tokens

    def _reduce_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum gradients and loss over processes, in one message."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        message = self.reduce(torch.cat([*gradients, loss.view(1)]))
        for parameter, gradient in zip(self.parameters, message[:-1], strict=True):
            parameter.grad = gradient.view(1)
        return message[-1]

    def run(
        self,
        batches: Sequence[Batch],
        name: str,
        first: int = 0,
        on_batch: Callable[[float], None] = lambda loss: None,
    ) -> list[float]:
        """Train on batches; the mean loss of each. on_batch gets each loss, one batch late.

        Reading a loss only after the next batch was submitted keeps a GPU's queue full. Raises
        TrainingError at a loss that is not finite, naming `name` and the batch (numbered from
        `first`).
        """
        losses: list[float] = []

        def read(loss: torch.Tensor) -> None:
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name}, batch {first + len(losses)}: the loss is {value}; "
                    "lower --learning_rate, or use --dtype float32"
                )
            losses.append(value)
            on_batch(value)

        pending = None
        for index, batch in enumerate(batches):
            loss = self.step(batch, f"{name}, batch {first + index}")
            if pending is not None:
                read(pending)
            pending = loss
        if pending is not None:
            read(pending)
        return losses


@contextmanager
def naming_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that says in what, and what helps."""
    try:
        yield
    except RuntimeError as error:  # torch has no common class for it over its devices
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(f"{what}; {remedy}") from error


def naming_minibatch(where: str, number: int, minibatch: Minibatch, remedy: str):
    """`naming_out_of_memory` for one minibatch of the batch `where`."""
    rows, length = minibatch.input_ids.shape
    return naming_out_of_memory(
        f"{where}: out of memory in minibatch {number} ({rows} x {length} tokens)", remedy
    )


def _naming_shared_prefix(where: str):
    return naming_out_of_memory(
        f"{where}: out of memory in the tokens that all samples share", "use --gradient_checkpointing"
    )
