"""Checkpoints in other hands: device maps, dtypes, quantised weights."""

import contextlib
import errno
import importlib.util
import json
import shutil
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from conftest import check_refused
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

import block_selection
import param_scale
import unscaled_ckpt
from hopscotch_common import checkpoints, cli, scales
from hopscotch_common.errors import InputError
from hopscotch_common.loading import loader, models
from hopscotch_common.loading.loader import load_model, quantization_config
from hopscotch_common.loading.models import QUANTIZATIONS, model_ref

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


FETCHED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"]
FETCHED += ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model"]
FETCHED += ["README.md", "LICENSE", "model.safetensors.index.json"]
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
LEFT = ["consolidated.safetensors", "original/params.json", "original/consolidated.00.pth", "evil.py"]
LEFT += ["pytorch_model.bin", "onnx/model.onnx", "model.gguf"]


@pytest.mark.parametrize("weights", [True, False])
def test_what_is_fetched_of_a_hub_id(monkeypatch, tmp_path, weights):
    found = set()

    def fetch(_, **patterns):
        found.update(filter_repo_objects([*FETCHED, *WEIGHTS, *LEFT], **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert models._download.__wrapped__("owner/name", weights) == tmp_path
    assert found == {*FETCHED, *(WEIGHTS if weights else [])}


class ProxyError(Exception):
    """As HTTP libraries have one; which the hub uses (httpx, httpx2) depends on its version."""


@pytest.mark.parametrize(
    "raised",
    [
        ProxyError("403 Forbidden"),
        RuntimeError("Data processing error: connection refused (os error 111)"),
        ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
        FileNotFoundError("not in the cache"),
    ],
    ids=repr,
)
def test_why_a_hub_id_cannot_be_fetched(raised, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=raised))
    with pytest.raises(InputError) as refused:
        models._download.__wrapped__("owner/name", True)
    reason = f"({type(raised).__name__}: {raised})"
    assert reason in str(refused.value) and "--model /path/to/model" in str(refused.value)


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOSPC, "No space left on device", "/cache/blob"),
        RuntimeError("Data processing error: No space left on device (os error 28)"),
        PermissionError(errno.EACCES, "Permission denied", "/cache"),
    ],
    ids=repr,
)
def test_a_cache_that_cannot_be_written_is_no_login_problem(raised, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=raised))
    main = cli.command(lambda argv: models._download.__wrapped__("owner/name", True))
    assert main([]) == 1
    place = getattr(raised, "filename", None) or huggingface_hub.constants.HF_HUB_CACHE
    reason = "Permission denied" if isinstance(raised, PermissionError) else "No space left on device"
    assert f"error: {place}: {reason}; " in capsys.readouterr().err


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
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients[kind] = torch.cat([parameter.grad for parameter in trainable])
    assert type(model.model.layers[1].mlp.up_proj.weight) is not torch.nn.Parameter
    assert 0 < relative_error(logits[quantization], logits[None]) < TOLERANCES[quantization]
    assert gradients[quantization].isfinite().all() and gradients[quantization].abs().min() > 0
    assert relative_error(gradients[quantization], gradients[None]) < 2 * TOLERANCES[quantization]
    before = scales.snapshot(model)
    torch.optim.Adam(trainable, lr=1e-2).step()
    assert torch.equal((scales.snapshot(model) != before).sum(1), torch.tensor([3, 4, 3, 4]))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4"])
def test_a_quantised_base_without_gradients_does_not_train(base, method, tmp_path, monkeypatch):
    folder = shutil.copytree(base.source, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method}})
    )
    unpacked = method in ("fp8", "mxfp4")
    loads = []

    def load(*_, **options):  # as transformers does with kernels for them
        loads.append(method)
        model = AutoModelForCausalLM.from_pretrained(base.source)
        model.hf_quantizer = object()
        return model

    monkeypatch.setattr(loader, "load_whole", load)
    with pytest.raises(InputError, match=rf"base: its weights are quantised \({method}\)"):
        load_model(model_ref(str(folder)), device="cpu")
    assert len(loads) == unpacked  # the others are known by their config


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_int4_on_cuda_computes_in_the_models_dtype(stored, monkeypatch):
    monkeypatch.setattr(loader, "_require", lambda *_: None)
    found = quantization_config("int4", torch.device("cuda"), getattr(torch, stored))
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_compute_dtype) == ("nf4", getattr(torch, stored))


@pytest.mark.parametrize("gpus, rank, place", [(1, 3, 0), (4, 3, 3)])
def test_a_process_that_sees_one_gpu_takes_that(gpus, rank, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert loader.resolve_device("auto") == torch.device("cuda", place)


@pytest.mark.parametrize("cuda, place", [(False, torch.device("cpu")), (True, None)])
def test_split_is_over_nvidias_gpus_only(cuda, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert loader.resolve_device("split") == place


@pytest.mark.parametrize(
    "device, capability, lacks", [("cuda", (7, 5), True), ("cuda", (8, 0), False), ("cpu", (0, 0), False)]
)
def test_gpus_from_before_bfloat16_are_known(device, capability, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert loader.lacks_bfloat16(torch.device(device)) == lacks


def test_flash_attention_in_float32_is_refused(base, monkeypatch):
    class Model:
        @staticmethod
        def from_pretrained(folder, output_loading_info, **options):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=options["dtype"])
            model.config._attn_implementation_internal = "flash_attention_2"
            return model, {}

    for dtype in ("bfloat16", "float32"):
        refused = pytest.raises(InputError, match="flash_attention_2: computes in 16 bits only")
        with refused if dtype == "float32" else contextlib.nullcontext():
            loader.load_whole(Model, base.source, dtype=dtype)


@pytest.mark.skipif(not missing("flash_attn"), reason="flash attention is installed")
def test_an_attention_kernel_that_is_missing_is_refused(tiny_folder):
    with pytest.raises(InputError, match="FlashAttention2 .*give another --attn_implementation"):
        load_model(model_ref(str(tiny_folder())), device="cpu", attn_implementation="flash_attention_2")
