"""benchmarks/gpu.py on a CPU: every section runs, and what it counts is what is there."""

import json
import math

import gpu
import measuring
import pytest
import torch
from test_training import loaded
from torch.utils._python_dispatch import TorchDispatchMode

from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import make_batches
from hopscotch_common.training.trainer import ScaleTrainer

COMMAND = ["--config", "tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """All sections."""
    output = tmp_path_factory.mktemp("gpu") / "tiny.json"
    assert gpu.main([*COMMAND, "--result", str(output)]) == 0
    content = json.loads(output.read_text())
    figures = {f["of"]["section"]: {k: v for k, v in f.items() if k != "of"} for f in content["figures"]}
    return content | {"figures": figures, "table": gpu.table(content["figures"])}


def test_every_section_measures_on_a_cpu(result):
    bench = gpu.Bench(gpu.SIZES["tiny"], torch.device("cpu"), torch.bfloat16)
    flash = {"saved, flash", "training, flash"}
    assert set(result["figures"]) == set(gpu.all_sections(bench)) - flash
    for name, figures in result["figures"].items():
        for key, value in figures.items():
            assert key != "peak_bytes", name
            assert value > 0 or key == "blocks_skipped", (name, key)
            assert math.isfinite(value), (name, key)
    assert "gpu" not in result["machine"]


def test_the_figures_agree_with_the_model(result):
    figures = result["figures"]
    none, eighth, quarter = (figures[f"inference, {share} skipped"] for share in ("none", "1/8", "1/4"))
    kv = 2 * 8 * 8 * 2  # keys and values, heads, width of a head, bytes
    assert [f["kv_bytes_per_token"] for f in (none, eighth, quarter)] == [8 * kv, 7 * kv, 6 * kv]
    # bytes: q and o, k and v, the norm; b_scale_attn, which is no parameter then
    attention = 2 * (2 * 256 * 256 + 2 * 256 * 64 + 256) + 4
    assert none["weight_bytes"] - eighth["weight_bytes"] == attention
    assert eighth["weight_bytes"] - quarter["weight_bytes"] == attention
    training, rate = figures["training, sdpa"], figures["matmul"]["flops_per_second"]
    (line,) = [line for line in result["table"] if line.startswith("training, sdpa")]
    assert f"share_of_matmul_rate {training['flops_per_second'] / rate:.4g}" in line
    assert training["tokens_per_step"] <= training["padded_tokens_per_step"]
    layer = figures["saved, a layer"]
    assert layer["bytes_per_token"] < layer["bytes_per_token_padded"]


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    model = torch.nn.ParameterList([torch.ones(10), torch.ones(10)])
    x, y = model
    # Saved: x and y (parameters) by the product, the exponential by itself and by the square.
    assert measuring.saved_bytes(model, lambda: (x * y).exp() ** 2) == 40
    assert measuring.saved_bytes(model[:1], lambda: (x * y).exp() ** 2) == 80


class ProductCounter(TorchDispatchMode):
    """FLOPs of all matrix products, backward included (torch's own counter fails in nested backwards)."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            self.flops += 2 * args[0].numel() * args[1].shape[1]
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("family", "products"), [(None, 7 * 256), ("granite", 3 * 32), ("phi3", 3 * 32)])
def test_flops_are_those_of_the_products(tiny_folder, family, products):
    """products: blocks that are not skipped, each of that many channels in all heads."""
    bench = gpu.Bench(gpu.SIZES["tiny"], torch.device("cpu"), torch.float32)
    model = loaded(tiny_folder(family), "float32") if family else bench.model()
    samples = bench.answers(3, (20, 20))
    padded, packed = (
        make_batches(samples, TrainingOptions(1e-2, 3), 100, packed=packed) for packed in (False, True)
    )
    trainer = ScaleTrainer(model, 1e-2, [0])  # else block 0 needs no gradient of its input
    with ProductCounter() as counter:
        trainer.step(padded[0], "epoch 0")
    attention = products * 6 * 3 * 20**2  # six over half the square, answers, tokens
    for batches in (padded, packed):
        assert measuring.count_flops(model, batches, skipped=1) == counter.flops + attention


def test_sections_stop_at_the_time_limit_and_outlive_a_failure(tmp_path):
    def fail():
        raise RuntimeError("broken")

    sections = {
        "fails": gpu.Section(1, fail),
        "lacks": gpu.Section(1, dict, missing="a tool"),
        "long": gpu.Section(61, dict),
        "short": gpu.Section(1, lambda: {"figure": 2.5}),
    }
    results = measuring.Results(tmp_path / "r.json", {})
    without = gpu.run(sections, 1, results)
    assert without.pop("fails") == "failed, RuntimeError: broken"
    assert set(without) == {"lacks", "long"} and "61 s" in without["long"]
    assert measuring.figures_in(results.path) == [{"of": {"section": "short"}, "figure": 2.5}]
    assert gpu.table(results.figures) == ["short: figure 2.5"]
    measured_before = sections | {"short": gpu.Section(1, fail)}
    assert set(gpu.run(measured_before, 1, results)) == {"fails", "lacks", "long"}


def test_what_tells_nothing_of_a_card_stays_out_of_the_results(capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(COMMAND)
    assert error.value.code == 2 and "--result" in capsys.readouterr().err
