"""The benchmark's plain search agrees with the search proper."""

import dataclasses
import json

import pytest
import race
import search
from test_search import Epoch, epoch, iterate, write_data
from test_training import random_samples

import block_selection
from hopscotch_common.search.schedule import Schedule


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
    for rule in (Schedule(2), Schedule(1, screening=0.5)):
        raced = iterate(tiny_folder(), epoch(24, 2), rule=rule)
        replayed = race.replay(race.Recorded(full.batch_losses), rule)
        assert dataclasses.replace(replayed, untrained_losses=raced.untrained_losses) == raced


def test_losses_before_training_are_kept_with_what_they_are_of(tiny_folder, tmp_path):
    report, kept = tmp_path / "full.json", tmp_path / "full.untrained.json"
    write_data(tmp_path / "data.jsonl", random_samples(8))
    source = ["--model", str(tiny_folder()), "--data_path", str(tmp_path / "data.jsonl")]
    searched = ["--batch_size", "2", "--device", "cpu", "--output", str(report)]
    assert block_selection.main([*source, *searched]) == 0
    words = [str(report), "--first_look", "2", "--screening", "0.5"]

    def replayed(*more: str) -> dict:
        race.main([*words, *more, "--result", str(tmp_path / "result.json")])
        found = json.loads((tmp_path / "result.json").read_text())["figures"]
        (tmp_path / "result.json").unlink()
        return found

    with pytest.raises(SystemExit, match="a screening of batch 1 needs --model and --data_path"):
        replayed()
    found = replayed(*source)
    first = kept.read_bytes()
    assert replayed() == found  # from what was kept
    content = json.loads(report.read_text())
    arguments = {name: content["arguments"] | {name: "another"} for name in ("seed", "batch_size", "dtype")}
    others = [{"arguments": changed} for changed in arguments.values()]
    others += [{"data": content["data"] | {"sha256": "another"}}, {"iterations": content["iterations"] * 2}]
    for other in others:  # a report made again in the place of the one before
        report.write_text(json.dumps(content | other))
        with pytest.raises(SystemExit, match="full.untrained.json: of another search; give --model and"):
            replayed()
    report.write_text(json.dumps(content))
    kept.write_text(json.dumps(json.loads(first) | {"of": "another"}))
    assert replayed(*source) == found and kept.read_bytes() == first
    for name, value in {"search": "race", "loss": "kl", "replacement_rank": 2}.items():
        other = content | {"arguments": content["arguments"] | {name: value}}
        report.write_text(json.dumps(other))
        with pytest.raises(SystemExit, match="full.json: not of --search full and --loss ce without maps"):
            replayed(*source)
