"""Every described family against its stock class, and against the method's two equations.

The independent computation is the stock model with each layer's forward replaced by the equations,
written out for the shapes of layers that there are; masks, positions and logits are its own.
"""

import functools
import subprocess
import sys

import pytest
import torch
from conftest import FAMILY_SIZES, MORE_FAMILIES, stock_config
from safetensors.torch import load_file, save_file
from test_modeling import skipping_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hopscotch_common import scales
from hopscotch_common.loading.loader import hopscotch_classes, hopscotch_config, load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales import modeling_hopscotch
from hopscotch_common.scales.modeling_hopscotch import (
    FAMILIES,
    attention_blocks,
    attention_types,
    family_classes,
)
from hopscotch_common.training.loss import scaled_logits

IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20]])
MASK = (IDS != 0).long()
ALL = sorted(FAMILY_SIZES | MORE_FAMILIES)
# One family of each shape of layer.
ONE_OF_EACH = sorted({str(shape): family for family, shape in reversed(FAMILIES.items())}.values())
CHANNEL = [family for family in ALL if family in ("llama", "gemma2", "olmo2", "granitemoehybrid")]


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory):
    """family_folder(family) -> folder of a tiny random model of which no two norms are alike."""

    @functools.cache
    def make(family: str):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(stock_config(family))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return folder

    return make


def test_every_described_family_is_tested():
    assert set(ALL) == set(FAMILIES)


def stock_model(folder, family: str, **options):
    """The stock class; with eager attention where its sdpa would leave out a cap."""
    kernel = "eager" if FAMILIES[family].caps_attention else None
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel, **options).eval()


def first(output):
    return output[0] if isinstance(output, tuple) else output


def apply_equations(model, family: str, values: torch.Tensor, skipped) -> None:
    """Let the layers of a stock model compute the method's two equations, spelt out."""

    def attention(layer, x, arguments):
        if not hasattr(layer, "self_attn") or layer.self_attn is None:
            mixer = layer.mamba if family == "granitemoehybrid" else layer.linear_attn
            return mixer(x, attention_mask=arguments["attention_mask"])
        return first(layer.self_attn(hidden_states=x, **arguments))

    def branches(layer):
        """Two functions of x_in and x1: what attention adds, and what the MLP adds, unscaled."""
        if family in ("gemma2", "gemma3_text"):
            return (
                lambda x, a: layer.post_attention_layernorm(attention(layer, layer.input_layernorm(x), a)),
                lambda x: layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x))),
            )
        if family == "glm4":
            return (
                lambda x, a: layer.post_self_attn_layernorm(attention(layer, layer.input_layernorm(x), a)),
                lambda x: layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(x))),
            )
        if family in ("olmo2", "olmo3", "exaone4"):
            return (
                lambda x, a: layer.post_attention_layernorm(attention(layer, x, a)),
                lambda x: layer.post_feedforward_layernorm(layer.mlp(x)),
            )
        if family == "granitemoehybrid":
            multiplier = model.config.residual_multiplier

            def mlp(x):
                normed = layer.post_attention_layernorm(x)
                return multiplier * (layer.block_sparse_moe(normed) + layer.shared_mlp(normed))

            return lambda x, a: multiplier * attention(layer, layer.input_layernorm(x), a), mlp
        multiplier = model.config.residual_multiplier if family.startswith("granite") else 1.0
        return (
            lambda x, a: multiplier * attention(layer, layer.input_layernorm(x), a),
            lambda x: multiplier * first(layer.mlp(layer.post_attention_layernorm(x))),
        )

    width = (values.shape[1] - 2) // 2
    for index, layer in enumerate(model.model.layers):
        b_attn, s_attn, b_mlp, s_mlp = values[index].split([width, 1, width, 1])

        def forward(x, layer=layer, b=(b_attn, b_mlp), s=(s_attn, s_mlp), skip=index in skipped, **arguments):
            attention_of, mlp_of = branches(layer)
            x1 = s[0] * x if skip else b[0] * attention_of(x, arguments) + s[0] * x
            return b[1] * mlp_of(x1) + s[1] * x1

        layer.forward = forward


@pytest.mark.parametrize("family", [*CHANNEL, "gpt_oss"])
def test_a_model_is_one_graph(family_folder, family):
    """As vLLM must have it, which compiles unless told otherwise."""
    skipped = attention_blocks(stock_config(family))[:1]
    model = skipping_model(family_folder(family), family, skipped)
    torch.compiler.reset()  # it gives up on a function after so many recompilations, of all families
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for use_cache in (False, True):
            found = compiled(IDS, use_cache=use_cache).last_hidden_state
            assert_close(found, model.model(IDS, use_cache=use_cache).last_hidden_state)


@pytest.mark.parametrize("family", ALL)
def test_untrained_equals_stock_bit_for_bit(family_folder, family):
    folder = family_folder(family)
    for dtype in ("float32", "bfloat16"):
        stock = stock_model(folder, family, dtype=dtype)
        ours = load_model(model_ref(str(folder)), dtype=dtype, device="cpu")
        assert ours.config._experts_implementation == stock.config._experts_implementation
        assert all(scale.dtype == torch.float32 for _, scale in scales.named_scales(ours))
        logits = ours(IDS, attention_mask=MASK).logits
        assert torch.equal(logits, stock(IDS, attention_mask=MASK).logits)
        scales.restore(ours, 1.5 * scales.ones(ours.config))
        assert not torch.equal(ours(IDS, attention_mask=MASK).logits, logits)


def some_skips(config) -> list[list[int]]:
    """Sets of blocks: none, the first, and all of the first one's type but its last."""
    blocks, types = attention_blocks(config), attention_types(config)
    alike = [block for block in blocks if types[block] == types[blocks[0]]]
    others = [block for block in blocks if block not in alike]
    return [[], blocks[:1], alike[:-1], *([others[:-1], others, others + alike[1:]] if others else [])]


@pytest.mark.parametrize("family", ALL)
def test_scaled_and_skipped_equals_the_equations(family_folder, family):
    """Logits, and gradients of the scales through the recomputing modules, with padding."""
    folder, counted = family_folder(family), MASK.bool()
    weights = torch.randn(int(MASK.sum()), 300, generator=torch.Generator().manual_seed(2))
    for granularity in ("layer", "channel") if family in CHANNEL else ("layer",):
        for skipped in some_skips(stock_config(family)):
            model = skipping_model(folder, family, skipped, granularity)
            stock = stock_model(folder, family).requires_grad_(False)
            values = scales.snapshot(model).requires_grad_()
            apply_equations(stock, family, values, skipped)
            plain = model(IDS, attention_mask=MASK, use_cache=False).logits
            scales.freeze_base(model)
            expected, found = (m(IDS, attention_mask=MASK, use_cache=False).logits for m in (stock, model))
            for logits in (plain, found):
                assert_close(logits[counted], expected[counted], rtol=2e-4, atol=2e-4)
            for logits in (expected, found):
                (logits[counted] * weights).sum().backward()
            gradients, largest = scales.as_state_dict(values.grad), values.grad.abs().max()
            for key, scale in scales.named_scales(model):
                if scale.requires_grad:
                    assert_close(scale.grad / largest, gradients[key] / largest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_cached_generation_equals_uncached(family_folder, family):
    folder = family_folder(family)
    common = dict(attention_mask=MASK, max_new_tokens=10, do_sample=False, eos_token_id=None)
    for skipped in some_skips(stock_config(family)):
        model = skipping_model(folder, family, skipped)
        expected = model.generate(IDS, use_cache=False, **common)
        assert torch.equal(model.generate(IDS, **common), expected)
        if family in ("llama", "granite"):
            assert torch.equal(model.generate(IDS, cache_implementation="static", **common), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_speculative_decoding_with_any_skips(family_folder, family):
    """It cuts the cache back, the slots included that no layer fills; as drafter, too."""
    common = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.randint(3, 300, (1, 5), generator=torch.Generator().manual_seed(0)).repeat(1, 3)
    whole = skipping_model(family_folder(family), family, [])
    for skipped in some_skips(stock_config(family)):
        model = skipping_model(family_folder(family), family, skipped)
        expected = model.generate(ids, **common)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **common), expected)
        drafted = whole.generate(ids, assistant_model=model, **common)
        assert torch.equal(drafted, whole.generate(ids, **common))


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_skipped_attention_is_not_computed_nor_held(family_folder, family):
    folder = family_folder(family)
    model = load_model(model_ref(str(folder)), device="cpu")
    block = attention_blocks(model.config)[0]
    description = FAMILIES[family]

    def fail(*args, **kwargs):
        raise AssertionError("attention was computed")

    for name in description.skipped_modules(False):
        getattr(model.model.layers[block], name).forward = fail
    with pytest.raises(AssertionError, match="attention was computed"):
        model(IDS)
    scales.reset(model, [block])
    cache = model(IDS, use_cache=True).past_key_values
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len(filled) == len(attention_blocks(model.config)) - 1

    held = skipping_model(folder, family, [block]).state_dict().keys()
    gone = tuple(f"model.layers.{block}.{name}." for name in description.skipped_modules(False))
    assert gone and not any(key.startswith(gone) for key in held)


@pytest.mark.parametrize("family", ALL)
def test_the_loss_can_make_the_logits_of_the_base_models_output(family_folder, family):
    model = load_model(model_ref(str(family_folder(family))), device="cpu")
    logits = scaled_logits(model.config, model.lm_head(model.model(IDS).last_hidden_state))
    assert torch.equal(logits, model(IDS).logits)


OUTSIDE = """
import sys
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    ids = torch.load(f"{folder}/ids.pt")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(config).__name__.startswith("Hopscotch") and "hopscotch_common" not in sys.modules
    with torch.no_grad():
        torch.save((model(ids).logits, base(ids).last_hidden_state), f"{folder}/found.pt")
    if Path(folder).name in "llama gemma2 olmo2 granitemoehybrid".split():
        model.save_pretrained(f"{folder}/again")
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", trust_remote_code=True).eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
    if folder == sys.argv[1]:
        families = {name.split(".")[2] for name in sys.modules if name.startswith("transformers.models.")}
        print(*sorted(families & set("qwen3 mistral granite gemma2 olmo2 olmo3".split())))
"""


def save_with_code(model, folder) -> None:
    """A checkpoint as this project writes them: with the code that it needs."""
    config_class, base_class, model_class = family_classes(model.config.model_type.removeprefix("hopscotch_"))
    model.config.auto_map = {
        "AutoConfig": f"modeling_hopscotch.{config_class.__name__}",
        "AutoModel": f"modeling_hopscotch.{base_class.__name__}",
        "AutoModelForCausalLM": f"modeling_hopscotch.{model_class.__name__}",
    }
    model.save_pretrained(folder)
    code = open(modeling_hopscotch.__file__).read()
    (folder / "modeling_hopscotch.py").write_text(code)


def test_checkpoints_of_every_family_load_where_this_project_is_not(family_folder, tmp_path):
    """The first of them has imported no other family than its own."""
    models = {}
    for family in ("olmo2", *(family for family in ALL if family != "olmo2")):
        granularity = "channel" if family in CHANNEL else "layer"
        skipped = attention_blocks(stock_config(family))[:1]
        models[family] = skipping_model(family_folder(family), family, skipped, granularity)
        save_with_code(models[family], tmp_path / family)
        torch.save(IDS, tmp_path / family / "ids.pt")
    outside = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *(str(tmp_path / family) for family in models)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert outside.returncode == 0, outside.stderr
    assert outside.stdout.split() == ["olmo2"]
    for family, model in models.items():
        logits, hidden = torch.load(tmp_path / family / "found.pt")
        with torch.no_grad():
            assert_close(logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
            assert_close(hidden, model.model(IDS).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_its_scales_is_refused(family_folder, tmp_path):
    model = skipping_model(family_folder("llama"), "llama", [1])
    save_with_code(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.2.s_scale_mlp"]
    save_file(tensors, path, metadata={"format": "pt"})
    _, model_class = hopscotch_classes("llama")
    with pytest.raises(ValueError, match="scales are missing"):
        model_class.from_pretrained(tmp_path)
    model_class.from_pretrained(tmp_path, config=hopscotch_config(stock_config("llama"), [1]))


def test_a_new_family_of_llamas_shape_is_one_line(monkeypatch):
    monkeypatch.setitem(FAMILIES, "helium", modeling_hopscotch.Family())
    torch.manual_seed(0)
    from transformers import HeliumConfig, HeliumForCausalLM

    config = HeliumConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    stock = HeliumForCausalLM(config).eval()
    model = modeling_hopscotch.HopscotchHeliumForCausalLM(hopscotch_config(config)).eval()
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and len(missing) == 3 * 4
    assert torch.equal(model(IDS).logits, stock(IDS).logits)


def test_blocks_without_attention_cannot_be_skipped():
    config = hopscotch_config(stock_config("granitemoehybrid"), [0])
    _, model_class = hopscotch_classes("granitemoehybrid")
    with pytest.raises(ValueError, match=r"block 0 has no attention .* only blocks \[1, 3, 4\]"):
        model_class(config)


def test_hidden_states_of_every_layer_are_given_out(family_folder):
    stock = AutoModelForCausalLM.from_pretrained(family_folder("llama")).eval()
    ours = load_model(model_ref(str(family_folder("llama"))), device="cpu")
    expected, found = (model(IDS, output_hidden_states=True).hidden_states for model in (stock, ours))
    assert len(found) == 5 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_scales_as_one_tensor_and_back(family_folder, granularity):
    model = skipping_model(family_folder("llama"), "llama", [1], granularity)
    width = {"layer": 4, "channel": 2 * 32 + 2}[granularity]
    values = torch.randn(4, width)
    scales.restore(model, values)
    assert torch.equal(scales.snapshot(model), values)
    assert torch.equal(scales.from_state_dict(scales.as_state_dict(values), 4), values)
    by_name = scales.columns(values)
    assert torch.equal(by_name["s_scale_mlp"], values[:, -1:])
    assert torch.equal(by_name["b_scale_attn"][2], model.model.layers[2].b_scale_attn)
    assert {key: value.shape for key, value in scales.as_state_dict(values).items()} == {
        key: scale.shape for key, scale in scales.named_scales(model)
    }
    scales.reset(model, [1])
    expected = scales.ones(model.config)
    scales.columns(expected)["b_scale_attn"][1] = 0
    assert torch.equal(scales.snapshot(model), expected)
