"""The same command and seed give the same bits, and several processes the same picks and losses."""

import json

import pytest
from driving import differences, launch, record, state_of, succeed

NAMES = (
    "generate",
    "process",
    "full",
    "race",
    "resume",
    "scale_export",
    "unscaled",
    "export",
    "report",
)
FLOAT32_TOLERANCE = 1e-4  # relative, of losses after a few steps, which sum in another order


@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_gives_the_same_bits(commands, tmp_path, name):
    whole = commands.undisturbed(name)
    again = succeed(tmp_path, *commands[name], env={"PYTHONHASHSEED": "1"})
    assert not differences(state_of(tmp_path), whole.state) and again.out == whole.out
    record(f"`{name}` twice", f"{len(whole.state)} files, the same bits")


@pytest.mark.parametrize(("name", "seed"), [("full", 43), ("resume", 43)])
def test_another_seed_gives_other_losses(commands, tmp_path, name, seed):
    """The comparison above can tell results apart. The seed itself is in a report's arguments."""
    succeed(tmp_path, *commands[name], "--seed", seed)
    file, part = {"full": ("report.json", "iterations"), "resume": ("scaled/report.json", "epochs")}[name]
    states = (state_of(tmp_path), commands.undisturbed(name).state)
    found, expected = ([run["loss"] for run in state[file][part]] for state in states)
    assert all(mine != theirs for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["full", "race", "resume"])
def test_two_and_three_processes_give_the_same(commands, tmp_path, name, processes):
    """The losses to FLOAT32_TOLERANCE. (What of this is quick, `test_scripts.py` tries.)"""
    commands.undisturbed(name)
    launch(tmp_path, commands[name], processes)
    if name in ("full", "race"):
        (alone, together) = (
            json.loads((place / "report.json").read_text())
            for place in (commands.inputs / f"undisturbed-{name}", tmp_path)
        )
        assert together["skipped_blocks"] == alone["skipped_blocks"]
        pairs = zip(together["iterations"], alone["iterations"], strict=True)
        for mine, theirs in pairs:
            assert mine["losses"] == pytest.approx(theirs["losses"], rel=FLOAT32_TOLERANCE)
            assert mine["dropped"].keys() == theirs["dropped"].keys()
    else:
        (alone, together) = (
            json.loads((place / "scaled/report.json").read_text())["epochs"]
            for place in (commands.inputs / f"undisturbed-{name}", tmp_path)
        )
        assert len(together) == len(alone) == 2
        for mine, theirs in zip(together, alone, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=FLOAT32_TOLERANCE)
            assert mine["held_out"].keys() == theirs["held_out"].keys()
            for of, figures in mine["held_out"].items():
                assert figures == pytest.approx(theirs["held_out"][of], rel=FLOAT32_TOLERANCE)
    assert state_of(tmp_path).keys() == commands.undisturbed(name).state.keys()
    record(f"`{name}` in {processes} processes", "the same picks and losses")
