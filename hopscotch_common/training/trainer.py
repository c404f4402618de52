"""Training the scales: the search and the final training both call this."""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch

from hopscotch_common import scales
from hopscotch_common.errors import Diverged, TrainingError
from hopscotch_common.modeling_hopscotch import attention_blocks
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Batch, Layout, Minibatch, Sample, make_batches
from hopscotch_common.training.distributed import least
from hopscotch_common.training.loss import SharedPrefix, summed_figures, summed_loss
from hopscotch_common.training.memory import MinibatchRunner, is_out_of_memory, token_budget
from hopscotch_common.training.originals import Originals

Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over the processes that share a batch


def prepare_model(model, options: TrainingOptions) -> None:
    """Switch on what only training wants."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True  # the layer alone: its attention must not start dropping out
    if options.compile_layers:
        # A layer comes skipped or not, with padding or without, first or later: more than torch's 8.
        torch._dynamo.config.recompile_limit = 32
        for layer in model.model.layers:
            layer.compile(dynamic=True)


class EpochBatches:
    """The batches of some samples for one model, by epoch and by the part that a process runs.

    The token budget is found once, by what is free on the model's device then; of several processes by
    the least, as their parts of a batch fit together only where all divide it alike.
    """

    def __init__(self, model, samples: Sequence[Sample], options: TrainingOptions):
        self.samples, self.options = samples, options
        recurrent = len(attention_blocks(model.config)) < model.config.num_hidden_layers
        # A recurrent layer carries its state along a row, over the borders of what is packed.
        packed = "flash" in (model.config._attn_implementation or "") and not recurrent
        padding = model.config.pad_token_id
        self.layout = Layout(packed, padding if padding in range(model.config.vocab_size) else 0)
        self.share_prefix = not (
            packed or recurrent or options.gradient_checkpointing or options.compile_layers
        )
        self.max_tokens = least(token_budget(model, samples, self.layout, options.max_tokens_per_batch))

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.options.batch_size)

    def epoch(self, number: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """An epoch's batches, the part of one of the processes that share each."""
        return self._batches(epoch=number, rank=rank, world_size=world_size)

    def in_order(self, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """The batches of the samples in their own order, for what is only measured."""
        return self._batches(shuffle=False, rank=rank, world_size=world_size)

    def _batches(self, **choice) -> list[Batch]:
        return make_batches(
            self.samples,
            self.options,
            self.max_tokens,
            layout=self.layout,
            share_prefix=self.share_prefix,
            **choice,
        )


def compute_prefix(model, batch: Batch) -> tuple[SharedPrefix | None, list[Minibatch]]:
    """What the batch's samples share, computed, and the minibatches to run after it.

    Without a prefix, or where there is no memory to keep one, these are whole samples.
    """
    if batch.prefix is None:
        return None, batch.minibatches
    try:
        return SharedPrefix(model, batch.prefix.to(model.device)), batch.minibatches
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None, [minibatch.whole() for minibatch in batch.minibatches]


@dataclass(frozen=True)
class HeldOut:
    """Means over the loss-counted tokens of answers that were not trained on.

    cross_entropy: of the answers' tokens; kl: divergence from the original model's distributions; both
    in nats a token. agreement: share of positions where the most likely token is the answer's.
    """

    cross_entropy: float
    kl: float
    agreement: float


def evaluate(
    model,
    batches: Sequence[Batch],
    where: str,
    on_batch: Callable[[], None] = lambda: None,
    reduce: Reduce | None = None,
    originals: Originals | None = None,
) -> HeldOut:
    """Figures over all loss-counted tokens of the batches (of all processes).

    originals: kept by the caller, where the same batches come again. Raises TrainingError when a single
    answer does not fit into memory, Diverged when a figure is not finite.
    """

    originals = originals or Originals(model)

    def sums_of(minibatch: Minibatch, prefix: SharedPrefix | None) -> torch.Tensor:
        return summed_figures(model, minibatch.to(model.device), originals(minibatch), prefix)

    return HeldOut(*_means(model, batches, where, sums_of, len(fields(HeldOut)), on_batch, reduce))


def mean_loss(
    model,
    batches: Sequence[Batch],
    where: str,
    originals: Originals | None = None,
    reduce: Reduce | None = None,
) -> float:
    """The loss over all loss-counted tokens of the batches: cross entropy, or KL to the originals.

    Raises as `evaluate`.
    """

    def sums_of(minibatch: Minibatch, prefix: SharedPrefix | None) -> torch.Tensor:
        return _summed_loss(model, minibatch, prefix, originals).view(1)

    return _means(model, batches, where, sums_of, 1, reduce=reduce)[0]


def _summed_loss(model, minibatch: Minibatch, prefix: SharedPrefix | None, originals: Originals | None):
    original = None if originals is None else originals(minibatch)
    return summed_loss(model, minibatch.to(model.device), prefix, original)


@torch.no_grad()
def _means(
    model,
    batches: Sequence[Batch],
    where: str,
    sums_of: Callable[[Minibatch, SharedPrefix | None], torch.Tensor],
    count: int,
    on_batch: Callable[[], None] = lambda: None,
    reduce: Reduce | None = None,
) -> list[float]:
    """So many sums over minibatches, by the batches' loss-counted tokens; errors as `evaluate`."""
    runner = MinibatchRunner()
    total, tokens = torch.zeros(count, device=model.device), 0
    for batch in batches:
        prefix, minibatches = compute_prefix(model, batch)
        for _, sums in runner.run(minibatches, lambda part, prefix=prefix: sums_of(part, prefix), where):
            total += sums.to(model.device)
        tokens += batch.num_loss_counted_tokens
        on_batch()
    means = [value / tokens for value in (total if reduce is None else reduce(total)).tolist()]
    for mean in means:
        if not math.isfinite(mean):
            raise Diverged(f"{where}: the loss is {mean}; use --dtype float32")
    return means


@dataclass(frozen=True)
class ScaleState:
    """All that distinguishes one training run of the scales from another: [4, layers, width] float32.

    Rows: values (as `scales.snapshot` gives them), Adam's first and second moments, and step counts.
    Small enough to keep for every candidate of a search, so pausing one costs nothing.
    maps: of maps that train, too, the same four [4, *shape] by state-dict key; a search trains none.
    """

    tensors: torch.Tensor
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    def encode(self) -> str:
        """As ASCII, exactly: the number of layers, a colon, and the numbers in base64."""
        return f"{self.tensors.shape[1]}:{base64.b64encode(self.tensors.numpy().tobytes()).decode()}"

    @staticmethod
    def decode(text: str) -> "ScaleState":
        """The reverse of `encode`; ValueError where the text is none, or a number is not finite."""
        layers, _, numbers = text.partition(":")
        numbers = torch.frombuffer(bytearray(base64.b64decode(numbers, validate=True)), dtype=torch.float32)
        if not bool(numbers.isfinite().all()):
            raise ValueError("a number is not finite")
        try:
            return ScaleState(numbers.view(4, int(layers), -1))
        except RuntimeError as error:
            raise ValueError(str(error)) from error


class ScaleTrainer:
    """Trains the scales of a model with Adam.

    Making one sets the model's scales and skips, so a model has one trainer at a time: to go on with
    another candidate, take this one's `state` and make a trainer of the other's.
    """

    def __init__(
        self,
        model,
        learning_rate: float,
        skipped: Sequence[int],
        state: ScaleState | None = None,
        reduce: Reduce | None = None,
        runner: MinibatchRunner | None = None,
        originals: Originals | None = None,
        map_learning_rate: float | None = None,
    ):
        """Skip exactly `skipped`; go on from `state`, or start from scales of 1.

        reduce: sums a tensor over the processes that share each batch. runner: kept by the caller, so that
        what it learnt of memory outlives this trainer. originals: the loss is the divergence from them; None:
        cross entropy on the answers' tokens. map_learning_rate: as `TrainingOptions` has it.
        """
        self.model, self.reduce, self.runner = model, reduce, runner or MinibatchRunner()
        self.originals = originals
        scales.reset(model, skipped)
        groups = [{"params": scales.trainable_scales(model), "lr": learning_rate}]
        self._maps = {}
        if map_learning_rate is not None and (maps := dict(scales.named_maps(model))):
            self._maps = {key: parameter.requires_grad_() for key, parameter in maps.items()}
            groups.append({"params": list(maps.values()), "lr": map_learning_rate})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups)
        if state is not None:
            self._go_on_from(state)

    def _go_on_from(self, state: ScaleState) -> None:
        scales.restore(self.model, state.tensors[0])
        rows = [scales.as_state_dict(row) for row in state.tensors[1:]]
        for key, scale in scales.named_scales(self.model):
            if scale.requires_grad:
                self._set_moments(scale, *(row[key] for row in rows))
        for key, parameter in self._maps.items():
            parameter.data.copy_(state.maps[key][0])
            self._set_moments(parameter, *state.maps[key][1:])

    def _set_moments(self, parameter: torch.Tensor, first, second, step) -> None:
        self.optimizer.state[parameter] = {
            "step": step.flatten()[0].clone(),
            "exp_avg": first.to(parameter.device, copy=True),
            "exp_avg_sq": second.to(parameter.device, copy=True),
        }

    def _moment(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Of Adam's state, on the CPU and in the parameter's shape; 0 before the first step."""
        moment = self.optimizer.state.get(parameter, {}).get(name, torch.zeros(()))
        return moment.detach().cpu().float().expand_as(parameter).clone()

    def state(self) -> ScaleState:
        """The present state, a copy."""
        names, layers = ("exp_avg", "exp_avg_sq", "step"), len(self.model.model.layers)
        moments = [
            scales.from_state_dict(
                {key: self._moment(name, scale) for key, scale in scales.named_scales(self.model)}, layers
            )
            for name in names
        ]
        maps = {
            key: torch.stack([parameter.detach().cpu(), *(self._moment(name, parameter) for name in names)])
            for key, parameter in self._maps.items()
        }
        return ScaleState(torch.stack([scales.snapshot(self.model), *moments]), maps)

    def step(self, batch: Batch, where: str) -> torch.Tensor:
        """One optimizer step; the batch's mean loss, a detached scalar on the model's device.

        The loss and its gradient are those of the whole batch, however it was split into
        minibatches and over processes. where: named in the errors, for example "epoch 0, batch 3".
        Raises TrainingError when a single answer does not fit into memory.
        """
        total, gradients = self.gradients(batch, where)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / batch.num_loss_counted_tokens

    def gradients(self, batch: Batch, where: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(summed loss, gradient of the mean loss by each of `parameters`), of all processes.

        Sums are taken in float32, and divided only at the end: the mean's gradients underflow in float16.
        """
        device = self.model.device
        prefix, minibatches = compute_prefix(self.model, batch)
        leaves = prefix.leaves if prefix else []
        inputs = [*self.parameters, *leaves]
        sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in inputs]
        total = torch.zeros((), device=device)

        def run(minibatch: Minibatch) -> tuple[torch.Tensor, tuple]:
            loss = _summed_loss(self.model, minibatch, prefix, self.originals)
            return loss.detach(), torch.autograd.grad(loss, inputs, allow_unused=True)

        for _, (loss, gradients) in self.runner.run(minibatches, run, where):
            total += loss.to(device)
            _add(sums, gradients)
        if leaves:
            arrived = [
                gathered.to(leaf.dtype)
                for gathered, leaf in zip(sums[len(self.parameters) :], leaves, strict=True)
            ]
            _add(sums, self._through_prefix(prefix, arrived, where))
        gradients = sums[: len(self.parameters)]
        if self.reduce is not None:
            total, gradients = self._reduce(total, gradients)
        return total, [gradient / batch.num_loss_counted_tokens for gradient in gradients]

    def _through_prefix(self, prefix: SharedPrefix, arrived: list[torch.Tensor], where: str) -> tuple:
        """The parameters' gradients by way of the shared prefix, given those that arrived at its leaves."""
        try:
            return torch.autograd.grad(prefix.computed, self.parameters, arrived, allow_unused=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"{where}: out of memory in the {prefix.length} tokens that all answers share; "
                "use --gradient_checkpointing"
            ) from error

    def _reduce(
        self, loss: torch.Tensor, gradients: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Sum loss and gradients over processes, in one message."""
        message = self.reduce(torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)]))
        parts = message[1:].split([gradient.numel() for gradient in gradients])
        return message[0], [p.view_as(gradient) for p, gradient in zip(parts, gradients, strict=True)]

    def run(
        self,
        batches: Sequence[Batch],
        name: str,
        first: int = 0,
        on_batch: Callable[[float], None] = lambda loss: None,
    ) -> list[float]:
        """Train on batches; the mean loss of each. on_batch gets each loss, one batch late.

        Reading a loss only after the next batch was submitted keeps a GPU's queue full. Raises
        Diverged at a loss that is not finite, naming `name` and the batch (numbered from `first`).
        """
        losses: list[float] = []

        def read(loss: torch.Tensor) -> None:
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(
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

    def check_sound(self, batches: Sequence[Batch], where: str) -> None:
        """Raise Diverged unless all scales are finite, and so is the loss with them on the last batch.

        The losses of `run` are those before each step, so they cannot tell what the last one did.
        """
        remedy = "lower --learning_rate, or use --dtype float32 (with --resume, earlier epochs stay)"
        for name, parameter in [*scales.named_scales(self.model), *self._maps.items()]:
            if not bool(parameter.isfinite().all()):
                raise Diverged(f"{where}: {name} is not finite after it; {remedy}")
        try:
            mean_loss(self.model, batches[-1:], where, self.originals, self.reduce)
        except Diverged as error:
            raise Diverged(f"{where}: the loss is not finite after it; {remedy}") from error


def _add(sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """Add gradients to the float32 sums of the first tensors, in place."""
    for total, gradient in zip(sums, gradients, strict=False):
        if gradient is not None:
            total += gradient
