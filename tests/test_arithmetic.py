"""benchmarks/arithmetic.py: FLOPs and bytes are those that PyTorch counts and that lie in memory."""

import json

import arithmetic
import inference
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hopscotch_common import scales
from hopscotch_common.loading.loader import load_model, read_config
from hopscotch_common.loading.models import model_ref

ROWS, TOKENS = 2, 24


@pytest.mark.parametrize("skipped", [[], [1, 2]])
@torch.inference_mode()
def test_flops_and_bytes_are_what_a_model_takes(tiny_folder, skipped):
    ref = model_ref(str(tiny_folder()))
    model = load_model(ref, dtype="float32", device="cpu")
    model.set_attn_implementation("eager")  # the counter knows no fused attention of a CPU
    cost = arithmetic.cost_of(read_config(ref), "float32")
    scales.reset(model, skipped)
    cache, ids = DynamicCache(), torch.randint(3, model.config.vocab_size, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(ids, past_key_values=cache, logits_to_keep=1)
    # the counter takes every pair of tokens, where a causal kernel leaves out those that come later
    masked = ROWS * 4 * (cost.layers - len(skipped)) * cost.width * (TOKENS * (TOKENS - 1) // 2)
    assert counter.get_total_flops() == cost.prefill_flops(ROWS, TOKENS, len(skipped)) + masked

    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    projections = [
        module.weight.nbytes
        for number, layer in enumerate(model.model.layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and not (number in skipped and "self_attn" in name)
    ]
    read = sum(projections) + model.lm_head.weight.nbytes + kept
    assert cost.decode_bytes(ROWS, TOKENS, len(skipped)) == read


def test_the_table_is_of_what_the_file_holds(tiny_folder, tmp_path, capsys):
    words = ["--model", str(tiny_folder()), "--rows", "1", "4", "--contexts", "64", "--counts", "0", "2"]
    path = tmp_path / "found.json"
    arithmetic.main([*words, "--result", str(path)])
    table = capsys.readouterr().out.splitlines()
    figures = json.loads(path.read_text())["figures"]
    assert len(table) == 2 + len(figures) == 6
    for figure in figures:
        assert (figure["decode_times"] == 1) == (figure["of"]["skipped"] == 0)
    arithmetic.main([*words, "--result", str(path), "--table"])
    assert capsys.readouterr().out.splitlines() == table


@pytest.mark.parametrize(("weights", "share"), [({"0": 100, "8": 90}, "0.90"), ({"8": 90}, "-")])
def test_measured_weights_are_a_share_of_those_without_skips(weights, share):
    """Where these were measured, too."""

    def found(seconds: float, cache: int) -> dict:
        return {"seconds": {"prefill": seconds, "decode": seconds}, "kv_bytes_per_token": cache}

    rounds = [{"stock": found(2.0, 40), "8": found(1.0, 30)}]
    figure = {"of": {"model": "m", "engine": "e"}, "weights": weights, "rounds": rounds}
    lines = inference.table([figure], {"prompt_tokens": 4, "new_tokens": 2, "rows": 1})
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[2:5] == ["8", "4.0", "2.00 (2.00 to 2.00)"] and cells[-2:] == ["0.75", share]
