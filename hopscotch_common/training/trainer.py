"""Training the scales: the search and the final training both call this."""

import base64
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from hopscotch_common import scales
from hopscotch_common.errors import Diverged, progress
from hopscotch_common.scales.modeling_hopscotch import attention_blocks
from hopscotch_common.training import MAPS_RATE, TrainingOptions
from hopscotch_common.training.batches import Batch, Batches, Minibatch, MinibatchRunner, Sample, make_batches
from hopscotch_common.training.distributed import Group, Reduce
from hopscotch_common.training.loss import HeldOut, Originals, compute_prefix, evaluate, summed_loss
from hopscotch_common.training.replacement import fit_maps

# Tokens that run at once. More are not faster, waste more on padding and need more memory.
CPU_TOKENS = 512
GPU_TOKENS = 4096
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam's state


# What a model needs for training, and how much of the data it takes at once


def prepare_model(model, options: TrainingOptions) -> None:
    """Switch on what only training needs."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True  # only the layer: its attention must not start dropout


class EpochBatches:
    """The batches of some samples for one model, by epoch and by the part that a process runs."""

    def __init__(self, model, samples: Sequence[Sample], options: TrainingOptions):
        recurrent = len(attention_blocks(model.config)) < model.config.num_hidden_layers
        # A recurrent layer carries its state along a row, across the borders of packed samples.
        packed = "flash" in (model.config._attn_implementation or "") and not recurrent
        suits = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
        most = options.max_tokens_per_batch or suits
        share_prefix = not (packed or recurrent or options.gradient_checkpointing)
        self._make = functools.partial(
            make_batches, samples, options, most, packed=packed, share_prefix=share_prefix
        )

    def epoch(self, number: int = 0, rank: int = 0, world_size: int = 1) -> Batches:
        """Return an epoch's batches: the part of one of the processes that share each batch."""
        return self._make(epoch=number, rank=rank, world_size=world_size)

    def in_order(self, rank: int = 0, world_size: int = 1) -> Batches:
        """Return the batches of the samples in their own order, for measurements only."""
        return self._make(shuffle=False, rank=rank, world_size=world_size)


# One choice of skipped blocks, step by step


@dataclass(frozen=True)
class ScaleState:
    """All that distinguishes one training run of the scales from another: [4, layers, width] float32.

    Rows: values (as `scales.snapshot` gives them), Adam's first and second moments, and step counts.
    It is small enough to keep for every candidate of a search, so pausing one costs nothing.
    maps: the same four [4, *shape] for maps that also train, by state-dict key; a search trains none.
    """

    tensors: torch.Tensor
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names that a checkpoint's training state has."""
        return {"scale_state": self.tensors} | self.maps

    @staticmethod
    def from_tensors(tensors: dict[str, torch.Tensor]) -> "ScaleState":
        """Do the reverse of `as_tensors`."""
        maps = {key: tensor for key, tensor in tensors.items() if key != "scale_state"}
        return ScaleState(tensors["scale_state"], maps)

    def encode(self) -> str:
        """Encode it exactly as ASCII: the number of layers, a colon, and the numbers in base64."""
        return f"{self.tensors.shape[1]}:{base64.b64encode(self.tensors.numpy().tobytes()).decode()}"

    @staticmethod
    def decode(text: str) -> "ScaleState":
        """Do the reverse of `encode`; raise ValueError for invalid text, or if a number is not finite."""
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

    Making one sets the model's scales and skips, so a model has one trainer at a time. To continue with
    another candidate, take this one's `state` and make a trainer from the other's.
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
        """Skip exactly `skipped`; continue from `state`, or start from scales of 1.

        reduce: sums a tensor over the processes that share each batch. runner: kept by the caller, so that
        what it learnt about memory outlives this trainer. originals: the loss is the divergence from them;
        None: cross entropy on the answers' tokens. map_learning_rate: Adam's for the maps in skipped blocks'
        place; None: they stay as they were fitted.
        """
        self.model, self.reduce, self.runner = model, reduce, runner or MinibatchRunner()
        self.originals = originals
        scales.reset(model, skipped)
        trainable = [scale for _, scale in scales.named_scales(model) if scale.requires_grad]
        groups = [{"params": trainable, "lr": learning_rate}]
        self._maps = {}
        if map_learning_rate is not None and (maps := dict(scales.named_maps(model))):
            self._maps = {key: parameter.requires_grad_() for key, parameter in maps.items()}
            groups.append({"params": list(maps.values()), "lr": map_learning_rate})
        self._named = dict(scales.named_scales(model)) | self._maps
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups)
        if state is not None:
            self._go_on_from(state)

    def _go_on_from(self, state: ScaleState) -> None:
        rows = [scales.as_state_dict(row) for row in state.tensors]
        for key, parameter in self._named.items():
            value, *moments = state.maps[key] if key in self._maps else (row[key] for row in rows)
            parameter.data.copy_(value)
            if parameter.requires_grad:
                first, second, step = moments
                self.optimizer.state[parameter] = {
                    "step": step.flatten()[0].clone(),
                    "exp_avg": first.to(parameter.device, copy=True),
                    "exp_avg_sq": second.to(parameter.device, copy=True),
                }

    def state(self) -> ScaleState:
        """Return a copy of the present state."""
        by_key = {key: self._state_of(parameter) for key, parameter in self._named.items()}
        rows = [
            scales.from_state_dict(
                {key: rows[i] for key, rows in by_key.items()}, len(self.model.model.layers)
            )
            for i in range(1 + len(MOMENTS))
        ]
        return ScaleState(torch.stack(rows), {key: by_key[key] for key in self._maps})

    def _state_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """[4, *shape] on the CPU: a parameter and Adam's moments of it, 0 before the first step."""
        adam = self.optimizer.state.get(parameter, {})
        rows = [parameter, *(adam.get(name, torch.zeros(())) for name in MOMENTS)]
        return torch.stack([row.detach().cpu().float().expand(parameter.shape) for row in rows])

    def step(self, batch: Batch, where: str) -> torch.Tensor:
        """Take one optimizer step; return the batch's mean loss, a detached scalar on the model's device.

        The loss and its gradient are those of the whole batch, however it was split into
        minibatches and over processes. where: named in the errors, for example "epoch 0, batch 3".
        Raises TrainingError if a single answer does not fit into memory.
        """
        total, gradients = self.gradients(batch, where)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / batch.num_loss_counted_tokens

    def gradients(self, batch: Batch, where: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return (summed loss, gradient of the mean loss for each of `parameters`), over all processes.

        Sums are taken in float32, and divided only at the end: the mean's gradients underflow in float16. A
        batch with a prefix takes two stages. Each minibatch gives gradients for the parameters and for the
        prefix's keys and values (its `leaves`), which add up; then the latter go back through the prefix
        once.
        """
        prefix, minibatches = compute_prefix(self.model, batch)
        inputs = [*self.parameters, *(prefix.leaves if prefix else [])]
        sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in inputs]
        total = torch.zeros((), device=self.model.device)

        def run(minibatch: Minibatch) -> tuple[torch.Tensor, tuple]:
            original = None if self.originals is None else self.originals(minibatch)
            loss = summed_loss(self.model, minibatch.to(self.model.device), prefix, original)
            return loss.detach(), torch.autograd.grad(loss, inputs, materialize_grads=True)

        def add(gradients: Sequence[torch.Tensor]) -> None:
            for tensor, gradient in zip(sums, gradients, strict=False):  # those of the parameters come first
                tensor += gradient

        for _, (loss, gradients) in self.runner.run(minibatches, run, where):
            total += loss.to(total.device)
            add(gradients)
        arrived = sums[len(self.parameters) :]
        if arrived:
            add(prefix.gradients(self.parameters, arrived))
        sums = sums[: len(self.parameters)]
        if self.reduce is not None:  # in one message
            vector_to_parameters(self.reduce(parameters_to_vector([total, *sums])), [total, *sums])
        return total, [gradient / batch.num_loss_counted_tokens for gradient in sums]

    def run(
        self,
        batches: Sequence[Batch],
        name: str,
        first: int = 0,
        on_batch: Callable[[float], None] = lambda loss: None,
    ) -> list[float]:
        """Train on batches; return the mean loss of each. on_batch gets each loss, one batch late.

        Reading a loss only after the next batch was submitted keeps a GPU's queue full. Raises
        Diverged for a loss that is not finite, naming `name` and the batch (numbered from `first`).
        """
        losses: list[float] = []
        steps = (self.step(batch, f"{name}, batch {number}") for number, batch in enumerate(batches, first))
        for loss, _next in itertools.pairwise(itertools.chain(steps, [None])):
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"{name}, batch {first + len(losses) - 1}: the loss is {losses[-1]}; "
                    "lower --learning_rate, or use --dtype float32"
                )
            on_batch(losses[-1])
        return losses

    def check_sound(self, batches: Sequence[Batch], where: str) -> None:
        """Raise Diverged unless all scales, and loss and KL with them on the last batch, are finite.

        The losses of `run` are those before each step, so they cannot tell what the last one did.
        """
        where = f"{where}, after it"
        for name, parameter in self._named.items():
            if not bool(parameter.isfinite().all()):
                raise Diverged(
                    f"{where}: {name} is not finite; lower --learning_rate, or use --dtype float32"
                )
        evaluate(self.model, batches[-1:], where, self.reduce, self.originals)


# The final training, epoch after epoch


@dataclass(frozen=True)
class Epoch:
    """The results of an epoch. losses: one per batch; held_out: None if nothing is held out.

    state: of the scales, and of the maps in skipped blocks' place: all that it takes to continue.
    """

    losses: list[float]
    held_out: HeldOut | None
    state: ScaleState

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


class EpochTraining:
    """Trains a model's scales with some blocks skipped, on samples, and measures it on held-out ones.

    Call `fit_maps` if there are maps, `baselines`, `start`, and `epoch` for each epoch, in this order. To
    continue from an earlier epoch's state, leave out the first two.
    """

    def __init__(
        self,
        model,
        skipped: Sequence[int],
        training: Sequence[Sample],
        held_out: Sequence[Sample],
        options: TrainingOptions,
        group: Group | None = None,
    ):
        self.model, self.skipped, self.options = model, list(skipped), options
        prepare_model(model, options)
        self.group = group or Group()
        self._share = {"rank": self.group.rank, "world_size": self.group.size}
        self._training = EpochBatches(model, training, options)
        self._held_out = EpochBatches(model, held_out, options).in_order(**self._share)
        self._originals = Originals(model)
        self._originals.keep(self._held_out)
        if options.loss == "kl":  # each epoch spreads them over the processes anew, so each keeps all
            self._originals.keep(self._training.in_order())
        self._trainer: ScaleTrainer | None = None

    def fit_maps(self) -> None:
        """Fit each skipped block's map to the original model on the training answers, and put it there."""
        batches = progress(self._training.in_order(**self._share), "fitting the maps")
        fit_maps(self.model, batches, self.skipped, self.group.reduce)

    def baselines(self) -> dict[str, HeldOut | None]:
        """Held-out figures without training: of the original model, and with the blocks skipped."""
        figures = {}
        for what, skipped in (("original", []), ("unscaled", self.skipped)):
            scales.reset(self.model, skipped)
            figures[what] = self._held_out_figures(what)
        return figures

    def start(self, state: ScaleState | None = None) -> None:
        """Begin with scales of 1, or continue from an earlier epoch's state."""
        self._trainer = ScaleTrainer(
            self.model,
            self.options.learning_rate,
            self.skipped,
            state,
            self.group.reduce,
            originals=self._originals if self.options.loss == "kl" else None,
            map_learning_rate=self.options.learning_rate * MAPS_RATE,
        )

    def epoch(self, number: int) -> Epoch:
        """Train one epoch. Raises Diverged, naming epoch and batch, if the result is not sound."""
        batches = self._training.epoch(number, **self._share)
        first = self.group.rank == 0
        with tqdm(batches, f"epoch {number}", unit="batch", disable=not first, dynamic_ncols=True) as bar:

            def show(loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                bar.update()

            losses = self._trainer.run(batches, f"epoch {number}", on_batch=show)
        self._trainer.check_sound(batches, f"epoch {number}, batch {len(batches) - 1}")
        return Epoch(losses, self._held_out_figures(f"epoch {number}"), self._trainer.state())

    def _held_out_figures(self, what: str) -> HeldOut | None:
        if not self._held_out:
            return None
        name = f"held-out loss, {what}"
        batches = progress(self._held_out, name)
        return evaluate(self.model, batches, name, self.group.reduce, self._originals)
