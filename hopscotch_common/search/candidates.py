"""One loaded model that trains and screens candidates: all that a search asks of it."""

import statistics
from collections.abc import Callable, Sequence

from hopscotch_common import scales
from hopscotch_common.errors import Diverged
from hopscotch_common.modeling_hopscotch import attention_blocks
from hopscotch_common.search.distances import stream_distances
from hopscotch_common.search.schedule import Candidate
from hopscotch_common.search.screening import untrained_losses
from hopscotch_common.training import MEASURES, TrainingOptions
from hopscotch_common.training.batches import Batch, MinibatchRunner, Sample
from hopscotch_common.training.distributed import Group
from hopscotch_common.training.loss import HeldOut, Originals, evaluate
from hopscotch_common.training.replacement import fit_maps
from hopscotch_common.training.trainer import EpochBatches, ScaleState, ScaleTrainer


class CandidateTrainer:
    """Trains candidates on one model, over the same batches in the same order.

    held_out: samples that are not trained on. Several processes may share a candidate (`Group`); each
    then runs its part of every batch.
    """

    def __init__(
        self, model, samples: Sequence[Sample], options: TrainingOptions, held_out: Sequence[Sample] = ()
    ):
        self.model, self.options = model, options
        self.batches = EpochBatches(model, samples, options)
        self.num_batches = len(self.batches)
        self._held_out = EpochBatches(model, held_out, options).in_order() if held_out else []
        self._runner = MinibatchRunner()
        self._originals = Originals(model)
        if options.loss == "kl":
            self._originals.keep(self.batches.epoch())
        self._originals.keep(self._held_out)
        self._wrong: dict[int, float] = {}  # by block, once maps are fitted
        self._parts: dict[tuple[int, int], list[Batch]] = {}  # by rank and size of a group

    @property
    def _trained_towards(self) -> Originals | None:
        return self._originals if self.options.loss == "kl" else None

    def _part(self, group: Group) -> list[Batch]:
        place = (group.rank, group.size)
        if place not in self._parts:
            self._parts[place] = self.batches.epoch(0, *place)
        return self._parts[place]

    def fit_maps(self, group: Group) -> None:
        """Fit the map of every block, for when it is skipped; `group`: all processes, to share the work."""
        blocks = attention_blocks(self.model.config)
        batches = self.batches.in_order(group.rank, group.size)
        self._wrong = fit_maps(self.model, batches, blocks, group.reduce)

    def candidates(self, skipped: Sequence[int]) -> list[int]:
        """The blocks of which each could be skipped next."""
        return scales.skippable_blocks(self.model, skipped)

    def train(
        self,
        skipped: Sequence[int],
        candidate: Candidate,
        look: int,
        group: Group,
        on_batch: Callable[[float], None],
    ) -> Candidate:
        """The candidate after `look` batches of the epoch, from where it is; marked if it diverged."""
        done = len(candidate.losses)
        trainer = ScaleTrainer(
            self.model,
            self.options.learning_rate,
            [*skipped, candidate.block],
            candidate.state,
            group.reduce,
            self._runner,
            self._trained_towards,
        )
        losses = list(candidate.losses)

        def keep(loss: float) -> None:
            losses.append(loss)
            on_batch(loss)

        name = f"candidate block {candidate.block}, epoch 0"
        try:
            trainer.run(self._part(group)[done:look], name, first=done, on_batch=keep)
        except Diverged as error:
            return Candidate(candidate.block, losses, diverged=str(error))
        state = trainer.state()
        if not bool(state.tensors.isfinite().all()):
            where = f"{name}: the scales or their moments are not finite after batch {len(losses) - 1}"
            return Candidate(candidate.block, losses, diverged=where)
        return Candidate(candidate.block, losses, state)

    def screen(
        self,
        skipped: Sequence[int],
        blocks: Sequence[int],
        batch: int,
        on_screened: Callable[[float], None],
    ) -> dict[int, float]:
        """Each block's loss on one of the batches before any training; infinite where it is not finite."""
        return untrained_losses(
            self.model,
            self._part(Group())[batch],
            skipped,
            blocks,
            f"screening, batch {batch}",
            on_screened,
            self._runner,
            self._trained_towards,
        )

    def distances(self, skipped: Sequence[int], blocks: Sequence[int]) -> dict[int, float]:
        """How far each block turns the residual stream, over all batches (`stream_distances`).

        With maps: the share of the stream behind a block that its map gets wrong (`fit_maps`).
        """
        if self._wrong:
            return {block: self._wrong[block] for block in blocks}
        return stream_distances(self.model, self._part(Group()), skipped, blocks, self._runner)

    def original_loss(self) -> float:
        """Mean of the batches' losses with nothing skipped, as a candidate's is."""
        scales.reset(self.model)
        figures = [
            evaluate(self.model, [batch], "the original model", originals=self._originals)
            for batch in self._part(Group())
        ]
        return statistics.fmean(getattr(found, MEASURES[self.options.loss]) for found in figures)

    @property
    def holds_out(self) -> bool:
        return bool(self._held_out)

    def held_out(self, skipped: Sequence[int], state: ScaleState | None = None) -> HeldOut:
        """Figures of the held-out samples with exactly `skipped` skipped. state: None for scales of 1."""
        ScaleTrainer(self.model, self.options.learning_rate, skipped, state)
        return evaluate(self.model, self._held_out, "held-out loss", originals=self._originals)
