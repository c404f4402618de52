"""The schedules of the search: which candidates go on, and how far each is trained.

`full` gives every candidate a whole epoch (the paper's search). A race first screens: it compares
candidates by their losses on the first batches before any training, which is cheap, and only the best
go on. Those advance together over the same batches and are compared at one look after another. The
share that goes on falls as the batches add up (in the spirit of successive halving, arXiv
1502.07943), so the cost is the same whatever the data. Finalists run the whole epoch, so the winner's
loss is the number that `full` gives. Both follow one rule: `full` has a single look, after the last batch.
Two more schedules train nothing: they pick by the loss before training, or by cosine distance.
In every schedule, ties go to the block nearest to the input.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from hopscotch_common.training.trainer import ScaleState

# With a power of 1, one of 18 recorded picks was lost; 0.9 costs an eighth more (benchmarks/README.md).
SHARE_POWER = 0.9
# A race's first look, in epochs: the losses of more batches cost more than they tell.
FIRST_LOOK = 1 / 32
# Share of a training step on the same batch: no backward pass, half of the layers on average, and the LM
# head. More if samples share a long prefix, which training computes once per batch.
SCREENING_COST = 1 / 3


@dataclass
class Candidate:
    """A block that might be skipped next, and how far its training has come."""

    block: int
    losses: list[float] = field(default_factory=list)  # one per batch
    state: ScaleState | None = None
    known_loss: float | None = None  # from --prev, or before any training: nothing to train
    diverged: str | None = None  # where its loss ceased to be finite: nothing more to train

    @property
    def mean_loss(self) -> float:
        """Mean loss of the batches so far, which after an epoch is the search's criterion."""
        if self.diverged is not None:
            return math.inf
        return self.known_loss if self.known_loss is not None else statistics.fmean(self.losses)


@dataclass(frozen=True)
class Schedule:
    """When candidates are compared, and which of them go on.

    first_look: batches before the first comparison, after which about half go on, and about 1 / (1 + n)
    after n times as many. screening: the share that is trained at all (at least two), by the losses on the
    first_look batches before training; 1 screens nobody. criterion: what decides: "trained", the loss after
    training; "untrained", the loss before it; or "cosine", how far a block turns the residual stream. Without
    training, the other fields have no effect.
    """

    first_look: int
    screening: float = 1.0
    criterion: str = "trained"

    def most_trained(self, num_candidates: int) -> int:
        """How many of the candidates the screening leaves."""
        return min(num_candidates, max(2, math.ceil(num_candidates * self.screening)))

    def screened_batches(self, num_candidates: int, num_batches: int) -> int:
        """Batches that the screening sees: none where it could drop nobody."""
        drops = self.most_trained(num_candidates) < num_candidates
        return min(self.first_look, num_batches) if drops else 0

    def looks(self, num_batches: int) -> list[int]:
        """Return the numbers of batches after which to compare.

        First comes the first look, then every next batch or, if there are many, every further eighth;
        num_batches is always last.
        """
        looks = [min(self.first_look, num_batches)]
        while looks[-1] < num_batches:
            looks.append(min(looks[-1] + max(1, looks[-1] // 8), num_batches))
        return looks

    def most_survivors(self, num_candidates: int, batches: int) -> int:
        """How many of the initial candidates go on, at most, after a look at this many batches."""
        if batches < self.first_look:
            return num_candidates
        share = self.first_look / (self.first_look + batches)
        return max(1, int(num_candidates * share**SHARE_POWER))

    def survivors(self, candidates: Sequence[Candidate], num_candidates: int, look: int) -> list[Candidate]:
        """Return the candidates that go on after a look, by block; none of those given has diverged.

        num_candidates: how many the search began with. look: the number of batches.
        """
        most = self.most_survivors(num_candidates, look)
        best = sorted(candidates, key=_by_loss)[:most]
        return sorted(best, key=lambda candidate: candidate.block)

    def longest(self, num_candidates: int, num_batches: int, processes: int = 1) -> float:
        """Return the most time that the search for one block can take on this many processes.

        The unit is a training step of one process; screening counts at its cost.
        """
        if self.criterion == "cosine":
            return 2 * num_batches * SCREENING_COST  # all blocks' distances, and the loss of one of them
        share = math.ceil(num_candidates / processes)
        if self.criterion == "untrained":
            return share * num_batches * SCREENING_COST
        total = share * self.screened_batches(num_candidates, num_batches) * SCREENING_COST
        done, racing = 0, self.most_trained(num_candidates)
        for look in self.looks(num_batches):
            total += sum(time for _, time in rounds(racing, processes)) * (look - done)
            done, racing = look, min(racing, self.most_survivors(num_candidates, look))
        return total


NEVER = 2**62  # batches; no epoch has so many
FULL = Schedule(first_look=NEVER)
UNTRAINED = Schedule(first_look=NEVER, criterion="untrained")
COSINE = Schedule(first_look=NEVER, criterion="cosine")


def named(search: str, num_batches: int, screening: float) -> Schedule:
    """Return the schedule of `--search` for epochs of this many batches. screening: of a race."""
    race = Schedule(max(1, int(num_batches * FIRST_LOOK)), screening)
    return {"full": FULL, "race": race, "untrained": UNTRAINED, "cosine": COSINE}[search]


def rounds(num_candidates: int, processes: int) -> list[tuple[int, float]]:
    """Return (candidates that train at once, time of a batch then) for each round over the candidates.

    Each process has a candidate of its own. In the last round, if there are fewer candidates, several
    processes share one: the smallest group of them decides the time.
    """
    whole, rest = divmod(num_candidates, processes)
    return [(processes, 1.0)] * whole + ([(rest, 1 / (processes // rest))] if rest else [])


def _by_loss(candidate: Candidate) -> tuple[float, int]:
    return candidate.mean_loss, candidate.block


def leader(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest mean loss; the lower index wins a tie."""
    return min(candidates, key=_by_loss)
