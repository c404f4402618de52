"""Two commands at once on one output: the second says who holds it and stops, or both are safe.

The first stands still (SIGSTOP) in the middle of its writing while the second runs, so that every pair
meets for sure; in the slow form pairs also start together, as chance will have it.
"""

import random
import signal
import time
from pathlib import Path

import pytest
from driving import (
    TIMEOUT,
    Fault,
    Running,
    differences,
    leftovers,
    record,
    run,
    start,
    state_of,
    succeed,
    torn,
)

MIDDLE = 7  # a file call in the middle of any command's writing
SAME = ("generate", "process", "full", "resume", "scale_export", "unscaled", "export")
SCALE = ("--blocks_to_skip", 2)
DIFFERENT = {  # the second command on the output of the first
    "generate": ("--max_tokens", 5),
    "process": ("--max_seq_len", 50),
    "full": ("--search", "race", "--learning_rate", 0.02),
    "resume": SCALE,
    "scale_export": (*SCALE, "--num_epochs", 3),
    "unscaled": SCALE,
    "export": ("--format", "folded"),
}


def halted(folder: Path, command: tuple) -> Running:
    """A command that stands still in the middle of its writing."""
    running = start(folder, *command, fault=Fault(MIDDLE, signal=signal.SIGSTOP))
    assert running.stopped(), running.wait()
    return running


def refused(second, holder: int) -> bool:
    """Whether a command gave way, in one line that names the holder of its output."""
    return second.code == 2 and not second.faults_as_error([2], rf"\b{holder}\b") and not second.out


@pytest.mark.parametrize("name", SAME)
def test_the_same_command_twice(commands, tmp_path, name):
    whole = commands.undisturbed(name)
    first = halted(tmp_path, commands[name])
    second = run(tmp_path, *commands[name])
    assert refused(second, first.pid) or second.code == 0, second.err
    broken = torn(tmp_path, whole.state)
    first.kill(signal.SIGCONT)
    assert first.wait().code == 0, first.text("err")
    broken += [f"{file} differs" for file in differences(state_of(tmp_path), whole.state)]
    broken += [f"{file} is left" for file in leftovers(tmp_path)]
    assert not broken, "\n".join(broken)
    record(f"`{name}` twice at once", "refused" if second.code == 2 else "both safe")


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_command_on_the_same_output(commands, tmp_path, name):
    """The second, with other settings, must give way, and the first must end as if alone."""
    first = halted(tmp_path, commands[name])
    second = run(tmp_path, *commands[name], *DIFFERENT[name])
    first.kill(signal.SIGCONT)
    end = first.wait()
    assert refused(second, first.pid), f"exit code {second.code}: {second.complaint}"
    assert end.code == 0, end.err
    assert not differences(state_of(tmp_path), commands.undisturbed(name).state)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["generate", "process", "full", "resume", "export"])
def test_a_killed_run_holds_nothing(commands, tmp_path, name):
    """Its output is free at once, whatever processes of it (step 2 has some) have outlived it."""
    first = halted(tmp_path, commands[name])
    first.kill(signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT
    while not first.poll():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    succeed(tmp_path, *commands[name])
    assert not differences(state_of(tmp_path), commands.undisturbed(name).state)
    assert not leftovers(tmp_path)
    first.wait()


def test_outputs_side_by_side_are_no_conflict(commands, tmp_path):
    """Only the same output is held: two searches in one folder, and two models' checkpoints, go on."""
    first = halted(tmp_path, commands["full"])
    succeed(tmp_path, *commands["race"], "--output", "other.json")
    first.kill(signal.SIGCONT)
    assert first.wait().code == 0
    found = state_of(tmp_path)
    assert found["report.journal.jsonl"] == commands.undisturbed("full").state["report.journal.jsonl"]
    assert found["other.journal.jsonl"] == commands.undisturbed("race").state["report.journal.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_pairs_that_start_together(commands, tmp_path, name):
    whole, moments, broken, refusals = commands.undisturbed(name), random.Random(name), [], 0
    for number in range(9):
        place = tmp_path / str(number)
        place.mkdir()
        pair = [start(place, *commands[name])]
        time.sleep(moments.choice([0, 0, whole.seconds / 4, whole.seconds / 2]))
        pair.append(start(place, *commands[name]))
        ends = [running.wait() for running in pair]
        for end, other in zip(ends, reversed(pair), strict=True):
            refusals += end.code == 2
            if end.code != 0 and not refused(end, other.pid):
                broken.append(f"pair {number}: exit code {end.code}: {end.complaint}")
        if all(end.code for end in ends):
            broken.append(f"pair {number}: none was done")
        broken += [f"pair {number}: {file} differs" for file in differences(state_of(place), whole.state)]
        broken += [f"pair {number}: {file} is left" for file in leftovers(place)]
    assert not broken, "\n".join(broken)
    record(f"`{name}` twice, started together", f"9 pairs, {refusals} refusals")
