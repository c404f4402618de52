"""Losses before training, against a plain loop, and the screening of a race by them."""

import json
import math

import pytest
import torch
from conftest import FAMILY_SIZES
from test_search import epoch, iterate
from test_training import make_batches, random_samples, reference_loss
from transformers import AutoModelForCausalLM

from hopscotch_common.loading.loader import load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.search.candidates import untrained_losses
from hopscotch_common.search.schedule import Schedule
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Sample
from hopscotch_common.training.trainer import ScaleTrainer, prepare_model


@pytest.mark.parametrize("kind", ["checkpointed", "packed"])
def test_untrained_losses_do_not_depend_on_how_they_are_run(tiny_folder, kind):
    samples = random_samples(6)
    losses = []
    for special in (False, True):
        model = load_model(model_ref(str(tiny_folder())), device="cpu")
        checkpointed = special and kind == "checkpointed"
        prepare_model(model, TrainingOptions(1e-2, gradient_checkpointing=checkpointed))
        (batch,) = make_batches(samples, 6, 75, packed=special and kind == "packed")
        losses.append(untrained_losses(model, batch, [2], [0, 1, 3], "batch 0"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_untrained_loss_that_is_not_finite_is_infinite(tiny_folder):
    model = load_model(model_ref(str(tiny_folder())), device="cpu")
    model.model.layers[3].mlp.down_proj.weight.data.fill_(math.inf)
    (batch,) = make_batches(random_samples(2), 2, 60)
    assert untrained_losses(model, batch, [], [1], "batch 0") == {1: math.inf}


def test_screening_goes_on_where_it_was(tiny_folder, tmp_path):
    batches = epoch(12, 2)
    race = Schedule(first_look=3, screening=0.5)
    whole = tmp_path / "whole.jsonl"
    expected = iterate(tiny_folder(), batches, rule=race, journal=whole)
    lines = whole.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:3]))  # the settings and two of three screened batches
    assert iterate(tiny_folder(), batches, rule=race, journal=cut) == expected
    record = json.loads(lines[1])
    del record["untrained"]["1"]  # as after a run with `--prev`, which screens fewer
    cut.write_text(lines[0] + json.dumps(record) + "\n")
    assert iterate(tiny_folder(), batches, rule=race, journal=cut) == expected


def test_screening_that_would_drop_nobody_is_left_out(tiny_folder):
    race = Schedule(first_look=1, screening=0.4)
    assert race.most_trained(2) == race.most_trained(5) == 2 and race.most_trained(1) == 1
    assert race.screened_batches(2, 6) == 0 and race.screened_batches(3, 6) == 1
    batches = epoch(12, 2)
    raced = iterate(tiny_folder(), batches, skipped=[0, 3], rule=race)
    assert not raced.untrained_losses and raced.dropped.keys().isdisjoint({raced.block})


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
@pytest.mark.parametrize("prefix", [0, 9])
def test_untrained_losses_equal_a_plain_loop(tiny_folder, family, prefix):
    samples = random_samples(6)
    shared = list(range(40, 40 + prefix))
    samples = [Sample(shared + s.input_ids, [-100] * prefix + s.labels) for s in samples]
    (batch,) = make_batches(samples, 6, 75, seed=0, share_prefix=True)
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
    trainer = ScaleTrainer(model, 1e-2, [2, 0])
    assert trainer.run([batch], "epoch 0") == pytest.approx([losses[0]], rel=1e-5)


def test_screening_trains_only_the_best_before_training(tiny_folder, tmp_path):
    batches = epoch(12, 2)
    full = iterate(tiny_folder(), batches)
    first = {block: losses[0] for block, losses in full.batch_losses.items()}
    best = sorted(sorted(first, key=first.get)[:2])
    race = Schedule(first_look=1, screening=0.5)
    journal = tmp_path / "journal.jsonl"
    raced = iterate(tiny_folder(), batches, rule=race, journal=journal)
    assert raced.untrained_losses == pytest.approx(first, rel=1e-5)
    assert sorted(raced.batch_losses) == best and raced.losses.items() <= full.losses.items()
    for block in set(first) - set(best):
        assert raced.dropped[block]["after_batches"] == 0
    assert sum(map(len, raced.batch_losses.values())) == 2 + 6 - 1 + 1
    assert raced.candidate_epochs == pytest.approx((8 + 4 / 3) / 6)
    written = journal.read_bytes()
    assert iterate(tiny_folder(), batches, rule=race, journal=journal) == raced
    assert journal.read_bytes() == written  # nothing was computed again
