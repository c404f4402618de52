"""Every bad input is one line that names the place and the remedy, exit code 2, and nothing is touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_inputs import flags, models, outputs, records, saved
from bad_inputs.cases import Case, points_to
from bad_inputs.makers import line, old_bin
from bad_inputs.running import (
    MODULES,
    Outcome,
    check_refused,
    check_untouched,
    run,
    script,
    snapshot,
)
from bad_inputs.workplace import GGUF, GO_ON, GOOD
from conftest import ROOT

pytest_plugins = ["bad_inputs.fixtures"]

CASES = [case for module in (flags, records, models, saved, outputs) for case in module.CASES]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused(case: Case, work, capsys):
    case.spoil(work)
    before = snapshot(work.parent)
    outcome = run(case.script, case.arguments(), capsys)
    check_refused(outcome, case.message)
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


def test_the_corpus_is_large_and_each_case_is_its_own():
    assert len(CASES) >= 500
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", GOOD)
def test_every_flag_has_a_case(name):
    """A new flag fails this until something bad has been tried with it."""
    tried = {case.about for case in CASES if case.script == name}
    if name == "report":  # makes its parser, of one positional argument, in main
        assert tried == {"output_dir"}
        return
    actions = [action for action in script(name).build_parser()._actions if action.dest != "help"]
    assert tried == {(action.option_strings or [action.dest])[-1] for action in actions}
    for case in CASES:
        said = [word.partition("=")[0] for word in case.arguments()]
        assert case.script != name or case.about in said or case.about == "checkpoint", str(case)


ODD_BUT_GOOD = {
    "BOM": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: "\n \n" + text.replace("\n", "\n\t\n"),
    "no last line break": lambda text: text.rstrip("\n"),
}


ODD_BUT_GOOD["all of it"] = lambda text: "\ufeff" + text.replace("\n", "\r\n \t\r\n").rstrip()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "all of it")) for name in ODD_BUT_GOOD]
)
@pytest.mark.parametrize(
    "command, file, output",
    [
        ("generate_model_gt_data", "prompts.jsonl", "new/answers_final.jsonl"),
        ("process_gt_data", "answers.jsonl", "new/data.jsonl"),
        ("param_scale", "data.jsonl", "new/model_scaled_epoch_0/scales.safetensors"),
    ],
)
def test_odd_but_good_records_change_no_result(command, file, output, name, work, capsys):
    """What other editors and systems write is no fault."""
    assert run(command, GOOD[command], capsys).code == 0
    expected = (work / output).read_bytes()
    shutil.rmtree(work / "new")
    content = ODD_BUT_GOOD[name]((work / file).read_text())
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


@pytest.mark.parametrize("command", models.WITH_WEIGHTS)
def test_weights_of_an_old_torch_are_read_or_refused(command, work, capsys):
    """A pickle of before torch 1.6 cannot be mapped into memory: that is no reason for a traceback."""
    old_bin(work)
    outcome = run(command, GOOD[command], capsys)
    if outcome.code != 0:
        check_refused(outcome, points_to("pytorch_model.bin"))


def run_process(name: str, *arguments: str, **options) -> Outcome:
    """The real thing: `python script.py arguments`, or `python -m`."""
    module = MODULES[name]
    start = ["-m", module] if "." in module else [str(ROOT / f"{module}.py")]
    process = subprocess.run(
        [sys.executable, *start, *arguments],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        **({"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options),
    )
    return Outcome(process.returncode, process.stdout or "", process.stderr)


REAL_CASES = [
    pytest.param(
        case, marks=[] if case.script in ("unscaled_ckpt", "report") else pytest.mark.slow, id=str(case)
    )
    for name in GOOD
    for case in [one for one in CASES if one.script == name][-1:]
]


@pytest.mark.parametrize("case", REAL_CASES)
def test_a_real_process_says_no_more_than_that(case, work):
    """Whatever libraries write to stderr while they are imported, here it would be seen."""
    case.spoil(work)
    before = snapshot(work)
    check_refused(run_process(case.script, *case.arguments()), case.message)
    check_untouched(before, snapshot(work))


def test_a_reader_of_stdout_that_left_loses_no_result(work):
    """`block_selection.py | head -0`: the report is written, whoever reads the picks."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        outcome = run_process("block_selection", *GOOD["block_selection"], stdout=writer)
    finally:
        os.close(writer)
    assert "Traceback" not in outcome.err and "Exception ignored" not in outcome.err
    assert json.loads((work / "new/selection.json").read_text())["skipped_blocks"]


@pytest.mark.slow
def test_interrupted_step_2_exits_130_at_once_and_leaves_nothing(work):
    """Ctrl-C goes to the whole process group, workers of instructlab-training included."""
    answers = (work / "answers.jsonl").read_text()
    (work / "answers.jsonl").write_text(answers * 3000)
    command = [sys.executable, str(ROOT / "process_gt_data.py"), *GOOD["process_gt_data"]]
    process = subprocess.Popen(
        [*command, "--num_cpu_procs", "2"],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: list(Path("new").glob(".processing.*")), process)
    time.sleep(1)
    interrupted = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - interrupted < 10
    assert process.returncode == 130 and out == ""
    assert Outcome(130, out, err).lines() == ["interrupted"], err
    assert not Path("new").exists() or os.listdir("new") == []


def wait_for(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_case_that_is_not_refused_fails(work, capsys):
    """The checks themselves: each of them can fail."""
    outcome = run("report", ["scaled"], capsys)
    with pytest.raises(AssertionError):
        check_refused(outcome, "")
    for bad in (
        Outcome(None, "", "", "KeyError: 'x'"),
        Outcome(1, "", "error: a\n"),
        Outcome(2, "a result\n", "error: a\n"),
        Outcome(2, "", "error: a\nerror: b\n"),
        Outcome(2, "", "error: \x1b[31ma\n"),
        Outcome(2, "", "error: b\n"),
        Outcome(2, "", "error: a" + "a" * 2000),
    ):
        with pytest.raises(AssertionError):
            check_refused(bad, "a$")
    bar = "screening:  50%|#####     | 1/2 [00:01<00:01, 1.2batch/s, 3 racing]\n"
    check_refused(Outcome(2, "", bar + "error: a\n"), "a$")
    for change in (line("data.jsonl", 1, "x"), lambda work: (work / "more").touch(), shutil.rmtree):
        before = snapshot(work)
        change(work)
        with pytest.raises(AssertionError):
            check_untouched(before, snapshot(work))
    work.mkdir()
