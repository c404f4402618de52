"""Properties: folding, minibatch splits, shared prefixes and packed rows change no loss.

Models of random shape, dtype, scales and skips. What one holds exactly in real numbers, another may
round elsewhere, so a mean loss may differ by TOLERANCES nats a token and no more.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import FAMILY_SIZES, stock_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import make_batches
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from hopscotch_common import scales
from hopscotch_common.export.folding import Folding, fold_factors
from hopscotch_common.loading.loader import hopscotch_classes, hopscotch_config
from hopscotch_common.training import IGNORE_INDEX
from hopscotch_common.training.batches import Sample
from hopscotch_common.training.loss import evaluate

VOCABULARY = 300
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.05}  # nats a token
FOLDING_TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 0.3}  # folded weights are rounded again


def check_property(examples: int):
    """Try the same examples every time, so many; failures are shrunk, nothing is kept on disk."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Model:
    """A stock model of random weights, and the same weights in one with scales and skips."""

    stock: torch.nn.Module
    scaled: torch.nn.Module
    values: torch.Tensor  # the scales [layers, 4]
    skipped: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.stock.dtype


@st.composite
def models(draw, dtypes=tuple(TOLERANCES)) -> Model:
    """Any family, 1 to 4 layers, 1 to 4 heads, tied or not, biased or not, scales of either sign."""
    family = draw(st.sampled_from(sorted(FAMILY_SIZES)))
    layers, kv_heads, head_dim = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([4, 8, 16])),
    )
    heads = kv_heads * draw(st.integers(1, 2))
    shape = dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.integers(1, 48)),
        head_dim=head_dim,
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=1e-20,  # folding is exact but for eps
    )
    if family in ("llama", "granite", "qwen3"):
        shape["attention_bias"] = draw(st.booleans())
    skipped = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    config = stock_config(family, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    values = torch.empty(layers, 4).uniform_(-1.1, 1.1, generator=generator).exp()  # 1/3 to 3
    values *= torch.randint(2, values.shape, generator=generator) * 2 - 1
    values[sorted(skipped), 0] = 0
    return Model(stock, _with_scales(stock, values, skipped), values, sorted(skipped))


def _with_scales(stock, values: torch.Tensor, skipped: set[int]):
    """The stock model's weights under scaled decoder layers."""
    _, model_class = hopscotch_classes(stock.config.model_type)
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(stock.dtype)
    try:
        scaled = model_class(hopscotch_config(stock.config))
    finally:
        torch.set_default_dtype(earlier)
    found = scaled.load_state_dict(stock.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) == {key for key, _ in scales.named_scales(scaled)}
    scales.freeze_base(scaled.eval())
    scales.reset(scaled, skipped)
    scales.restore(scaled, values)
    return scaled


@st.composite
def sample_lists(draw, shared: int = 0) -> list[Sample]:
    """2 to 7 samples of 2 to 30 tokens, of which any but the first may count; they begin alike."""
    token = st.integers(3, VOCABULARY - 1)
    prefix = draw(st.lists(token, min_size=shared, max_size=shared))
    samples = []
    for _ in range(draw(st.integers(2, 7))):
        own = draw(st.lists(token, min_size=2, max_size=30))
        counted = draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own)))
        counted[draw(st.integers(1, len(own) - 1))] = True
        labels = [id if counts else IGNORE_INDEX for id, counts in zip(own, counted, strict=True)]
        labels = [IGNORE_INDEX] * shared + [IGNORE_INDEX, *labels[1:]]
        samples.append(Sample(prefix + own, labels))
    return samples


@torch.no_grad()
def one_by_one(model, samples: list[Sample]) -> float:
    """Mean loss over the loss-counted tokens: each sample on its own, from the model's own logits."""
    total = tokens = 0
    for sample in samples:
        logits = model(torch.tensor([sample.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(sample.labels[1:])
        total += cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
        tokens += int((labels != IGNORE_INDEX).sum())
    return total / tokens


def folded_copy(model: Model):
    """The stock class, with the scales in its weights and no attention in skipped blocks."""
    folding = Folding(model.stock.config, fold_factors(model.values, model.skipped))
    state = {key: folding.fold(key, tensor) for key, tensor in model.stock.state_dict().items()}
    for block in model.skipped:
        for key in state:
            if key.startswith(f"model.layers.{block}.self_attn.o_proj"):
                state[key] = torch.zeros_like(state[key])
    folded = copy.deepcopy(model.stock)
    folded.load_state_dict(state)
    return folded


def folding_changes_no_loss(model, samples):
    expected = one_by_one(model.scaled, samples)
    found = one_by_one(folded_copy(model), samples)
    assert abs(found - expected) <= FOLDING_TOLERANCES[model.dtype], (found, expected)


def splitting_changes_no_loss(model, samples, data):
    """Batch size and token budget decide what runs at once."""
    longest = max(map(len, samples))
    budget = data.draw(st.integers(longest, 8 * longest), label="token budget")
    batch_size = data.draw(st.integers(1, len(samples)), label="batch size")
    batches = make_batches(samples, batch_size, budget, seed=1)
    for batch in batches:
        assert all(minibatch.num_tokens <= budget for minibatch in batch.minibatches)
    check_loss(model, batches, samples)


def sharing_a_prefix_changes_no_loss(model, samples, data):
    budget = data.draw(st.integers(60, 300), label="token budget")
    batches = make_batches(samples, len(samples), budget, seed=1, share_prefix=True)
    assert batches[0].prefix is not None and batches[0].prefix.shape[1] >= 20
    check_loss(model, batches, samples)


def packing_changes_no_loss(model, samples, data):
    """Rows joined without padding, told apart by their positions."""
    budget = data.draw(st.integers(30, 300), label="token budget")
    check_loss(model, make_batches(samples, len(samples), budget, seed=1, packed=True), samples)


def check_loss(model: Model, batches, samples) -> None:
    expected = one_by_one(model.scaled, samples)
    found = evaluate(model.scaled, batches, "held out").cross_entropy
    assert abs(found - expected) <= TOLERANCES[model.dtype], (found, expected)


PROPERTIES = {
    "folding": (folding_changes_no_loss, dict(samples=sample_lists())),
    "splits": (splitting_changes_no_loss, dict(samples=sample_lists(), data=st.data())),
    "prefix": (sharing_a_prefix_changes_no_loss, dict(samples=sample_lists(20), data=st.data())),
    "packed": (packing_changes_no_loss, dict(samples=sample_lists(), data=st.data())),
}


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_property(name, examples):
    holds, strategies = PROPERTIES[name]
    check_property(examples)(given(model=models(), **strategies)(holds))()
