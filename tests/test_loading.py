"""Checkpoints in other hands: device maps, dtypes, quantised weights."""

import contextlib
import importlib.util
import shutil

import pytest
import torch
from conftest import check_refused
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import block_selection
import param_scale
import unscaled_ckpt
from hopscotch_common import checkpoints, scales
from hopscotch_common.errors import InputError
from hopscotch_common.loading.loader import load_model, quantization_config
from hopscotch_common.loading.models import QUANTIZATIONS, model_ref
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.trainer import prepare_model

SKIPPED = [0, 2]
VALUES = 1 + 0.02 * torch.arange(16.0).view(4, 4)
VALUES[SKIPPED, 0] = 0
# Widths that 4-bit groups of 32 divide.
WIDE = dict(hidden_size=128, intermediate_size=256)
# Largest relative difference to unquantised weights, of logits and of the scales' gradients. An
# int8 weight is off by at most 1/254 of its row's largest, an int4 one by 1/14 of its group's.
TOLERANCES = {"int8": 0.05, "int4": 0.5}
IDS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


needs_torchao = pytest.mark.skipif(missing("torchao"), reason="torchao is not installed")
no_cuda = not torch.cuda.is_available() or missing("bitsandbytes")
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(no_cuda, reason="needs a CUDA device and bitsandbytes")]
DEVICES = [pytest.param("cpu", marks=needs_torchao), pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture(scope="module")
def base(tiny_folder):
    return model_ref(str(tiny_folder("llama", **WIDE)))


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "checkpoint"
    checkpoints.save_checkpoint(folder, base, SKIPPED, VALUES, {})
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS.to(model.device)).logits.float().cpu()


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def check_scales(model) -> None:
    """They are float32, and bit for bit those that were saved."""
    assert {scale.dtype for _, scale in scales.named_scales(model)} == {torch.float32}
    assert torch.equal(scales.snapshot(model), VALUES)


@needs_torchao
def test_a_base_quantised_by_torchao_is_refused(base, tmp_path, capsys, monkeypatch):
    """Its files hold parts of tensors, which make sense with all others only."""
    monkeypatch.chdir(tmp_path)
    config = quantization_config("int8", torch.device("cpu"))
    AutoModelForCausalLM.from_pretrained(base.source, quantization_config=config).save_pretrained("base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(f"{base.source}/{name}", tmp_path / "base" / name)
    (tmp_path / "data.jsonl").write_text('{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}\n')
    skips, data = ["--blocks_to_skip", "1"], ["--data_path", "data.jsonl"]
    message = "base: its weights are quantised by torchao"
    for script, more in ((unscaled_ckpt, skips), (param_scale, [*skips, *data]), (block_selection, data)):
        check_refused(script, ["--model", "base", *more], message, capsys)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("bfloat16", 0.05), ("float16", 0.01)])
def test_device_map_and_dtype(checkpoint, dtype, tolerance):
    expected = logits_of(checkpoints.load_checkpoint(checkpoint))
    model = checkpoints.load_checkpoint(checkpoint, device_map="auto", dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
    error = relative_error(logits_of(model), expected)
    assert error <= tolerance and (error > 0) == (tolerance > 0)
    check_scales(model)


def test_a_model_that_does_not_fit_is_split_between_layers(checkpoint, tmp_path):
    expected = logits_of(checkpoints.load_checkpoint(checkpoint))
    memory = dict(max_memory={"cpu": 1_200_000}, offload_folder=tmp_path)
    model = checkpoints.load_checkpoint(checkpoint, device_map="auto", **memory)
    places = model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_checkpoint(checkpoint, quantization, device):
    options = dict(device_map={"": device})
    expected = logits_of(checkpoints.load_checkpoint(checkpoint, **options))
    options["quantization_config"] = quantization_config(quantization, torch.device(device))
    model = checkpoints.load_checkpoint(checkpoint, **options)
    assert 0 < relative_error(logits_of(model), expected) < TOLERANCES[quantization]
    check_scales(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_scales_train_on_a_quantised_base(base, quantization, device):
    logits, gradients = {}, {}
    for kind in (None, quantization):
        model = load_model(base, device=device, quantization=kind)
        scales.reset(model, SKIPPED)
        ids = IDS.to(model.device)
        output = model(ids, labels=ids)
        output.loss.backward()
        logits[kind] = output.logits.detach().float()
        gradients[kind] = torch.cat([scale.grad for scale in scales.trainable_scales(model)])
    assert type(model.model.layers[1].mlp.up_proj.weight) is not torch.nn.Parameter
    assert 0 < relative_error(logits[quantization], logits[None]) < TOLERANCES[quantization]
    assert gradients[quantization].isfinite().all() and gradients[quantization].abs().min() > 0
    assert relative_error(gradients[quantization], gradients[None]) < 2 * TOLERANCES[quantization]
    before = scales.snapshot(model)
    torch.optim.Adam(scales.trainable_scales(model), lr=1e-2).step()
    assert torch.equal((scales.snapshot(model) != before).sum(1), torch.tensor([3, 4, 3, 4]))


@pytest.mark.parametrize("method", [{}, {"quant_method": "fp8"}])
@pytest.mark.parametrize("pre_quantized", [True, False])
def test_a_quantised_base_without_gradients_does_not_train(base, pre_quantized, method):
    model = load_model(base, device="cpu")
    settings = FineGrainedFP8Config(**method)
    model.hf_quantizer = FineGrainedFP8HfQuantizer(settings, pre_quantized=pre_quantized)
    refused = pytest.raises(InputError, match=rf"{base.name}: its weights are quantised \(fp8\)")
    with refused if pre_quantized else contextlib.nullcontext():
        prepare_model(model, TrainingOptions(1e-2))


@pytest.mark.skipif(not missing("flash_attn"), reason="flash attention is installed")
def test_an_attention_kernel_that_is_missing_is_refused(tiny_folder):
    with pytest.raises(InputError, match="FlashAttention2 .*give another --attn_implementation"):
        load_model(model_ref(str(tiny_folder())), device="cpu", attn_implementation="flash_attention_2")
