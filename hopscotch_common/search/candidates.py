"""One loaded model that trains and screens candidates: all that a search asks of it."""

from collections.abc import Callable, Sequence

from hopscotch_common import scales
from hopscotch_common.errors import Diverged
from hopscotch_common.search.schedule import Candidate
from hopscotch_common.search.screening import untrained_losses
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Batch, Sample
from hopscotch_common.training.distributed import Group
from hopscotch_common.training.memory import MinibatchRunner
from hopscotch_common.training.trainer import EpochBatches, ScaleTrainer


class CandidateTrainer:
    """Trains candidates on one model, over the same batches in the same order.

    Several processes may share a candidate (`Group`); each then runs its part of every batch.
    """

    def __init__(self, model, samples: Sequence[Sample], options: TrainingOptions):
        self.model, self.options = model, options
        self.batches = EpochBatches(model, samples, options)
        self.num_batches = len(self.batches)
        self._runner = MinibatchRunner()
        self._parts: dict[tuple[int, int], list[Batch]] = {}  # by rank and size of a group

    def _part(self, group: Group) -> list[Batch]:
        place = (group.rank, group.size)
        if place not in self._parts:
            self._parts[place] = self.batches.epoch(0, *place)
        return self._parts[place]

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
        return Candidate(candidate.block, losses, trainer.state() if look < self.num_batches else None)

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
        )
