"""The benchmark's plain search agrees with the search proper."""

import dataclasses
import sys

import pytest
from conftest import ROOT
from test_search import Epoch, epoch, iterate
from test_training import random_samples

from hopscotch_common.search.schedule import Schedule

sys.path.insert(0, str(ROOT / "benchmarks"))
import race  # noqa: E402
import search  # noqa: E402


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_reference_chooses_the_same_block_with_the_same_losses(tiny_folder, family):
    samples = random_samples(9)
    found = iterate(tiny_folder(family), Epoch(samples, 4), skipped=[2])
    records = [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    means = {}
    for block in (0, 1, 3):
        plain = search.load_plain(tiny_folder(family), {2, block})
        losses = search.plain_losses(plain, records, 4, 1e-2, 5)
        assert losses == pytest.approx(found.batch_losses[block], rel=1e-4)
        means[block] = sum(losses) / len(losses)
    assert found.block == min(means, key=means.get)


def test_replayed_race_equals_a_run_one(tiny_folder):
    full = iterate(tiny_folder(), epoch(24, 2))
    for rule in (Schedule(2, confidence=1.5), Schedule(1, confidence=1.5, screening=0.5)):
        raced = iterate(tiny_folder(), epoch(24, 2), rule=rule)
        replayed = race.replay(race.Recorded(full.batch_losses), rule)
        assert dataclasses.replace(replayed, untrained_losses=raced.untrained_losses) == raced
