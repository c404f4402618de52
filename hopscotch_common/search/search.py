"""The greedy search: which block to skip next, given those already skipped, and what that costs."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from hopscotch_common.errors import TrainingError, logger
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.search.journal import Journal
from hopscotch_common.search.progress import SearchBar
from hopscotch_common.search.schedule import SCREENING_COST, Candidate, Schedule, leader, rounds
from hopscotch_common.training import MEASURES
from hopscotch_common.training.distributed import Processes
from hopscotch_common.training.loss import HeldOut
from hopscotch_common.training.trainer import ScaleState


@dataclass
class Iteration:
    """What one iteration of the search found, filled in while it runs. Dictionaries are by block.

    block, loss, state: the pick, its loss and its scales after training; None if there was none.
    losses: full-epoch means of the finalists (all candidates with `full` and `untrained`).
    dropped: after how many batches of training, with the mean loss and the leader's at that point (before
    any training: from the untrained_losses). diverged: where the loss ceased to be finite.
    untrained_losses: means of the screened batches; empty without a screening.
    skipped_before: the blocks skipped already. batch_losses: one per batch, of the candidates that trained.
    distances: of the residual stream, by which `cosine` picks; else empty.
    candidate_epochs, elapsed_epochs: the work of all processes together, and the time, of an iteration that
    finds nothing in its journal, in epochs of one candidate, with screening at SCREENING_COST.
    held_out, loss_increase: from `Picks`; None if no answers are held out, or no increase is limited.
    """

    skipped_before: list[int]
    block: int | None = None
    loss: float | None = None
    losses: dict[int, float] = field(default_factory=dict)
    dropped: dict[int, dict] = field(default_factory=dict)
    diverged: dict[int, str] = field(default_factory=dict)
    untrained_losses: dict[int, float] = field(default_factory=dict)
    batch_losses: dict[int, list[float]] = field(default_factory=dict)
    distances: dict[int, float] = field(default_factory=dict)
    candidate_epochs: float = 0.0
    elapsed_epochs: float = 0.0
    held_out: HeldOut | None = None
    loss_increase: float | None = None
    state: ScaleState | None = field(default=None, compare=False, repr=False)


class Search:
    """Finds one block after another.

    trainer: trains and screens candidates, but only what the journal lacks. With several processes, each
    trains a different candidate over the same batches, or shares one if there are fewer, and `next_block`
    returns the same in all.
    """

    def __init__(
        self,
        trainer: CandidateTrainer,
        schedule: Schedule,
        journal: Journal | None = None,
        processes: Processes | None = None,
        bar: SearchBar | None = None,
    ):
        self.trainer, self.schedule = trainer, schedule
        self.journal = journal or Journal()
        self.processes = processes or Processes()
        self.bar = SearchBar(1, schedule, self.processes, show=False) if bar is None else bar

    def next_block(self, skipped: Sequence[int], known_losses: dict[int, float] | None = None) -> Iteration:
        """Find the next block to skip, given those already skipped.

        known_losses: full-epoch losses of this iteration that need no training (`--prev`). Raises
        TrainingError if every candidate diverges.
        """
        found = Iteration(list(skipped))
        self._work = self._time = 0.0  # in training steps: of all processes, and one after another
        blocks = self.trainer.candidates(skipped)
        if self.schedule.criterion == "trained":
            finalists = self._train(found, blocks, known_losses or {})
        else:
            finalists = self._judge_untrained(found, blocks)
        if not finalists:
            where = next(iter(found.diverged.values()), "no block can be skipped")
            raise TrainingError(f"every candidate diverged: {where}")
        winner = leader(finalists)
        found.block, found.loss, found.state = winner.block, winner.mean_loss, winner.state
        found.losses = {c.block: c.mean_loss for c in sorted(finalists, key=lambda c: c.block)}
        found.candidate_epochs = self._work / self.trainer.num_batches
        found.elapsed_epochs = self._time / self.trainer.num_batches
        return found

    def _train(self, found: Iteration, blocks: list[int], known_losses: dict[int, float]) -> list[Candidate]:
        """Train by the schedule's looks; return the candidates that have a full epoch's loss."""
        known = [Candidate(b, known_loss=known_losses[b]) for b in blocks if b in known_losses]
        unknown = [block for block in blocks if block not in known_losses]
        num_batches = self.trainer.num_batches
        self.bar.start_iteration(len(unknown), len(blocks), num_batches)
        screened = self.schedule.screened_batches(len(unknown), num_batches)
        kept = self._best_untrained(found, unknown, screened) if screened else unknown
        racing, done = [Candidate(block) for block in kept], 0
        for look in self.schedule.looks(num_batches):
            if not racing:
                break
            racing, done = self._advance(found, racing, done, look), look
            if racing and look < num_batches:
                best, seen = leader(racing).mean_loss, racing
                racing = self.schedule.survivors(seen, len(unknown), look)
                left = {candidate.block for candidate in racing}
                found.dropped |= {
                    c.block: _drop(look, c.mean_loss, best) for c in seen if c.block not in left
                }
        return racing + known

    def _judge_untrained(self, found: Iteration, blocks: Sequence[int]) -> list[Candidate]:
        """Return candidates with their losses before training: all, or for `cosine` the one it picks."""
        num_batches = self.trainer.num_batches
        self.bar.start_iteration(len(blocks), len(blocks), num_batches)
        if self.schedule.criterion == "cosine":
            distances = self.trainer.distances(found.skipped_before, blocks)
            distances = self.processes.gather(distances)[0]  # all must pick the same
            found.distances = _finite(found, distances, "what passes through it is not finite")
            self.bar.move(num_batches * SCREENING_COST)
            self._work = num_batches * SCREENING_COST
            self._time = self._work / self.processes.count
            blocks = sorted(found.distances, key=lambda block: (found.distances[block], block))[:1]
        losses = self._screen(found, blocks, num_batches)
        return [Candidate(block, known_loss=loss) for block, loss in losses.items()]

    def _screen(self, found: Iteration, blocks: Sequence[int], num_batches: int) -> dict[int, float]:
        """Return each block's mean loss on the first batches before any training, if it is finite."""
        skipped, rank, count = found.skipped_before, self.processes.rank, self.processes.count
        seen = []
        for index in range(num_batches):
            known = self.journal.find_untrained(skipped, index)
            missing = [block for block in blocks if block not in known]
            self.bar.restored((len(blocks) - len(missing)) * SCREENING_COST / count)
            if missing:
                mine = missing[rank::count]
                part = self.trainer.screen(skipped, mine, index, self.bar.on_screened) if mine else {}
                for losses_of_one in self.processes.gather(part):
                    known |= losses_of_one
                self.journal.add_untrained(skipped, index, known)
            seen.append(known)
        cost = num_batches * SCREENING_COST
        self._work += len(blocks) * cost
        self._time += math.ceil(len(blocks) / count) * cost
        means = {block: statistics.fmean(known[block] for known in seen) for block in blocks}
        return _finite(found, means, "the loss is not finite before any training")

    def _best_untrained(self, found: Iteration, blocks: Sequence[int], num_batches: int) -> list[int]:
        """Return the blocks that the screening leaves, in order."""
        losses = found.untrained_losses = self._screen(found, blocks, num_batches)
        best = sorted(losses, key=lambda block: (losses[block], block))
        most = self.schedule.most_trained(len(blocks))
        for block in best[most:]:
            found.dropped[block] = _drop(0, losses[block], losses[best[0]])
        return sorted(best[:most])

    def _advance(self, found: Iteration, racing: list[Candidate], done: int, look: int) -> list[Candidate]:
        """Train the candidates from `done` to `look` batches, unless the journal knows the result.

        Returns them by block, without those that diverge on the way.
        """
        skipped, count = found.skipped_before, self.processes.count
        advanced, waiting = [], []
        for candidate in racing:
            candidate = self.journal.find(skipped, candidate.block, done, look) or candidate
            self.bar.restored((len(candidate.losses) - done) / count)
            ends = candidate.diverged is not None or len(candidate.losses) == look
            (advanced if ends else waiting).append(candidate)
        for together, time in rounds(len(waiting), count):
            group = self.processes.group(together)
            mine = waiting[group.index]
            self.bar.on_candidate(mine.block)
            on_batch = functools.partial(self.bar.move, time)
            trained = self.trainer.train(skipped, mine, look, group, on_batch)
            for candidate in self.processes.gather(trained if group.rank == 0 else None):
                if candidate is not None:
                    self.journal.add(skipped, candidate)
                    advanced.append(candidate)
            waiting = waiting[together:]
            if done == 0 or not waiting:  # else the leader is still the last look's
                self.bar.advanced(len(racing), leader(advanced))
        advanced.sort(key=lambda candidate: candidate.block)
        found.batch_losses |= {candidate.block: candidate.losses for candidate in advanced}
        self._work += sum(len(candidate.losses) - done for candidate in advanced)
        self._time += sum(time for _, time in rounds(len(racing), count)) * (look - done)
        for candidate in advanced:
            if candidate.diverged is not None:
                _note_diverged(found, candidate.block, candidate.diverged)
        return [candidate for candidate in advanced if candidate.diverged is None]


def _drop(after_batches: int, loss: float, leader_loss: float) -> dict:
    return {"after_batches": after_batches, "mean_loss": loss, "leader_mean_loss": leader_loss}


def _finite(found: Iteration, values: dict[int, float], where: str) -> dict[int, float]:
    """Return the blocks' values that are finite; note `where` the others diverged."""
    for block, value in values.items():
        if not math.isfinite(value):
            _note_diverged(found, block, where)
    return {block: value for block, value in values.items() if block not in found.diverged}


def _note_diverged(found: Iteration, block: int, where: str) -> None:
    logger.warning("without block %d the model diverges, so it is not picked: %s", block, where)
    found.diverged[block] = where


class Picks:
    """Picks one block after another, judged on held-out answers if there are any, until one costs too much.

    most_increase: how far the loss may rise above the original model's, or None. It is the held-out loss if
    the search's trainer holds answers out, else that of the training. original: the original model's held-out
    figures. All processes get the same numbers, since the trainer sums over them.
    """

    def __init__(self, search: Search, most_increase: float | None = None):
        self.search, self.most_increase = search, most_increase
        self._measure = MEASURES[search.trainer.options.loss]
        self.original = search.trainer.held_out([])
        self._original_loss = None if most_increase is None else self._loss_of_original()

    def next(self, skipped: Sequence[int], known_losses: dict[int, float]) -> Iteration:
        """Find the next block, given those skipped; arguments and errors are `Search.next_block`'s."""
        found = self.search.next_block(skipped, known_losses)
        found.held_out = self.search.trainer.held_out([*skipped, found.block], found.state)
        if self.most_increase is not None:
            loss = found.loss if found.held_out is None else getattr(found.held_out, self._measure)
            found.loss_increase = self.increase(loss)
        return found

    def increase(self, loss: float) -> float:
        """Return the increase as a share of the original's loss or, if that is 0 (as for KL), the loss."""
        return (loss - self._original_loss) / self._original_loss if self._original_loss else loss

    def costs_too_much(self, pick: Iteration) -> bool:
        return self.most_increase is not None and pick.loss_increase > self.most_increase

    def _loss_of_original(self) -> float:
        if self._measure == "kl":  # to itself; a measured one may be off by rounding
            return 0.0
        if self.original is not None:
            return getattr(self.original, self._measure)
        return self.search.trainer.original_loss()
