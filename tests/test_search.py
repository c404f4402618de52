"""The search: against a plain loop, races against full searches, and a journal that was cut anywhere."""

import contextlib
import dataclasses
import json
import math
import sys

import pytest
import torch
from test_training import loaded, plain_training, random_samples
from transformers import AutoModelForCausalLM

import block_selection
from hopscotch_common import scales
from hopscotch_common.errors import InputError, TrainingError
from hopscotch_common.resumable import ResumableLog
from hopscotch_common.search import journal as journals
from hopscotch_common.search import schedule
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.search.journal import Journal
from hopscotch_common.search.schedule import Candidate, Schedule
from hopscotch_common.search.search import Picks, Search
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.loss import HeldOut
from hopscotch_common.training.trainer import ScaleState


@dataclasses.dataclass
class Epoch:
    """What candidates train on."""

    samples: list
    batch_size: int


def epoch(count: int, batch_size: int) -> Epoch:
    return Epoch(random_samples(count), batch_size)


@contextlib.contextmanager
def journal_at(path, settings=None):
    """The journal in a file; None: one that keeps nothing."""
    if path is None:
        yield Journal()
        return
    with ResumableLog(path, settings or {}, journals.KIND, journals.REMEDY) as log:
        yield Journal(((f"line {n}", record) for n, record in log.records), log.append)


def iterate(folder, data: Epoch, skipped=(), rule=schedule.FULL, known=None, journal=None, loss="ce"):
    """One iteration of the search. journal: its file."""
    model = loaded(folder)
    options = TrainingOptions(1e-2, data.batch_size, max_tokens_per_batch=60, seed=5, loss=loss)
    with journal_at(journal) as opened:
        search = Search(CandidateTrainer(model, data.samples, options), rule, opened)
        return search.next_block(list(skipped), known)


def reference_losses(
    folder, samples, batch_size, seed, skipped, loss="ce", learning_rate=1e-2, blocks=range(4)
) -> dict[int | None, float]:
    """Every candidate's mean epoch loss, in a plain loop over the stock class; None: nothing more skipped."""
    results = {}
    for block in blocks:
        if block not in skipped:
            without, values = {*skipped, block} - {None}, torch.ones(4, 4)
            losses = plain_training(folder, samples, batch_size, seed, values, without, loss, learning_rate)
            results[block] = sum(losses) / len(losses)
    return results


@pytest.mark.parametrize(
    ("rule", "skipped", "loss"),
    [
        (schedule.FULL, [], "ce"),
        (schedule.FULL, [2], "kl"),
        (schedule.UNTRAINED, [2], "kl"),
        (schedule.UNTRAINED, [0, 3], "ce"),
    ],
)
def test_a_search_equals_a_plain_loop(tiny_folder, tmp_path, rule, skipped, loss):
    journal = tmp_path / "journal.jsonl"
    found = iterate(tiny_folder(), epoch(8, 3), skipped, rule, journal=journal, loss=loss)
    trains = rule is schedule.FULL
    rate, cost = (1e-2, 1) if trains else (0, schedule.SCREENING_COST)
    expected = reference_losses(tiny_folder(), random_samples(8), 3, 5, skipped, loss, rate)
    assert found.losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.block == min(expected, key=expected.get) and found.loss == found.losses[found.block]
    assert found.candidate_epochs == pytest.approx(len(expected) * cost) and trains == bool(found.state)
    written = journal.read_bytes()
    assert iterate(tiny_folder(), epoch(8, 3), skipped, rule, journal=journal, loss=loss) == found
    assert journal.read_bytes() == written


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_cosine_picks_what_turns_the_stream_least(tiny_folder, family):
    folder, samples = tiny_folder(family), random_samples(8)
    found = iterate(folder, epoch(8, 3), [2], schedule.COSINE)

    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    layers, attention = stock.model.layers, {}
    torch.nn.init.zeros_(layers[2].self_attn.o_proj.weight)  # so that it is skipped
    for block, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(
            lambda module, inputs, output, block=block: attention.update({block: output[0]})
        )
    sums = dict.fromkeys((0, 1, 3), 0.0)
    for sample in samples:
        with torch.no_grad():
            states = stock.model(torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        for block in sums:
            after = states[block] + attention[block] * getattr(stock.config, "residual_multiplier", 1.0)
            cosine = (states[block] * after).sum(-1) / states[block].norm(dim=-1) / after.norm(dim=-1)
            sums[block] += (1 - cosine).sum().item()
    tokens = sum(map(len, samples))
    assert found.distances == pytest.approx({b: total / tokens for b, total in sums.items()}, rel=1e-3)
    assert found.block == min(sums, key=sums.get)
    before_training = reference_losses(folder, samples, 3, 5, [2], learning_rate=0)[found.block]
    assert (
        found.losses == {found.block: pytest.approx(before_training, rel=1e-4)} == {found.block: found.loss}
    )


def test_distances_in_16_bits(tiny_folder):
    """Of blocks that hardly turn the stream, as real ones: a bfloat16 near 1 could not tell them apart."""
    found = []
    for dtype in ("float32", "bfloat16"):
        model = loaded(tiny_folder(), dtype)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.data *= 0.05
        trainer = CandidateTrainer(model, random_samples(8), TrainingOptions(1e-2, 3, 60))
        found.append(trainer.distances([2], [0, 1, 3]))
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_known_losses_are_not_trained_again(tiny_folder):
    batches = epoch(12, 2)
    full = iterate(tiny_folder(), batches)
    known = {block: full.losses[block] for block in (0, 1)}
    resumed = iterate(tiny_folder(), batches, known=known)
    assert resumed.losses == full.losses and resumed.candidate_epochs == 2
    assert iterate(tiny_folder(), batches, known={0: 0.0}).block == 0
    race = Schedule(first_look=1, screening=0.5)
    raced = iterate(tiny_folder(), batches, rule=race, known={full.block: full.loss})
    assert raced.block == full.block and set(raced.untrained_losses) == set(full.losses) - {full.block}
    assert raced.losses.items() <= full.losses.items() and len(raced.losses) == 2


def overflowing(monkeypatch, blocks, backward: bool = False) -> None:
    """From here on, loaded models overflow when one of these blocks is skipped, as float16 may.

    backward: in the gradients alone, so that the loss is finite and what was trained is not.
    """
    real = loaded

    def overflow(layer, inputs, output):
        if not layer.skip_attention:
            return output
        if not backward:
            return output * math.inf
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    def load(*args, **kwargs):
        model = real(*args, **kwargs)
        for block in blocks:
            model.model.layers[block].register_forward_hook(overflow)
        return model

    monkeypatch.setattr(sys.modules[__name__], "loaded", load)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rule", [schedule.FULL, Schedule(2), Schedule(1, screening=0.75)])
def test_a_candidate_that_diverges_loses(tiny_folder, tmp_path, monkeypatch, caplog, rule, backward):
    data = epoch(12, 2)
    expected = iterate(tiny_folder(), data, rule=rule)
    hopeless = next(block for block in expected.batch_losses if block != expected.block)
    overflowing(monkeypatch, [hopeless], backward)
    journal = tmp_path / "journal.jsonl"
    found = iterate(tiny_folder(), data, rule=rule, journal=journal)
    assert list(found.diverged) == [hopeless] and hopeless not in found.losses
    assert found.block != hopeless and all(map(math.isfinite, found.losses.values()))
    if rule is schedule.FULL:
        assert found.block == expected.block and found.loss == expected.loss
    warnings = [record.message for record in caplog.records if "diverges" in record.message]
    assert len(warnings) == 1 and f"without block {hopeless}" in warnings[0]
    written = journal.read_bytes()
    assert iterate(tiny_folder(), data, rule=rule, journal=journal) == found
    assert journal.read_bytes() == written
    json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(found, state=None)), allow_nan=False))


def test_cosine_passes_over_what_is_not_finite(tiny_folder, monkeypatch, caplog):
    expected = iterate(tiny_folder(), epoch(4, 2), rule=schedule.COSINE)
    hopeless = expected.block
    real = Search.__init__

    def spoil(search, trainer, *arguments, **options):
        real(search, trainer, *arguments, **options)
        layer = trainer.model.model.layers[hopeless]
        after = layer.after_attention
        layer.after_attention = lambda x, **kw: after(x, **kw) * (1 if layer.skip_attention else math.inf)

    monkeypatch.setattr(Search, "__init__", spoil)
    monkeypatch.setattr(
        CandidateTrainer, "screen", lambda self, skipped, blocks, *_: dict.fromkeys(blocks, 1.0)
    )
    found = iterate(tiny_folder(), epoch(4, 2), rule=schedule.COSINE)
    assert list(found.diverged) == [hopeless] and found.block != hopeless
    assert found.distances == {b: d for b, d in expected.distances.items() if b != hopeless}


def test_the_originals_own_kl_is_0_though_rounding_says_otherwise(tiny_folder, monkeypatch):
    """So that --max_loss_increase is the KL itself, and not a multiple of a rounding error."""
    measured = HeldOut(cross_entropy=1.0, kl=-2.7e-8, agreement=1.0)
    monkeypatch.setattr(CandidateTrainer, "held_out", lambda *_: measured)
    model = loaded(tiny_folder())
    options = TrainingOptions(1e-2, 2, loss="kl")
    trainer = CandidateTrainer(model, random_samples(4), options, held_out=random_samples(2))
    assert Picks(Search(trainer, schedule.UNTRAINED), most_increase=0.1).increase(0.07) == 0.07


def test_it_is_an_error_only_when_all_diverge(tiny_folder, monkeypatch):
    overflowing(monkeypatch, [0, 1, 2, 3])
    with pytest.raises(TrainingError, match="every candidate diverged: candidate block 0, epoch 0, batch 0"):
        iterate(tiny_folder(), epoch(4, 2))


def test_the_last_block_of_the_kind_that_the_cache_needs_is_no_candidate(tiny_folder):
    mixed = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
    model = loaded(tiny_folder("qwen2", **mixed))
    assert scales.skippable_blocks(model, [0]) == [2, 3]
    assert scales.skippable_blocks(model, [2, 3]) == [0, 1]
    assert scales.skippable_blocks(model, [0, 2]) == [3]


def test_a_race_keeps_to_its_bound(tiny_folder):
    batches = epoch(12, 2)
    full = iterate(tiny_folder(), batches)
    race = Schedule(first_look=1)
    raced = iterate(tiny_folder(), batches, rule=race)
    assert sorted(len(losses) for losses in raced.batch_losses.values()) == [1, 1, 2, 6]
    assert raced.candidate_epochs == 10 / 6 == race.longest(4, 6) / 6
    for block, losses in raced.batch_losses.items():  # the same trajectory, cut short
        assert losses == full.batch_losses[block][: len(losses)]


def test_journal_refuses_other_settings_and_names_them(tmp_path):
    path = tmp_path / "journal.jsonl"
    with journal_at(path, {"model": "a", "learning_rate": 0.01}) as journal:
        journal.add([3], Candidate(0, [1.0, 2.0]))
    with pytest.raises(InputError, match="learning_rate = 0.01, now it is 0.02"):
        with journal_at(path, {"model": "a", "learning_rate": 0.02}):
            pass


def test_journal_gives_the_longest_training_it_has():
    journal = Journal()
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


def test_a_candidate_that_diverged_later_passes_the_look_that_it_passed():
    """So a race over its journal is the race that it was."""
    journal = Journal()
    state = ScaleState(torch.rand(4, 2, 4))
    journal.add([], Candidate(0, [1.0, 2.0], state))
    journal.add([], Candidate(0, [1.0, 2.0], diverged="batch 2"))
    for records in (journal, Journal()):
        if records is not journal:  # in the other order
            records.add([], Candidate(0, [1.0, 2.0], diverged="batch 2"))
            records.add([], Candidate(0, [1.0, 2.0], state))
        assert records.find([], 0, 0, 2).diverged is None and records.find([], 0, 0, 2).state is not None
        assert records.find([], 0, 2, 4).diverged == "batch 2"
        assert records.find([], 0, 0, 1) == Candidate(0, [1.0])


def test_a_journal_serves_another_schedule(tiny_folder, tmp_path):
    batches = epoch(12, 2)
    expected = iterate(tiny_folder(), batches)
    race = Schedule(first_look=1)
    path = tmp_path / "journal.jsonl"
    raced = iterate(tiny_folder(), batches, rule=race, journal=path)
    assert raced.loss == expected.losses[raced.block]
    assert iterate(tiny_folder(), batches, journal=path) == expected
    written = path.read_bytes()
    for look in (1, 2, 4):  # a full search's losses say all that a race wants to know
        race = Schedule(first_look=look)
        again = iterate(tiny_folder(), batches, rule=race, journal=path)
        assert again == iterate(tiny_folder(), batches, rule=race)
    assert path.read_bytes() == written


def test_a_race_goes_on_from_another_ones_looks(tiny_folder, tmp_path):
    batches = epoch(12, 2)
    path = tmp_path / "journal.jsonl"
    iterate(tiny_folder(), batches, rule=Schedule(first_look=2), journal=path)
    written = path.read_text()
    for look in (1, 3):
        race = Schedule(first_look=look)
        found = iterate(tiny_folder(), batches, rule=race, journal=path)
        assert found == iterate(tiny_folder(), batches, rule=race)
    assert path.read_text().startswith(written)


def write_data(path, samples) -> None:
    with open(path, "w") as file:
        for sample in samples:
            file.write(json.dumps({"input_ids": sample.input_ids, "labels": sample.labels}) + "\n")


@pytest.mark.parametrize("rule", [["full"], ["race", "--screening", "0.7"]])
def test_whatever_is_left_of_the_journal_it_ends_alike(tiny_folder, tmp_path, capsys, rule):
    """As after kill -9, also in the middle of a line."""
    write_data(tmp_path / "data.jsonl", random_samples(12))
    command = ["--model", tiny_folder(), "--data_path", tmp_path / "data.jsonl", "--device", "cpu"]
    command += ["--batch_size", 2, "--num_blocks", 2, "--output", tmp_path / "report.json", "--search", *rule]
    journal = tmp_path / "report.journal.jsonl"

    def select() -> tuple:
        assert block_selection.main(list(map(str, command))) == 0
        iterations = json.loads((tmp_path / "report.json").read_text())["iterations"]
        return capsys.readouterr().out, iterations, sorted(journal.read_bytes().splitlines())

    expected = select()
    assert expected[0].count("Best block to remove") == 2
    lines = journal.read_bytes().splitlines(keepends=True)
    for left in range(0, len(lines), 3):
        journal.write_bytes(b"".join(lines[:left]) + lines[left][: len(lines[left]) // 2])
        assert select() == expected
