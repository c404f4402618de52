"""Whole scripts on a tiny model: what they print and leave, and one line for every bad input."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, check_refused
from driving import launch
from safetensors.torch import load_file, save_file
from test_files import held
from test_search import reference_losses, write_data
from test_training import random_samples, reference_loss
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import block_selection
import param_scale
import unscaled_ckpt
from hopscotch_common import checkpoints, cli, inputs, scales
from hopscotch_common.checkpoints import __main__ as verify
from hopscotch_common.errors import InputError
from hopscotch_common.export import formats
from hopscotch_common.loading import loader
from hopscotch_common.loading.models import model_ref
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Sample, split_samples
from hopscotch_common.training.trainer import EpochTraining


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


def test_losses_that_are_known_are_those_of_the_first_pick(work, tmp_path):
    assert block_selection.main(flags(work, "--num_blocks", "2", "--prev", "0.5", "9", "9", "9")) == 0
    report = json.loads((tmp_path / f"{work.name}_block_selection.json").read_text())
    first, second = report["iterations"]
    assert first["block"] == 0 and first["losses"] == {"0": 0.5, "1": 9.0, "2": 9.0, "3": 9.0}
    assert block_selection.main(flags(work, "--starting_skipped_blocks", "0", "--output", "alone.json")) == 0
    (alone,) = json.loads((tmp_path / "alone.json").read_text())["iterations"]
    assert second["losses"] == alone["losses"]


MEASURES = {"ce": "cross_entropy", "kl": "kl"}


def held_out_loss(work, loss, values, skipped) -> float:
    """The held-out loss of 12 random samples, in a plain loop over the stock class."""
    _, samples = split_samples(random_samples(12), 0.25, 42)
    stock = AutoModelForCausalLM.from_pretrained(work, attn_implementation="eager").eval()
    with torch.no_grad():
        losses = [reference_loss(stock, sample, values, set(skipped), loss) for sample in samples]
    return sum(losses).item() / sum(sample.num_loss_counted_tokens for sample in samples)


def test_held_out_figures_are_those_of_the_three_models(work, tmp_path):
    arguments = flags(work, "--blocks_to_skip", "1", "--num_epochs", "1", "--validation_split", "0.25")
    assert param_scale.main(arguments) == 0
    folder = tmp_path / f"scaled_{work.name}_ckpts" / f"{work.name}_scaled_epoch_0"
    held_out = checkpoints.read_run(folder)["held_out"]
    for which, values, skipped in (
        ("original", torch.ones(4, 4), []),
        ("unscaled", torch.ones(4, 4), [1]),
        ("scaled", checkpoints.load_scales(folder)[0], [1]),
    ):
        for loss, measure in MEASURES.items():
            expected = held_out_loss(work, loss, values, skipped)
            assert math.isclose(held_out[which][measure], expected, rel_tol=1e-4, abs_tol=1e-6), which


@pytest.mark.parametrize("loss", MEASURES)
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
        assert math.isclose(picked["held_out"][MEASURES[loss]], expected, rel_tol=1e-4, abs_tol=1e-6)
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


@pytest.mark.parametrize(
    ("family", "budget", "picks"),
    [
        *(("llama", *more) for more in (("0.75", 1), ("0.74", 2), ("0.5", 2), ("0.25", 3))),
        ("granitemoehybrid", "0.67", 1),  # of five layers, three have attention
    ],
)
def test_a_kv_budget_picks_as_many_as_it_needs(work, tiny_folder, tmp_path, family, budget, picks):
    model = tiny_folder(family)
    assert block_selection.main(flags(model, "--search", "cosine", "--kv_budget", budget)) == 0
    report = json.loads((tmp_path / f"{model.name}_block_selection.json").read_text())
    assert len(report["skipped_blocks"]) == picks


def test_held_out_figures_of_a_trained_pick_are_those_of_its_scales(work, tmp_path):
    """Also where the journal has all that was trained."""
    arguments = flags(work, "--search", "race", "--validation_split", "0.25", "--num_blocks", "2")
    arguments += ["--screening", "0.75"]
    assert block_selection.main(arguments) == 0
    path = tmp_path / f"{work.name}_block_selection.json"
    first = json.loads(path.read_text())
    assert block_selection.main(arguments) == 0
    assert json.loads(path.read_text())["iterations"] == first["iterations"]
    picked = first["iterations"][0]
    assert len(picked["batch_losses"]) == 3  # of four blocks, the screening leaves as many
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
            flags(work, "--blocks_to_skip", "1", "--loss", loss, "--output_dir", "none")
        )
        assert param_scale.final_report(arguments, runs)["best_epoch"] == best


@pytest.mark.parametrize("best", [0, 1])
def test_the_best_epoch_is_exported(work, monkeypatch, best):
    asked = []
    monkeypatch.setattr(formats, "run_exports", lambda _, checkpoint, *__: asked.append(checkpoint) or {})
    arguments = param_scale.build_parser().parse_args(
        flags(work, "--blocks_to_skip", "1", "--output_dir", "out", "--export", "folded")
    )
    param_scale.export(arguments, {"best_epoch": best})
    assert asked == [Path(f"out/{work.name}_scaled_epoch_{best}")]


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
    assert checkpoints.load_scales(folder / f"{model.name}_scaled_epoch_1")[0].shape == (4, 2 * 32 + 2)


def test_a_width_that_int4_does_not_take_gets_one_line(work, capsys):  # 48 columns in the MLP
    arguments = flags(work, "--blocks_to_skip", "1", "--num_epochs", "1", "--quantization", "int4")
    check_refused(param_scale, arguments, "cannot be loaded .* use --quantization int8", capsys)


def test_a_model_that_does_not_fit_gets_one_line(work, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loader, "load_whole", full)
    assert param_scale.main(flags(work, "--blocks_to_skip", "1", "--num_epochs", "1")) == 1
    assert re.search("error: out of memory .*--device split", capsys.readouterr().err)


def test_a_disk_too_small_for_a_checkpoint_is_told_before_the_training(work, capsys, monkeypatch):
    epoch = ["--blocks_to_skip", "1", "--output_dir", "out", "--num_epochs"]
    usage = shutil.disk_usage(".")

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))

    whole, part = ((work / "model.safetensors").stat().st_size * share for share in (1, 0.5))
    leave(whole)  # enough: one block less is written
    assert param_scale.main(flags(work, *epoch, "1")) == 0
    leave(int(part))
    assert param_scale.main(flags(work, *epoch, "2", "--resume")) == 0  # shares the weights
    capsys.readouterr()
    monkeypatch.setattr(cli, "load_model", lambda _: pytest.fail("loaded for nothing"))
    for script, arguments in ((param_scale, flags(work)), (unscaled_ckpt, ["--model", str(work)])):
        assert script.main([*arguments, "--blocks_to_skip", "1", "--output_dir", "small/new"]) == 1
        message = r"error: small/new: too little disk space: .* takes \d\.\d\d GB, and \d\.\d\d GB are free"
        assert re.search(message, capsys.readouterr().err)
    assert not [path for path in Path("small").rglob("*") if path.is_file()]


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_resumed_training_equals_uninterrupted(work, tmp_path, capsys, granularity, monkeypatch):
    common = flags(work, "--blocks_to_skip", "1", "--learning_rate", "1e-2", "--granularity", granularity)
    assert param_scale.main([*common, "--num_epochs", "3", "--output_dir", "whole"]) == 0
    assert param_scale.main([*common, "--num_epochs", "1", "--output_dir", "parts", "--resume"]) == 0
    (tmp_path / f"parts/{work.name}_scaled_epoch_0/of-a-user.gguf").touch()  # which is not written again
    assert param_scale.main([*common, "--num_epochs", "2", "--output_dir", "parts", "--resume"]) == 0
    gone = tmp_path / "parts" / f"{work.name}_scaled_epoch_0"
    shutil.rmtree(gone)  # it goes on after the last, whichever are left
    last = tmp_path / "parts" / f"{work.name}_scaled_epoch_1"
    index = json.loads((last / "model.safetensors.index.json").read_text())
    assert {path.name for path in last.glob("*.safetensors")} == set(index["weight_map"].values())
    (last / "training_state.adam").rename(last / "training_state.safetensors")  # as it was named before
    checkpoints.check_replaceable(last)
    assert param_scale.main([*common, "--num_epochs", "3", "--output_dir", "parts", "--resume"]) == 0
    for epoch in (1, 2):
        a, b = (tmp_path / part / f"{work.name}_scaled_epoch_{epoch}" for part in ("whole", "parts"))
        assert torch.equal(checkpoints.load_scales(a)[0], checkpoints.load_scales(b)[0])
        assert checkpoints.read_run(a)["loss"] == checkpoints.read_run(b)["loss"]
    report, whole = (
        json.loads((tmp_path / f"{part}/report.json").read_text()) for part in ("parts", "whole")
    )
    assert not gone.exists() and [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]
    assert [report[key] for key in ("weights", "scales")] == [whole[key] for key in ("weights", "scales")]
    capsys.readouterr()
    again = [*common, "--num_epochs", "3", "--output_dir", "parts", "--resume"]
    with monkeypatch.context() as patched:
        patched.setattr(cli, "load_model", lambda _: pytest.fail("loaded for nothing"))
        assert param_scale.main(again) == 0
    assert "all epochs are there, so none is trained" in capsys.readouterr().err
    message = (
        "all epochs are there, the last trained at 0.01, and none is left for --learning_rate 0.02; name"
    )
    check_refused(param_scale, [*again, "--learning_rate", "0.02"], message, capsys)
    (other,) = {"layer", "channel"} - {granularity}
    others = dict(granularity=other, loss="kl", seed=7, batch_size=5, validation_split=0.25, dtype="bfloat16")
    others |= dict(quantization="int8", replacement_rank=2)
    for name, value in others.items():
        changed = [*common, "--output_dir", "parts", "--resume", f"--{name}", str(value)]
        check_refused(param_scale, changed, f"was made with {name} = .*, now it is {value}", capsys)
    write_data(tmp_path / "data.jsonl", random_samples(12, seed=1))
    check_refused(param_scale, again, "was made with other answers ", capsys)


def test_scales_by_channel_are_saved_verified_and_exported(work, tmp_path):
    arguments = flags(work, "--blocks_to_skip", "1", "0", "--num_epochs", "1", "--granularity", "channel")
    assert param_scale.main([*arguments, "--export", "folded"]) == 0
    folder = tmp_path / f"scaled_{work.name}_ckpts" / f"{work.name}_scaled_epoch_0"
    assert verify.main(["verify", str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["scale_granularity"] == "channel"
    values = checkpoints.load_scales(folder)[0]
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


def test_resume_leaves_the_epochs_of_an_earlier_training(work, tmp_path, capsys):
    common = flags(work, "--blocks_to_skip", "1", "--output_dir", "parts")
    assert param_scale.main([*common, "--num_epochs", "4", "--learning_rate", "0.05"]) == 0
    slower = [*common, "--learning_rate", "0.001"]
    warning = f"{work.name}_scaled_epoch_2 and later epochs there are of an earlier training"
    for more in (["--num_epochs", "2"], ["--num_epochs", "4", "--resume"]):
        assert warning not in capsys.readouterr().err
        assert param_scale.main([*slower, *more]) == 0
        assert warning in capsys.readouterr().err
    whole = [*slower[:-3], "whole", *slower[-2:]]
    assert param_scale.main([*whole, "--num_epochs", "4"]) == 0
    (mine, theirs) = (
        json.loads((tmp_path / f"{part}/report.json").read_text()) for part in ("parts", "whole")
    )
    assert [epoch["learning_rate"] for epoch in mine["epochs"]] == [0.001] * 4
    assert mine["epochs"] == theirs["epochs"]


def test_blocks_that_were_searched_with_maps_are_told_of_where_none_will_stand(work, tmp_path, capsys):
    report = {
        "model": work.name,
        "num_layers": 4,
        "skipped_blocks": [1],
        "arguments": {"replacement_rank": 2},
    }
    (tmp_path / "maps.json").write_text(json.dumps(report))
    common = ["--model", str(work), "--blocks_to_skip", "maps.json", "--data_path", "data.jsonl"]
    assert unscaled_ckpt.main([*common, "--replacement_rank", "3"]) == 0
    assert "chosen with --replacement_rank" not in capsys.readouterr().err
    assert unscaled_ckpt.main(common) == 0
    told = capsys.readouterr().err
    assert "maps.json: its blocks were chosen with --replacement_rank 2, and now it is 0" in told
    assert "--data_path has no effect without --replacement_rank" in told
    (tmp_path / "none.json").write_text(json.dumps(report | {"skipped_blocks": []}))
    none = ["--model", str(work), "--blocks_to_skip", "none.json"]
    check_refused(unscaled_ckpt, none, "none.json: names no block to skip; search", capsys)


def test_an_epoch_whose_weights_are_gone_is_not_shared(work, tmp_path):
    common = flags(work, "--blocks_to_skip", "1", "--output_dir", "out")
    assert param_scale.main([*common, "--num_epochs", "1"]) == 0
    first, second = (tmp_path / f"out/{work.name}_scaled_epoch_{epoch}" for epoch in (0, 1))
    (gone,) = first.glob("base-*.safetensors")
    gone.unlink()
    assert param_scale.main([*common, "--num_epochs", "2", "--resume"]) == 0
    assert verified(second) and not verified(first)


def verified(folder: Path) -> bool:
    return verify.main(["verify", str(folder)]) == 0


def test_a_model_that_changes_while_scales_train_is_told(work, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(work, tmp_path / "copy")
    whole = EpochTraining.epoch

    def changes(trained, number):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.2.post_attention_layernorm.weight"][-1] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return whole(trained, number)

    monkeypatch.setattr(EpochTraining, "epoch", changes)
    arguments = flags(folder, "--blocks_to_skip", "1", "--output_dir", "out")
    assert param_scale.main(arguments) == 1
    assert "copy: its files changed during training" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("copy*"))


def test_the_report_of_an_earlier_training_goes_with_its_first_epoch(work, tmp_path, monkeypatch):
    common = flags(work, "--blocks_to_skip", "1", "--output_dir", "out", "--num_epochs", "2")
    assert param_scale.main(common) == 0
    monkeypatch.setattr(param_scale, "final_report", interrupt)
    assert param_scale.main([*common, "--learning_rate", "0.1"]) == 130
    assert not (tmp_path / "out/report.json").exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_one_scripts_report_is_not_taken_for_anothers(work, tmp_path, capsys):
    assert block_selection.main([*flags(work), "--output", "out/report.json"]) == 0
    scaling = flags(work, "--blocks_to_skip", "1", "--output_dir")
    check_refused(param_scale, [*scaling, "out"], "out/report.json: is not a report of this script", capsys)
    assert param_scale.main([*scaling, "scaled", "--num_epochs", "1"]) == 0
    search = [*flags(work), "--output", "scaled/report.json"]
    check_refused(block_selection, search, "scaled/report.json: exists and is not a report", capsys)


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
    check_refused(param_scale, arguments, "those of qwen3 are not; export it as folded", capsys)


def test_a_journal_of_other_settings_or_weights_is_refused(work, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(work, folder)
    arguments = [*flags(folder), "--output", "report.json"]
    assert block_selection.main(arguments) == 0
    journal = (tmp_path / "report.journal.jsonl").read_bytes()
    folder = folder.rename(tmp_path / "elsewhere")  # it is the same model there
    arguments = [*flags(folder), "--output", "report.json"]
    assert block_selection.main(arguments) == 0
    assert (tmp_path / "report.journal.jsonl").read_bytes() == journal
    others = dict(seed=7, batch_size=5, learning_rate=0.5, loss="kl", dtype="bfloat16", replacement_rank=2)
    for name, value in others.items():
        message = f"journal.jsonl: was made with {name} = .*, now it is {value}"
        check_refused(block_selection, [*arguments, f"--{name}", str(value)], message, capsys)
    message = "journal.jsonl: was made with other answers .--data_path, --max_samples, .*; repeat"
    check_refused(block_selection, [*arguments, "--max_samples", "4"], message, capsys)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    message = "journal.jsonl: was made with other weights or another config of --model; repeat"
    check_refused(block_selection, arguments, message, capsys)
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)  # as it was
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 1e-3}))
    check_refused(block_selection, arguments, message, capsys)
    (folder / "config.json").write_text(config)
    first, *rest = random_samples(12)
    fewer = Sample(first.input_ids, [-100] * (len(first) - 1) + first.labels[-1:])
    write_data(tmp_path / "data.jsonl", [fewer, *rest])
    check_refused(block_selection, arguments, "was made with other answers", capsys)


def test_two_runs_at_once_do_not_write_into_one_another(work, tmp_path, capsys):
    arguments = flags(work, "--search", "untrained", "--output", "report.json")
    with held(tmp_path / "report.journal.jsonl"):
        check_refused(block_selection, arguments, "report.journal.jsonl: .* is writing there", capsys)
    arguments = flags(work, "--blocks_to_skip", "1", "--output_dir", "out", "--num_epochs", "1")
    with held(tmp_path / "out" / "report.json"):
        check_refused(param_scale, arguments, "out/report.json: .* is writing there", capsys)


HALF = ["--blocks_to_skip", "1", "--num_epochs", "2", "--validation_split", "0.25"]
SEVERAL = {
    "full": ("block_selection.py", ["--num_blocks", "2"]),
    "race": ("block_selection.py", ["--num_blocks", "1", "--search", "race", "--screening", "0.75"]),
    "cosine, with held-out figures": (
        "block_selection.py",
        ["--num_blocks", "2", "--search", "cosine", "--validation_split", "0.25", "--max_loss_increase", "9"],
    ),
    "cosine with maps": (
        "block_selection.py",
        ["--num_blocks", "1", "--search", "cosine", "--replacement_rank", "2"],
    ),
    "untrained, with the original's loss": (
        "block_selection.py",
        ["--num_blocks", "1", "--search", "untrained", "--max_loss_increase", "9"],
    ),
    "param_scale": ("param_scale.py", HALF),
    "param_scale by channel and KL with maps": (
        "param_scale.py",
        [*HALF, "--granularity", "channel", "--loss", "kl", "--replacement_rank", "2"],
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_processes_equal_one(work, tmp_path, name):
    """Three candidates race over two and three processes, and two on three: they share then."""
    script, more = SEVERAL[name]
    results, iterations = [], []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        write_data(folder / "data.jsonl", random_samples(12))
        results.append(numbers(launch(folder, (script, *flags(work, *more)), processes)))
        if script == "block_selection.py":
            (report,) = folder.glob("*_block_selection.json")
            iterations.append(json.loads(report.read_text())["iterations"])
    for other in results[1:]:
        assert results[0].keys() == other.keys() and len(results[0]) >= 1
        for line, values in results[0].items():
            assert other[line] == pytest.approx(values, abs=2e-4), line
    for other in iterations[1:]:
        for mine, theirs in zip(iterations[0], other, strict=True):
            most = 0.7 if not mine["distances"] else 0.8  # cosine's pick is measured by one process
            assert theirs["elapsed_epochs"] < most * mine["elapsed_epochs"]
            for key in ("block", "candidate_epochs", "skipped_before"):
                assert theirs[key] == mine[key]
            assert theirs["distances"] == pytest.approx(mine["distances"], rel=1e-4)
            assert theirs["batch_losses"].keys() == mine["batch_losses"].keys()
            for block, losses in mine["batch_losses"].items():
                assert theirs["batch_losses"][block] == pytest.approx(losses, rel=1e-5)


def test_the_processes_of_accelerates_launcher_find_one_another(work, tmp_path):
    write_data(tmp_path / "data.jsonl", random_samples(12))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0", str(ROOT / "param_scale.py")]
    result = subprocess.run(
        [*launcher, *flags(work, *HALF)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "; 2 process(es)" in result.stderr, result.stderr


@pytest.mark.parametrize("script", [block_selection, param_scale])
@pytest.mark.parametrize("device", ["split", "cuda:0"])
def test_a_launcher_with_one_device_for_all_is_refused(work, capsys, monkeypatch, script, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [*flags(work), "--device", device]
    if script is param_scale:
        arguments += ["--blocks_to_skip", "1"]
    check_refused(script, arguments, f"--device {device} with a launcher", capsys)


def test_a_script_needs_no_docstring():
    command = [sys.executable, "-OO", "param_scale.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--model" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["param_scale.py", "--help"], rb"cuda:1, \\u2026"),
        (
            ["-c", "from hopscotch_common import cli; cli.command(lambda _: cli.result('\u6a21'))()"],
            rb"^\\u6a21$",
        ),
    ],
    ids=["help", "result"],
)
def test_a_terminal_without_utf_8_shows_escapes(arguments, said):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert result.returncode == 0 and re.search(said, result.stdout), result


def numbers(text: str) -> dict[str, list[float]]:
    """stdout lines as {words: numbers}, block indices kept in the words."""
    found = {}
    for line in text.splitlines():
        words = line.replace("(", " ").replace(")", " ").replace(",", " ").split()
        found[" ".join(w for w in words if "." not in w)] = [float(w) for w in words if "." in w]
    return found


def test_an_epoch_whose_last_step_diverged_is_not_saved(work, tmp_path, capsys):
    arguments = flags(work, "--blocks_to_skip", "1", "--num_epochs", "1", "--batch_size", "12")
    assert param_scale.main([*arguments, "--learning_rate", "1e29", "--output_dir", "out"]) == 1
    assert "epoch 0, batch 0, after it: loss, KL and agreement are" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*epoch*"))


def test_a_loss_that_is_not_finite_exits_1_and_picks_nothing(work, capsys):
    assert block_selection.main(flags(work, "--learning_rate", "1e29")) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "candidate block 0, epoch 0, batch 1: the loss is nan" in captured.err


def test_an_epoch_that_tells_little_of_training_is_told_of(work, capsys):
    for search, told in (("full", True), ("untrained", False)):
        assert block_selection.main(flags(work, "--batch_size", "32", "--search", search)) == 0
        assert ("an epoch has 1 batch(es) only" in capsys.readouterr().err) == told


def test_training_that_did_harm_is_told_of(caplog):
    def report(scaled: float) -> dict:
        figures = {
            name: dict(cross_entropy=1.0, kl=kl, agreement=0.5, kl_error=0.0)
            for name, kl in (("original", 0.0), ("unscaled", 0.02), ("scaled", scaled))
        }
        epochs = [{"epoch": 0, "held_out": figures}]
        return {"epochs": epochs, "best_epoch": 0, "arguments": {"loss": "kl"}}

    param_scale.print_held_out(report(0.01))
    assert not caplog.messages
    param_scale.print_held_out(report(0.03))
    assert "training left the held-out loss worse" in caplog.text


def test_race_flags_without_a_race_are_named(work, capsys):
    assert block_selection.main(flags(work, "--screening", "0.5")) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert len(warnings) == 1 and "--screening has no effect without --search race" in warnings[0]


def test_flags_reach_what_they_are_for(work, monkeypatch):
    more = ["--seed", "7", "--gradient_checkpointing", "--max_tokens_per_batch", "99", "--loss", "kl"]
    more += ["--learning_rate", "0.5", "--dtype", "bfloat16", "--max_samples", "5"]
    arguments = block_selection.build_parser().parse_args(flags(work, *more))
    assert cli.training_options(arguments) == TrainingOptions(0.5, 4, 99, True, 7, "kl")
    assert inputs.load_samples(arguments, loader.read_config(arguments.model)) == random_samples(12)[:5]
    monkeypatch.setattr(loader, "load_model", lambda _, **options: options)
    assert cli.load_model(arguments)["dtype"] == "bfloat16"


def test_interrupted_exits_130(work, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "load_model", interrupt)
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
