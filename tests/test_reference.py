"""The benchmark's plain search agrees with the search proper."""

import sys

import pytest
from conftest import ROOT
from test_search import iterate
from test_training import random_samples

from hopscotch_common import data

sys.path.insert(0, str(ROOT / "benchmarks"))
import race  # noqa: E402
import reference_search  # noqa: E402


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_reference_chooses_the_same_block_with_the_same_losses(tiny_folder, family):
    samples = random_samples(9)
    found = iterate(tiny_folder(family), data.make_batches(samples, 4, 60, seed=42), skipped=[2])
    records = [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    means = {}
    for block in (0, 1, 3):
        losses = reference_search.epoch_losses(tiny_folder(family), records, {2, block}, 4, 1e-2, 42)
        assert losses == pytest.approx(found.batch_losses[block], rel=1e-4)
        means[block] = sum(losses) / len(losses)
    assert found.block == min(means, key=means.get)


def test_replayed_race_equals_a_run_one(tiny_folder):
    batches = data.make_batches(random_samples(24), 2, 60, seed=5)
    full = iterate(tiny_folder(), batches)
    for schedule in (race.Race(2, confidence=1.5), race.Race(1, confidence=1.5, screening=0.5)):
        raced = iterate(tiny_folder(), batches, race=schedule)
        assert race.replay(full.batch_losses, schedule) == (raced.block, raced.candidate_epochs)
