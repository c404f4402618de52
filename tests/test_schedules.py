"""The race's rule, and the bar that knows how much a schedule can take."""

import pytest

import block_selection
from hopscotch_common.search import schedule
from hopscotch_common.search.progress import SearchBar
from hopscotch_common.search.schedule import Candidate, Schedule
from hopscotch_common.search.search import Search
from hopscotch_common.training.distributed import Processes


def racing(*losses: list[float]) -> list[Candidate]:
    return [Candidate(block, list(values)) for block, values in enumerate(losses)]


def test_fewer_go_on_the_more_batches_were_seen():
    race = Schedule(first_look=2)
    assert [race.most_survivors(10, batches) for batches in (1, 2, 3, 4, 6, 8, 20)] == [10, 5, 4, 3, 2, 2, 1]
    candidates = racing(*[[3.0 - block / 10] * 2 for block in range(10)])
    assert [candidate.block for candidate in race.survivors(candidates, 10, 2)] == [5, 6, 7, 8, 9]
    # Two batches of ten, then one of five and of four, two of three, and one of two.
    assert race.longest(10, 7) == 2 * 10 + 5 + 4 + 3 + 3 + 2
    # Ten on four: two rounds, and two candidates that two processes share; and so on.
    assert race.longest(10, 7, processes=4) == 2 * 2.5 + 1.25 + 1 + 1 + 1 + 0.5
    assert schedule.FULL.longest(10, 12) == 120
    # Screening ten on two batches costs seven batches, three are left.
    assert Schedule(2, screening=0.3).longest(10, 7) == pytest.approx(20 / 3 + 2 * 3 + 3 + 3 + 3 + 3 + 2)


def test_the_default_race_is_bounded_whatever_the_data():
    for num_batches, share in ((12, 1 / 4), (16, 1 / 4), (64, 1 / 8), (128, 1 / 8), (1000, 1 / 8)):
        race = schedule.named("race", num_batches, block_selection.SCREENING)
        for layers in (28, 30, 32):
            assert race.longest(layers, num_batches) <= share * layers * num_batches


class Alike:
    """Stands in for a `CandidateTrainer`: all are alike, but for blocks above `best`, which are worse."""

    num_batches = 6

    def __init__(self, best: int):
        self.best = best

    def _loss(self, block: int) -> float:
        return 1.0 if block <= self.best else 2.0

    def candidates(self, skipped) -> list[int]:
        return [block for block in (9, 3, 7, 5) if block not in skipped]  # in whatever order

    def train(self, skipped, candidate, look, group, on_batch) -> Candidate:
        return Candidate(candidate.block, [self._loss(candidate.block)] * look)

    def screen(self, skipped, blocks, index, on_screened) -> dict[int, float]:
        return {block: self._loss(block) for block in blocks}

    def distances(self, skipped, blocks) -> dict[int, float]:
        return self.screen(skipped, blocks, 0, None)


RULES = {
    "full": schedule.FULL,
    "race": Schedule(first_look=1),
    "screened": Schedule(first_look=1, screening=0.5),
    "untrained": schedule.UNTRAINED,
    "cosine": schedule.COSINE,
}


@pytest.mark.parametrize("rule", RULES)
def test_of_candidates_that_are_alike_the_first_block_wins(rule):
    search = Search(Alike(best=7), RULES[rule])
    assert search.next_block([]).block == 3
    assert search.next_block([3]).block == 5
    if rule in ("full", "race", "screened"):  # --prev, which has no place among the others before the end
        for block, loss in ((3, 1.0), (9, 1.0)):
            assert search.next_block([], {block: loss}).block == 3


def test_of_candidates_that_are_alike_the_first_blocks_go_on():
    alike = [Candidate(block, [1.0]) for block in (8, 2, 6, 4)]
    assert schedule.leader(alike).block == 2
    going_on = Schedule(first_look=1).survivors(alike, 4, 1)
    assert [candidate.block for candidate in going_on] == [2, 4]
    found = Search(Alike(best=9), Schedule(first_look=1, screening=0.5)).next_block([])
    assert list(found.batch_losses) == [3, 5]
    assert {block: drop["after_batches"] for block, drop in found.dropped.items()} == {7: 0, 9: 0, 5: 2}


def test_looks_end_with_the_last_batch():
    assert Schedule(2).looks(5) == [2, 3, 4, 5]
    assert Schedule(8).looks(5) == [5]
    assert schedule.FULL.looks(7) == [7]
    looks = Schedule(2).looks(100)
    assert looks[-1] == 100 and looks == sorted(set(looks)) and len(looks) < 50


def test_the_bar_knows_what_a_full_search_takes():
    bar = SearchBar(num_iterations=2, schedule=schedule.FULL, processes=Processes())
    for candidates in (4, 3):
        bar.start_iteration(candidates, candidates, num_batches=5)
        assert bar.total == 35
        assert not bar.postfix
        bar.on_candidate(7)
        for _ in range(5 * candidates):
            bar.move(1.0)
        bar.advanced(candidates, Candidate(0, [1.0]))
    assert bar.n == 35
    assert bar.desc == "pick 2, candidate 7: " and bar.postfix == f"{candidates} racing, leader 0 at 1.0000"
    bar.close()


def test_the_bar_counts_screening_at_its_cost():
    race = Schedule(first_look=2, screening=0.5)
    bar = SearchBar(num_iterations=1, schedule=race, processes=Processes())
    bar.start_iteration(9, 9, num_batches=4)
    for _ in range(36):
        bar.on_screened(0.5)
    assert bar.n == 6 and bar.total == 6 + 2 * 5 + 4 + 3
    bar.close()


def test_the_bar_leaves_out_what_the_journal_had():
    bar = SearchBar(num_iterations=1, schedule=schedule.FULL, processes=Processes())
    bar.start_iteration(4, 4, num_batches=5)
    for batches in [9] + [1 / 12] * 12:
        bar.restored(batches)
    assert bar.total == 10
    bar.close()


def test_the_bar_knows_that_later_iterations_train_what_is_known_now():
    bar = SearchBar(num_iterations=2, schedule=schedule.FULL, processes=Processes())
    bar.start_iteration(1, 4, num_batches=5)
    assert bar.total == 5 + 3 * 5
    bar.close()
