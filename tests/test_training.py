"""Batches, the loss, and scale training against plain loops over the stock class."""

import contextlib
import dataclasses
import gzip
import json
import math
import random
import statistics
import types

import pytest
import torch
from conftest import ROOT, stock_config
from driving import succeed
from measuring import saved_bytes
from test_modeling import reference_logits
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig

from hopscotch_common import scales
from hopscotch_common.errors import Diverged, InputError, TrainingError, is_out_of_memory
from hopscotch_common.loading.loader import load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training import batches as data
from hopscotch_common.training.batches import Batch, Sample
from hopscotch_common.training.loss import LOGIT_ROWS, HeadLoss, Originals, summed_loss
from hopscotch_common.training.trainer import (
    EpochBatches,
    EpochTraining,
    ScaleState,
    ScaleTrainer,
    evaluate,
    prepare_model,
)


def random_samples(count: int = 8, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(5, 20, (), generator=generator))
        prompt = int(torch.randint(1, 4, (), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        samples.append(Sample(ids, [-100] * prompt + ids[prompt:]))
    return samples


def make_batches(samples, batch_size: int, max_tokens: int, seed: int = 0, **more) -> list[Batch]:
    options = TrainingOptions(1e-2, batch_size, seed=seed)
    return data.make_batches(samples, options, max_tokens, **more)


def loaded(folder, dtype: str = "auto", **options):
    """A tiny model on the CPU, ready for scales."""
    return load_model(model_ref(str(folder)), dtype, "cpu", **options)


def trainer_of(folder, skipped, learning_rate=1e-2, loss="ce", training=None, **options) -> ScaleTrainer:
    """training: what `prepare_model` switches on; the other options are of the model."""
    model = loaded(folder, **options)
    if training is not None:
        prepare_model(model, training)
    return ScaleTrainer(model, learning_rate, skipped, originals=originals_for(loss, model))


def originals_for(loss: str, model) -> Originals | None:
    return Originals(model) if loss == "kl" else None


def loss_of_logits(
    logits: torch.Tensor, sample: Sample, original: torch.Tensor | None = None
) -> torch.Tensor:
    """Of [tokens, vocabulary], summed over the counted tokens: cross entropy, or KL(original || logits)."""
    labels = torch.tensor(sample.labels)[1:]
    if original is None:
        return cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
    ours, theirs = (x[:-1][labels != -100].log_softmax(-1) for x in (logits, original.detach()))
    return kl_div(ours, theirs, reduction="sum", log_target=True)


def reference_loss(
    stock, sample: Sample, values: torch.Tensor, skipped: set[int], loss: str = "ce"
) -> torch.Tensor:
    """Of one sample, alone, from full logits: summed cross entropy, or KL(stock || logits)."""
    ids = torch.tensor([sample.input_ids])
    original = stock(ids).logits[0] if loss == "kl" else None
    return loss_of_logits(reference_logits(stock, ids, values, skipped)[0], sample, original)


def plain_training(
    folder, samples, batch_size: int, seed: int, values: torch.Tensor, skipped, loss="ce", learning_rate=1e-2
) -> list[float]:
    """Train scales in a plain loop over the stock class, an epoch; the mean loss of each batch."""
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    optimizer = torch.optim.Adam([values.requires_grad_()], lr=learning_rate)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for start in range(0, len(order), batch_size):
        batch = [samples[i] for i in order[start : start + batch_size]]
        total = sum(reference_loss(stock, sample, values, set(skipped), loss) for sample in batch)
        mean = total / sum(sample.num_loss_counted_tokens for sample in batch)
        optimizer.zero_grad()
        mean.backward()
        values.grad[list(skipped), : values.shape[1] // 2 - 1] = (
            0  # b_attn of a skipped block is no parameter
        )
        optimizer.step()
        losses.append(mean.item())
    return losses


@pytest.mark.parametrize(
    ("family", "granularity", "loss", "packed"),
    [
        ("llama", "layer", "ce", False),
        ("llama", "channel", "kl", True),
        ("granite", "layer", "kl", False),
        ("granite", "channel", "ce", True),
    ],
)
def test_training_equals_a_plain_loop(tiny_folder, family, granularity, loss, packed):
    folder, samples = tiny_folder(family), random_samples()
    batches = make_batches(samples, 3, 40, seed=7, packed=packed)
    assert any(len(batch.minibatches) > 1 for batch in batches)
    trainer = trainer_of(folder, [1], loss=loss, scale_granularity=granularity)
    losses = trainer.run(batches, "epoch 0")
    b_size = {"layer": 1, "channel": 32}[granularity]
    values = torch.ones(4, 2 * b_size + 2)
    assert_close(losses, plain_training(folder, samples, 3, 7, values, [1], loss), rtol=1e-4, atol=1e-5)
    trained = scales.snapshot(trainer.model)
    assert not trained[1, :b_size].any() and not torch.allclose(trained[1, b_size:], torch.ones(1))
    values.data[1, :b_size] = 0
    assert_close(trained, values.detach(), rtol=1e-4, atol=1e-4)
    if granularity == "channel":
        assert trained[0, :b_size].std() > 1e-3  # each channel has its own


def test_checkpointed_layers_train_alike_and_save_less(tiny_folder):
    batches = make_batches(random_samples(), 4, 60)
    losses, kept = [], []
    for options in ({}, {"gradient_checkpointing": True}):
        folder = tiny_folder(attention_dropout=0.5)  # which must stay off, though only training checkpoints
        trainer = trainer_of(folder, [0], loss="kl", training=TrainingOptions(1e-2, **options))
        losses.append(trainer.run(batches, "epoch 0"))
        kept.append(
            saved_bytes(trainer.model, lambda t=trainer: summed_loss(t.model, batches[0].minibatches[0]))
        )
    assert_close(losses[1], losses[0])
    assert 0 < kept[1] < kept[0] / 3


def test_frozen_weights_get_no_gradient_and_keep_no_input(tiny_folder):
    model = loaded(tiny_folder())
    (batch,) = make_batches(random_samples(4), 4, 1000, seed=0)
    scales.reset(model, [1])
    inputs = {}
    for name in ("gate_proj", "down_proj"):
        module = getattr(model.model.layers[3].mlp, name)
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    saved = []  # the tensors themselves, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        summed_loss(model, batch.minibatches[0]).backward()
    addresses = {tensor.data_ptr() for tensor in saved}
    assert not addresses & {tensor.data_ptr() for tensor in inputs.values()}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, s in scales.named_scales(model)} - {"model.layers.1.b_scale_attn"}


HEADS = [  # a config, and what its family makes of the head's output
    (LlamaConfig(), lambda logits: logits),
    (GraniteConfig(logits_scaling=2.0), lambda logits: logits / 2),
    (Gemma2Config(final_logit_softcapping=4.0), lambda logits: 4 * torch.tanh(logits / 4)),
]


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize(("config", "scaled"), HEADS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_sums_its_loss_in_float32(dtype, config, scaled, kind):
    torch.manual_seed(0)
    hidden = torch.randn(1000, 16).to(dtype).requires_grad_()
    head = torch.nn.Linear(16, 70, bias=False).to(dtype).requires_grad_(False)
    head.weight.normal_()
    targets, original = torch.randint(70, (1000,)), torch.randn(1000, 16).to(dtype)

    def expected(logits_of, hidden) -> torch.Tensor:
        logits = scaled(logits_of(hidden))
        if kind == "ce":
            return cross_entropy(logits, targets, reduction="sum")
        theirs = scaled(logits_of(original)).log_softmax(-1)
        return kl_div(logits.log_softmax(-1), theirs, reduction="sum", log_target=True)

    loss = HeadLoss.apply(hidden, head, config, targets, original if kind == "kl" else None)
    (2 * loss).backward()
    exact = hidden.detach().double().requires_grad_()
    total = expected(lambda states: states.double() @ head.weight.double().T, exact)
    (2 * total).backward()
    step = torch.finfo(dtype).eps
    assert loss.dtype == torch.float32
    if config is HEADS[0][0]:  # with the logits of that dtype
        of_dtype = expected(lambda states: head(states).float(), hidden.detach())
        assert math.isclose(loss.item(), of_dtype.item(), rel_tol=1e-6)
    assert math.isclose(loss.item(), total.item(), rel_tol=max(1e-6, step))
    assert_close(hidden.grad.double(), exact.grad, rtol=64 * step, atol=64 * step)


def test_no_matrix_of_all_tokens_by_the_vocabulary(tiny_folder):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == 300:
                    largest = max(largest, tensor.numel() // 300)
            return result

    (batch,) = make_batches(random_samples(60), 60, 10**6)
    assert batch.num_loss_counted_tokens > 2 * LOGIT_ROWS
    trainer = trainer_of(tiny_folder(), [1], loss="kl")
    with Watch():
        trainer.gradients(batch, "epoch 0")
        evaluate(trainer.model, [batch], "held out")
    assert largest == LOGIT_ROWS


def test_the_original_for_a_while_and_then_all_as_it_was(tiny_folder):
    model = loaded(tiny_folder())
    ids = torch.arange(3, 63).view(3, 20)
    with torch.no_grad():
        original = model(ids).logits
    trainer = ScaleTrainer(model, 1e-2, [0, 2])
    scales.restore(model, torch.rand(4, 4) + 0.5)

    def state():
        slots = [layer.self_attn.layer_idx for layer in model.model.layers if not layer.skip_attention]
        return [layer.skip_attention for layer in model.model.layers], slots, scales.snapshot(model).tolist()

    before, parameters = state(), [scale for _, scale in scales.named_scales(model)]
    output = model(ids).logits
    for end in (contextlib.nullcontext(), pytest.raises(torch.OutOfMemoryError)):
        with end as fails, scales.neutral(model):
            assert torch.equal(model(ids).logits, original)
            cache = model(ids, use_cache=True).past_key_values
            assert [layer.get_seq_length() for layer in cache.layers] == [20] * 4
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
        assert state() == before
        now = [scale for _, scale in scales.named_scales(model)]
        assert all(a is b for a, b in zip(now, parameters, strict=True))
    assert torch.equal(model(ids).logits, output)
    output.sum().backward()  # a graph of before is good still
    assert all(parameter.grad is not None for parameter in trainer.parameters)


def test_original_states_that_are_kept_are_not_computed_again(tiny_folder, monkeypatch):
    """They come in the order of the targets, though batches are shuffled and share a prefix."""
    samples = with_prefix(random_samples(8), 12)
    epochs = [make_batches(samples, 4, 100, epoch=epoch, share_prefix=True) for epoch in range(2)]
    assert max(len(minibatch.samples) for minibatch in epochs[0][0].minibatches) > 1
    trainer = trainer_of(tiny_folder(), [1], loss="kl")
    losses = [trainer.run(batches, "epoch") for batches in epochs]
    runs, model = [], trainer.model
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for kept_bytes, runs_a_minibatch in ((2**30, 1), (10, 2)):
        monkeypatch.setattr("hopscotch_common.training.loss.KEPT_BYTES", kept_bytes)
        kept = Originals(model)
        kept.keep(make_batches(samples, 4, 100, shuffle=False))
        trainer = ScaleTrainer(model, 1e-2, [1], originals=kept)
        for batches, expected in zip(epochs, losses, strict=True):
            runs.clear()
            assert_close(trainer.run(batches, "epoch"), expected, rtol=1e-4, atol=1e-5)
            # and once for each prefix
            assert len(runs) == sum(1 + runs_a_minibatch * len(batch.minibatches) for batch in batches)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_an_epoch_equals_a_plain_loop_in_an_order_of_its_own(tiny_folder, loss):
    folder, samples = tiny_folder(), random_samples()
    options = TrainingOptions(1e-2, 3, 60, seed=5, loss=loss)
    trained = EpochTraining(loaded(folder), [1], samples, [], options)
    for number in (0, 1):
        trained.start()
        values = torch.ones(4, 4)
        expected = plain_training(folder, samples, 3, 5 + number, values, [1], loss)
        epoch = trained.epoch(number)
        assert_close(epoch.losses, expected, rtol=1e-4, atol=1e-5)
        values.data[1, 0] = 0
        assert_close(epoch.state.tensors[0], values.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kernel", "checkpointing", "packed", "shared"),
    [
        ("llama", "sdpa", False, False, True),
        ("llama", "flash_attention_2", False, True, False),
        ("llama", "sdpa", True, False, False),  # transformers would leave the cache out
        ("qwen3_next", "flash_attention_2", False, False, False),  # a state runs along the row
    ],
)
def test_what_is_packed_and_what_shared(family, kernel, checkpointing, packed, shared):
    config = stock_config(family)
    config._attn_implementation_internal = kernel
    model = types.SimpleNamespace(config=config, device=torch.device("cpu"))
    options = TrainingOptions(1e-2, 4, gradient_checkpointing=checkpointing)
    batch = EpochBatches(model, with_prefix(random_samples(4), 12), options).epoch()[0]
    assert (batch.prefix is not None, batch.minibatches[0].packed) == (shared, packed)


def test_float16_gradients_of_a_large_batch_do_not_underflow(tiny_folder):
    (batch,) = make_batches(random_samples(8), 8, 2000, seed=0)
    batch = dataclasses.replace(batch, num_loss_counted_tokens=10**7)  # the rest is on other processes
    exact, found = (
        torch.cat(trainer_of(tiny_folder(), [1], dtype=dtype).gradients(batch, "epoch 0")[1])
        for dtype in ("float32", "float16")
    )
    assert_close(found, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_evaluate_is_the_mean_over_tokens(tiny_folder):
    samples = random_samples(5)
    model = loaded(tiny_folder())
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder(), attn_implementation="eager").eval()
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    scales.reset(model, [2])
    scales.restore(model, values)
    tokens = sum(sample.num_loss_counted_tokens for sample in samples)
    found = evaluate(model, make_batches(samples, 2, 60, seed=0, shuffle=False), "held out")
    with torch.no_grad():
        for loss, mean in (("ce", found.cross_entropy), ("kl", found.kl)):
            of_each = [reference_loss(stock, sample, values, {2}, loss).item() for sample in samples]
            assert math.isclose(mean, sum(of_each) / tokens, rel_tol=1e-5)
        counted = [sample.num_loss_counted_tokens for sample in samples]
        apart = [kl - found.kl * count for kl, count in zip(of_each, counted, strict=True)]  # their sum is 0
        error = math.sqrt(len(samples)) * statistics.stdev(apart) / tokens
        assert math.isclose(found.kl_error, error, rel_tol=1e-3)
        one = evaluate(model, make_batches(samples[:1], 2, 60), "one answer")
        assert one.kl_error is None and (one.answers, found.answers) == (1, len(samples))
        agreeing = 0
        for sample in samples:
            logits = reference_logits(stock, torch.tensor([sample.input_ids]), values, {2})[0]
            agreeing += (logits.argmax(-1)[:-1] == torch.tensor(sample.labels[1:])).sum().item()
    assert math.isclose(found.agreement, agreeing / tokens, rel_tol=1e-6)
    scales.reset(model)
    assert evaluate(model, make_batches(samples, 2, 60), "original").kl == 0


def test_a_paused_run_goes_on_exactly(tiny_folder):
    batches = make_batches(random_samples(), 2, 60, seed=0)
    model = loaded(tiny_folder(), scale_granularity="channel")
    whole = ScaleTrainer(model, 1e-2, [3]).run(batches, "epoch 0")
    trainer = ScaleTrainer(model, 1e-2, [3])
    first = trainer.run(batches[:2], "epoch 0")
    state = ScaleState.decode(trainer.state().encode())
    ScaleTrainer(model, 1e-2, [0]).run(batches[:1], "epoch 0")  # another candidate in between
    assert first + ScaleTrainer(model, 1e-2, [3], state).run(batches[2:], "epoch 0") == whole


def test_a_loss_that_is_not_finite_is_refused_with_its_batch(tiny_folder):
    """Also where the last step of an epoch makes it so, which no loss of that epoch tells."""
    trainer = trainer_of(tiny_folder(), [0], learning_rate=1e29)
    with pytest.raises(Diverged, match=r"epoch 0, batch 1: the loss is nan; lower --learning_rate"):
        trainer.run(make_batches(random_samples(), 2, 60), "epoch 0")
    batches = make_batches(random_samples(4), 4, 60)
    trainer = trainer_of(tiny_folder(), [0], learning_rate=1e29)
    assert math.isfinite(trainer.run(batches, "epoch 3")[-1])
    with pytest.raises(Diverged, match=r"epoch 3, batch 0, after it: loss, KL .*(nan|inf).*; lower --learn"):
        trainer.check_sound(batches, "epoch 3, batch 0")
    trainer = trainer_of(tiny_folder(), [0])
    trainer.run(batches, "epoch 3")
    trainer.check_sound(batches, "epoch 3, batch 0")
    trainer.parameters[5].data.fill_(math.nan)
    with pytest.raises(Diverged, match=r"batch 0, after it: model.layers.1.\w+ is not finite; lower --learn"):
        trainer.check_sound(batches, "epoch 3, batch 0")


def test_gradients_at_a_shared_prefix_add_up_in_float32(tiny_folder):
    """In bfloat16, many small minibatches after a prefix give what few large ones do."""
    samples = with_prefix(random_samples(64), 12)
    (batch,) = make_batches(samples, 64, 4000)
    expected = torch.cat(trainer_of(tiny_folder(), [0]).gradients(batch, "exact")[1])
    errors = []
    for max_tokens in (4000, 35):
        (batch,) = make_batches(samples, 64, max_tokens, share_prefix=True)
        assert batch.prefix is not None
        gradients = trainer_of(tiny_folder(), [0], dtype="bfloat16").gradients(batch, "bfloat16")[1]
        errors.append(((torch.cat(gradients) - expected).norm() / expected.norm()).item())
    assert len(batch.minibatches) > 30 and errors[1] < 1.5 * errors[0] + 1e-3


class Crowded:
    """Memory for so many tokens at once: the base model's forward runs out of it beyond that."""

    def __init__(self, model, tokens: int):
        self.forward, self.tokens, self.failures = model.model.forward, tokens, 0
        model.model.forward = self

    def __call__(self, *args, **kwargs):
        if kwargs["input_ids"].numel() > self.tokens:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize(("packed", "loss"), [(False, "kl"), (True, "ce")])
def test_what_does_not_fit_is_split_and_changes_nothing(tiny_folder, packed, loss):
    batches = make_batches(random_samples(), 4, 100, packed=packed)
    expected = trainer_of(tiny_folder(), [0], loss=loss)
    losses = expected.run(batches, "epoch 0")
    trainer = trainer_of(tiny_folder(), [0], loss=loss)
    crowded = Crowded(trainer.model, 25)
    assert_close(trainer.run(batches, "epoch 0"), losses, rtol=1e-5, atol=1e-6)
    assert_close(scales.snapshot(trainer.model), scales.snapshot(expected.model), rtol=1e-4, atol=1e-4)
    failures = crowded.failures
    trainer.run(batches, "epoch 1")
    assert 0 < failures == crowded.failures  # what is too large was learnt
    held_out = evaluate(trainer.model, batches, "held out")
    crowded.tokens = 10**6
    expected = evaluate(trainer.model, batches, "held out")
    assert dataclasses.astuple(held_out) == pytest.approx(dataclasses.astuple(expected), rel=1e-5)


def test_a_single_answer_that_does_not_fit_is_named(tiny_folder):
    trainer = trainer_of(tiny_folder(), [0])
    Crowded(trainer.model, 10)
    samples = [
        dataclasses.replace(s, where=f"data.jsonl, line {n}") for n, s in enumerate(random_samples(2), 1)
    ]
    longest = max(samples, key=len)
    message = f"epoch 0, batch 0: .* single answer of {len(longest)} tokens, data.jsonl, line [12];"
    with pytest.raises(TrainingError, match=message):
        trainer.run(make_batches(samples, 2, 1000), "epoch 0")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",  # torch's AcceleratorError, of pinned memory for one
        "CUDA driver error: out of memory",  # with expandable segments
        "Triton Error [CUDA]: out of memory",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_ways_to_be_out_of_memory(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(RuntimeError("CUDA error: 3"))


def test_out_of_memory_for_real_is_split(tiny_folder, tmp_path):
    """On a CPU with a limit on the address space, as large as needed for one row and not for all."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import resource, sys, torch
sys.path[:0] = [{str(ROOT / "tests")!r}]
from test_training import Sample, data, make_batches, random_samples, trainer_of
torch.set_num_threads(1)
(sample,) = random_samples(1)
long = Sample(sample.input_ids * 40, sample.labels * 40)
trainer = trainer_of(sys.argv[1], [0])
(small,), (large,) = make_batches([long], 1, 10**6), make_batches([long] * 64, 64, 10**6)
alone = trainer.gradients(small, "small")[0].item()
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 160 * 2**20,) * 2)
print(trainer.gradients(large, "large")[0].item() / alone, trainer.runner.too_large)
""")
    result = succeed(tmp_path, program, tiny_folder())
    ratio, too_large = result.out.split()
    assert float(ratio) == pytest.approx(64, rel=1e-5) and math.isfinite(float(too_large))
    assert "going on with half" in result.err


def test_batches_over_ranks_hold_every_sample_once():
    samples = random_samples(9)
    parts = [make_batches(samples, 4, 50, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for mine, other in zip(*parts, strict=True):
        targets = sum(len(mb.targets) for mb in mine.minibatches + other.minibatches)
        assert targets == mine.num_loss_counted_tokens == other.num_loss_counted_tokens


@pytest.mark.parametrize(("packed", "padding", "uneven"), [(False, 1.15, 1.25), (True, 1.0, 1.07)])
def test_rows_spread_evenly_over_ranks_whatever_the_budget(packed, padding, uneven):
    lengths = random.Random(0).choices(range(100, 700), k=256)
    samples = [Sample([5] * length, [-100] + [5] * (length - 1)) for length in lengths]
    for budget, ranks in ((1024, 8), (4096, 8), (50_000, 8), (4096, 4), (50_000, 4), (4096, 2), (4096, 1)):
        parts = [
            make_batches(samples, 32, budget, rank=r, world_size=ranks, packed=packed) for r in range(ranks)
        ]
        ran = [[sum(m.num_tokens for m in batch.minibatches) for batch in part] for part in parts]
        assert sum(map(sum, ran)) <= padding * sum(lengths)
        assert sum(map(max, zip(*ran, strict=True))) <= uneven * sum(lengths) / ranks, (budget, ranks)


def test_packed_rows_keep_to_their_own_targets():
    samples = random_samples(3)
    (batch,) = make_batches(samples, 3, 1000, packed=True)
    (minibatch,) = batch.minibatches
    assert minibatch.attention_mask is None and (minibatch.inputs["position_ids"] == 0).sum() == 3
    ends = torch.tensor([0, *(len(sample) for sample in minibatch.samples)]).cumsum(0)
    assert minibatch.inputs["cu_seq_lens_q"].tolist() == ends.tolist()
    assert minibatch.inputs["max_length_k"] == max(map(len, samples))
    flat = minibatch.inputs["input_ids"].flatten()
    assert torch.equal(flat[minibatch.predicting + 1], minibatch.targets)
    assert len(minibatch.targets) == sum(sample.num_loss_counted_tokens for sample in samples)


def with_prefix(samples: list[Sample], length: int) -> list[Sample]:
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(9)).tolist()
    return [Sample(ids + s.input_ids, [-100] * length + s.labels) for s in samples]


@pytest.mark.parametrize("lacking", ["for the prefix", "for the rows after it"])
def test_out_of_memory_with_a_shared_prefix_changes_nothing(tiny_folder, lacking):
    samples = with_prefix(random_samples(), 10)
    (batch,) = make_batches(samples, 8, 1000, share_prefix=True)
    assert batch.prefix is not None and len(batch.minibatches) == 1
    (whole,) = make_batches(samples, 8, 1000)
    expected = trainer_of(tiny_folder(), [0]).gradients(whole, "whole")
    trainer = trainer_of(tiny_folder(), [0])
    forward = trainer.model.model.forward

    def no_prefix(*args, use_cache, **kwargs):
        if use_cache:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, use_cache=use_cache, **kwargs)

    if lacking == "for the prefix":
        trainer.model.model.forward = no_prefix
    else:
        Crowded(trainer.model, 60)
    assert_close(trainer.gradients(batch, "crowded"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "loss"),
    [
        ("llama", {}, "kl"),
        ("granite", {}, "ce"),
        ("mistral", {"sliding_window": 6}, "ce"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}, "ce"),
    ],
)
def test_a_shared_prefix_changes_nothing(tiny_folder, family, changes, loss):
    samples = with_prefix(random_samples(), 10)
    results = []
    for share in (False, True):
        batches = make_batches(samples, 4, 60, seed=0, share_prefix=share)
        assert all((batch.prefix is not None) == share for batch in batches)
        rows = [mb.inputs["input_ids"].shape for batch in batches for mb in batch.minibatches]
        assert max(count for count, _ in rows) > 1  # padding is covered
        assert all(count * length <= 60 - 10 * share for count, length in rows)
        trainer = trainer_of(tiny_folder(family, **changes), [0], loss=loss)
        losses = trainer.run(batches, "epoch 0")
        figures = dataclasses.astuple(evaluate(trainer.model, batches, ""))
        results.append((losses, scales.snapshot(trainer.model), figures))
    (losses, trained, figures), expected = results[1], results[0]
    assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    assert_close(trained, expected[1], rtol=1e-4, atol=1e-4)
    assert figures[:3] == pytest.approx(expected[2][:3], rel=1e-5)
    assert figures[3] == pytest.approx(expected[2][3], rel=1e-3)  # of what little the answers differ by


def test_a_prefix_is_shared_where_it_saves_and_predicts_nothing():
    samples = with_prefix([Sample([5, 6, 7], [-100, -100, 7]), Sample([5, 8, 9], [-100, 8, 9])], 10)
    assert data.shared_prefix(samples) == samples[0].input_ids[:10]  # 5 predicts 8
    assert data.shared_prefix([samples[0], samples[0]]) == samples[0].input_ids[:11]  # 6 predicts 7
    assert data.shared_prefix(samples[:1]) == []
    counted = Sample(samples[0].input_ids, samples[0].input_ids)  # from the first token on
    assert data.shared_prefix([counted, counted]) == []
    long = Sample(samples[0].input_ids + [1] * 30, samples[0].labels + [1] * 30)
    assert data.shared_prefix([samples[0], long]) == []  # 11 of 56 tokens


def test_split_is_disjoint_complete_and_seeded():
    samples = random_samples(10)
    training, held_out = data.split_samples(samples, 0.2, seed=1)
    assert len(held_out) == 2 and sorted(map(id, training + held_out)) == sorted(map(id, samples))
    assert data.split_samples(samples, 0.2, seed=1) == (training, held_out)
    assert data.split_samples(samples, 0.0, seed=1) == (samples, [])
    with pytest.raises(InputError, match="at least 2 samples"):
        data.split_samples(samples[:1], 0.2, seed=1)


def test_what_asks_the_same_is_held_out_together():
    def sample(asked: list[int], said: list[int]) -> Sample:
        return Sample(asked + said, [-100] * len(asked) + said)

    questions = [[5, 6, n] for n in range(10)]
    # each twice: with another answer, or followed up
    samples = [sample(q, [1, 2]) for q in questions] + [sample(q, [3]) for q in questions[:5]]
    samples += [sample([*q, 1, 2, 9], [4]) for q in questions[5:]]
    for seed in range(8):
        training, held_out = data.split_samples(samples, 0.2, seed)
        assert len(held_out) == 4 and len(training) == 16
        trained_on = {tuple(sample.input_ids[:3]) for sample in training}
        assert not trained_on & {tuple(sample.input_ids[:3]) for sample in held_out}
    many = [sample([5, 6], [n]) for n in range(99)] + [sample([7, 8], [1])]
    for seed in range(8):
        assert data.split_samples(many, 0.1, seed) == (many[:99], many[99:])
    counted = [Sample([5, n, 7], [-100, n, 7]) for n in range(10)]  # texts that begin alike
    assert len(data.split_samples(counted, 0.2, seed=0)[1]) == 2
    with pytest.raises(InputError, match="ask different things, there are 1"):
        data.split_samples([sample([5, 6], [n]) for n in range(4)], 0.2, seed=0)


GOOD = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 6]}, "needs 'input_ids' and 'labels'"),
        (GOOD | {"labels": [-100, 6]}, "3 input_ids but 2 labels"),
        (GOOD | {"input_ids": [5, 300, 7], "labels": [-100, -100, 7]}, "token id 300 is beyond"),
        (GOOD | {"input_ids": [5, -1, 7], "labels": [-100, -100, 7]}, "token id -1 is beyond"),
        (GOOD | {"labels": [-100, 7, 7]}, "must equal its token"),
        (GOOD | {"labels": [-100, -100, -100]}, "no label counts"),
        (GOOD | {"labels": [5, -100, -100]}, "no label counts"),
        ({"input_ids": list(range(60)), "labels": list(range(60))}, "60 tokens do not fit"),
    ],
)
def test_bad_samples_are_refused_with_their_line(tmp_path, record, message):
    for name, unpacked in (("data.jsonl", open), ("data.jsonl.gz", gzip.open)):
        with unpacked(tmp_path / name, "wt") as file:
            file.write(json.dumps(GOOD) + "\n" + json.dumps(record) + "\n")
        with pytest.raises(InputError, match=f"{name}, line 2: .*{message}"):
            data.load_samples(tmp_path / name, vocab_size=300, max_tokens=50)


def test_samples_are_read_as_far_as_asked_and_hold_each_id_once(tmp_path):
    large = {"input_ids": [5, 1000, 1001], "labels": [-100, 1000, 1001]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(large)}\n" * 2 + "{}\n")
    first, second = data.load_samples(tmp_path / "data.jsonl", vocab_size=2000, max_samples=2)
    assert first == second == Sample([5, 1000, 1001], [-100, 1000, 1001])
    assert first.input_ids[1] is second.input_ids[1] is second.labels[1]  # above 256 Python makes a new one


def test_batches_are_made_when_they_are_asked_for(monkeypatch):
    """An epoch's tensors would not fit: what was asked for is made, and made anew each time."""
    made = []

    def of(samples, *shape):
        made.append(len(samples))
        return make(samples, *shape)

    make = data.Minibatch.of
    monkeypatch.setattr(data.Minibatch, "of", staticmethod(of))
    batches = make_batches(random_samples(10), 4, 10**6)
    assert len(batches) == 3 and not made
    assert batches.num_loss_counted_tokens == sum(s.num_loss_counted_tokens for s in random_samples(10))
    later = batches[1:]
    assert len(later) == 2 and not made
    assert later[-1].num_loss_counted_tokens == batches[2].num_loss_counted_tokens and made == [2, 2]


@pytest.mark.parametrize(
    ("device", "asked", "most"), [("cpu", None, 512), ("cuda", None, 4096), ("cuda", 300, 300)]
)
def test_tokens_that_run_at_once(tiny_folder, device, asked, most):
    """As asked, or by device, and no more of them for a longer answer that is in another batch."""
    model = types.SimpleNamespace(config=loaded(tiny_folder()).config, device=torch.device(device))
    long = Sample([5] * 5000, [-100] + [5] * 4999)
    samples = [Sample(sample.input_ids * 5, sample.labels * 5) for sample in random_samples(200)]
    batches = EpochBatches(model, [*samples, long], TrainingOptions(1e-2, 200, asked)).in_order()
    at_once = [max(minibatch.num_tokens for minibatch in batch.minibatches) for batch in batches]
    assert most - 100 < at_once[0] <= most and at_once[1:] == [5000]
