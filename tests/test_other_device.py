"""Search, training and generation on a device that is not the CPU: the same numbers, no mixed devices.

On a GPU where there is one, and on a pretended device everywhere.
"""

import contextlib

import pytest
import torch
from other_device import Far, MixedDevices, to_far, two_devices
from test_training import loaded, random_samples, with_prefix
from transformers import AutoModelForCausalLM

from hopscotch_common.answers import decoding
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.search.schedule import COSINE, FULL, UNTRAINED, Candidate, Schedule
from hopscotch_common.search.search import Search
from hopscotch_common.training import TrainingOptions, loss
from hopscotch_common.training.distributed import Group
from hopscotch_common.training.trainer import EpochTraining, ScaleState

SEARCHES = {"full": FULL, "race": Schedule(1, 0.5), "untrained": UNTRAINED, "cosine": COSINE}


cuda = pytest.param(
    (lambda model: model.to("cuda"), contextlib.nullcontext),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    id="cuda",
)


@pytest.fixture(params=[pytest.param((to_far, two_devices), id="pretended"), cuda])
def on_both(request):
    """Gives, of `work(move)`, (its result on the CPU, its result where `move` puts models elsewhere)."""
    move, other_device = request.param

    def run(work) -> tuple:
        near = work(lambda model: model)
        with other_device():
            return near, work(move)

    return run


def is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not isinstance(tensor, Far)


@pytest.mark.parametrize(
    ("search", "measure", "prefix", "rank"),
    [
        ("full", "kl", True, 3),
        ("race", "ce", True, 0),
        ("race", "kl", False, 3),
        ("untrained", "ce", False, 0),
        ("cosine", "kl", True, 3),
    ],
)
def test_a_search(on_both, tiny_folder, search, measure, prefix, rank):
    samples = with_prefix(random_samples(6), 30) if prefix else random_samples(6)

    def work(move):
        model = move(loaded(tiny_folder("llama"), replacement_rank=rank))
        options = TrainingOptions(1e-2, 3, loss=measure)
        trainer = CandidateTrainer(model, samples[:4], options, samples[4:])
        if rank:
            trainer.fit_maps()
        found = Search(trainer, SEARCHES[search]).next_block([3])
        held_out = trainer.held_out([3, found.block], found.state)
        return found.block, found.losses, found.distances, vars(held_out)

    near, far = on_both(work)
    assert far[0] == near[0]
    for ours, theirs in zip(far[1:], near[1:], strict=True):
        if "kl_error" in ours:  # two answers that are much alike: what is left of them is less exact
            assert ours.pop("kl_error") == pytest.approx(theirs.pop("kl_error"), rel=1e-2)
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("granularity", "rank", "checkpointing"),
    [("layer", 3, False), ("channel", 0, True), ("channel", 3, True)],
)
def test_training_and_going_on(on_both, tiny_folder, granularity, rank, checkpointing):
    def work(move):
        model = move(loaded(tiny_folder("llama"), scale_granularity=granularity, replacement_rank=rank))
        options = TrainingOptions(1e-2, 3, gradient_checkpointing=checkpointing, loss="kl")
        trained = EpochTraining(model, [1, 2], random_samples(6), random_samples(2, 1), options)
        if rank:
            trained.fit_maps()
        figures = [vars(found) for found in trained.baselines().values()]
        trained.start()
        first = trained.epoch(0)
        trained.start(ScaleState(first.state.tensors, first.state.maps))
        second = trained.epoch(1)
        return figures + [vars(second.held_out)], second.state

    near, far = on_both(work)
    for ours, theirs in zip(far[0], near[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert is_on_cpu(far[1].tensors)  # as what is saved does
    torch.testing.assert_close(far[1].tensors[0], near[1].tensors[0], rtol=1e-4, atol=1e-5)
    for key, ours in far[1].maps.items():
        assert is_on_cpu(ours)
        torch.testing.assert_close(ours[0], near[1].maps[key][0], rtol=1e-3, atol=1e-5)


def test_generation(on_both, tiny_folder):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]

    def work(move):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
        answers = decoding.decode(move(model), prompts, [6, 4, 8], {2}, 64)
        return sorted((answer.index, answer.token_ids) for answer in answers)

    near, far = on_both(work)
    assert far == near


def test_what_is_left_on_the_cpu_is_found(tiny_folder, monkeypatch):
    """As where a `.to(device)` is forgotten."""
    model, options = loaded(tiny_folder("llama")), TrainingOptions(1e-2, 3)
    counted = loss._counted
    monkeypatch.setattr(loss, "_counted", lambda *given: [tensor.cpu() for tensor in counted(*given)])
    with two_devices(), pytest.raises(MixedDevices, match="aten"):
        CandidateTrainer(to_far(model), random_samples(3), options).train([], Candidate(1), 1, Group(), print)
