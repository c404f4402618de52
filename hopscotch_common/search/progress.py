"""The progress bar of a search."""

from tqdm import tqdm

from hopscotch_common.search.schedule import SCREENING_COST, Candidate, Schedule
from hopscotch_common.training.distributed import Processes


class SearchBar(tqdm):
    """One bar over the whole search, in units of a batch's time.

    It shows the pick that is sought and the candidate that is trained for it, the leader and its loss, and an
    ETA. The total is the most that the search can take: exact for `full`, a little high for a race. Screening
    a candidate on a batch counts as the part of a training step that it costs, and a batch that processes
    share as the part of its time that it takes them.
    """

    def __init__(self, num_iterations: int, schedule: Schedule, processes: Processes, show: bool = True):
        super().__init__(unit="batch", disable=not show or processes.rank != 0, dynamic_ncols=True)
        self.num_iterations, self.iterations_begun = num_iterations, 0
        self.schedule, self.processes = schedule, processes.count
        self.done = self.most = 0.0  # as `n` and `total`, which are whole batches

    def start_iteration(self, num_candidates: int, num_blocks: int, num_batches: int) -> None:
        """Start an iteration.

        num_candidates: to be trained in it; num_blocks: including those whose loss is known.
        """
        iterations_left = self.num_iterations - self.iterations_begun
        self.iterations_begun += 1
        self.set_description(f"pick {self.iterations_begun}, before training", refresh=False)
        self.set_postfix_str("", refresh=False)  # drops the last pick's leader
        candidates = [num_candidates, *(num_blocks - later for later in range(1, iterations_left))]
        longest = [self.schedule.longest(count, num_batches, self.processes) for count in candidates]
        self.most = self.done + sum(longest)
        self.restored(0)
        self.refresh()

    def on_screened(self, share: float) -> None:
        """share: the part of a batch that was screened, summed over candidates."""
        self.move(share * SCREENING_COST)

    def on_candidate(self, block: int) -> None:
        self.set_description(f"pick {self.iterations_begun}, candidate {block}", refresh=False)

    def move(self, batches: float) -> None:
        """Advance the bar by `batches`, in time."""
        self.done += batches
        self.update(int(self.done + 1e-6) - self.n)

    def restored(self, batches: float) -> None:
        """Take `batches`, in time, off the total: the journal had them, so they are not left to do."""
        self.most -= batches
        self.total = round(self.most)

    def advanced(self, racing: int, best: Candidate) -> None:
        self.set_postfix_str(f"{racing} racing, leader {best.block} at {best.mean_loss:.4f}")
