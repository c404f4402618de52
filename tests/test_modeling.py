"""What the scaled layers are made of; test_families.py holds the whole of them against the equations."""

import importlib.metadata

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import stock_config
from measuring import saved_bytes
from torch.testing import assert_close
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hopscotch_common import scales
from hopscotch_common.loading.loader import hopscotch_classes, hopscotch_config, load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales import modeling_hopscotch, recomputation
from hopscotch_common.scales.modeling_hopscotch import SCALE_NAMES, scaled


def skipping_model(folder, family: str, blocks: list[int], granularity: str = "layer", **changes):
    """The folder's weights in a model whose config skips blocks, with random scales around 1."""
    config = hopscotch_config(stock_config(family, **changes), blocks, granularity)
    _, model_class = hopscotch_classes(family)
    model = model_class.from_pretrained(folder, config=config).eval()
    ones = scales.ones(config)
    noise = torch.randn(ones.shape, generator=torch.Generator().manual_seed(1))
    scales.restore(model, ones + 0.1 * noise)
    return model


def reference_logits(stock, ids: torch.Tensor, values: torch.Tensor, skipped: set[int]) -> torch.Tensor:
    """Logits by the method's two equations, in a plain loop over the stock model's own modules.

    values: [layers, 4], or [layers, 2 * hidden + 2] with a b for each channel.
    """
    b_size = (values.shape[1] - 2) // 2
    inner, config = stock.model, stock.config
    x = inner.embed_tokens(ids) * getattr(config, "embedding_multiplier", 1.0)
    multiplier = getattr(config, "residual_multiplier", 1.0)
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(x, positions)
    causal = torch.full((ids.shape[1],) * 2, -1e30).triu(1)[None, None]
    for index, layer in enumerate(inner.layers):
        b_attn, s_attn, b_mlp, s_mlp = values[index].split([b_size, 1, b_size, 1])
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


def test_a_transformers_that_builds_other_layers_is_refused(monkeypatch):
    """Early 5.x knows "mamba" and "attention", not the names of today, and builds attention everywhere."""
    stock = modeling_granitemoehybrid.GraniteMoeHybridDecoderLayer
    everywhere = stock_config("granitemoehybrid", layer_types=["full_attention"] * 5)
    monkeypatch.setattr(
        modeling_granitemoehybrid, stock.__name__, lambda config, layer_idx: stock(everywhere, layer_idx)
    )
    _, model_class = hopscotch_classes("granitemoehybrid")
    with pytest.raises(ValueError, match="layer 0 is 'linear_attention' by config.json, and transformers 5"):
        model_class(hopscotch_config(stock_config("granitemoehybrid")))


def test_a_transformers_whose_caches_know_no_skips_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.3.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.16 is required"):
        modeling_hopscotch.family_config.__wrapped__("llama")


def test_random_initialisation_sets_scales_to_one():
    _, model_class = hopscotch_classes("llama")
    model = model_class(hopscotch_config(stock_config("llama")))
    assert torch.equal(scales.snapshot(model), torch.ones(4, len(SCALE_NAMES)))


@pytest.fixture(params=[1e9, 100], ids=["at once", "a few rows at a time"])
def rows_at_once(request, monkeypatch):
    """Sums and gradients in one part, and in several."""

    def split(tensor):
        features = tensor.shape[-1]
        return tensor.reshape(-1, features).split(max(1, int(request.param) // features))

    monkeypatch.setattr(modeling_hopscotch, "rows_at_once", split)
    monkeypatch.setattr(recomputation, "rows_at_once", split)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 24])
def test_a_scale_and_its_gradient(rows_at_once, size, dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3, 7, 24, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(3, 7, 24, generator=generator).to(dtype)
    scale = torch.empty(size).uniform_(0.5, 1.5, generator=generator).requires_grad_()

    output = scaled(tensor, scale)
    assert torch.equal(output, (scale * tensor).to(dtype))
    gradient, scale_gradient = torch.autograd.grad(output, (tensor, scale), upstream)
    assert torch.equal(gradient, (scale * upstream).to(dtype))
    expected = (upstream.double() * tensor.double()).flatten(0, 1).sum(0)
    expected = expected.sum(0, keepdim=True) if size == 1 else expected
    assert scale_gradient.dtype == torch.float32
    assert_close(scale_gradient, expected.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(scaled(tensor, scale), output)


def randomise(module, dtype) -> torch.nn.Module:
    """A frozen module with random weights."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [LlamaRMSNorm, Gemma2RMSNorm, LlamaMLP])
def test_recomputed_modules_equal_stock(rows_at_once, make, dtype):
    torch.manual_seed(0)
    module = randomise(make(stock_config("llama") if make is LlamaMLP else 32), dtype)
    inputs = torch.randn(3, 5, 32).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, 32).to(dtype)
    expected = module(inputs)
    (expected_gradient,) = torch.autograd.grad(expected, inputs, upstream)

    recomputation.recompute_elementwise(torch.nn.ModuleList([module]))
    assert type(module) is not make
    assert torch.equal(module(inputs), expected)
    (gradient,) = torch.autograd.grad(module(inputs), inputs, upstream)
    tolerance = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    assert_close(gradient, expected_gradient, **tolerance)


def test_recomputed_modules_run_under_the_hooks_of_a_split_model():
    """accelerate's hooks keep a module's forward from before."""
    norm = randomise(LlamaRMSNorm(32), torch.bfloat16)
    add_hook_to_module(norm, AlignDevicesHook())
    inputs = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)

    def saved() -> set[torch.dtype]:
        found = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.add(t.dtype), lambda t: t):
            norm(inputs)
        return found

    assert torch.float32 in saved()
    recomputation.recompute_elementwise(torch.nn.ModuleList([norm]))
    assert saved() == {torch.bfloat16}


def test_a_norm_that_trains_gets_its_gradient():
    norm = randomise(LlamaRMSNorm(32), torch.float32)
    recomputation.recompute_elementwise(torch.nn.ModuleList([norm]))
    norm.requires_grad_(True)
    norm(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None


def test_scales_by_channel_save_as_much_as_scalars(tiny_folder):
    ids = torch.arange(3, 67).view(2, 32)

    def saved(granularity: str) -> int:
        model = load_model(model_ref(str(tiny_folder())), device="cpu", scale_granularity=granularity)
        scales.reset(model, [1])
        return saved_bytes(model, lambda: model.model(ids, use_cache=False))

    assert saved("channel") == saved("layer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_layer_saves_for_backward(tiny_folder, dtype):
    """Residual, branch, MLP and attention tensors once each, in their own dtype, and nothing else."""
    model = load_model(model_ref(str(tiny_folder())), dtype=dtype, device="cpu")
    ids = torch.arange(3, 67).view(2, 32)

    def saved(skipped: list[int]) -> int:
        scales.reset(model, skipped)
        return saved_bytes(model, lambda: model.model(ids, use_cache=False))

    hidden, mlp, heads, kv_heads, head_dim = 32, 48, 4, 2, 8
    attention = 2 * hidden + 2 * heads * head_dim + 2 * kv_heads * head_dim  # x, branch; q, output; k, v
    size = {"float32": 4, "bfloat16": 2}[dtype]
    bytes_per_token = size * (attention + 2 * hidden + 2 * mlp) + 4 * heads  # and a float32 a head
    # Two layers less: what they save of attention, but for the input, which s of the layer needs.
    assert saved([1]) - saved([1, 2]) == 64 * (size * (attention - hidden) + 4 * heads)
    everything = saved([])
    assert everything < 64 * (4 * bytes_per_token + size * hidden) + 64 * 4 * 2 * head_dim
    assert everything > 64 * 3 * bytes_per_token
