"""Whole scripts on a tiny model: what they print and leave, and one line for every bad input."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, check_refused
from test_search import reference_losses, write_data
from test_training import random_samples, reference_loss
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import block_selection
import param_scale
import unscaled_ckpt
from hopscotch_common import checkpoints, loading, scales
from hopscotch_common.checkpoints import __main__ as verify
from hopscotch_common.errors import InputError
from hopscotch_common.models import model_ref
from hopscotch_common.training.batches import split_samples


@pytest.fixture
def work(tiny_folder, tmp_path, monkeypatch):
    """A working folder with processed data; the tiny model's folder."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl", random_samples(12))
    return tiny_folder()


def flags(model, *more) -> list[str]:
    return ["--model", str(model), "--data_path", "data.jsonl", "--device", "cpu", "--batch_size", "4", *more]


def test_selection_then_scaling_then_unscaled(work, tmp_path, capsys):
    name = work.name
    assert block_selection.main(flags(work, "--num_blocks", "2", "--plot", "losses.png")) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / f"{name}_block_selection.json").read_text())
    picked = [iteration["block"] for iteration in report["iterations"]]
    assert report["skipped_blocks"] == picked and report["arguments"]["batch_size"] == 4
    for line, iteration in zip(lines, report["iterations"], strict=True):
        assert line == f"Best block to remove: {iteration['block']} (loss: {iteration['loss']:.4f})"
        losses = {int(block): loss for block, loss in iteration["losses"].items()}
        assert iteration["block"] == min(losses, key=losses.get)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    chained = flags(work, "--blocks_to_skip", f"{name}_block_selection.json", "--num_epochs", "2")
    assert param_scale.main([*chained, "--validation_split", "0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Epoch 0: loss ") and lines[2].startswith("Held-out loss: original ")
    assert lines[3].startswith("Held-out KL: original 0.0000, unscaled ")
    assert lines[4].startswith("Held-out agreement: original ") and len(lines) == 5
    folder = tmp_path / f"scaled_{name}_ckpts"
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.json",
        f"{name}_scaled_epoch_0",
        f"{name}_scaled_epoch_1",
    ]
    run = checkpoints.read_run(folder / f"{name}_scaled_epoch_1")
    assert run["skipped_attention_blocks"] == sorted(picked) and run["arguments"]["num_epochs"] == 2

    assert unscaled_ckpt.main(["--model", str(work), "--blocks_to_skip", *map(str, picked)]) == 0
    unscaled = tmp_path / f"unscaled_{name}_ckpts" / f"{name}_unscaled"
    assert capsys.readouterr().out.split() == [str(unscaled.relative_to(tmp_path))]
    values = scales.snapshot(checkpoints.load_checkpoint(unscaled))
    expected = torch.ones(4, 4)
    expected[picked, 0] = 0
    assert torch.equal(values, expected)


def test_held_out_figures_are_those_of_the_three_models(work, tmp_path):
    arguments = flags(work, "--blocks_to_skip", "1", "--num_epochs", "1", "--validation_split", "0.25")
    assert param_scale.main(arguments) == 0
    folder = tmp_path / f"scaled_{work.name}_ckpts" / f"{work.name}_scaled_epoch_0"
    held_out = checkpoints.read_run(folder)["held_out"]
    _, samples = split_samples(random_samples(12), 0.25, 42)
    tokens = sum(sample.num_loss_counted_tokens for sample in samples)
    stock = AutoModelForCausalLM.from_pretrained(work, attn_implementation="eager").eval()
    trained = checkpoints.load_scales(folder)
    for which, values, skipped in (
        ("original", torch.ones(4, 4), set()),
        ("unscaled", torch.ones(4, 4), {1}),
        ("scaled", trained, {1}),
    ):
        for loss, measure in (("ce", "cross_entropy"), ("kl", "kl")):
            with torch.no_grad():
                losses = [reference_loss(stock, sample, values, skipped, loss) for sample in samples]
            expected = sum(losses).item() / tokens
            assert math.isclose(held_out[which][measure], expected, rel_tol=1e-4, abs_tol=1e-6), which
        assert 0 <= held_out[which]["agreement"] <= 1


def held_out_loss(work, loss, values, skipped, split=0.25) -> float:
    """The held-out loss of 12 random samples, in a plain loop over the stock class."""
    _, samples = split_samples(random_samples(12), split, 42)
    stock = AutoModelForCausalLM.from_pretrained(work, attn_implementation="eager").eval()
    with torch.no_grad():
        losses = [reference_loss(stock, sample, values, set(skipped), loss) for sample in samples]
    return sum(losses).item() / sum(sample.num_loss_counted_tokens for sample in samples)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_search_stops_where_the_held_out_loss_would_rise_too_much(work, tmp_path, capsys, loss):
    """Without training, as then the scales are known here, too."""
    arguments = flags(work, "--search", "untrained", "--loss", loss, "--validation_split", "0.25")
    assert block_selection.main([*arguments, "--num_blocks", "3", "--output", "all.json"]) == 0
    everything = json.loads((tmp_path / "all.json").read_text())["iterations"]
    original = held_out_loss(work, loss, torch.ones(4, 4), [])
    increases = []
    for picked in everything:
        skipped = [*picked["skipped_before"], picked["block"]]
        expected = held_out_loss(work, loss, torch.ones(4, 4), skipped)
        measure = {"ce": "cross_entropy", "kl": "kl"}[loss]
        assert math.isclose(picked["held_out"][measure], expected, rel_tol=1e-4, abs_tol=1e-6)
        assert picked["loss_increase"] is None
        increases.append(expected if loss == "kl" else (expected - original) / original)
    most = max(increases) * 0.999
    if loss == "ce" and most <= 0:
        pytest.skip("no skip makes this random model worse")
    first_above = next(i for i, increase in enumerate(increases) if increase > most)
    capsys.readouterr()
    assert block_selection.main([*arguments, "--max_loss_increase", str(most), "--output", "some.json"]) == 0
    report = json.loads((tmp_path / "some.json").read_text())
    assert report["skipped_blocks"] == [picked["block"] for picked in everything[:first_above]]
    assert report["stopped_before"]["block"] == everything[first_above]["block"]
    assert math.isclose(
        report["stopped_before"]["loss_increase"], increases[first_above], rel_tol=1e-3, abs_tol=1e-6
    )
    *picks, last = capsys.readouterr().out.splitlines()
    assert len(picks) == first_above and last.startswith(
        f"Stopped: without block {everything[first_above]['block']} as"
    )


def test_a_search_stops_by_its_training_loss_where_nothing_is_held_out(work, tmp_path, capsys):
    arguments = flags(work, "--search", "untrained")
    assert block_selection.main([*arguments, "--max_loss_increase", "100", "--output", "all.json"]) == 0
    everything = json.loads((tmp_path / "all.json").read_text())["iterations"]
    assert len(everything) == 3  # all that can be skipped
    samples = random_samples(12)
    original = reference_losses(work, samples, 4, 42, [], learning_rate=0, blocks=[None])[None]
    for picked in everything:
        assert math.isclose(
            picked["loss_increase"], (picked["loss"] - original) / original, rel_tol=1e-3, abs_tol=1e-5
        )
    journal = (tmp_path / "all.journal.jsonl").read_bytes()
    assert block_selection.main([*arguments, "--max_loss_increase", "100", "--output", "all.json"]) == 0
    assert (tmp_path / "all.journal.jsonl").read_bytes() == journal


@pytest.mark.parametrize(("budget", "picks"), [("0.75", 1), ("0.74", 2), ("0.5", 2), ("0.25", 3)])
def test_a_kv_budget_picks_as_many_as_it_needs(work, tmp_path, budget, picks):
    assert block_selection.main(flags(work, "--search", "cosine", "--kv_budget", budget)) == 0
    report = json.loads((tmp_path / f"{work.name}_block_selection.json").read_text())
    assert len(report["skipped_blocks"]) == picks


def test_held_out_figures_of_a_trained_pick_are_those_of_its_scales(work, tmp_path):
    """Also where the journal has all that was trained."""
    arguments = flags(work, "--search", "race", "--validation_split", "0.25", "--num_blocks", "2")
    assert block_selection.main(arguments) == 0
    path = tmp_path / f"{work.name}_block_selection.json"
    first = json.loads(path.read_text())
    assert block_selection.main(arguments) == 0
    assert json.loads(path.read_text())["iterations"] == first["iterations"]
    picked = first["iterations"][0]
    skips = flags(work, "--blocks_to_skip", str(picked["block"]), "--num_epochs", "1")
    assert param_scale.main([*skips, "--validation_split", "0.25", "--learning_rate", "1e-2"]) == 0
    epoch = json.loads((tmp_path / f"scaled_{work.name}_ckpts" / "report.json").read_text())["epochs"][0]
    assert picked["held_out"] == pytest.approx(epoch["held_out"]["scaled"], rel=1e-5)
    assert first["original_held_out"] == pytest.approx(epoch["held_out"]["original"], rel=1e-5, abs=1e-7)


def test_the_best_epoch_is_the_one_of_the_loss_trained_on(work):
    held_out = [{"cross_entropy": 0.4, "kl": 0.3}, {"cross_entropy": 0.5, "kl": 0.2}]
    runs = [
        {
            "epoch": n,
            "learning_rate": 1.0,
            "loss": 1.0,
            "held_out": {"scaled": h},
            "skipped_attention_blocks": [1],
        }
        for n, h in enumerate(held_out)
    ]
    for loss, best in (("ce", 0), ("kl", 1)):
        arguments = param_scale.build_parser().parse_args(
            flags(work, "--blocks_to_skip", "1", "--loss", loss)
        )
        assert param_scale.final_report(arguments, runs)["best_epoch"] == best


def test_each_epoch_prints_the_held_out_value_of_its_loss(work, tmp_path, capsys):
    arguments = flags(work, "--blocks_to_skip", "1", "--num_epochs", "2", "--validation_split", "0.25")
    assert param_scale.main([*arguments, "--loss", "kl"]) == 0
    report = json.loads((tmp_path / f"scaled_{work.name}_ckpts/report.json").read_text())
    for line, epoch in zip(capsys.readouterr().out.splitlines(), report["epochs"], strict=False):
        held_out = epoch["held_out"]["scaled"]["kl"]
        assert line == f"Epoch {epoch['epoch']}: loss {epoch['loss']:.4f}, held-out {held_out:.4f}"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_finer_scales_and_divergence_over_quantised_weights(work, tiny_folder, tmp_path, quantization):
    model = tiny_folder(intermediate_size=64)  # int4 takes 32 columns at a time
    arguments = flags(model, "--blocks_to_skip", "1", "--num_epochs", "2", "--quantization", quantization)
    arguments += ["--granularity", "channel", "--loss", "kl", "--learning_rate", "1e-2"]
    assert param_scale.main(arguments) == 0
    folder = tmp_path / f"scaled_{model.name}_ckpts"
    first, last = (epoch["loss"] for epoch in json.loads((folder / "report.json").read_text())["epochs"])
    assert 0 < last < first
    assert checkpoints.load_scales(folder / f"{model.name}_scaled_epoch_1").shape == (4, 2 * 32 + 2)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_resumed_training_equals_uninterrupted(work, tmp_path, capsys, granularity):
    common = flags(work, "--blocks_to_skip", "1", "--learning_rate", "1e-2", "--granularity", granularity)
    assert param_scale.main([*common, "--num_epochs", "3", "--output_dir", "whole"]) == 0
    assert param_scale.main([*common, "--num_epochs", "1", "--output_dir", "parts", "--resume"]) == 0
    assert param_scale.main([*common, "--num_epochs", "3", "--output_dir", "parts", "--resume"]) == 0
    for epoch in range(3):
        a, b = (tmp_path / part / f"{work.name}_scaled_epoch_{epoch}" for part in ("whole", "parts"))
        assert torch.equal(checkpoints.load_scales(a), checkpoints.load_scales(b))
        assert checkpoints.read_run(a)["loss"] == checkpoints.read_run(b)["loss"]
    capsys.readouterr()
    (other,) = {"layer", "channel"} - {granularity}
    finer = [*common, "--granularity", other, "--output_dir", "parts", "--resume"]
    message = f"was made with granularity = {granularity}, now it is {other}"
    check_refused(param_scale, finer, message, capsys)
    other = [*common, "--blocks_to_skip", "2", "--output_dir", "parts", "--resume"]
    check_refused(param_scale, other, r"was made with blocks_to_skip = \[1\], now it is \[2\]", capsys)


def test_scales_by_channel_are_saved_verified_and_exported(work, tmp_path):
    arguments = flags(work, "--blocks_to_skip", "1", "0", "--num_epochs", "1", "--granularity", "channel")
    assert param_scale.main([*arguments, "--export", "folded"]) == 0
    folder = tmp_path / f"scaled_{work.name}_ckpts" / f"{work.name}_scaled_epoch_0"
    assert verify.main(["verify", str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["scale_granularity"] == "channel"
    values = checkpoints.load_scales(folder)
    assert values.shape == (4, 2 * 32 + 2)
    b_attn = scales.columns(values)["b_scale_attn"]
    assert not b_attn[:2].any() and (b_attn[2:].std(dim=1) > 0).all()
    model = checkpoints.load_checkpoint(folder)
    assert torch.equal(scales.snapshot(model), values)
    folded = AutoModelForCausalLM.from_pretrained(folder.parent / f"{work.name}_scaled_folded")
    ids = torch.arange(3, 43).view(2, 20)
    assert_close(folded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_scales_of_another_granularity_than_the_config_says_are_refused(work, tmp_path):
    values = torch.ones(4, 2 * 32 + 2)
    checkpoints.save_checkpoint(tmp_path / "checkpoint", model_ref(str(work)), [], values, {})
    config = json.loads((tmp_path / "checkpoint/config.json").read_text())
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(config | {"scale_granularity": "layer"}))
    with pytest.raises(InputError, match=r"b_scale_attn is of shape \[32\], not one finite number"):
        checkpoints.load_checkpoint(tmp_path / "checkpoint")


def test_training_resumes_after_the_last_epoch_whichever_are_left(work, tmp_path):
    common = flags(work, "--blocks_to_skip", "1", "--learning_rate", "1e-2")
    assert param_scale.main([*common, "--num_epochs", "3", "--output_dir", "whole"]) == 0
    assert param_scale.main([*common, "--num_epochs", "2", "--output_dir", "parts"]) == 0
    shutil.rmtree(tmp_path / "parts" / f"{work.name}_scaled_epoch_0")
    assert param_scale.main([*common, "--num_epochs", "3", "--output_dir", "parts", "--resume"]) == 0
    assert not (tmp_path / "parts" / f"{work.name}_scaled_epoch_0").exists()
    a, b = (tmp_path / part / f"{work.name}_scaled_epoch_2" for part in ("whole", "parts"))
    assert torch.equal(checkpoints.load_scales(a), checkpoints.load_scales(b))
    report = json.loads((tmp_path / "parts/report.json").read_text())
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]


def test_resume_leaves_the_epochs_of_an_earlier_training(work, tmp_path, capsys):
    common = flags(work, "--blocks_to_skip", "1", "--output_dir", "parts")
    assert param_scale.main([*common, "--num_epochs", "4", "--learning_rate", "0.05"]) == 0
    slower = [*common, "--learning_rate", "0.001"]
    assert param_scale.main([*slower, "--num_epochs", "2"]) == 0
    assert param_scale.main([*slower, "--num_epochs", "4", "--resume"]) == 0
    warning = f"{work.name}_scaled_epoch_2 and later epochs there are of an earlier training"
    assert warning in capsys.readouterr().err
    whole = [*slower[:-3], "whole", *slower[-2:]]
    assert param_scale.main([*whole, "--num_epochs", "4"]) == 0
    (mine, theirs) = (
        json.loads((tmp_path / f"{part}/report.json").read_text()) for part in ("parts", "whole")
    )
    assert [epoch["learning_rate"] for epoch in mine["epochs"]] == [0.001] * 4
    assert mine["epochs"] == theirs["epochs"]


def test_an_odd_padding_token_is_not_looked_up(work, tmp_path):
    folder = shutil.copytree(work, tmp_path / "odd")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"pad_token_id": -1}))
    arguments = ["--blocks_to_skip", "1", "--num_epochs", "1", "--max_tokens_per_batch", "64"]
    losses = []
    for model in (work, folder):
        assert param_scale.main([*flags(model, *arguments), "--output_dir", f"out-{model.name}"]) == 0
        losses.append(
            json.loads((tmp_path / f"out-{model.name}/report.json").read_text())["epochs"][0]["loss"]
        )
    assert losses[0] == losses[1]


def test_an_export_that_cannot_succeed_is_refused_before_training(work, tiny_folder, capsys):
    arguments = flags(tiny_folder("qwen3"), "--blocks_to_skip", "1", "--export", "nemotron_nas")
    check_refused(param_scale, arguments, "no place for the q and k norms of qwen3", capsys)


def test_a_journal_of_other_weights_is_refused(work, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(work, folder)
    assert block_selection.main([*flags(folder), "--output", "report.json"]) == 0
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    arguments = [*flags(folder), "--output", "report.json"]
    check_refused(block_selection, arguments, "journal.jsonl: was made with weights = ", capsys)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("block_selection.py", ["--num_blocks", "2"]),
        ("block_selection.py", ["--num_blocks", "1", "--search", "race", "--screening", "0.75"]),
        ("param_scale.py", ["--blocks_to_skip", "1", "--num_epochs", "2", "--validation_split", "0.25"]),
        (
            "param_scale.py",
            ["--blocks_to_skip", "1", "--num_epochs", "2", "--validation_split", "0.25"]
            + ["--granularity", "channel", "--loss", "kl"],
        ),
    ],
    ids=["full", "race", "param_scale", "param_scale by channel and KL"],
)
def test_several_processes_equal_one(work, tmp_path, script, more):
    """Three candidates race over two and three processes, and two on three: they share then."""
    results, iterations = [], []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        write_data(folder / "data.jsonl", random_samples(12))
        result = launched(processes, script, flags(work, *more), folder)
        assert result.returncode == 0, result.stderr
        assert f"; {processes} process(es)" in result.stderr
        results.append(numbers(result.stdout))
        if script == "block_selection.py":
            (report,) = folder.glob("*_block_selection.json")
            iterations.append(json.loads(report.read_text())["iterations"])
    for other in results[1:]:
        assert results[0].keys() == other.keys() and len(results[0]) >= 1
        for line, values in results[0].items():
            assert other[line] == pytest.approx(values, abs=2e-4), line
    for other in iterations[1:]:
        for mine, theirs in zip(iterations[0], other, strict=True):
            assert theirs["elapsed_epochs"] < 0.7 * mine["elapsed_epochs"]
            for name in ("block", "candidate_epochs", "skipped_before"):
                assert theirs[name] == mine[name]
            assert theirs["batch_losses"].keys() == mine["batch_losses"].keys()
            for block, losses in mine["batch_losses"].items():
                assert theirs["batch_losses"][block] == pytest.approx(losses, rel=1e-5)


def launched(processes: int, script: str, arguments: list[str], folder) -> subprocess.CompletedProcess:
    """A script's run by accelerate's launcher, or alone."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    return subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(ROOT / script), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", [block_selection, param_scale])
@pytest.mark.parametrize("device", ["split", "cuda:0"])
def test_a_launcher_with_one_device_for_all_is_refused(work, capsys, monkeypatch, script, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [*flags(work), "--device", device]
    if script is param_scale:
        arguments += ["--blocks_to_skip", "1"]
    check_refused(script, arguments, f"--device {device} with a launcher", capsys)


def numbers(text: str) -> dict[str, list[float]]:
    """stdout lines as {words: numbers}, block indices kept in the words."""
    found = {}
    for line in text.splitlines():
        words = line.replace("(", " ").replace(")", " ").replace(",", " ").split()
        found[" ".join(w for w in words if "." not in w)] = [float(w) for w in words if "." in w]
    return found


GOOD = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            block_selection,
            ["--model", "quen"],
            "unknown model 'quen': give one of qwen, llama, granite, smollm",
        ),
        (block_selection, ["--data_path", "none.jsonl"], "none.jsonl: no such file"),
        (block_selection, ["--data_path", "empty.jsonl"], "empty.jsonl: holds no records"),
        (block_selection, ["--data_path", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (block_selection, ["--screening", "0"], "must be above 0 and at most 1, got '0'"),
        (block_selection, ["--starting_skipped_blocks", "4"], "block 4 does not exist"),
        (block_selection, ["--starting_skipped_blocks", "-1"], "block -1 does not exist"),
        (block_selection, ["--starting_skipped_blocks", "1", "1"], "block 1 is named twice"),
        (
            block_selection,
            ["--starting_skipped_blocks", "x", "1"],
            "give block indices or one selection report",
        ),
        (block_selection, ["--starting_skipped_blocks", "none.json"], "none.json: no such file"),
        (block_selection, ["--starting_skipped_blocks", "0", "1", "2"], "at most 0 more"),
        (block_selection, ["--prev", "1", "1", "1", "1", "1"], "5 losses, but the model has 4 layers"),
        (block_selection, ["--prev", "nan"], "the loss of layer 0 is nan"),
        (block_selection, ["--batch_size", "0"], "must be a whole number above 0"),
        (block_selection, ["--learning_rate", "inf"], "must be a finite number above 0"),
        (block_selection, ["--learning_rate", "-1"], "must be a finite number above 0"),
        (
            block_selection,
            ["--max_tokens_per_batch", "2"],
            "line 1: .* tokens do not fit --max_tokens_per_batch",
        ),
        (block_selection, ["--device", "cuda:9"], "CUDA devices here; try cpu"),
        (
            block_selection,
            ["--output", "data.jsonl/report.json"],
            "data.jsonl is a file; name another folder",
        ),
        (block_selection, ["--output", "."], "is a folder; name a file"),
        (block_selection, ["--plot", "losses.pgn"], "give a file name that ends in .png, .pdf, .svg"),
        (
            block_selection,
            ["--starting_skipped_blocks", "mine.json", "--output", "mine.json"],
            "would take the place of an input; name another",
        ),
        (param_scale, ["--blocks_to_skip", "0", "1", "2", "3"], "all 4 attention blocks would be skipped"),
        (param_scale, ["--blocks_to_skip", "other.json"], "a report of model other"),
        (param_scale, ["--blocks_to_skip", "data.jsonl"], "or a report of block_selection.py"),
        (param_scale, ["--blocks_to_skip", "1", "--num_epochs", "0"], "must be a whole number above 0"),
        (param_scale, ["--blocks_to_skip", "1", "--validation_split", "1"], "at least 0 and below 1"),
        (param_scale, ["--blocks_to_skip", "1", "--output_dir", "data.jsonl"], "data.jsonl is a file"),
        (unscaled_ckpt, ["--blocks_to_skip", "7"], "block 7 does not exist"),
        (unscaled_ckpt, ["--blocks_to_skip", "1", "--model", "gpt2-like"], "unknown model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    work, tmp_path, capsys, monkeypatch, script, arguments, message
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\nnot json\n")
    other = {"model": "other", "num_layers": 4, "skipped_blocks": [1]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "mine.json").write_text(json.dumps(other | {"model": work.name}))

    def no_model(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(loading, "load_model", no_model)
    base = flags(work) if script is not unscaled_ckpt else ["--model", str(work)]
    if "cuda:9" in arguments:
        monkeypatch.undo()
        os.chdir(tmp_path)
    check_refused(script, base + arguments, message, capsys)


def test_data_of_another_model_is_refused(work, tmp_path, capsys):
    bad = [GOOD, {"input_ids": [5, 900], "labels": [-100, 900]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bad))
    message = "line 2: token id 900 is beyond the model's vocabulary of 300"
    check_refused(block_selection, flags(work), message, capsys)


def test_unsupported_architecture_is_named(work, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for model_type, message in (
        ("qwen2_moe", "'qwen2_moe' is not supported; supported are llama, .*FAMILIES in"),
        ("whisper", "'whisper' is a speech model; give a decoder-only language model"),
        ("t5", "'t5' is an encoder-decoder model; give"),
        ("bert", "'bert' is an encoder; give"),
        ("qwen2_vl", "'qwen2_vl' is a vision-language model; give"),
        ("vit", "'vit' is no language model; give"),
        ("cohere", "'cohere' is not supported: attention and MLP stand side by side"),
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        check_refused(unscaled_ckpt, ["--model", str(folder), "--blocks_to_skip", "1"], message, capsys)


def test_hopscotch_checkpoint_as_base_is_refused(work, tmp_path, capsys):
    assert unscaled_ckpt.main(["--model", str(work), "--blocks_to_skip", "1"]) == 0
    capsys.readouterr()
    folder = str(tmp_path / f"unscaled_{work.name}_ckpts" / f"{work.name}_unscaled")
    check_refused(unscaled_ckpt, ["--model", folder, "--blocks_to_skip", "1"], "give its base model", capsys)


def test_weights_that_cannot_be_fetched_name_the_id_and_the_remedy(work, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "nobody/nothing cannot be fetched .* --model /path/to/model"
    check_refused(unscaled_ckpt, ["--model", "nobody/nothing", "--blocks_to_skip", "1"], message, capsys)


def test_a_loss_that_is_not_finite_exits_1_and_picks_nothing(work, capsys):
    assert block_selection.main(flags(work, "--learning_rate", "1e29")) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "candidate block 0, epoch 0, batch 1: the loss is nan" in captured.err


def test_race_flags_without_a_race_are_named(work, capsys):
    assert block_selection.main(flags(work, "--screening", "0.5")) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert len(warnings) == 1 and "--screening has no effect without --search race" in warnings[0]


def test_interrupted_exits_130(work, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_model", interrupt)
    assert block_selection.main(flags(work)) == 130


@pytest.mark.parametrize(
    "script", ["generate_model_gt_data", "process_gt_data", "block_selection", "param_scale", "unscaled_ckpt"]
)
def test_help_is_quick_and_loads_nothing_heavy(script):
    code = f"import sys, {script} as s\ntry:\n s.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'vllm', 'datasets', 'instructlab'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--model" in result.stdout and "python " in result.stdout
