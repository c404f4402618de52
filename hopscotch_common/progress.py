"""What a search tells while it runs."""

from hopscotch_common.distributed import Processes
from hopscotch_common.schedules import SCREENING_COST, Candidate, Race


class Progress:
    """What a search tells; this one says nothing (see `SearchBar`)."""

    def start_iteration(self, num_candidates: int, num_batches: int) -> None: ...

    def on_screened(self) -> None: ...

    def on_batch(self, loss: float) -> None: ...

    def restored(self, batches: float) -> None: ...

    def advanced(self, racing: int, best: Candidate) -> None: ...


class SearchBar(Progress):
    """One bar over the whole search, in batches of this process, with the leader and an ETA.

    The total is the most that the search can take: exact for `full`, a little high for a race.
    Screening a candidate on a batch counts as the part of a training step that it costs.
    """

    def __init__(self, num_iterations: int, race: Race, processes: Processes):
        from tqdm import tqdm

        self.bar = tqdm(unit="batch", disable=processes.rank != 0, dynamic_ncols=True)
        self.num_iterations, self.iterations_begun = num_iterations, 0
        self.race, self.processes = race, processes.count
        self.screened = 0  # since the bar last moved

    def start_iteration(self, num_candidates: int, num_batches: int) -> None:
        iterations_left = self.num_iterations - self.iterations_begun
        self.iterations_begun += 1
        self.bar.set_description(f"block {self.iterations_begun}")
        self.bar.total = self.bar.n + sum(
            self.race.most_batches(num_candidates - later, num_batches, self.processes)
            for later in range(iterations_left)
        )
        self.bar.refresh()

    def on_screened(self) -> None:
        self.screened += 1
        whole = int(self.screened * SCREENING_COST)
        if whole:
            self.screened = 0
            self.bar.update(whole)

    def restored(self, batches: float) -> None:
        self.bar.total -= int(batches)

    def on_batch(self, loss: float) -> None:
        self.bar.update()

    def advanced(self, racing: int, best: Candidate) -> None:
        self.bar.set_postfix_str(f"{racing} racing, leader {best.block} at {best.mean_loss:.4f}")

    def close(self) -> None:
        self.bar.total = self.bar.n
        self.bar.close()
