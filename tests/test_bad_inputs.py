"""Every bad input is one line that names the place and the remedy, exit code 2, and nothing is touched."""

import os
import shutil
import subprocess
import sys

import pytest
from bad_inputs import flags, models, outputs, records, saved
from bad_inputs.cases import Case, points_to
from bad_inputs.makers import line, nothing, old_bin
from bad_inputs.running import MODULES, Outcome, check_refused, check_untouched, run, script, snapshot
from bad_inputs.workplace import GGUF, GO_ON, GOOD
from conftest import ROOT

from hopscotch_common.loading import loader

pytest_plugins = ["bad_inputs.fixtures"]

CASES = [case for module in (flags, records, models, saved, outputs) for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused(case: Case, work, capsys, monkeypatch):
    if case.about not in ("--device", "--attn_implementation"):  # these two, loading itself refuses
        monkeypatch.setattr(loader, "load_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    case.spoil(work)
    before = snapshot(work.parent)
    outcome = run(case.script, case.arguments(), capsys)
    check_refused(outcome, points_to(case.message))
    check_untouched(before, snapshot(work.parent))


@pytest.mark.parametrize("name", GOOD)
def test_without_the_fault_it_succeeds(name, work, capsys):
    """So it is the fault that is refused, not what stands around it."""
    before = snapshot(work)
    outcome = run(name, GOOD[name], capsys)
    assert outcome.code == 0 and outcome.out, outcome
    after = snapshot(work)
    assert {path: after[path] for path in before} == before
    assert name == "report" or any(path.startswith("new/") for path in after.keys() - before.keys())


@pytest.mark.parametrize("name", [*GO_ON, "export"])
def test_without_the_fault_it_goes_on(name, work, capsys):
    outcome = run(name, GGUF if name == "export" else [*GOOD[name], *GO_ON[name]], capsys)
    assert outcome.code == 0 and outcome.out, outcome


def test_each_case_is_its_own():
    names = [str(case) for case in CASES]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", GOOD)
def test_every_flag_has_a_case(name):
    """A new flag fails this until something bad has been tried with it."""
    tried = {case.about for case in CASES if case.script == name}
    actions = [action for action in script(name).build_parser()._actions if action.dest != "help"]
    assert tried == {(action.option_strings or [action.dest])[-1] for action in actions}
    for case in CASES:
        said = [word.partition("=")[0] for word in case.arguments()]
        assert case.script != name or case.about in said or case.about in ("checkpoint", "runs"), str(case)


@pytest.mark.parametrize(
    "command, file, output",
    [
        ("generate_model_gt_data", "prompts.jsonl", "new/answers_final.jsonl"),
        ("process_gt_data", "answers.jsonl", "new/data.jsonl"),
        ("param_scale", "data.jsonl", "new/model_scaled_epoch_0/scales.safetensors"),
    ],
)
def test_odd_but_good_records_change_no_result(command, file, output, work, capsys):
    """A BOM, CRLF, blank lines and no last line break: what others write is no fault."""
    assert run(command, GOOD[command], capsys).code == 0
    expected = (work / output).read_bytes()
    shutil.rmtree(work / "new")
    content = "\ufeff" + (work / file).read_text().replace("\n", "\r\n \t\r\n").rstrip()
    (work / file).write_bytes(content.encode())
    outcome = run(command, GOOD[command], capsys)
    assert outcome.code == 0, outcome
    assert (work / output).read_bytes() == expected
    assert (work / file).read_bytes() == content.encode()


@pytest.mark.parametrize("name", ["my model", "it's", 'the "best"', "-rf", "--help", "модель", "a;b&c|d"])
@pytest.mark.parametrize("command", ["unscaled_ckpt", "param_scale"])
def test_odd_but_good_names(command, name, work, capsys):
    """Spaces, quotes, leading dashes: the outputs carry the name, and stay in their folder."""
    shutil.copytree("model", name)
    before = snapshot(work)
    outcome = run(command, [*GOOD[command], f"--model=./{name}"], capsys)
    assert outcome.code == 0, outcome
    made = snapshot(work).keys() - before.keys()
    checkpoint = f"new/{name}_unscaled" if command == "unscaled_ckpt" else f"new/{name}_scaled_epoch_0"
    assert f"{checkpoint}/config.json" in made and all(path.split("/")[0] == "new" for path in made)


@pytest.mark.parametrize(
    "command, arguments, made",
    [
        ("process_gt_data", ["--input_file=~/answers.jsonl", "--output_dir=~/home"], "home/data.jsonl"),
        (
            "unscaled_ckpt",
            ["--blocks_to_skip", "~/selection.json", "--output_dir=~/home"],
            "home/model_unscaled",
        ),
        ("export", ["--output=~/home"], "home/config.json"),
        ("report", ["scaled", "--html=~/home.html"], "home.html"),
    ],
)
def test_a_tilde_is_the_home_folder(command, arguments, made, work, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(work))
    outcome = run(command, Case(command, "", "", "", tuple(arguments), nothing).arguments(), capsys)
    assert outcome.code == 0, outcome
    assert (work / made).exists() and not (work / "~").exists()


@pytest.mark.parametrize("command", models.WITH_WEIGHTS)
def test_weights_of_an_old_torch_are_read_or_refused(command, work, capsys):
    """A pickle of before torch 1.6 cannot be mapped into memory: that is no reason for a traceback."""
    old_bin(work)
    outcome = run(command, GOOD[command], capsys)
    if outcome.code != 0:
        check_refused(outcome, points_to("pytorch_model.bin"))


LAST_OF_EACH = {case.script: case for case in CASES}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("unscaled_ckpt", "report") else pytest.mark.slow)
        for name in LAST_OF_EACH
    ],
)
def test_a_real_process_says_no_more_than_that(name, work):
    """Whatever libraries write to stderr while they are imported, here it would be seen."""
    case = LAST_OF_EACH[name]
    case.spoil(work)
    before = snapshot(work)
    module = MODULES[name]
    package = module.removesuffix(".__main__")
    start, named = [str(ROOT / f"{module}.py")], f"{module}.py"
    if "." in module:
        start, named = ["-m", package], f"python -m {package}"
    process = subprocess.run(
        [sys.executable, *start, *case.arguments()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    check_refused(Outcome(process.returncode, process.stdout, process.stderr), points_to(case.message))
    assert process.stderr.startswith(f"{named}: error: ")
    check_untouched(before, snapshot(work))


@pytest.mark.parametrize(
    "bad",
    [
        Outcome(None, "", "", "KeyError: 'x'"),
        Outcome(1, "", "error: a\n"),
        Outcome(2, "a result\n", "error: a\n"),
        Outcome(2, "", "error: a\nerror: b\n"),
        Outcome(2, "", "error: \x1b[31ma\n"),
        Outcome(2, "", "error: b\n"),
        Outcome(2, "", "error: a" + "a" * 2000),
    ],
)
def test_what_is_not_refused_fails(bad):
    with pytest.raises(AssertionError):
        check_refused(bad, "a$")
    bar = "screening:  50%|#####     | 1/2 [00:01<00:01, 1.2batch/s, 3 racing]\n"
    check_refused(Outcome(2, "", bar + "error: a\n"), "a$")


def test_what_is_touched_fails(work):
    for change in (line("data.jsonl", 1, "x"), lambda work: (work / "more").touch(), shutil.rmtree):
        before = snapshot(work)
        change(work)
        with pytest.raises(AssertionError):
            check_untouched(before, snapshot(work))
    work.mkdir()
