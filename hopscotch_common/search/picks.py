"""One pick after the other, each judged where answers are held out, until one would cost too much."""

from collections.abc import Sequence
from dataclasses import dataclass

from hopscotch_common.search.limits import LossLimit
from hopscotch_common.search.search import Iteration, Search
from hopscotch_common.training import MEASURES
from hopscotch_common.training.loss import HeldOut


@dataclass(frozen=True)
class Pick:
    """A block that the search chose. held_out: None where nothing is held out.

    increase: of the loss above the original model's, as a `LossLimit` counts it; None without one.
    """

    iteration: Iteration
    held_out: HeldOut | None
    increase: float | None


class Picks:
    """Asks a search for blocks, and says of each what it costs.

    most_increase: what the loss may rise, or None; the held-out loss where the search's trainer holds
    answers out, else that of the training. original: the original model's held-out figures.
    Several processes get the same numbers, rank 0's.
    """

    def __init__(self, search: Search, most_increase: float | None = None):
        self.search, self._measure = search, MEASURES[search.trainer.options.loss]
        self.original = self._held_out([], None)
        self.limit: LossLimit | None = None
        if most_increase is not None:
            self.limit = LossLimit(most_increase, self._original_loss())

    def next(self, skipped: Sequence[int], known_losses: dict[int, float]) -> Pick:
        """The next block, given those that are skipped; arguments and errors are `Search.next_block`'s."""
        found = self.search.next_block(skipped, known_losses)
        held_out = self._held_out([*skipped, found.block], found.state)
        loss = found.loss if held_out is None else getattr(held_out, self._measure)
        return Pick(found, held_out, self.limit and self.limit.increase(loss))

    def costs_too_much(self, pick: Pick) -> bool:
        return self.limit is not None and pick.increase > self.limit.most

    def _held_out(self, skipped: Sequence[int], state) -> HeldOut | None:
        trainer = self.search.trainer
        if not trainer.holds_out:
            return None
        return self.search.processes.gather(trainer.held_out(skipped, state))[0]

    def _original_loss(self) -> float:
        if self._measure == "kl":  # to itself; what is measured may be off by rounding
            return 0.0
        if self.original is not None:
            return getattr(self.original, self._measure)
        journal = self.search.journal
        if journal.original_loss is None:
            journal.add_original(self.search.processes.gather(self.search.trainer.original_loss())[0])
        return journal.original_loss
