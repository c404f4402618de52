"""What a search tells while it runs."""

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from hopscotch_common.search.schedule import SCREENING_COST, Candidate, Schedule
from hopscotch_common.training.distributed import Processes


class Progress:
    """What a search tells; this one says nothing (see `SearchBar`)."""

    def start_iteration(self, num_candidates: int, num_blocks: int, num_batches: int) -> None: ...

    def on_screened(self, share: float) -> None: ...

    def on_candidate(self, block: int, time_share: float) -> None: ...

    def on_batch(self, loss: float) -> None: ...

    def restored(self, batches: float) -> None: ...

    def advanced(self, racing: int, best: Candidate) -> None: ...


class SearchBar(Progress):
    """One bar over the whole search, in the time of a batch: the pick that is sought and the candidate
    that is trained for it, the leader and its loss, and an ETA.

    The total is the most that the search can take: exact for `full`, a little high for a race.
    Screening a candidate on a batch counts as the part of a training step that it costs, and a batch
    that processes share as the part of its time that it takes them.
    """

    def __init__(self, num_iterations: int, schedule: Schedule, processes: Processes):
        self.bar = tqdm(unit="batch", disable=processes.rank != 0, dynamic_ncols=True)
        self.num_iterations, self.iterations_begun = num_iterations, 0
        self.schedule, self.processes = schedule, processes.count
        self.time_share = 1.0  # of a batch of the present candidate
        self.moved = 0.0  # what of a batch the bar has not shown yet
        self.removed = 0.0  # what of a batch is still to be taken off the total

    def start_iteration(self, num_candidates: int, num_blocks: int, num_batches: int) -> None:
        """num_candidates: to be trained in this iteration; num_blocks: those whose loss is known, too."""
        iterations_left = self.num_iterations - self.iterations_begun
        self.iterations_begun += 1
        self.bar.set_description(f"pick {self.iterations_begun}, before training", refresh=False)
        self.bar.set_postfix_str("", refresh=False)  # the last pick's leader
        candidates = [num_candidates, *(num_blocks - later for later in range(1, iterations_left))]
        most = sum(self.schedule.longest(count, num_batches, self.processes) for count in candidates)
        self.bar.total = self.bar.n + round(most)
        self.bar.refresh()

    def on_screened(self, share: float) -> None:
        """share: the part of a batch that a candidate was screened on."""
        self._move(share * SCREENING_COST)

    def on_candidate(self, block: int, time_share: float) -> None:
        """time_share: what a batch of this candidate takes, as a share of its time in one process."""
        self.time_share = time_share
        self.bar.set_description(f"pick {self.iterations_begun}, candidate {block}", refresh=False)

    def on_batch(self, loss: float) -> None:
        self._move(self.time_share)

    def _move(self, batches: float) -> None:
        self.moved += batches
        whole = int(self.moved + 1e-6)
        if whole:
            self.moved -= whole
            self.bar.update(whole)

    def restored(self, batches: float) -> None:
        """batches: what the journal had, in time."""
        self.removed += batches
        whole = int(self.removed + 1e-6)
        self.removed -= whole
        self.bar.total -= whole

    def advanced(self, racing: int, best: Candidate) -> None:
        self.bar.set_postfix_str(f"{racing} racing, leader {best.block} at {best.mean_loss:.4f}")

    @contextlib.contextmanager
    def out_of_the_way(self) -> Iterator[None]:
        """Take the bar off the terminal while something else is printed."""
        self.bar.clear()
        yield
        self.bar.refresh()

    def finish(self) -> None:
        """All is found: what a race did not need is not left to do."""
        self.bar.total = self.bar.n

    def close(self) -> None:
        self.bar.close()
