"""Reports: what pictures and page show of a run, the bend, and one line for every bad report."""

import argparse
import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_refused
from PIL import Image
from test_search import write_data
from test_training import random_samples

import block_selection
import param_scale
from hopscotch_common import __version__, checkpoints
from hopscotch_common.errors import InputError
from hopscotch_common.loading import weights
from hopscotch_common.loading.models import ModelRef
from hopscotch_common.report import __main__ as report_command
from hopscotch_common.report import describe_run, find_bend, page, plots, tables
from hopscotch_common.report.reading import SearchRun, join_searches, parse, read_report
from hopscotch_common.report.tables import Table, decisions, picks, plain_text, summary

ODD_NAME = "$x^2$ <script>alert('&amp;')</script> \"\\frac\" \x1b[31m\n " + "long" * 30
SCALES = ("b_attn", "s_attn", "b_mlp", "s_mlp")


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A folder with a search (race), one that goes on from it, and a training of the scales."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data.jsonl", random_samples(12))
    common = ["--model", str(tiny_folder()), "--data_path", str(folder / "data.jsonl"), "--device", "cpu"]
    common += ["--batch_size", "2"]
    first, second = str(folder / "first.json"), str(folder / "second.json")
    race = ["--search", "race", "--screening", "0.75"]
    assert block_selection.main([*common, *race, "--output", first]) == 0
    assert block_selection.main([*common, "--starting_skipped_blocks", first, "--output", second]) == 0
    training = [*common, "--blocks_to_skip", second, "--num_epochs", "2", "--validation_split", "0.25"]
    assert param_scale.main([*training, "--output_dir", str(folder / "scaled")]) == 0
    return folder


@pytest.fixture
def scaled(made):
    """The report of the training, to be changed."""
    return json.loads((made / "scaled/report.json").read_text())


def synthetic_search(**changes) -> dict:
    """A report of a race over six layers: 3 and 4 run the whole epoch, 1 falls after 5 batches, 5 and
    0 are never trained, 2 was skipped before."""
    dropped = {"1": (5, 0.55, 0.4), "5": (0, 0.9, 0.7), "0": (0, 40.0, 0.7)}
    names = ("after_batches", "mean_loss", "leader_mean_loss")
    iteration = {
        "skipped_before": [2],
        "block": 4,
        "loss": 0.5,
        "losses": {"3": 0.6, "4": 0.5},
        "dropped": {block: dict(zip(names, values, strict=True)) for block, values in dropped.items()},
        "untrained_losses": {"0": 40.0, "1": 0.8, "3": 0.75, "4": 0.7, "5": 0.9},
        "batch_losses": {},
        "candidate_epochs": 3.5,
    }
    report = {"model": "six", "num_layers": 6, "skipped_blocks": [2, 4], "iterations": [iteration]}
    return copy.deepcopy(report | {"arguments": {}, "versions": {}} | changes)


# --- the bend -----------------------------------------------------------------------------------


def between(points: dict[int, float]) -> dict[int, float]:
    """The figures of a poster, straight lines between them."""
    counts = range(min(points), max(points) + 1)
    return dict(zip(counts, np.interp(counts, list(points), list(points.values())).tolist(), strict=True))


LLAMA = between({1: 0.125, 4: 0.15, 7: 0.18, 15: 0.47})
QWEN = between({1: 0.06, 4: 0.085, 9: 0.19})


@pytest.mark.parametrize(("curve", "bend"), [(LLAMA, 7), (QWEN, 4)])
def test_the_bends_that_the_paper_reads_off_its_plots(curve, bend):
    assert find_bend(curve) == bend
    assert find_bend({count: 100 * loss + 3 for count, loss in curve.items()}) == bend  # any unit
    so_far = [find_bend({count: curve[count] for count in curve if count <= last}) for last in curve]
    assert so_far == [None if last <= bend else bend for last in curve]


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [0.3],
        [0.1, 0.1, 0.9],  # three points bend by chance
        [0.1 * count for count in range(12)],
        [0.5] * 8,
        [1.0, 0.9, 0.8, 0.7, 0.6],
        [0.1, 0.5, 0.6, 0.65, 0.68, 0.7],  # bends, but downward
        [0.0, 1.0, 2.0, 3.0, 3.0, 5.0, 6.0, 7.0, 8.3],  # a line with noise
        [0.0, 1.0, 2.0, 3.5, 5.0, 6.5],  # steeper, but not twice as steep
    ],
)
def test_a_curve_without_a_bend(losses):
    assert find_bend(dict(enumerate(losses, 1))) is None


def test_the_bend_is_where_two_lines_fit_best_by_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(20):
        counts = np.arange(1, 12)
        bend = int(generator.integers(3, 9))
        losses = 0.01 * counts + 0.1 * np.maximum(counts - bend, 0) + generator.normal(0, 0.01, 11)
        errors = {}
        for middle in counts[1:-1]:  # a fit by another route: the height at three knots, on a grid of hats
            hats = np.stack(
                [np.interp(counts, [1, middle, 11], np.eye(3)[knot]) for knot in range(3)], axis=1
            )
            heights = np.linalg.solve(hats.T @ hats, hats.T @ losses)
            errors[middle] = ((hats @ heights - losses) ** 2).sum()
        expected = min(errors, key=errors.get)
        assert find_bend(dict(zip(counts.tolist(), losses.tolist(), strict=True))) == expected
        assert abs(expected - bend) <= 1


# --- pictures -----------------------------------------------------------------------------------


def points(axes, label: str) -> dict[float, float]:
    """x -> y of the lines with a label."""
    lines = [line for line in axes.lines if line.get_label() == label]
    return {x: y for line in lines for x, y in zip(*line.get_data(), strict=True)}


def test_the_picture_of_a_search_shows_every_candidate():
    report = synthetic_search()
    (axes,) = plots.search_figure(parse(SearchRun, report)).axes
    assert points(axes, "picked (whole epoch)") == {4: 0.5}
    assert points(axes, "whole epoch") == {3: 0.6}
    assert points(axes, "dropped after so many batches: mean loss until then") == {1: 0.55}
    assert [(t.get_position(), t.get_text()) for t in axes.texts] == [((1, 0.55), "5")]
    assert points(axes, "before training") == {1: 0.8, 3: 0.75, 4: 0.7, 5: 0.9}
    above = points(axes, "above the panel, or diverged")
    assert list(above) == [0] and 0.9 <= above[0] <= axes.get_ylim()[1] < 2  # 40 would squeeze the rest
    (band,) = [patch for patch in axes.patches if patch.get_hatch()]
    assert band.get_x() < 2 < band.get_x() + band.get_width()
    assert "nats per token" in axes.figure.get_supylabel() and "decoder layer" in axes.get_xlabel()


@pytest.mark.parametrize("said", [{"diverged": {"3": "epoch 0, batch 1"}}, {"losses": {"3": None, "4": 0.5}}])
def test_a_diverged_candidate_is_drawn_at_the_edge(said):
    report = synthetic_search()
    report["iterations"][0] |= {"losses": {"4": 0.5}} | said
    run = parse(SearchRun, report)
    (axes,) = plots.search_figure(run).axes
    assert set(points(axes, "above the panel, or diverged")) == {0, 3}
    assert points(axes, "whole epoch") == {}
    assert picks(run).rows[0][4] == "3 of 5 (1 diverged)"


def chain(losses: dict[int, float]) -> SearchRun:
    iteration = synthetic_search()["iterations"][0]
    iterations = [
        iteration | {"skipped_before": list(range(count - 1)), "block": count - 1, "loss": loss}
        for count, loss in losses.items()
    ]
    return parse(SearchRun, synthetic_search(iterations=iterations, num_layers=40))


def test_the_picture_over_blocks_names_the_bend():
    (axes,) = plots.blocks_figure(chain(LLAMA)).axes
    assert np.array_equal(np.transpose(axes.lines[0].get_data()), list(LLAMA.items()))
    assert "bend at 7 blocks" in [text.get_text() for text in axes.texts]
    assert list(axes.lines[1].get_xdata()) == [7, 7]
    straight = plots.blocks_figure(chain({1: 0.1, 2: 0.2}))
    assert "no bend" in straight.get_suptitle()
    assert [text.get_text() for text in straight.axes[0].texts] == ["0", "1"]


def test_the_pictures_of_epochs_show_what_the_report_holds(made, scaled, tmp_path):
    """A panel for each measure; what is far above is told at the edge, the loss stands in its own panel."""
    epochs = scaled["epochs"]
    panels = plots.epochs_figure(read_report(made / "scaled")).axes
    assert points(panels[0], "training") == {epoch["epoch"]: epoch["loss"] for epoch in epochs}
    for axes, measure in zip(panels, ("cross_entropy", "kl", "agreement"), strict=True):
        held_out = {epoch["epoch"]: epoch["held_out"]["scaled"][measure] for epoch in epochs}
        assert points(axes, "held out, with scales") == held_out
        for name, label in (("original", "original model"), ("unscaled", "skips without scales")):
            expected = epochs[0]["held_out"][name][measure]
            assert set(points(axes, f"held out, {label}").values()) == {expected}

    scaled["arguments"]["loss"] = "kl"
    for epoch in epochs:
        epoch["held_out"]["unscaled"]["cross_entropy"] = 90.0
        epoch["held_out"]["original"]["cross_entropy"] = epoch["held_out"]["scaled"]["cross_entropy"] = 0.5
    (tmp_path / "report.json").write_text(json.dumps(scaled))
    entropy, kl, agreement = plots.epochs_figure(read_report(tmp_path)).axes
    assert points(kl, "training") and not points(entropy, "training") and not points(agreement, "training")
    assert "90.0000 ↑" in [text.get_text() for text in entropy.texts] and entropy.get_ylim()[1] < 1
    assert kl.get_ylabel().startswith("KL divergence\n")
    assert agreement.get_ylabel().split("\n")[0] == "agreement: the answers' tokens that are"


def test_the_map_shows_the_scales_of_the_best_epoch(made, scaled):
    run = read_report(made / "scaled")
    axes = plots.scales_figure(run).axes[0]
    shown = axes.collections[0].get_array()
    best = made / "scaled" / f"{scaled['model']}_scaled_epoch_{scaled['best_epoch']}"
    assert scaled["checkpoint"] == str(best)
    expected = checkpoints.load_scales(best)[0].T.numpy()
    hatched = np.zeros((4, 4), dtype=bool)
    hatched[0, list(run.skipped_blocks)] = True
    assert np.array_equal(np.ma.getmaskarray(shown), hatched) and len(run.skipped_blocks) == 2
    assert np.array_equal(shown[~hatched], expected[~hatched])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b_attn", "s_attn", "b_mlp", "s_mlp"]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((layer, row), "−") for row, layer in np.argwhere((expected < 1) & ~hatched)
    }
    norm = axes.collections[0].norm
    assert norm.vcenter == 1 and norm.vmax - 1 == pytest.approx(1 - norm.vmin)


def test_the_map_of_vectors_shows_mean_and_spread(made, scaled, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(scaled["checkpoint"], checkpoint)
    config = json.loads((checkpoint / "config.json").read_text()) | {"scale_granularity": "channel"}
    generator = torch.Generator().manual_seed(0)
    path = checkpoint / "scales.safetensors"
    tensors = {
        key: torch.rand(32, generator=generator) if ".b_" in key else value
        for key, value in weights.read_tensors(path).items()
    }
    for file in (path, checkpoint / "config.json"):
        file.unlink()
    weights.save_tensors(tensors, path)
    (checkpoint / "config.json").write_text(json.dumps(config))
    scaled |= param_scale.checkpoint_figures(checkpoint)
    (tmp_path / "report.json").write_text(json.dumps(scaled))
    run = read_report(tmp_path)
    figure = plots.scales_figure(run)
    means, spreads = (axes.collections[0].get_array() for axes in figure.axes[:2])
    for layer in range(4):
        for row, name in enumerate(("b_scale_attn", "b_scale_mlp")):
            values = tensors[f"model.layers.{layer}.{name}"].double()
            if row == 0 and layer in run.skipped_blocks:
                assert np.ma.is_masked(means[0, layer]) and np.ma.is_masked(spreads[0, layer])
            else:
                assert means[2 * row, layer] == pytest.approx(values.mean().item())
                assert spreads[row, layer] == pytest.approx(values.std(correction=0).item())


def test_a_search_without_a_pick_has_nothing_to_show():
    with pytest.raises(InputError, match="no block was picked, so there is nothing to show"):
        parse(SearchRun, synthetic_search(iterations=[], skipped_blocks=[]))


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_plot_search_writes_a_whole_file_and_nothing_else(tmp_path, suffix, start):
    report = synthetic_search(model=ODD_NAME)
    path = tmp_path / "new" / f"losses{suffix}"
    plots.plot_search(path, report)
    once = path.read_bytes()
    assert once.startswith(start) and [entry.name for entry in path.parent.iterdir()] == [path.name]
    plots.plot_search(path, report)
    assert path.read_bytes() == once


def test_a_report_that_is_about_to_be_written_draws_as_one_that_was_read():
    report = synthetic_search()
    for name in ("losses", "dropped", "untrained_losses"):
        by_name = report["iterations"][0][name]
        report["iterations"][0][name] = {int(block): value for block, value in by_name.items()}
    assert parse(SearchRun, report) == parse(SearchRun, synthetic_search())


def test_nothing_is_drawn_outside_a_picture(made):
    """Titles, labels and numbers at the edges fit, those of a long name too."""
    wide = synthetic_search(model="m" * 200)
    twice = parse(SearchRun, wide | {"iterations": 2 * wide["iterations"]})
    for run in (twice, chain(LLAMA), read_report(made / "scaled")):
        for name, figure in plots.pictures(run).items():
            figure.draw_without_rendering()
            inside = figure.get_tightbbox()
            width, height = figure.get_size_inches()
            assert inside.x0 >= 0 and inside.y0 >= 0, name
            assert inside.x1 <= width and inside.y1 <= height, name


# --- the page -----------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Refuses tags that do not close, ids given twice, and whatever is not in the page itself."""

    VOID = {"meta", "br"}
    NOT_HERE = {"script", "link", "iframe", "object", "embed", "base", "form", "img", "b"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        assert tag not in self.NOT_HERE, f"<{tag}>"
        for name, value in attributes:
            assert not name.startswith("on"), name
            assert name.startswith("xmlns") or "://" not in value and "//" not in value, (tag, name, value)
            self.used |= set(re.findall(r"url\(#([^)]*)\)", value))
            assert value.count("url(") == value.count("url(#")
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), value
                self.used.add(value[1:])
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
        else:
            self.text.append(data)


def check_page(html: str) -> str:
    """The text of a page that is well formed and needs nothing from elsewhere."""
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open and len(checker.ids) == len(set(checker.ids))
    assert checker.used and checker.used <= set(checker.ids)
    return "".join(checker.text)


def test_the_command_writes_one_page_of_all_runs(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(made / name) for name in ("first.json", "second.json", "scaled")]
    assert report_command.main(runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "report.html" and [path.name for path in tmp_path.iterdir()] == ["report.html"]
    html = Path("report.html").read_text()
    text = check_page(html)
    for number, run in enumerate(runs[:2], 1):
        iteration = json.loads(Path(run).read_text())["iterations"][0]
        assert f"pick {number}: block {iteration['block']}, loss {iteration['loss']:.4f}" in text
    assert "instructlab-training" in text and "learning_rate" in text and runs[2] in text
    assert html.count("<svg") == 4 and html.count("<h2>") == 2  # the two searches are one
    assert "#1a1a1a" not in html.split("</style>", 1)[1]  # the ink follows the theme


def test_one_run_prints_its_short_table_and_makes_its_pictures(made, scaled, tmp_path, capsys):
    arguments = ["--html", str(tmp_path / "a.html"), "--pictures", str(tmp_path / "p"), "--format", "pdf"]
    assert report_command.main([str(made / "scaled"), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    held_out = scaled["epochs"][scaled["best_epoch"]]["held_out"]
    # of the tiny model: q and o are 32 x 32, k and v 16 x 32, and the norm before them 32; 16 scales come in
    saved, total = (
        2 * (2 * 32 * 32 + 2 * 16 * 32 + 32) - 16,
        300 * 32 * 2 + 32 + 4 * (3072 + 3 * 32 * 48 + 64),
    )
    rows = {
        "attention blocks skipped": ", ".join(map(str, scaled["skipped_blocks"])),
        "granularity": "layer",
        "trained on": "ce",
    }
    for measure in ("agreement", "kl", "cross entropy"):
        words = {"scaled": "scaled", "unscaled": "skips without scales", "original": "original model"}
        for name, said in words.items():
            value = held_out[name][measure.replace(" ", "_")]
            error = held_out[name]["kl_error"] if measure == "kl" and name != "original" else None
            rows[f"held-out {measure}, {said}"] = f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
    rows["parameters saved"] = f"{saved:,} of {total:,} ({saved / total:.1%})"
    rows["KV cache saved"] = "2 of 4 blocks (50.0%)"
    width = max(map(len, rows))
    expected = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    assert sorted(lines[: len(rows)]) == sorted(expected) and lines[0] == expected[0]
    assert lines[-1] == str(tmp_path / "a.html")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["1_epochs.pdf", "1_scales.pdf"]
    assert all(path.read_bytes().startswith(b"%PDF") for path in (tmp_path / "p").iterdir())


def test_a_search_tells_held_out_figures_and_why_it_stopped():
    report = synthetic_search(
        kv_cache_blocks=4,
        original_held_out={"cross_entropy": 0.5, "kl": 0.0, "agreement": 0.99},
        stopped_before=synthetic_search()["iterations"][0]
        | {"block": 5, "loss": 9.5, "skipped_before": [2, 4]},
    )
    figures = {"cross_entropy": 0.625, "kl": 0.25, "agreement": 0.875, "kl_error": None, "answers": 3}
    report["iterations"][0]["held_out"] = figures
    run = parse(SearchRun, report)
    rows = dict(summary(run).rows)
    assert rows["stopped before"] == "block 5, loss 9.5000"
    assert rows["held-out kl"] == "0.2500 (original 0.0000)"
    table = picks(run)
    assert table.header[-3:] == ("held-out cross entropy", "held-out kl", "held-out agreement")
    assert table.rows[0][-3:] == ("0.6250", "0.2500", "0.8750")
    (found,) = decisions([run])
    assert found == (
        "on 3 held-out answers after the last pick: cross entropy 0.6250 (original 0.5000); "
        "kl 0.2500 (original 0.0000); agreement 0.8750 (original 0.9900)",
        "attention blocks skipped: 2, 4; KV cache blocks left: 2 of 4 (50.0%)",
    )


def test_the_page_begins_with_what_is_lost_and_what_is_gained(made, scaled, tmp_path):
    """Of the training where there is one, whatever the order; the figures as the files have them."""
    runs = [read_report(made / name) for name in ("scaled", "first.json")]
    counts = checkpoints.read_run(Path(scaled["checkpoint"]))["weights"]
    held_out = scaled["epochs"][scaled["best_epoch"]]["held_out"]
    ((lost, gained),) = decisions(runs)
    figures = dict(held_out["scaled"])
    count, best = (
        figures.pop("answers"),
        f"{scaled['best_epoch']} (the best of {len(scaled['epochs'])} on them)",
    )
    assert lost.startswith(f"on {count} held-out answers after epoch {best}: ") and count > 1
    errors = {"kl": f" ± {figures.pop('kl_error'):.4f}"}
    for measure, value in figures.items():
        original, unscaled = (held_out[name][measure] for name in ("original", "unscaled"))
        beside = f"(original model {original:.4f}, skips without scales {unscaled:.4f})"
        expected = f"{value:.4f}{errors.get(measure, '')} {beside}"
        assert f"{measure.replace('_', ' ')} {expected}" in lost
    left = counts["parameters"] - counts["parameters_removed"] + 16  # scales, four in each of four layers
    assert f"parameters left: {left:,} of {counts['parameters']:,}" in gained
    assert gained.endswith("KV cache blocks left: 2 of 4 (50.0%)")
    assert gained.startswith(f"attention blocks skipped: {', '.join(map(str, scaled['skipped_blocks']))};")
    text = check_page(page.build_page(runs))
    places = [
        text.index(f"Lost: {lost}"),
        text.index(f"Gained: {gained}"),
        text.index("attention blocks picked"),
    ]
    assert places == sorted(places)
    (tmp_path / "data.json").write_text('{"arguments": {}, "kept": 1}')
    assert decisions([read_report(tmp_path / "data.json")]) == []
    ((lost, _),) = decisions([parse(SearchRun, synthetic_search())])
    assert lost.startswith("not measured: no answers")


def test_of_several_runs_each_says_what_it_lost_and_gained(made, scaled, tmp_path):
    """The trainings, if there are any, or the searches: in their order, each by name."""
    shutil.copytree(made / "scaled", tmp_path / "other")
    best = scaled["epochs"][scaled["best_epoch"]]
    best["held_out"]["scaled"]["kl"] = 0.125
    (tmp_path / "other/report.json").unlink()
    (tmp_path / "other/report.json").write_text(json.dumps(scaled | {"model": "other"}))
    runs = [read_report(made / "scaled"), read_report(made / "first.json"), read_report(tmp_path / "other")]
    alone = [decisions([runs[0]])[0], decisions([runs[2]])[0]]
    assert "kl 0.1250 ±" in alone[1][0] and "kl 0.1250" not in alone[0][0]
    names = [f"{runs[0].model} ({made}/scaled/report.json): ", f"other ({tmp_path}/other/report.json): "]
    expected = [tuple(name + line for line in lines) for name, lines in zip(names, alone, strict=True)]
    assert decisions(runs) == expected
    text = check_page(page.build_page(runs))
    lines = [
        f"{what}: {line}" for pair in expected for what, line in zip(("Lost", "Gained"), pair, strict=True)
    ]
    places = [text.index(line) for line in lines]
    assert places == sorted(places) and text.count("Lost: ") == 2
    searches = [parse(SearchRun, synthetic_search(model=name)) for name in ("a", "b")]
    assert [lost.split(" ")[0] for lost, _ in decisions(searches)] == ["a", "b"]


def test_names_are_text_wherever_they_stand(scaled, tmp_path):
    report = synthetic_search(model=ODD_NAME, arguments={ODD_NAME: ODD_NAME, "list": [ODD_NAME]})
    report["versions"] = {ODD_NAME: ODD_NAME}
    scaled |= {"model": ODD_NAME, "exports": {ODD_NAME: {"folder": ODD_NAME, ODD_NAME: ODD_NAME}}}
    scaled["checkpoint"] = ODD_NAME
    paths = [tmp_path / "<i>$a$.json", tmp_path / "scaled.json"]
    for path, content in zip(paths, (report, scaled), strict=True):
        path.write_text(json.dumps(content))
    text = check_page(page.build_page([read_report(path) for path in paths]))
    start = "$x^2$ <script>alert('&amp;')</script> \"\\frac\" \\x1b[31m\\n longlong"
    assert text.count(start) >= 9 and "<i>$a$.json" in text
    (figure,) = plots.pictures(read_report(paths[0])).values()
    assert figure.get_suptitle().startswith("$x^2$ <scr")
    drawn = check_page(page.inline_svg(figure, "a-", ODD_NAME))
    assert "$x^2$ <scr" in drawn  # as characters, not as a formula of them


@pytest.mark.parametrize(
    ("added", "left", "row"),
    [
        (None, "parameters left: 700 of 1,000 (70.0%)", ("parameters saved", "300 of 1,000 (30.0%)")),
        (40, "parameters left: 740 of 1,000 (74.0%)", ("parameters saved", "260 of 1,000 (26.0%)")),
        (
            450,
            "parameters left: 1,150 instead of 1,000 (115.0%)",
            ("parameters added", "150 to 1,000 (15.0%)"),
        ),
    ],
)
def test_parameters_of_scales_and_maps_count(scaled, tmp_path, added, left, row):
    """Where the checkpoint told them; they can be more than the skipped blocks had."""
    del scaled["weights"]["parameters_added"]
    scaled["weights"] |= {"parameters": 1000, "parameters_removed": 300}
    scaled["weights"] |= {} if added is None else {"parameters_added": added}
    (tmp_path / "report.json").write_text(json.dumps(scaled))
    run = read_report(tmp_path)
    ((_, gained),) = decisions([run])
    assert left in gained and row in summary(run).rows


def test_of_maps_the_baseline_is_these_as_fitted(scaled, tmp_path):
    scaled["arguments"]["replacement_rank"] = 2
    (tmp_path / "report.json").write_text(json.dumps(scaled))
    run = read_report(tmp_path)
    rows = dict(summary(run).rows)
    unscaled = scaled["epochs"][0]["held_out"]["unscaled"]["agreement"]
    assert rows["held-out agreement, maps as fitted"] == f"{unscaled:.4f}"
    assert not any("unscaled" in name or "skips without" in name for name in rows)


def test_b_attn_of_a_skipped_block_is_shown_where_a_map_has_it(scaled, tmp_path):
    for rank in (0, 2):
        scaled["arguments"]["replacement_rank"] = rank
        (tmp_path / "report.json").write_text(json.dumps(scaled))
        run = read_report(tmp_path)
        column = [row[1] for row in tables.scales(run).rows]
        hidden = [block for block, cell in enumerate(column) if cell == "skipped"]
        assert hidden == ([] if rank else sorted(scaled["skipped_blocks"]))
        axes = plots.scales_figure(run).axes[0]
        assert len(axes.patches) == len(hidden) and ("map" in axes.get_xlabel()) == bool(rank)


def test_an_earlier_report_without_held_out_figures(scaled, tmp_path):
    """It told nothing of its checkpoint, and nor does one whose best epoch was removed by its end."""
    assert param_scale.checkpoint_figures(tmp_path / "removed") == {}
    (tmp_path / "hopscotch.json").write_text("{}")
    assert param_scale.checkpoint_figures(tmp_path) == {}  # its tensors are gone
    for key in ("checkpoint", "weights", "scales"):
        del scaled[key]
    for epoch in scaled["epochs"]:
        epoch["held_out"] = {"original": None, "unscaled": None, "scaled": None}
    (tmp_path / "report.json").write_text(json.dumps(scaled))
    run = read_report(tmp_path)
    assert run.scales is None and list(plots.pictures(run)) == ["epochs"]
    names = [name for name, _ in summary(run).rows]
    assert names == ["attention blocks skipped", "granularity", "trained on"]
    check_page(page.build_page([run]))


ANSWERS = {"prompts": 16, "answers": 12, "truncated": 4, "generated_tokens": 1351, "backend": "vllm"}
DATA = {"samples": 12, "kept": 11, "tokens": 123456, "loss_counted_tokens": 1362}


@pytest.mark.parametrize(
    ("what", "content", "row", "named"),
    [
        ("answers", ANSWERS, ("generated tokens", "1351"), "a.json"),
        ("data", DATA, ("tokens", "123,456"), "data_report.json"),
        ("data", DATA, ("tokens", "123,456"), "."),
    ],
)
def test_reports_of_the_first_two_steps(tmp_path, what, content, row, named):
    content = json.dumps(content | {"arguments": {"model": "some/<folder>/name"}})
    (tmp_path / ("data_report.json" if named == "." else named)).write_text(content)
    run = read_report(tmp_path / named)
    assert (run.model, run.what) == ("name", what) and row in summary(run).rows


def test_only_searches_that_belong_together_are_joined():
    first = synthetic_search(skipped_blocks=[2, 4])
    after = synthetic_search(skipped_blocks=[2, 4, 0])
    after["iterations"][0] |= {"skipped_before": [4, 2], "block": 0}
    (joined,) = join_searches([parse(SearchRun, first), parse(SearchRun, after)])
    assert [i.count for i in joined.iterations] == [2, 3] and joined.skipped_blocks == (2, 4, 0)
    kl, untrained = {"arguments": {"loss": "kl"}}, {"arguments": {"search": "untrained"}}
    maps, data = {"arguments": {"replacement_rank": 16}}, {"data": {"sha256": "another"}}
    for change in ({"model": "other"}, {"num_layers": 7}, data, kl, untrained, maps):
        assert len(join_searches([parse(SearchRun, first), parse(SearchRun, after | change)])) == 2
    assert len(join_searches([parse(SearchRun, first), parse(SearchRun, first)])) == 2


@pytest.mark.parametrize(("search", "values"), [("untrained", "losses"), ("cosine", "distances")])
def test_a_search_that_trains_nothing_says_so(made, tiny_folder, tmp_path, search, values):
    words = ["--model", str(tiny_folder()), "--data_path", str(made / "data.jsonl"), "--device", "cpu"]
    path = tmp_path / "report.json"
    assert block_selection.main([*words, "--search", search, "--output", str(path)]) == 0
    run, iteration = read_report(path), json.loads(path.read_text())["iterations"][0]
    row = dict(zip(picks(run).header, *picks(run).rows, strict=True))
    assert (row["candidates trained"], row["whole epoch"]) == ("0 of 4", "0")
    ((name, figure),) = plots.pictures(run).items()
    shown = {x: y for line in figure.axes[0].lines for x, y in zip(*line.get_data(), strict=True)}
    edge = max(shown.values())  # where what lies far above is marked
    assert shown == pytest.approx(
        {int(block): min(value, edge) for block, value in iteration[values].items()}
    )
    assert min(shown, key=shown.get) == iteration["block"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts and not any("epoch" in text for text in texts)
    assert name == ("distances" if search == "cosine" else "candidates")


def test_text_tables_are_aligned_and_their_text_is_printable():
    table = Table("t", (("a", "1"), ("long", "22")), ("name", "n"))
    assert table.text() == ["name  n", "a     1", "long  22"]
    assert plain_text("a\tb\x00\u202e\U0001f600") == "a\\tb\\x00\\u202e\U0001f600"
    assert len(plain_text("x" * 500, 41)) <= 41 and plain_text("abcdefgh", 5).startswith("a")


def test_a_run_is_described_by_a_plain_mapping(tmp_path):
    namespace = argparse.Namespace(model=ModelRef("m", "owner/m"), paths=[tmp_path], dtype="auto", seed=42)
    run = describe_run(vars(namespace))
    assert run["arguments"] == {"model": "owner/m", "paths": [str(tmp_path)], "dtype": "auto", "seed": 42}
    assert re.fullmatch(re.escape(__version__) + r"(\+\w+(-dirty)?)?", run["versions"]["hopscotch"])
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in run["versions"]["torch"]
    json.dumps(run)


# --- bad reports --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"iterations": []}, "a.json: model: Field required"),
        ({"best_epoch": 0, "model": "m", "epochs": [{"epoch": 0}]}, "skipped_blocks: Field required"),
    ],
)
def test_what_is_no_report_is_one_line(report, message, tmp_path, monkeypatch, capsys):
    """More of them are among the bad inputs."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(report))
    check_refused(report_command, ["a.json"], message, capsys)
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("changes", "of_pick", "message"),
    [
        ({"num_layers": True}, {}, "num_layers: Input should be a valid integer"),
        ({"num_layers": 10**400}, {}, "num_layers: Input should be less than"),
        ({"iterations": []}, {}, "iterations: no block was picked, so there is nothing to show"),
        ({"iterations": [7]}, {}, r"iterations\[0\]: Input should be an object"),
        ({}, {"loss": float("nan")}, "NaN is not a JSON number"),
        ({}, {"loss": 10**400}, "loss: Input should be a finite number"),
        ({}, {"block": 6}, "a.json: 6 is no block of this model, which has 6"),
        ({}, {"losses": {"x": 1.0}}, "losses.x.*: Input should be a valid integer"),
        ({}, {"dropped": {"1": {"mean_loss": 1.0}}}, "dropped.1.after_batches: Field required"),
    ],
)
def test_a_malformed_search_is_one_line(changes, of_pick, message, tmp_path, capsys):
    report = synthetic_search()
    report["iterations"][0] |= of_pick
    (tmp_path / "a.json").write_text(json.dumps(report | changes))
    check_refused(report_command, [str(tmp_path / "a.json")], message, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s_mlp": None}, "scales.s_mlp: Input should be an object"),
        ({"s_mlp": {"mean": [1.0] * 4}}, "scales.s_mlp.deviation: Field required"),
        (
            {"s_mlp": {"mean": [1.0, 1.0, 1.0, "1"], "deviation": []}},
            r"scales.s_mlp.mean\[3\]: Input should be",
        ),
        ({"s_mlp": {"mean": [1.0] * 3, "deviation": []}}, "scales: s_mlp tells of another number of layers"),
        ({"b_mlp": {"mean": [1.0] * 4, "deviation": [0.5] * 5}}, "scales: b_mlp tells of another number"),
        (dict.fromkeys(SCALES, {"mean": [], "deviation": []}), "scales.b_attn.mean: Tuple should have at"),
        (dict.fromkeys(SCALES, {"mean": [1.0], "deviation": []}), "skipped_blocks: . is no block of those"),
    ],
)
def test_malformed_scales_of_a_report_are_one_line(changes, message, scaled, tmp_path, capsys):
    scaled["scales"] |= changes
    (tmp_path / "report.json").write_text(json.dumps(scaled))
    check_refused(report_command, [str(tmp_path)], message, capsys)


def test_bad_arguments_are_one_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = str(made / "first.json")
    Path("folder.html").mkdir()
    for arguments, message in (
        ([], "the following arguments are required: RUN"),
        ([str(tmp_path)], "report.json: no such file; make it again, or give a report of one"),
        ([run, "--html", "folder.html"], "--html folder.html: is a folder"),
        ([run, "--html", run], "give a file name that ends in .html"),
        ([run, "--pictures", "folder.html/x", "--format", "gif"], "invalid choice: 'gif'"),
    ):
        check_refused(report_command, arguments, message, capsys)


# --- in a browser -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize(("theme", "paper"), [(1, (255, 255, 255)), (0, (0x17, 0x19, 0x1D))])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(made, tmp_path, theme, paper, width):
    """It takes the window's theme and width, and asks for nothing that its policy refuses."""
    runs = [read_report(made / name) for name in ("first.json", "scaled")]
    html = page.build_page([*runs, parse(SearchRun, synthetic_search(model=ODD_NAME))])
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    measure = (
        "<script>document.body.dataset.over = document.documentElement.scrollWidth - innerWidth</script>"
    )
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"{measure}</body>")
    (tmp_path / "measured.html").write_text(without_policy, encoding="utf-8")

    def chromium(name: str, *flags: str) -> subprocess.CompletedProcess:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
        command += [f"--blink-settings=preferredColorScheme={theme}", f"--window-size={width},900", *flags]
        return subprocess.run(
            [*command, (tmp_path / name).as_uri()], capture_output=True, text=True, timeout=120
        )

    shown = chromium("page.html", f"--screenshot={tmp_path / 'page.png'}")
    assert "CONSOLE" not in shown.stderr
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == width
        assert picture.convert("RGB").getpixel((2, 2)) == paper
    over = re.search(r'data-over="(-?\d+)"', chromium("measured.html", "--dump-dom").stdout)
    assert over and int(over[1]) <= 0  # no sideways scrolling of the whole page
