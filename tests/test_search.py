"""The search: against a plain loop, the race's rule, and the journal under kill -9."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FAMILY_SIZES, ROOT
from test_training import random_samples, reference_loss
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import block_selection
from hopscotch_common import data, scales, schedules, search
from hopscotch_common.cli import InputError, TrainingError
from hopscotch_common.distributed import Processes
from hopscotch_common.models import load_model, model_ref
from hopscotch_common.progress import Progress, SearchBar
from hopscotch_common.schedules import Candidate, Race
from hopscotch_common.screening import untrained_losses
from hopscotch_common.search import Journal
from hopscotch_common.training import ScaleState, ScaleTrainer, prepare_model


def iterate(folder, batches, skipped=(), race=schedules.FULL, known=None, journal=None):
    trainer = ScaleTrainer(load_model(model_ref(str(folder)), device="cpu"), 1e-2)
    journal = journal or Journal(None, {})
    return search.run_iteration(
        trainer, batches, list(skipped), race, journal, known or {}, Processes(), Progress()
    )


def reference_losses(folder, samples, batch_size, seed, skipped) -> dict[int, float]:
    """Every candidate's mean epoch loss, in a plain loop over the stock class."""
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    results = {}
    for block in range(4):
        if block in skipped:
            continue
        blocks = {*skipped, block}
        values = torch.ones(4, 4, requires_grad=True)
        optimizer = torch.optim.Adam([values], lr=1e-2)
        losses = []
        for start in range(0, len(order), batch_size):
            batch = [samples[i] for i in order[start : start + batch_size]]
            total = sum(reference_loss(stock, sample, values, blocks) for sample in batch)
            loss = total / sum(sample.num_loss_counted_tokens for sample in batch)
            optimizer.zero_grad()
            loss.backward()
            values.grad[list(blocks), 0] = 0
            optimizer.step()
            losses.append(loss.item())
        results[block] = sum(losses) / len(losses)
    return results


@pytest.mark.parametrize("skipped", [[], [2], [0, 3]])
def test_full_search_equals_a_plain_loop(tiny_folder, skipped):
    samples = random_samples(8)
    found = iterate(tiny_folder(), data.make_batches(samples, 3, 60, seed=5), skipped)
    expected = reference_losses(tiny_folder(), samples, 3, 5, skipped)
    assert found.losses.keys() == expected.keys()
    assert_close(list(found.losses.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    assert found.block == min(expected, key=expected.get) and found.loss == found.losses[found.block]
    assert found.candidate_epochs == len(expected)


def test_race_finds_the_same_block_with_the_same_loss_for_less(tiny_folder):
    batches = data.make_batches(random_samples(24), 2, 60, seed=5)
    full = iterate(tiny_folder(), batches)
    raced = iterate(tiny_folder(), batches, race=Race(first_look=2, confidence=2.0))
    assert raced.block == full.block and raced.loss == full.loss
    assert raced.candidate_epochs < full.candidate_epochs and raced.dropped
    for block, losses in raced.batch_losses.items():  # the same trajectory, cut short
        assert losses == full.batch_losses[block][: len(losses)]


def test_known_losses_are_not_trained_again(tiny_folder):
    batches = data.make_batches(random_samples(8), 3, 60, seed=5)
    full = iterate(tiny_folder(), batches)
    known = {block: full.losses[block] for block in (0, 1)}
    resumed = iterate(tiny_folder(), batches, known=known)
    assert resumed.losses == full.losses and resumed.candidate_epochs == 2
    assert iterate(tiny_folder(), batches, known={0: 0.0}).block == 0


@pytest.mark.parametrize("kind", ["checkpointed", "packed"])
def test_untrained_losses_do_not_depend_on_how_they_are_run(tiny_folder, kind):
    samples = random_samples(6)
    losses = []
    for special in (False, True):
        model = load_model(model_ref(str(tiny_folder())), device="cpu")
        prepare_model(model, gradient_checkpointing=special and kind == "checkpointed")
        (batch,) = data.make_batches(samples, 6, 75, seed=0, packed=special and kind == "packed")
        losses.append(untrained_losses(model, batch, [2], [0, 1, 3], "batch 0"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_untrained_loss_that_is_not_finite_is_named(tiny_folder):
    model = load_model(model_ref(str(tiny_folder())), device="cpu")
    model.model.layers[3].mlp.down_proj.weight.data.fill_(math.inf)
    (batch,) = data.make_batches(random_samples(2), 2, 60, seed=0)
    with pytest.raises(TrainingError, match="batch 0: without block 1 the loss is nan before any training"):
        untrained_losses(model, batch, [], [1], "batch 0")


def test_screening_goes_on_where_it_was(tiny_folder, tmp_path):
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    race = Race(first_look=3, confidence=math.inf, screening=0.5)
    whole = tmp_path / "whole.jsonl"
    expected = iterate(tiny_folder(), batches, race=race, journal=Journal(whole, {}))
    lines = whole.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:3]))  # the settings and two of three screened batches
    assert iterate(tiny_folder(), batches, race=race, journal=Journal(cut, {})) == expected
    record = json.loads(lines[1])
    del record["untrained"]["1"]  # as after a run with `--prev`, which screens fewer
    cut.write_text(lines[0] + json.dumps(record) + "\n")
    assert iterate(tiny_folder(), batches, race=race, journal=Journal(cut, {})) == expected


def test_screening_that_would_drop_nobody_is_left_out(tiny_folder):
    race = Race(first_look=1, confidence=3.0, screening=0.4)
    assert race.most_trained(2) == race.most_trained(5) == 2 and race.most_trained(1) == 1
    assert race.screened_batches(2, 6) == 0 and race.screened_batches(3, 6) == 1
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    raced = iterate(tiny_folder(), batches, skipped=[0, 3], race=race)
    assert not raced.untrained_losses and raced.dropped.keys().isdisjoint({raced.block})


def test_a_race_with_known_losses(tiny_folder):
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    full = iterate(tiny_folder(), batches)
    race = Race(first_look=1, confidence=math.inf, screening=0.5)
    known = {full.block: full.loss}
    raced = iterate(tiny_folder(), batches, race=race, known=known)
    assert raced.block == full.block and set(raced.untrained_losses) == set(full.losses) - {full.block}
    assert raced.losses.items() <= full.losses.items() and len(raced.losses) == 2


def test_the_last_block_of_the_kind_that_the_cache_needs_is_no_candidate(tiny_folder):
    mixed = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
    model = load_model(model_ref(str(tiny_folder("qwen2", **mixed))), device="cpu")
    assert scales.skippable_blocks(model, [0]) == [2, 3]
    assert scales.skippable_blocks(model, [2, 3]) == [0, 1]
    assert scales.skippable_blocks(model, [0, 2]) == [3]


def test_the_bar_knows_what_a_full_search_takes():
    bar = SearchBar(num_iterations=2, race=schedules.FULL, processes=Processes())
    for candidates in (4, 3):
        bar.start_iteration(candidates, candidates, num_batches=5)
        assert bar.bar.total == 35
        bar.on_candidate(7)
        for _ in range(5 * candidates):
            bar.on_batch(1.0)
        bar.advanced(candidates, Candidate(0, [1.0]))
    assert bar.bar.n == 35
    assert (
        bar.bar.desc == "pick 2, candidate 7: "
        and bar.bar.postfix == f"{candidates} racing, leader 0 at 1.0000"
    )
    bar.close()


def test_the_bar_counts_screening_at_its_cost():
    race = Race(first_look=2, confidence=math.inf, screening=0.5)
    bar = SearchBar(num_iterations=1, race=race, processes=Processes())
    bar.start_iteration(9, 9, num_batches=4)
    for _ in range(36):
        bar.on_screened(0.5)
    assert bar.bar.n == 6 and bar.bar.total == 6 + 2 * 5 + 4 + 3
    bar.close()


def test_the_bar_leaves_out_what_the_journal_had():
    bar = SearchBar(num_iterations=1, race=schedules.FULL, processes=Processes())
    bar.start_iteration(4, 4, num_batches=5)
    for batches in [9] + [1 / 12] * 12:
        bar.restored(batches)
    assert bar.bar.total == 10
    bar.close()


def test_the_bar_knows_that_later_iterations_train_what_is_known_now():
    bar = SearchBar(num_iterations=2, race=schedules.FULL, processes=Processes())
    bar.start_iteration(1, 4, num_batches=5)
    assert bar.bar.total == 5 + 3 * 5
    bar.close()


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
@pytest.mark.parametrize("prefix", [0, 9])
def test_untrained_losses_equal_a_plain_loop(tiny_folder, family, prefix):
    samples = random_samples(6)
    shared = list(range(40, 40 + prefix))
    samples = [data.Sample(shared + s.input_ids, [-100] * prefix + s.labels) for s in samples]
    (batch,) = data.make_batches(samples, 6, 75, seed=0, share_prefix=True)
    assert len(batch.minibatches) > 1 and (batch.prefix is None) == (prefix == 0)
    model = load_model(model_ref(str(tiny_folder(family))), device="cpu")
    told = []
    losses = untrained_losses(model, batch, [2], [0, 1, 3], "batch 0", told.append)

    stock = AutoModelForCausalLM.from_pretrained(tiny_folder(family), attn_implementation="eager").eval()
    tokens = sum(sample.num_loss_counted_tokens for sample in samples)
    with torch.no_grad():
        expected = {
            block: sum(reference_loss(stock, s, torch.ones(4, 4), {2, block}) for s in samples).item()
            / tokens
            for block in (0, 1, 3)
        }
    assert losses == pytest.approx(expected, rel=1e-4) and sum(told) == pytest.approx(3)
    trainer = ScaleTrainer(model, 1e-2)
    trainer.start([2, 0])
    assert trainer.run([batch], "epoch 0") == pytest.approx([losses[0]], rel=1e-5)


def test_screening_trains_only_the_best_before_training(tiny_folder, tmp_path):
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    full = iterate(tiny_folder(), batches)
    first = {block: losses[0] for block, losses in full.batch_losses.items()}
    best = sorted(sorted(first, key=first.get)[:2])
    race = Race(first_look=1, confidence=math.inf, screening=0.5)
    journal = tmp_path / "journal.jsonl"
    raced = iterate(tiny_folder(), batches, race=race, journal=Journal(journal, {}))
    assert raced.untrained_losses == pytest.approx(first, rel=1e-5)
    assert sorted(raced.batch_losses) == best and raced.losses.items() <= full.losses.items()
    for block in set(first) - set(best):
        assert raced.dropped[block]["after_batches"] == 0
    assert sum(map(len, raced.batch_losses.values())) == 2 + 6 - 1 + 1
    assert raced.candidate_epochs == pytest.approx((8 + 4 / 3) / 6)
    written = journal.read_bytes()
    assert iterate(tiny_folder(), batches, race=race, journal=Journal(journal, {})) == raced
    assert journal.read_bytes() == written  # nothing was computed again


def racing(*losses: list[float]) -> list[Candidate]:
    return [Candidate(block, list(values)) for block, values in enumerate(losses)]


def test_losses_are_compared_in_pairs():
    hard_and_easy = [5.0, 1.0, 4.0, 2.0]
    always_worse = [x + 0.10 + 0.001 * i for i, x in enumerate(hard_and_easy)]
    sometimes_worse = [x + d for x, d in zip(hard_and_easy, [0.2, -0.19, 0.2, -0.19], strict=True)]
    left = schedules.not_ruled_out(racing(hard_and_easy, always_worse, sometimes_worse), confidence=2.0)
    # The typical noise (the median of 0.001 and 0.2) leaves the second in doubt, its own does not.
    assert [candidate.block for candidate in left] == [0, 1, 2]
    left = schedules.not_ruled_out(racing(hard_and_easy, always_worse), confidence=2.0)
    assert [candidate.block for candidate in left] == [0]
    assert len(schedules.not_ruled_out(racing(hard_and_easy, always_worse), math.inf)) == 2


def test_too_few_batches_leave_all_in_doubt():
    losses = [1.0, 1.1, 1.2], [2.0, 2.1, 2.2]
    assert len(schedules.not_ruled_out(racing(*losses), confidence=2.0)) == 2
    assert len(schedules.not_ruled_out(racing(*(x + [1.0] for x in losses)), confidence=2.0)) == 1


def test_fewer_go_on_the_more_batches_were_seen():
    race = Race(first_look=2, confidence=math.inf)
    assert [race.most_survivors(10, batches) for batches in (1, 2, 3, 4, 6, 8, 20)] == [10, 5, 4, 3, 2, 2, 1]
    candidates = racing(*[[3.0 - block / 10] * 2 for block in range(10)])
    assert [candidate.block for candidate in race.survivors(candidates, 10)] == [5, 6, 7, 8, 9]
    # Two batches of ten, then one of five and of four, two of three, and one of two.
    assert race.most_batches(10, 7) == 2 * 10 + 5 + 4 + 3 + 3 + 2
    assert race.most_batches(10, 7, processes=4) == 2 * 3 + 2 + 1 + 1 + 1 + 1
    assert schedules.FULL.most_batches(10, 12) == 120
    # Screening ten on two batches costs seven batches, three are left.
    assert Race(2, math.inf, screening=0.3).most_batches(10, 7) == 7 + 2 * 3 + 3 + 3 + 3 + 3 + 2


def test_the_default_race_is_bounded_whatever_the_data():
    arguments = block_selection.build_parser().parse_args(["--model", "smollm", "--data_path", "-"])
    for num_batches, share in ((12, 1 / 4), (16, 1 / 4), (64, 1 / 8), (128, 1 / 8), (1000, 1 / 8)):
        race = Race(schedules.default_first_look(num_batches), arguments.confidence, arguments.screening)
        for layers in (28, 30, 32):
            assert race.most_batches(layers, num_batches) <= share * layers * num_batches


def test_a_race_keeps_to_its_bound(tiny_folder):
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    race = Race(first_look=1, confidence=math.inf)
    raced = iterate(tiny_folder(), batches, race=race)
    assert sorted(len(losses) for losses in raced.batch_losses.values()) == [1, 1, 2, 6]
    assert raced.candidate_epochs == 10 / 6 == race.most_batches(4, 6) / 6


def test_looks_end_with_the_last_batch():
    assert Race(2, 2.0).looks(5) == [2, 3, 4, 5]
    assert Race(8, 2.0).looks(5) == [5]
    assert schedules.FULL.looks(7) == [7]
    looks = Race(2, 2.0).looks(100)
    assert looks[-1] == 100 and looks == sorted(set(looks)) and len(looks) < 50


def test_journal_refuses_other_settings_and_names_them(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"model": "a", "learning_rate": 0.01})
    with pytest.raises(InputError, match="learning_rate = 0.01, now it is 0.02"):
        Journal(path, {"model": "a", "learning_rate": 0.02})


def test_journal_gives_the_longest_training_it_has():
    journal = Journal(None, {})
    state = ScaleState(torch.rand(4, 2, 4))
    for count in (1, 3):
        journal.add([], Candidate(0, [1.0, 2.0, 3.0][:count], state))
    assert journal.find([], 0, 0, 3).losses == [1.0, 2.0, 3.0] == journal.find([], 0, 1, 5).losses
    assert torch.equal(journal.find([], 0, 0, 5).state.tensors, state.tensors)
    assert journal.find([], 0, 0, 2) == Candidate(0, [1.0, 2.0])  # the losses, not the state then
    assert journal.find([], 0, 3, 5) is None
    journal.add([], Candidate(0, [1.0, 2.0, 3.0, 4.0]))
    assert journal.find([], 0, 3, 5) is None  # an epoch's end has no state to go on from
    assert journal.find([], 0, 3, 4).losses == [1.0, 2.0, 3.0, 4.0]
    assert journal.find([], 1, 0, 4) is None and journal.find([2], 0, 0, 4) is None


def test_journal_survives_a_torn_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"seed": 1}).add([3], Candidate(0, [1.0, 2.0]))
    with open(path, "a") as file:
        file.write('{"skipped": [3], "blo')
    journal = Journal(path, {"seed": 1})
    assert journal.find([3], 0, 0, 2).losses == [1.0, 2.0] and journal.find([3], 1, 0, 2) is None
    journal.add([3], Candidate(1, [4.0, 4.0]))
    assert len(Journal(path, {"seed": 1}).entries) == 2


def test_a_journal_serves_another_schedule(tiny_folder, tmp_path):
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    expected = iterate(tiny_folder(), batches)
    race = Race(first_look=1, confidence=math.inf)
    path = tmp_path / "journal.jsonl"
    raced = iterate(tiny_folder(), batches, race=race, journal=Journal(path, {}))
    assert raced.loss == expected.losses[raced.block]
    assert iterate(tiny_folder(), batches, journal=Journal(path, {})) == expected
    written = path.read_bytes()
    for look in (1, 2, 4):  # a full search's losses say all that a race wants to know
        race = Race(first_look=look, confidence=1.0)
        again = iterate(tiny_folder(), batches, race=race, journal=Journal(path, {}))
        assert again == iterate(tiny_folder(), batches, race=race)
    assert path.read_bytes() == written


def test_a_race_goes_on_from_another_ones_looks(tiny_folder, tmp_path):
    batches = data.make_batches(random_samples(12), 2, 60, seed=5)
    path, settings = tmp_path / "journal.jsonl", dict(confidence=math.inf)
    iterate(tiny_folder(), batches, race=Race(first_look=2, **settings), journal=Journal(path, {}))
    for look in (1, 3):
        race = Race(first_look=look, **settings)
        found = iterate(tiny_folder(), batches, race=race, journal=Journal(path, {}))
        assert found == iterate(tiny_folder(), batches, race=race)


def write_data(path, samples) -> None:
    with open(path, "w") as file:
        for sample in samples:
            file.write(json.dumps({"input_ids": sample.input_ids, "labels": sample.labels}) + "\n")


def selection_command(folder, path, output, *more) -> list[str]:
    command = [sys.executable, "block_selection.py", "--model", str(folder), "--data_path", str(path)]
    return [
        *command,
        "--device",
        "cpu",
        "--batch_size",
        "2",
        "--num_blocks",
        "2",
        "--output",
        str(output),
        *more,
    ]


@pytest.mark.parametrize("schedule", ["full", "race"])
def test_killed_at_any_moment_it_ends_alike(tiny_folder, tmp_path, schedule):
    folder = tiny_folder(num_hidden_layers=6)
    write_data(tmp_path / "data.jsonl", random_samples(16))
    common = ["--search", schedule]
    if schedule == "race":
        common += ["--confidence", "1.0", "--screening", "0.7"]
    whole = selection_command(folder, tmp_path / "data.jsonl", tmp_path / "whole.json", *common)
    expected = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert expected.count("Best block to remove") == 2

    output = tmp_path / "killed.json"
    command = selection_command(folder, tmp_path / "data.jsonl", output, *common)
    journal = output.with_suffix(".journal.jsonl")
    rng, kills, lines = random.Random(schedule), 0, 0
    while kills < 5:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        target = lines + rng.randint(1, 2)  # kill when so many lines stand, and a moment later
        while process.poll() is None and count_lines(journal) < target:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        finished = process.poll() is not None
        if not finished:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if finished:  # too fast to be killed again: from the beginning
            journal.unlink()
        lines = count_lines(journal)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert again == expected
    reports = [json.loads(path.read_text())["iterations"] for path in (output, tmp_path / "whole.json")]
    assert reports[0] == reports[1]


def count_lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
