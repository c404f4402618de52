"""The final training: epoch after epoch over the scales of one choice of skipped blocks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from hopscotch_common import scales
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Sample
from hopscotch_common.training.distributed import Group
from hopscotch_common.training.originals import Originals
from hopscotch_common.training.replacement import fit_maps
from hopscotch_common.training.trainer import EpochBatches, HeldOut, ScaleState, ScaleTrainer, evaluate


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to. losses: one a batch; held_out: None where nothing is held out.

    values: the scales [layers, width]; maps: those in skipped blocks' place, by state-dict key, on the CPU;
    state: all that it takes to go on.
    """

    number: int
    losses: list[float]
    held_out: HeldOut | None
    values: torch.Tensor
    maps: dict[str, torch.Tensor]
    state: ScaleState

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


class EpochTraining:
    """Trains a model's scales with some blocks skipped, on samples, and measures others held out.

    bar: makes a progress bar of (number of batches, what) with `update_loss(loss)` and `update()`.
    """

    def __init__(
        self,
        model,
        skipped: Sequence[int],
        training: Sequence[Sample],
        held_out: Sequence[Sample],
        options: TrainingOptions,
        group: Group | None = None,
        bar: Callable[[int, str], AbstractContextManager] | None = None,
    ):
        self.model, self.skipped, self.options = model, list(skipped), options
        self.group, self.bar = group or Group(), bar or _no_bar
        self._share = {"rank": self.group.rank, "world_size": self.group.size}
        self._training = EpochBatches(model, training, options)
        self._held_out = []
        if held_out:
            self._held_out = EpochBatches(model, held_out, options).in_order(**self._share)
        self._originals = Originals(model)
        if self._held_out:
            self._originals.keep(self._held_out)
        if options.loss == "kl":  # an epoch's shuffle spreads them over the processes anew: each keeps all
            self._originals.keep(self._training.in_order())
        self._trainer: ScaleTrainer | None = None

    def fit_maps(self) -> None:
        """Put a map fitted to the original model on the training answers into each skipped block's place."""
        batches = self._training.in_order(**self._share)
        with self.bar(len(batches), "fitting the maps") as bar:
            fit_maps(self.model, batches, self.skipped, self.group.reduce, bar.update)

    def baselines(self) -> dict[str, HeldOut | None]:
        """Held-out figures without training: of the original model, and with the blocks skipped."""
        figures = {}
        for what, skipped in (("original", []), ("unscaled", self.skipped)):
            scales.reset(self.model, skipped)
            figures[what] = self._held_out_figures(what)
        return figures

    def start(self, state: ScaleState | None = None) -> None:
        """Begin with scales of 1, or go on from an earlier epoch's state."""
        self._trainer = ScaleTrainer(
            self.model,
            self.options.learning_rate,
            self.skipped,
            state,
            self.group.reduce,
            originals=self._originals if self.options.loss == "kl" else None,
            map_learning_rate=self.options.map_learning_rate,
        )

    def epoch(self, number: int) -> Epoch:
        """Train one epoch. Raises Diverged, naming epoch and batch, where nothing sound comes of it."""
        batches = self._training.epoch(number, **self._share)
        with self.bar(len(batches), f"epoch {number}") as bar:
            losses = self._trainer.run(batches, f"epoch {number}", on_batch=bar.update_loss)
        self._trainer.check_sound(batches, f"epoch {number}, batch {len(batches) - 1}")
        held_out = self._held_out_figures(f"epoch {number}")
        values, maps = scales.snapshot(self.model), scales.maps_of(self.model)
        return Epoch(number, losses, held_out, values, maps, self._trainer.state())

    def _held_out_figures(self, what: str) -> HeldOut | None:
        if not self._held_out:
            return None
        name = f"held-out loss, {what}"
        with self.bar(len(self._held_out), name) as bar:
            return evaluate(self.model, self._held_out, name, bar.update, self.group.reduce, self._originals)


class _Silent:
    def update_loss(self, loss: float) -> None: ...

    def update(self) -> None: ...


def _no_bar(total: int, what: str) -> AbstractContextManager:
    return nullcontext(_Silent())
