"""The greedy search: which block to skip next, given those that are."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from hopscotch_common.errors import TrainingError, logger
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.search.journal import Journal
from hopscotch_common.search.progress import Progress
from hopscotch_common.search.schedule import SCREENING_COST, Candidate, Schedule, leader, rounds
from hopscotch_common.training.distributed import Processes
from hopscotch_common.training.trainer import ScaleState


@dataclass
class Iteration:
    """What one iteration of the search found."""

    skipped_before: list[int]
    block: int
    loss: float
    losses: dict[int, float]  # full-epoch means, of the finalists (all candidates of `full`, `untrained`)
    # block -> after how many batches of training, its mean loss and the leader's (before any
    # training: of the untrained_losses)
    dropped: dict[int, dict]
    diverged: dict[int, str]  # block -> where its loss ceased to be finite
    untrained_losses: dict[int, float]  # means of the screened batches; empty without a screening
    batch_losses: dict[int, list[float]]
    distances: dict[int, float]  # of the residual stream, by which `cosine` picks; else empty
    # In epochs of one candidate, screening at SCREENING_COST, of an iteration that finds nothing in its
    # journal: the work of all processes together, and the time, in epochs of one process.
    candidate_epochs: float
    elapsed_epochs: float
    # The pick's scales after its training; None where there was none.
    state: ScaleState | None = field(default=None, compare=False, repr=False)


class Search:
    """Finds one block after the other.

    trainer: trains and screens candidates; only what the journal lacks is asked of it. With several
    processes each trains other candidates over the same batches, or shares one where there are fewer,
    and `next_block` returns the same in all.
    """

    def __init__(
        self,
        trainer: CandidateTrainer,
        schedule: Schedule,
        journal: Journal | None = None,
        processes: Processes | None = None,
        progress: Progress | None = None,
    ):
        self.trainer, self.schedule = trainer, schedule
        self.journal = journal or Journal()
        self.processes = processes or Processes()
        self.progress = progress or Progress()

    def next_block(self, skipped: Sequence[int], known_losses: dict[int, float] | None = None) -> Iteration:
        """The next block to skip, given those that are.

        known_losses: full-epoch losses of this iteration that need no training (`--prev`). Raises
        TrainingError when every candidate diverges.
        """
        return _Iteration(self, list(skipped), known_losses or {}).run()


@dataclass
class _Iteration:
    """One iteration while it runs."""

    search: Search
    skipped: list[int]
    known_losses: dict[int, float]
    dropped: dict[int, dict] = field(default_factory=dict)
    diverged: dict[int, str] = field(default_factory=dict)
    batch_losses: dict[int, list[float]] = field(default_factory=dict)
    distances: dict[int, float] = field(default_factory=dict)
    work: float = 0.0  # training steps, of all processes
    time: float = 0.0  # training steps, one after the other

    def run(self) -> Iteration:
        trainer, schedule = self.search.trainer, self.search.schedule
        blocks = trainer.candidates(self.skipped)
        if schedule.criterion != "trained":
            return self._without_training(blocks)
        known = [
            Candidate(block, known_loss=self.known_losses[block])
            for block in blocks
            if block in self.known_losses
        ]
        racing = [Candidate(block) for block in blocks if block not in self.known_losses]
        num_candidates, num_batches = len(racing), trainer.num_batches
        self.search.progress.start_iteration(num_candidates, len(blocks), num_batches)
        untrained: dict[int, float] = {}
        screened = schedule.screened_batches(num_candidates, num_batches)
        if screened:
            untrained = self._screen([candidate.block for candidate in racing], screened)
            racing = self._best_untrained(untrained)
        for look in schedule.looks(num_batches):
            if not racing:
                break
            advanced = self._advance(racing, look)
            if look < num_batches:
                racing = schedule.survivors(advanced, num_candidates, look)
                self._note_dropped(advanced, racing, look)
            else:
                racing = [candidate for candidate in advanced if candidate.diverged is None]
        return self._result(racing + known, untrained)

    def _without_training(self, blocks: Sequence[int]) -> Iteration:
        """The block whose loss before training is the lowest, or that turns the residual stream least."""
        trainer, num_batches = self.search.trainer, self.search.trainer.num_batches
        self.search.progress.start_iteration(len(blocks), len(blocks), num_batches)
        if self.search.schedule.criterion == "cosine":
            found = trainer.distances(self.skipped, blocks)
            found = self.search.processes.gather(found)[0]  # all must pick alike
            self.distances = {block: value for block, value in found.items() if math.isfinite(value)}
            for block in found.keys() - self.distances.keys():
                self._note_diverged(block, "what passes through it is not finite")
            self.search.progress.on_screened(num_batches)
            self.work += num_batches * SCREENING_COST
            self.time += num_batches * SCREENING_COST
            blocks = sorted(self.distances, key=lambda block: (self.distances[block], block))[:1]
        losses = self._screen(blocks, num_batches)
        self._note_infinite(losses)
        finite = {block: loss for block, loss in losses.items() if block not in self.diverged}
        return self._result([Candidate(block, known_loss=loss) for block, loss in finite.items()], {})

    def _screen(self, blocks: Sequence[int], num_batches: int) -> dict[int, float]:
        """Mean loss of each candidate block on the first batches, before any training."""
        search, processes = self.search, self.search.processes
        losses: dict[int, list[float]] = {block: [] for block in blocks}
        for index in range(num_batches):
            found = search.journal.find_untrained(self.skipped, index)
            missing = [block for block in blocks if block not in found]
            search.progress.restored((len(blocks) - len(missing)) * SCREENING_COST / processes.count)
            if missing:
                mine = missing[processes.rank :: processes.count]
                part = {}
                if mine:
                    part = search.trainer.screen(self.skipped, mine, index, search.progress.on_screened)
                for losses_of_one in processes.gather(part):
                    found |= losses_of_one
                search.journal.add_untrained(self.skipped, index, found)
            for block in blocks:
                losses[block].append(found[block])
        self.work += len(blocks) * num_batches * SCREENING_COST
        self.time += math.ceil(len(blocks) / processes.count) * num_batches * SCREENING_COST
        return {block: statistics.fmean(values) for block, values in losses.items()}

    def _best_untrained(self, untrained: dict[int, float]) -> list[Candidate]:
        """The candidates that the screening leaves, by block."""
        self._note_infinite(untrained)
        finite = sorted((b for b in untrained if b not in self.diverged), key=untrained.get)
        kept = finite[: self.search.schedule.most_trained(len(untrained))]
        for block in finite[len(kept) :]:
            self.dropped[block] = _drop(0, untrained[block], untrained[kept[0]])
        return [Candidate(block) for block in sorted(kept)]

    def _advance(self, racing: Sequence[Candidate], look: int) -> list[Candidate]:
        """Train the candidates up to `look` batches, as far as the journal does not know them."""
        search, processes = self.search, self.search.processes
        before = {candidate.block: len(candidate.losses) for candidate in racing}
        advanced: dict[int, Candidate] = {}
        waiting: list[Candidate] = []
        for candidate in racing:
            found = search.journal.find(self.skipped, candidate.block, before[candidate.block], look)
            candidate = found or candidate
            search.progress.restored((len(candidate.losses) - before[candidate.block]) / processes.count)
            if candidate.diverged is not None or len(candidate.losses) == look:
                advanced[candidate.block] = candidate
            else:
                waiting.append(candidate)
        for count, _ in rounds(len(waiting), processes.count):
            together, waiting = waiting[:count], waiting[count:]
            group = processes.group(count)
            mine = together[group.index]
            search.progress.on_candidate(mine.block, group.time_share)
            trained = search.trainer.train(self.skipped, mine, look, group, search.progress.on_batch)
            for candidate in processes.gather(trained if group.rank == 0 else None):
                if candidate is not None:
                    search.journal.add(self.skipped, candidate)
                    advanced[candidate.block] = candidate
            if not self.batch_losses or not waiting:  # else only the last look knows a leader
                search.progress.advanced(len(racing), leader(list(advanced.values())))
        self.work += sum(len(advanced[block].losses) - count for block, count in before.items())
        self.time += sum(time for _, time in rounds(len(racing), processes.count)) * (
            look - min(before.values())
        )
        self.batch_losses |= {block: candidate.losses for block, candidate in sorted(advanced.items())}
        for candidate in advanced.values():
            if candidate.diverged is not None:
                self._note_diverged(candidate.block, candidate.diverged)
        return [advanced[block] for block in sorted(advanced)]

    def _note_dropped(self, before: Sequence[Candidate], after: Sequence[Candidate], look: int) -> None:
        going_on = {candidate.block for candidate in after}
        for candidate in before:
            if candidate.block not in going_on and candidate.diverged is None:
                self.dropped[candidate.block] = _drop(look, candidate.mean_loss, leader(before).mean_loss)

    def _note_infinite(self, untrained: dict[int, float]) -> None:
        for block, loss in untrained.items():
            if math.isinf(loss):
                self._note_diverged(block, "the loss is not finite before any training")

    def _note_diverged(self, block: int, where: str) -> None:
        logger.warning("without block %d the model diverges, so it is not picked: %s", block, where)
        self.diverged[block] = where

    def _result(self, finalists: Sequence[Candidate], untrained: dict[int, float]) -> Iteration:
        if not finalists:
            where = next(iter(self.diverged.values()), "no block can be skipped")
            raise TrainingError(f"every candidate diverged: {where}")
        winner = leader(finalists)
        return Iteration(
            skipped_before=self.skipped,
            block=winner.block,
            loss=winner.mean_loss,
            losses={c.block: c.mean_loss for c in sorted(finalists, key=lambda c: c.block)},
            dropped=dict(sorted(self.dropped.items())),
            diverged=dict(sorted(self.diverged.items())),
            untrained_losses={b: loss for b, loss in untrained.items() if math.isfinite(loss)},
            batch_losses=self.batch_losses,
            distances=self.distances,
            candidate_epochs=self.work / self.search.trainer.num_batches,
            elapsed_epochs=self.time / self.search.trainer.num_batches,
            state=winner.state,
        )


def _drop(after_batches: int, loss: float, leader_loss: float) -> dict:
    return {"after_batches": after_batches, "mean_loss": loss, "leader_mean_loss": leader_loss}
