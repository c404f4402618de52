"""Every command is killed, again and again, and what it leaves in the end is what it leaves undisturbed.

At random moments by SIGKILL, SIGTERM and Ctrl-C, and at each call that changes files. Meanwhile another
reads its outputs, and must never find one half-written. Compared are records, picks, losses and tensors,
bit for bit. The short form tries a few moments, `slow` all that are meant.
"""

import itertools
import random
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from driving import (
    Commands,
    Fault,
    Outcome,
    differences,
    leftovers,
    record,
    run,
    start,
    state_of,
    torn,
    watched,
)

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
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST_FAREWELL = 10  # seconds from a signal to the end


def finish(commands: Commands, name: str, folder: Path) -> list[str]:
    """Give a command again where it was interrupted; what is not as an undisturbed run leaves it."""
    whole = commands.undisturbed(name)
    outcome = run(folder, *commands[name])
    if outcome.code != 0:
        return [f"the rerun ends with {outcome.code}: {outcome.complaint}"]
    found = [f"{file} differs" for file in differences(state_of(folder), whole.state)]
    if name == "report" and outcome.out != whole.out:
        found.append("the table differs")
    return found + [f"{file} is left" for file in leftovers(folder)]


def faults_of_end(end: Outcome, which: int) -> list[str]:
    """What is wrong with how a command ended after a signal; it may have been done before.

    Ctrl-C is exit code 130 without a traceback. Before main began it is Python's own way of ending.
    """
    if end.code == 0:
        return []
    if which != signal.SIGINT:
        return [] if end.code in (-which, 128 + which) else [f"{which!r}: exit code {end.code}"]
    if end.code == -which:
        return []
    if end.code != 130 or "Traceback" in end.err:
        return [f"Ctrl-C: exit code {end.code}, {end.err.count('Traceback')} tracebacks: {end.complaint}"]
    return []


def kill_at_random(commands: Commands, name: str, folder: Path, wanted: int) -> None:
    """Kill a command by each signal, one run after another, and give it again; until `wanted` kills."""
    whole, moments = commands.undisturbed(name), random.Random(name)
    kills, broken = 0, []
    while kills < wanted:
        place = folder / str(kills)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with watched(place, whole.state) as seen:
            for which in moments.sample(SIGNALS, len(SIGNALS)):
                running = start(place, *commands[name])
                time.sleep(moments.uniform(0, whole.seconds))
                running.kill(which)
                try:
                    end = running.wait(LONGEST_FAREWELL)
                except TimeoutError:
                    broken.append(f"{which!r}: has not ended after {LONGEST_FAREWELL} s")
                    continue
                kills += end.code != 0
                broken += faults_of_end(end, which) + torn(place, whole.state)
            broken += finish(commands, name, place)
        broken += seen
    assert not broken, f"{kills} kills\n" + "\n".join(broken)
    record(f"`{name}` killed at random moments", f"{kills} kills")


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(commands, tmp_path, name):
    kill_at_random(commands, name, tmp_path, wanted=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_many_random_moments(commands, tmp_path, name):
    kill_at_random(commands, name, tmp_path, wanted=21)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_some_file_calls_one_after_another(commands, tmp_path, name):
    """In one folder, so that each run finds what the one before left."""
    whole, broken, call = commands.undisturbed(name), [], 1
    while run(tmp_path, *commands[name], fault=Fault(call, after=call % 2 == 1)).code == -signal.SIGKILL:
        broken += [f"killed at file call {call}: {fault}" for fault in torn(tmp_path, whole.state)]
        call = 3 * call + 1
    broken += finish(commands, name, tmp_path)
    assert call > 1 and not broken, "\n".join(broken)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_file_call(commands, tmp_path, name, after):
    whole, broken = commands.undisturbed(name), []
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        folder.mkdir()
        if run(folder, *commands[name], fault=Fault(call, after)).code != -signal.SIGKILL:
            break
        faults = torn(folder, whole.state) + finish(commands, name, folder)
        broken += [f"killed at file call {call}: {fault}" for fault in faults]
        shutil.rmtree(folder)
    kills = call - 1
    assert kills and not broken, f"{kills} kills\n" + "\n".join(broken)
    record(f"`{name}` killed {'after' if after else 'before'} each file call", f"{kills} kills")


@pytest.mark.parametrize("name", ["scale_export", "unscaled", "export"])
def test_killed_while_it_replaces_its_own_output(commands, tmp_path, name):
    """Where outputs stand already, none is lost, nor half there, at any moment of writing them again."""
    replace_and_kill(commands, name, tmp_path, calls=range(1, 60, 11))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scale_export", "unscaled", "export"])
def test_killed_at_every_call_while_it_replaces_its_own_output(commands, tmp_path, name):
    replace_and_kill(commands, name, tmp_path, calls=itertools.count(1))


def replace_and_kill(commands: Commands, name: str, folder: Path, calls: Iterable[int]) -> None:
    """Run a command to its end, then again, killed at file calls, and see the outputs at each time."""
    whole, broken, kills = commands.undisturbed(name), [], 0
    assert not finish(commands, name, folder)
    for call in calls:
        if run(folder, *commands[name], fault=Fault(call)).code != -signal.SIGKILL:
            break
        kills += 1
        broken += [f"killed at file call {call}: {fault}" for fault in torn(folder, whole.state)]
    broken += finish(commands, name, folder)
    assert kills and not broken, f"{kills} kills\n" + "\n".join(broken)
    record(f"`{name}` killed while it replaces its own output", f"{kills} kills")
