"""Checkpoints in other hands: device maps, dtypes, quantised weights, lm-eval."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, check_refused

import param_scale
import unscaled_ckpt
from hopscotch_common import checkpoints, scales
from hopscotch_common.errors import InputError
from hopscotch_common.loading import load_model, quantization_config
from hopscotch_common.models import QUANTIZATIONS, model_ref

SKIPPED = [0, 2]
TASKS = ROOT / "tests" / "lm_eval"
# Widths that 4-bit groups of 32 divide.
WIDE = dict(hidden_size=128, intermediate_size=256)
# Largest relative difference to unquantised weights, of logits and of the scales' gradients. An
# int8 weight is off by at most 1/254 of its row's largest, an int4 one by 1/14 of its group's.
TOLERANCES = {"int8": 0.05, "int4": 0.5}

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
        reason="needs a CUDA device and bitsandbytes",
    ),
]


@pytest.fixture
def checkpoint(tiny_folder, tmp_path):
    values = 1 + 0.02 * torch.arange(16.0).view(4, 4)
    values[SKIPPED, 0] = 0
    base = model_ref(str(tiny_folder("llama", **WIDE)))
    checkpoints.save_checkpoint(tmp_path / "checkpoint", base, SKIPPED, values, {})
    return tmp_path / "checkpoint"


@needs_torchao
def test_a_base_quantised_by_torchao_is_refused(tiny_folder, tmp_path, capsys, monkeypatch):
    """Its files hold parts of tensors, which make sense with all others only."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    config = quantization_config("int8", torch.device("cpu"))
    folder = tiny_folder("llama", **WIDE)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained("base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / "base" / name)
    (tmp_path / "data.jsonl").write_text('{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}\n')
    common = ["--model", "base", "--blocks_to_skip", "1"]
    for script, more in ((unscaled_ckpt, []), (param_scale, ["--data_path", "data.jsonl"])):
        check_refused(script, [*common, *more], "base: its weights are quantised by torchao", capsys)


def token_ids() -> torch.Tensor:
    return torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(token_ids().to(model.device)).logits.float().cpu()


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def loss_and_gradients(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the mean loss for every trainable scale."""
    ids = token_ids().to(model.device)
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = torch.cat([scale.grad for scale in scales.trainable_scales(model)])
    return output.logits.detach().float().cpu(), gradients.cpu()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("bfloat16", 0.05), ("float16", 0.01)])
def test_device_map_and_dtype(checkpoint, dtype, tolerance):
    expected = logits_of(checkpoints.load_checkpoint(checkpoint))
    model = checkpoints.load_checkpoint(checkpoint, device_map="auto", dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
    assert {scale.dtype for _, scale in scales.named_scales(model)} == {torch.float32}
    error = relative_error(logits_of(model), expected)
    assert error <= tolerance and (error > 0) == (tolerance > 0)
    saved = checkpoints.load_scales(checkpoint)
    assert torch.equal(scales.snapshot(model), saved)


def test_a_model_that_does_not_fit_is_split_between_layers(checkpoint, tmp_path):
    expected = logits_of(checkpoints.load_checkpoint(checkpoint))
    model = checkpoints.load_checkpoint(
        checkpoint, device_map="auto", max_memory={"cpu": 1_200_000}, offload_folder=tmp_path / "offloaded"
    )
    places = model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]
    assert torch.equal(logits_of(model), expected)


def quantised(checkpoint, quantization, device):
    config = quantization_config(quantization, torch.device(device))
    return checkpoints.load_checkpoint(checkpoint, quantization_config=config, device_map={"": device})


def check_quantised_checkpoint(checkpoint, quantization, device):
    expected = logits_of(checkpoints.load_checkpoint(checkpoint, device_map={"": device}))
    model = quantised(checkpoint, quantization, device)
    error = relative_error(logits_of(model), expected)
    assert 0 < error < TOLERANCES[quantization]
    assert torch.equal(scales.snapshot(model), checkpoints.load_scales(checkpoint))
    assert {scale.dtype for _, scale in scales.named_scales(model)} == {torch.float32}


def check_scales_train_on_a_quantised_base(base, quantization, device):
    results = []
    for kind in (None, quantization):
        model = load_model(base, device=device, quantization=kind)
        scales.reset(model, SKIPPED)
        results.append(loss_and_gradients(model))
    (logits, gradients), (quantised_logits, quantised_gradients) = results
    assert type(model.model.layers[1].mlp.up_proj.weight) is not torch.nn.Parameter
    assert 0 < relative_error(quantised_logits, logits) < TOLERANCES[quantization]
    assert quantised_gradients.isfinite().all() and quantised_gradients.abs().min() > 0
    assert relative_error(quantised_gradients, gradients) < 2 * TOLERANCES[quantization]
    before = scales.snapshot(model)
    torch.optim.Adam(scales.trainable_scales(model), lr=1e-2).step()
    assert torch.equal((scales.snapshot(model) != before).sum(1), torch.tensor([3, 4, 3, 4]))


@needs_torchao
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_checkpoint(checkpoint, quantization):
    check_quantised_checkpoint(checkpoint, quantization, "cpu")


@needs_torchao
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_scales_train_on_a_quantised_base(tiny_folder, quantization):
    base = model_ref(str(tiny_folder("llama", **WIDE)))
    check_scales_train_on_a_quantised_base(base, quantization, "cpu")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("_", [pytest.param("cuda", marks=needs_cuda)])
def test_bitsandbytes(checkpoint, tiny_folder, quantization, _):
    check_quantised_checkpoint(checkpoint, quantization, "cuda")
    base = model_ref(str(tiny_folder("llama", **WIDE)))
    check_scales_train_on_a_quantised_base(base, quantization, "cuda")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_runs_a_checkpoint(checkpoint, tmp_path):
    arguments = (
        f"--model hf --model_args pretrained={checkpoint},trust_remote_code=True,dtype=float32 --device cpu"
    )
    arguments += " --tasks local_generated,local_choices --include_path . --batch_size 2"
    arguments += f" --output_path {tmp_path / 'results'} --log_samples"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments.split()],
        cwd=TASKS,
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]

    def samples(task):
        (path,) = (tmp_path / "results").rglob(f"samples_{task}_*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = checkpoints.load_checkpoint(checkpoint)
    generated, choices = samples("local_generated"), samples("local_choices")
    assert len(generated) == len(choices) == 3
    for sample in generated:
        ids = torch.tensor([tokenizer.encode(sample["doc"]["question"])])
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert len(answer) > 0
        assert sample["resps"] == [[tokenizer.decode(answer, skip_special_tokens=True)]]
    for sample in choices:
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            question = tokenizer.encode(sample["doc"]["question"])
            answer = tokenizer.encode(choice, add_special_tokens=False)
            with torch.inference_mode():
                logits = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(answer)), answer].sum()
            assert float(response[0][0]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash attention is installed")
def test_an_attention_kernel_that_is_missing_is_refused(tiny_folder):
    with pytest.raises(InputError, match="FlashAttention2 .*give another --attn_implementation"):
        load_model(model_ref(str(tiny_folder())), device="cpu", attn_implementation="flash_attention_2")
