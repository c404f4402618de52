"""Every bad input is one line that names the place and the remedy, exit code 2, and nothing is touched."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import flags, models, outputs, records, saved
from bad_inputs.cases import Case
from bad_inputs.running import MODULES, check_refused, check_untouched, run, script, snapshot
from bad_inputs.workplace import GOOD, GO_ON, GGUF, write_gguf, write_inputs
from conftest import ROOT

CASES = [case for module in (flags, records, models, saved, outputs) for case in module.CASES]


@contextlib.contextmanager
def inside(folder: Path):
    earlier = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(earlier)


@pytest.fixture(scope="session")
def workplace(tiny_folder, tmp_path_factory):
    """A folder with good input for every command line; see bad_inputs/workplace.py."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(tiny_folder(), folder / "model")
    write_inputs(folder)
    with inside(folder), contextlib.redirect_stdout(sys.stderr):
        for name, more in (
            ("generate_model_gt_data", GO_ON["generate_model_gt_data"]),
            ("block_selection", GO_ON["block_selection"]),
            ("param_scale", ("--output_dir", "scaled", "--num_epochs", "2")),
            ("export", ("--output", "folded")),
        ):
            assert script(name).main([*GOOD[name], *more]) == 0
    write_gguf(folder / "folded", folder / "folded.gguf")
    shutil.rmtree(folder / "folded")
    return folder


@pytest.fixture
def work(workplace, tmp_path, monkeypatch):
    """A workplace of one's own, the working folder; removed afterwards."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "work"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


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


@pytest.mark.parametrize("arguments", [*GO_ON.items(), ("export", GGUF)], ids=lambda value: str(value[0]))
def test_without_the_fault_it_goes_on(arguments, work, capsys):
    name, more = arguments
    outcome = run(name, more if name == "export" else [*GOOD[name], *more], capsys)
    assert outcome.code == 0 and outcome.out, outcome


def test_the_corpus_is_large_and_each_case_is_its_own():
    assert len(CASES) >= 200
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.script for case in CASES} == GOOD.keys()


@pytest.mark.parametrize("name", GOOD)
def test_every_flag_has_a_case(name):
    """A new flag fails this until something bad has been tried with it."""
    module = script(name)
    tried = {case.about for case in CASES if case.script == name}
    if not hasattr(module, "build_parser"):
        assert tried == {"output_dir"}
        return
    known = {flag for action in module.build_parser()._actions for flag in action.option_strings[-1:]}
    positional = {action.dest for action in module.build_parser()._actions if not action.option_strings}
    assert tried == (known - {"--help"}) | positional


