"""The scaled decoder layers against the stock classes and against the method's two equations."""

import pytest
import torch
from conftest import FAMILY_SIZES, stock_config
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hopscotch_common import scales
from hopscotch_common.modeling_hopscotch import SCALE_NAMES
from hopscotch_common.models import hopscotch_classes, hopscotch_config, load_model, model_ref

FAMILIES = sorted(FAMILY_SIZES)
PROMPTS = torch.tensor([[0, 0, 5, 6, 7, 8], [0, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19]])
MASK = (PROMPTS != 0).long()


def skipping_model(folder, family: str, blocks: list[int], **changes):
    """The folder's weights in a model whose config skips blocks, with random scales."""
    config = hopscotch_config(stock_config(family, **changes), blocks)
    _, model_class = hopscotch_classes(family)
    model = model_class.from_pretrained(folder, config=config).eval()
    torch.manual_seed(1)
    scales.restore(model, 1 + 0.1 * torch.randn(4, 4))
    return model


def reference_logits(stock, ids: torch.Tensor, values: torch.Tensor, skipped: set[int]) -> torch.Tensor:
    """Logits by the method's two equations, in a plain loop over the stock model's own modules."""
    inner, config = stock.model, stock.config
    x = inner.embed_tokens(ids) * getattr(config, "embedding_multiplier", 1.0)
    multiplier = getattr(config, "residual_multiplier", 1.0)
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(x, positions)
    causal = torch.full((ids.shape[1],) * 2, -1e30).triu(1)[None, None]
    for index, layer in enumerate(inner.layers):
        b_attn, s_attn, b_mlp, s_mlp = values[index]
        attention = 0
        if index not in skipped:
            attention = (
                multiplier
                * layer.self_attn(
                    hidden_states=layer.input_layernorm(x), attention_mask=causal, position_embeddings=rotary
                )[0]
            )
        x = b_attn * attention + s_attn * x
        x = b_mlp * multiplier * layer.mlp(layer.post_attention_layernorm(x)) + s_mlp * x
    return stock.lm_head(inner.norm(x)) / getattr(config, "logits_scaling", 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_equals_stock_bit_for_bit(tiny_folder, family, dtype):
    folder = tiny_folder(family)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = load_model(model_ref(str(folder)), dtype=dtype, device="cpu")
    assert torch.equal(ours(PROMPTS, attention_mask=MASK).logits, stock(PROMPTS, attention_mask=MASK).logits)
    assert all(scale.dtype == torch.float32 for _, scale in scales.named_scales(ours))
    scales.restore(ours, torch.full((4, 4), 1.5))
    assert not torch.equal(ours(PROMPTS).logits, stock(PROMPTS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_and_skipped_equals_the_equations(tiny_folder, family):
    folder = tiny_folder(family)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    for blocks in ([], [0], [1, 3]):
        model = skipping_model(folder, family, blocks)
        with torch.no_grad():
            expected = reference_logits(stock, ids, scales.snapshot(model), set(blocks))
        assert_close(model(ids).logits, expected, rtol=2e-4, atol=2e-4)


def test_skipped_attention_is_not_computed(tiny_folder):
    model = load_model(model_ref(str(tiny_folder("llama"))), device="cpu")

    def fail(*args, **kwargs):
        raise AssertionError("attention was computed")

    model.model.layers[2].self_attn.forward = fail
    with pytest.raises(AssertionError, match="attention was computed"):
        model(PROMPTS)
    scales.reset(model, [2])
    assert model(PROMPTS).logits.isfinite().all()


def test_skipped_layer_of_a_checkpoint_holds_no_attention(tiny_folder):
    model = skipping_model(tiny_folder("llama"), "llama", [0, 2])
    keys = model.state_dict().keys()
    assert not any(
        key.startswith(("model.layers.0.self_attn", "model.layers.2.input_layernorm")) for key in keys
    )
    assert "model.layers.1.self_attn.q_proj.weight" in keys


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("blocks", [[0], [0, 2], [1, 2, 3], [0, 1, 2]])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_cached_generation_equals_uncached(tiny_folder, family, blocks, options):
    model = skipping_model(tiny_folder(family), family, blocks)
    common = dict(attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None)
    cached = model.generate(PROMPTS, **common, **options)
    options.pop("cache_implementation", None)
    assert torch.equal(cached, model.generate(PROMPTS, use_cache=False, **common, **options))


@pytest.mark.parametrize("blocks", [[0], [0, 2], [2], [1, 3]])
def test_cached_generation_with_full_and_sliding_layers(tiny_folder, blocks):
    mixed = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
    model = skipping_model(tiny_folder("qwen2", **mixed), "qwen2", blocks, **mixed)
    common = dict(attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(PROMPTS, **common), model.generate(PROMPTS, use_cache=False, **common))


def test_cache_holds_only_the_blocks_that_are_left(tiny_folder):
    model = skipping_model(tiny_folder("llama"), "llama", [0, 2])
    cache = model(PROMPTS, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6, 0, 0]


def test_skipping_every_block_of_the_first_cache_slot_is_refused(tiny_folder):
    mixed = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
    with pytest.raises(ValueError, match="every full_attention block is skipped"):
        skipping_model(tiny_folder("qwen2", **mixed), "qwen2", [0, 1], **mixed)


@pytest.mark.parametrize("blocks", [[-1], [4], [1, 1], [0, 1, 2, 3]])
def test_impossible_skips_are_refused(blocks):
    config = hopscotch_config(stock_config("llama"), blocks)
    _, model_class = hopscotch_classes("llama")
    with pytest.raises(ValueError, match="does not exist|named twice|keep at least one"):
        model_class(config)


def test_random_initialisation_sets_scales_to_one():
    _, model_class = hopscotch_classes("llama")
    model = model_class(hopscotch_config(stock_config("llama")))
    assert torch.equal(scales.snapshot(model), torch.ones(4, len(SCALE_NAMES)))
