"""Folding against the unfolded model, the two folder formats, refusals, the original's checkpoints."""

import dataclasses
import functools
import json
import pickle
import shutil

import pytest
import torch
import transformers
from conftest import FAMILY_SIZES, MORE_FAMILIES, byte_tokenizer, check_refused, stock_config
from gguf_models import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hopscotch_common import checkpoints, scales
from hopscotch_common.errors import InputError
from hopscotch_common.export import __main__ as export
from hopscotch_common.export import decilm, folding, formats
from hopscotch_common.export.configuration_decilm import DeciLMConfig
from hopscotch_common.loading.loader import hopscotch_config
from hopscotch_common.loading.models import ModelRef, model_ref
from hopscotch_common.scales.modeling_hopscotch import FAMILIES, SCALE_NAMES, attention_blocks

LAYERS, HIDDEN = 4, 32
WIDTHS = [len(SCALE_NAMES), 2 * HIDDEN + 2]  # four scalars a layer; b a channel
VARIANTS = [
    *((family, {}) for family in FAMILY_SIZES),
    ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    ("granite", dict(attention_bias=True, tie_word_embeddings=True)),
    ("mistral", dict(head_dim=16, num_key_value_heads=4)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, **config changes) -> a tiny folder with random norms and biases too, not 1s and 0s."""

    @functools.cache
    def make(family, **changes):
        folder = tmp_path_factory.mktemp(f"random-{family}")
        random_model(AutoModelForCausalLM, stock_config(family, **changes)).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def near_one(tmp_path, base):
    """A checkpoint of a llama that skips block 1, with scales near 1; all that tmp_path holds."""
    return save(tmp_path, base("llama"), [1], random_scales(0, 0.9, 1.1))


def random_scales(
    seed: int,
    low: float,
    high: float,
    signs: bool = False,
    width: int = len(SCALE_NAMES),
    layers: int = LAYERS,
) -> torch.Tensor:
    """[layers, width], log-uniform between low and high."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([low, high]).log()
    values = torch.empty(layers, width).uniform_(low, high, generator=generator).exp()
    if signs:
        values *= torch.randint(2, values.shape, generator=generator) * 2 - 1
    return values


def save(tmp_path, folder, skipped, values):
    scales.columns(values)["b_scale_attn"][skipped] = 0.0
    checkpoint = tmp_path / "checkpoint"
    checkpoints.save_checkpoint(checkpoint, ModelRef("tiny", str(folder)), skipped, values, {})
    return checkpoint


def logits(model) -> torch.Tensor:
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model.eval()(ids).logits


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def load_folded(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    kernel = "eager" if FAMILIES[kind].caps_attention else None  # sdpa would leave the cap out
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=kernel, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize(
    "family, changes, width, negative",
    [
        *((*variant, width, width == WIDTHS[0]) for variant in VARIANTS for width in WIDTHS),
        *((family, {}, WIDTHS[1], True) for family in MORE_FAMILIES),
    ],
)
def test_every_family_folds(tmp_path, base, family, changes, width, negative):
    """Negative and small scales, first and last block skipped, b a number or a vector: equal logits in the
    stock class. Without eps, what remains is float32 rounding. negative: how the stream ends up."""
    eps = {"starcoder2": "norm_epsilon"}.get(family, "rms_norm_eps")
    folder = base(family, **{eps: 1e-20}, **changes)
    low, tolerance = (0.05, 1e-4) if family in FAMILY_SIZES else (0.3, 2e-4)
    config = stock_config(family)
    blocks = attention_blocks(config)
    values = random_scales(0, low, 2.0, signs=True, width=width, layers=config.num_hidden_layers)
    by_name = scales.columns(values)
    if (by_name["s_scale_attn"].prod() * by_name["s_scale_mlp"].prod() < 0) != negative:
        by_name["s_scale_mlp"][3] *= -1
    checkpoint = save(tmp_path, folder, [blocks[0], blocks[-1]], values)
    expected = logits(checkpoints.load_checkpoint(checkpoint))
    formats.export_checkpoint(checkpoint, "folded", tmp_path / "folded")
    model = load_folded(tmp_path / "folded")
    assert type(model) is type(AutoModelForCausalLM.from_config(config))
    assert relative_error(logits(model), expected) < tolerance
    unfolded = AutoModelForCausalLM.from_pretrained(folder)
    assert relative_error(logits(unfolded), expected) > 0.1  # so the scales do matter here


def test_folded_folder_is_stock(tmp_path, base):
    checkpoint = save(tmp_path, base("qwen2"), [0, 2], random_scales(0, 0.9, 1.1))
    report = formats.export_checkpoint(checkpoint, "folded", tmp_path / "folded")
    expected = logits(checkpoints.load_checkpoint(checkpoint))
    assert report["relative_logit_error"] < 1e-3 and report["real_text"]  # with a real eps
    assert report["equal_continuations"] > 0.9
    names = {path.name for path in (tmp_path / "folded").iterdir()}
    assert names == {path.name for path in base("qwen2").iterdir()} | {"README.md", "hopscotch_export.json"}
    config = json.loads((tmp_path / "folded/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
    old = {
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
    }  # read before transformers 5
    assert config == json.loads((base("qwen2") / "config.json").read_text()) | old
    loaded = load_folded(tmp_path / "folded")
    assert relative_error(logits(loaded), expected) < 1e-3
    tensors = load_file(tmp_path / "folded/model.safetensors")
    for layer in range(LAYERS):
        zero = not tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].any()
        assert zero == (layer in (0, 2))


def test_a_folded_config_says_its_rope_scaling_as_older_readers_want_it(tmp_path, base):
    rope = dict(rope_type="linear", factor=2.0, rope_theta=5e5)
    folder = shutil.copytree(base("llama"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    checkpoint = save(tmp_path, folder, [1], random_scales(0, 0.9, 1.1))
    formats.export_checkpoint(checkpoint, "folded", tmp_path / "folded")
    config = json.loads((tmp_path / "folded/config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert AutoConfig.from_pretrained(tmp_path / "folded").rope_parameters == rope


PHI3_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "odd",
    [
        {"stop_strings": ["#"]},
        {"return_dict_in_generate": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"repetition_penalty": 9.0, "max_length": 2},
    ],
)
def test_the_check_asks_greedily_whatever_the_model_would(base, odd):
    model, prompts = AutoModelForCausalLM.from_pretrained(base("llama")), [([5, 6, 7, 8], 3)]
    ((_, expected),) = formats.ask(model, prompts)
    model.generation_config = GenerationConfig(eos_token_id=expected[3], **odd)
    ((_, said),) = formats.ask(model, prompts)
    assert said == expected[: expected.index(expected[3]) + 1]


YARN = dict(rope_type="yarn", factor=8.0, beta_fast=32.0, original_max_position_embeddings=64)
OLMO3_ROPE = {"rope_theta": 2e5, "rope_scaling": YARN}
GEMMA3_ROPE = {"rope_theta": 2e6, "rope_local_base_freq": 3e4}
GEMMA3_ROPE |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}


@pytest.mark.parametrize(
    ("family", "changes", "old"),
    [
        ("qwen3_moe", {}, {"num_experts": 4}),
        ("granitemoehybrid", {}, {"layer_types": ["mamba", "attention", "mamba", "attention", "attention"]}),
        ("phi3", {"rope_scaling": dict(PHI3_LONGROPE), "rope_theta": 5e5}, {"rope_scaling": PHI3_LONGROPE}),
        ("olmo3", OLMO3_ROPE, OLMO3_ROPE),
        ("gemma3_text", GEMMA3_ROPE, GEMMA3_ROPE),
        ("gemma3_text", GEMMA3_ROPE | {"rope_scaling": None}, GEMMA3_ROPE | {"rope_scaling": None}),
    ],
)
def test_a_folded_config_says_what_older_readers_of_a_family_want(tmp_path, family, changes, old):
    """Names of transformers 4.57; and transformers 5 reads the base's config again."""
    stock = stock_config(family, dtype="float32", **changes)
    config, layers = hopscotch_config(stock, [1]), stock.num_hidden_layers
    folding.prepare(tmp_path, config, torch.ones(layers, 4), {})
    text = (tmp_path / "config.json").read_text()
    values = json.loads(text)
    assert {key: values[key] for key in old} == old and "Infinity" not in text
    own = ("_name_or_path", "architectures", "partial_rotary_factor", "torch_dtype")
    found, expected = (
        {key: value for key, value in config.to_dict().items() if key not in own}
        for config in (AutoConfig.from_pretrained(tmp_path), stock)
    )
    assert found == expected


def test_weights_keep_their_dtype_and_their_files(tmp_path, base):
    folder = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(base("llama"), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20kB")
    checkpoints.copy_companions(base("llama"), folder)
    checkpoint = save(tmp_path, folder, [3], random_scales(0, 0.8, 1.2))
    report = formats.export_checkpoint(checkpoint, "folded", tmp_path / "folded")
    assert len(list((tmp_path / "folded").glob("*.safetensors"))) > 1
    model = load_folded(tmp_path / "folded")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 1e-4 < report["relative_logit_error"] < 0.1


@pytest.mark.parametrize(
    "family, changes, width",
    [("llama", {}, WIDTHS[0]), *((*variant, WIDTHS[1]) for variant in VARIANTS if variant[0] != "qwen3")],
)
def test_nemotron_nas(tmp_path, base, family, changes, width):
    skipped = [0, 2] if family == "llama" else [1, 2]
    folder = base(family, rms_norm_eps=1e-20, intermediate_size=300, **changes)
    checkpoint = save(tmp_path, folder, skipped, random_scales(3, 0.05, 2.0, signs=True, width=width))
    report = formats.export_checkpoint(checkpoint, "nemotron_nas", tmp_path / "decilm")
    assert report["relative_logit_error"] < 1e-4

    # The same numbers once more from the raw files, in a stock class that knows no skipped block.
    config = json.loads((tmp_path / "decilm/config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert config["intermediate_size"] == 512  # the next multiple of 256; what is added does nothing
    tensors = load_file(tmp_path / "decilm/model.safetensors")
    no_op = {i for i, block in enumerate(config["block_configs"]) if block["attention"]["no_op"]}
    assert no_op == set(skipped) - {0}
    attention = tuple(f"model.layers.{i}.{name}." for i in no_op for name in ("self_attn", "input_layernorm"))
    assert not [key for key in tensors if key.startswith(attention)]
    stock = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen2" if family == "qwen2" else "llama",
            **{key: config[key] for key in decilm.SAME_IN_BOTH},
            head_dim=config["head_dim"],
            attention_bias=config["attention_bias"],
            mlp_bias=config["mlp_bias"],
        )
    )
    with torch.no_grad():
        for layer in no_op:
            for parameter in stock.model.layers[layer].self_attn.parameters():
                parameter.zero_()
    unexpected = stock.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unexpected
    expected = logits(checkpoints.load_checkpoint(checkpoint))
    assert relative_error(logits(stock), expected) < 1e-4


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="default", rope_theta=50_000.0),
        dict(rope_type="llama3", rope_theta=500_000.0, **LLAMA3),
    ],
)
def test_decilm_config_class(tmp_path, near_one, rope):
    config = checkpoints.checkpoint_config(near_one)
    config.rope_parameters = rope
    decilm.write_config(decilm.decilm_config(config, {1}), tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == DeciLMConfig.__name__ and loaded.rope_parameters == rope
    # Before transformers 5 there was no rope_parameters, only these two.
    old = json.loads((tmp_path / "config.json").read_text())
    # of a folder of no known version, transformers says that its tokenizer (if large) is a faulty one
    assert old["transformers_version"] == transformers.__version__
    del old["rope_parameters"]
    assert DeciLMConfig(**old).rope_parameters == rope
    blocks = pickle.loads(pickle.dumps(DeciLMConfig(**old))).block_configs
    assert [block.attention.no_op for block in blocks] == [False, True, False, False]
    assert blocks[0].attention.n_heads_in_group == 2 and blocks[1].attention.n_heads_in_group is None
    assert blocks[0].ffn.ffn_mult == 1.5 * 256 / 32  # for a width of 48: multiples of 256 only
    assert json.loads(DeciLMConfig(**old).to_json_string())["block_configs"] == old["block_configs"]


@pytest.mark.parametrize(
    "hidden, width", [(576, 1536), (4096, 14336), (3584, 18944), (4096, 12800), (2560, 256)]
)
def test_ffn_mult_gives_back_the_width(hidden, width):
    config = hopscotch_config(AutoConfig.for_model("llama", hidden_size=hidden, intermediate_size=width))
    blocks = decilm.decilm_config(config, set())["block_configs"]
    assert decilm.ffn_width(blocks[0]["ffn"]["ffn_mult"], hidden) == width


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("qwen3", {}, "layers of Llama's shape, and those of qwen3 are not; export it as folded"),
        ("mistral", dict(sliding_window=16), "sliding window"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=2), "sliding window"),
        ("llama", dict(hidden_act="gelu"), "silu"),
    ],
)
def test_what_decilm_cannot_hold_is_refused(tmp_path, base, family, changes, reason):
    checkpoint = save(tmp_path, base(family, **changes), [1], random_scales(0, 0.9, 1.1))
    with pytest.raises(InputError, match=reason):
        formats.export_checkpoint(checkpoint, "nemotron_nas", tmp_path / "decilm")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    formats.export_checkpoint(checkpoint, "folded", tmp_path / "folded")  # which the message offers


def test_quantised_weights_are_refused_before_anything_is_trained(tmp_path):
    config = stock_config("llama")
    formats.check_exports(["folded", "nemotron_nas"], config, tmp_path / "scaled")
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(InputError, match="folded: the model's weights are quantised"):
        formats.check_exports(["folded"], config, tmp_path / "scaled")


def test_a_format_named_twice_is_exported_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(formats, "export_checkpoint", lambda _, name, *__, **___: made.append(name) or {})
    formats.run_exports(["folded", "nemotron_nas", "folded"], tmp_path / "checkpoint", tmp_path / "scaled")
    assert made == ["folded", "nemotron_nas"]


@pytest.mark.parametrize("column, value", [(1, 0.0), (3, 1e-5)])
def test_scales_that_cannot_be_folded_are_refused(column, value):
    """That an export then leaves nothing, and that none is made of scales that are not finite, is among the
    bad inputs."""
    values = random_scales(0, 0.9, 1.1)
    values[2, column] = value
    with pytest.raises(InputError, match=f"{SCALE_NAMES[column]} of layer 2 is"):
        folding.fold_factors(values, [1])


@pytest.mark.parametrize("factor", [100.0, torch.tensor([-1.0, 100.0])])
def test_a_product_that_the_dtype_cannot_hold_is_refused(factor):
    with pytest.raises(InputError, match="times 100 is not finite in torch.float16"):
        folding.multiplied("model.norm.weight", torch.full((2,), 1e3).half(), folding.Product(factor))


def test_past_the_tolerance_nothing_is_left_and_the_old_export_stays(tmp_path, base, capsys):
    checkpoint = save(tmp_path, base("llama", rms_norm_eps=1e-2), [1], random_scales(0, 0.2, 2.0))
    command = [str(checkpoint), "--format", "folded", "--output", str(tmp_path / "out")]
    assert export.main(command) == 2
    output = capsys.readouterr()
    assert "relative logit error" in output.err and "--tolerance" in output.err and not output.out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    assert export.main([*command, "--tolerance", "10"]) == 0
    assert "relative logit error" in capsys.readouterr().out
    first = (tmp_path / "out/hopscotch_export.json").read_text()
    assert json.loads(first)["tolerance"] == 10
    assert export.main(command) == 2
    assert (tmp_path / "out/hopscotch_export.json").read_text() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.fixture(scope="module")
def deep_granite(tiny_folder, tmp_path_factory):
    """A Granite of 30 layers in bfloat16, and a checkpoint of it with scales within 0.85 to 1.15."""
    base = tmp_path_factory.mktemp("granite") / "base"
    source = tiny_folder("granite", num_hidden_layers=30)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(base)
    checkpoints.copy_companions(source, base)
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(30, 4).uniform_(0.85, 1.15, generator=generator)
    return save(tmp_path_factory.mktemp("deep"), base, [1, 7], values)


def test_a_sound_export_of_16_bit_weights_passes(tmp_path, deep_granite):
    """What computing in bfloat16 makes of it anyway is no fault of the export."""
    report = formats.export_checkpoint(deep_granite, "folded", tmp_path / "out")
    assert report["relative_logit_error"] <= report["tolerance"]
    source, exported = (
        [model(ids[None]).logits for ids in torch.arange(3, 63).view(3, 20)]
        for model in (
            checkpoints.load_checkpoint(deep_granite, dtype=torch.float32),
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval(),
        )
    )
    assert relative_error(torch.cat(exported), torch.cat(source)) < 0.05


def test_an_export_of_16_bit_weights_with_a_scale_left_out_is_refused(tmp_path, deep_granite, monkeypatch):
    """A scale of one of 30 layers that is off by 30 percent shows, though the dtype's noise is allowed."""

    right = folding.fold_factors

    def wrong(*args):
        factors = right(*args)
        layers = list(factors.layers)
        layers[3] = dataclasses.replace(layers[3], mlp_adds=1.3 * layers[3].mlp_adds)
        return dataclasses.replace(factors, layers=tuple(layers))

    monkeypatch.setattr(folding, "fold_factors", wrong)
    with pytest.raises(InputError, match="not exact enough"):
        formats.export_checkpoint(deep_granite, "folded", tmp_path / "out")


def test_an_empty_folder_is_taken_and_a_gguf_needs_its_source(tmp_path, near_one, capsys):
    (tmp_path / "empty").mkdir()
    formats.export_checkpoint(near_one, "folded", tmp_path / "empty")
    check_refused(export, [str(tmp_path), "--output", "y", "--format", "gguf"], "--from", capsys)


def test_comparison_figures():
    logits = torch.tensor([[0.0, 3.0, 0.0], [2.0, 1.0, 0.0]])
    source, shifted = [(logits, [1, 2, 3, 4])], [(logits + 5, [1, 2, 3, 4])]
    assert formats.compare(source, shifted, True).relative_logit_error < 1e-6
    # Position 1 changes its first choice: the difference (-1, 1, 0) has norm^2 2, the source 6 + 2.
    other = [(torch.tensor([[0.0, 3.0, 0.0], [1.0, 2.0, 0.0]]), [1, 2, 0, 4])]
    result = formats.compare(source, other, True)
    assert result.relative_logit_error == pytest.approx(0.5)
    assert result.top1_agreement == 0.5 and result.equal_continuations == 0.5 and result.positions == 2
    broken = [(logits * float("nan"), [1])]
    assert not formats.compare(source, broken, True).relative_logit_error <= 0.1


def test_random_tokens_stand_in_for_a_missing_tokenizer(near_one):
    assert formats.check_prompts(near_one, 300)[1]
    assert not formats.check_prompts(near_one, 50)[1]  # a tokenizer with ids beyond the model's
    for path in near_one.glob("*token*"):
        path.unlink()
    prompts, real = formats.check_prompts(near_one, 50)
    assert not real and max(max(ids) for ids, _ in prompts) < 50


def original_folder(tmp_path, folder, values):
    """What the original system saves: a stock config, all weights, and the scales among them."""
    target = tmp_path / "original"
    target.mkdir()
    checkpoints.copy_companions(folder, target)
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for layer, row in enumerate(values):
        for name, value in zip(SCALE_NAMES, row, strict=True):
            tensors[f"model.layers.{layer}.{name}"] = value.reshape(1).clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_checkpoints_of_the_original_system(tmp_path, base):
    values = random_scales(0, 0.8, 1.2)
    ours = save(tmp_path, base("granite"), [0, 2], values)
    original = original_folder(tmp_path, base("granite"), values)
    model = checkpoints.load_checkpoint(original)
    assert model.config.skipped_attention_blocks == [0, 2]
    assert not hasattr(model.model.layers[2], "self_attn")
    expected = logits(checkpoints.load_checkpoint(ours))
    assert torch.equal(logits(model), expected)
    formats.export_checkpoint(original, "folded", tmp_path / "folded")
    assert relative_error(logits(load_folded(tmp_path / "folded")), expected) < 1e-3


def test_an_original_checkpoint_that_wipes_out_the_stream_is_refused(tmp_path, base):
    values = random_scales(0, 0.8, 1.2)
    values[2, :2] = 0.0
    with pytest.raises(InputError, match="s_scale_attn of layer 2 is 0 as well"):
        checkpoints.load_checkpoint(original_folder(tmp_path, base("llama"), values))


def test_a_model_without_scales_is_no_checkpoint(base):
    with pytest.raises(InputError, match="no scales"):
        checkpoints.load_checkpoint(base("llama"))


def test_names_of_a_vision_language_model(tiny_folder, tmp_path):
    """As transformers 5 saves qwen3_5_text, where it was read of one."""
    folder = shutil.copytree(tiny_folder("qwen3_5_text"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    named = {key.replace("model.", "model.language_model."): tensor for key, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    values = random_scales(0, 0.9, 1.1, layers=5)
    checkpoint = save(tmp_path, folder, [1], values)
    kept = load_file(checkpoint / "base-00001-of-00001.safetensors")
    assert kept.keys() < tensors.keys() and "model.layers.1.self_attn.o_proj.weight" not in kept
    report = formats.export_checkpoint(checkpoint, "folded", tmp_path / "folded", device="cpu")
    assert report["relative_logit_error"] < 1e-3


@pytest.mark.parametrize("family, form", [("gemma", "folded"), ("granite", "nemotron_nas")])
def test_a_tied_base_with_a_head_of_its_own(tiny_folder, tmp_path, family, form):
    """What peft leaves with `modules_to_save`: transformers keeps both matrices, whatever the config says."""
    folder = shutil.copytree(tiny_folder(family, tie_word_embeddings=False), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert not torch.equal(tensors["lm_head.weight"], embedding)

    def exported(name: str) -> tuple:
        checkpoint, output = tmp_path / name, tmp_path / f"{name}_{form}"
        checkpoints.save_checkpoint(checkpoint, model_ref(str(folder)), [1], torch.ones(4, 4), {})
        report = formats.export_checkpoint(checkpoint, form, output, device="cpu")
        return checkpoint, report, json.loads((output / "config.json").read_text())

    checkpoint, report, _ = exported("own")
    assert report["relative_logit_error"] < 1e-4
    assert not checkpoints.checkpoint_config(checkpoint).tie_word_embeddings
    assert torch.equal(checkpoints.load_checkpoint(checkpoint).lm_head.weight, tensors["lm_head.weight"])
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert exported("tied")[2]["tie_word_embeddings"]
