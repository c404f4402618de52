"""Disks that run full, and places that cannot be written: one line, exit code 1, and nothing is lost.

The disk is a small tmpfs, filled to the brim while a command stands still at a file call; where none can
be mounted, and beside that, it is a limit on the size of files.
"""

import itertools
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
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
    succeed,
    torn,
)

SHORT = ("generate", "process", "full", "resume", "scale_export", "unscaled", "export")
NAMES = (*SHORT, "race")  # which writes as "full" does
FULL = "[Nn]o space left|disk space|full|[Tt]oo large"
UNWRITABLE = "[Rr]ead-only|cannot write|no permission"
DISK_BYTES = 16 << 20
BALLAST = ".ballast"


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A folder on a tmpfs of DISK_BYTES; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here (it takes root)")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave not a byte on the disk."""
    with open(disk / BALLAST, "ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def run_on_full_disk(disk: Path, command: tuple, call: int) -> Outcome | None:
    """A command whose disk runs full at its file call of that number; None where it has fewer."""
    running = start(disk, *command, fault=Fault(call, signal=signal.SIGSTOP))
    if not running.stopped():
        assert running.wait().code == 0
        return None
    fill(disk)
    running.kill(signal.SIGCONT)
    outcome = running.wait()
    (disk / BALLAST).unlink()
    return outcome


def faults_after_failure(outcome: Outcome, place: Path, complete: dict) -> list[str]:
    """What is wrong after a run that may have failed for want of space, but for nothing else."""
    found = [f"{file} is left" for file in leftovers(place)] + torn(place, complete)
    return found if outcome.code == 0 else outcome.faults_as_error([1], FULL) + found


def faults_and_rerun(commands: Commands, name: str, place: Path, outcome: Outcome, when: str) -> list[str]:
    """`faults_after_failure`, and what one more run with space does not fix."""
    whole = commands.undisturbed(name)
    faults = faults_after_failure(outcome, place, whole.state)
    succeed(place, *commands[name])
    faults += [f"{file} differs after the rerun" for file in differences(state_of(place), whole.state)]
    return [f"{when}: {fault}" for fault in faults]


def fill_at_calls(commands: Commands, name: str, disk: Path, calls: Iterable[int]) -> None:
    """For each call, from an empty disk: a run that meets a full disk, and one more with space."""
    tried, broken = 0, []
    for call in calls:
        outcome = run_on_full_disk(disk, commands[name], call)
        if outcome is None:
            break
        tried += 1
        broken += faults_and_rerun(commands, name, disk, outcome, f"full from file call {call}")
        empty(disk)
    assert tried and not broken, f"{tried} disks\n" + "\n".join(broken)
    record(f"`{name}` on a disk that runs full", f"{tried} moments")


def empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    subprocess.run(["find", str(folder), "-mindepth", "1", "-delete"], check=True)


@pytest.mark.parametrize("name", SHORT)
def test_a_disk_runs_full(commands, disk, name):
    fill_at_calls(commands, name, disk, calls=(3, 9))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_runs_full_at_every_file_call(commands, disk, name):
    fill_at_calls(commands, name, disk, calls=itertools.count(1))


@pytest.mark.parametrize("name", ["generate", "scale_export"])
def test_earlier_results_survive_a_full_disk(commands, disk, name):
    """What a run would replace is as it was when the disk has no room for the new."""
    whole = commands.undisturbed(name)
    succeed(disk, *commands[name])
    fill(disk)
    outcome = run(disk, *commands[name])
    (disk / BALLAST).unlink()
    faults = faults_after_failure(outcome, disk, whole.state)
    faults += [f"{file} differs" for file in differences(state_of(disk), whole.state)]
    assert outcome.code != 0 and not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["generate", "full", "resume", "export"])
def test_files_may_not_grow(commands, tmp_path, name):
    limit_files(commands, name, tmp_path, limits=[700])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_may_not_grow_to_many_sizes(commands, tmp_path, name):
    limit_files(commands, name, tmp_path, limits=[0, 1, 100, 300, 1000, 3000, 10_000, 30_000, 100_000])


def limit_files(commands: Commands, name: str, folder: Path, limits: list[int]) -> None:
    """The same with a limit on the size of each file, which needs no disk of its own."""
    broken, failed = [], 0
    for limit in limits:
        place = folder / str(limit)
        place.mkdir()
        outcome = run(place, *commands[name], file_limit=limit)
        failed += outcome.code != 0
        broken += faults_and_rerun(commands, name, place, outcome, f"files of at most {limit} bytes")
    assert failed and not broken, f"{failed} failed\n" + "\n".join(broken)
    record(f"`{name}` with a limit on the size of files", f"{failed} failures of {len(limits)} limits")


@pytest.mark.parametrize("name", SHORT)
def test_a_read_only_disk_is_told_before_the_work(commands, disk, name):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    outcome = run(disk, *commands[name])
    assert not outcome.faults_as_error([1, 2], UNWRITABLE) and not os.listdir(disk)
    assert not outcome.out


@pytest.mark.parametrize("name", ["generate", "process", "full", "resume", "unscaled", "export", "report"])
def test_results_stay_when_nobody_reads_stdout(commands, tmp_path, name):
    """`script | head -0`: the files are complete; no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    outcome = run(tmp_path, *commands[name], stdout=writing)
    os.close(writing)
    assert "Traceback" not in outcome.err and "Exception ignored" not in outcome.err, outcome.complaint
    assert not differences(state_of(tmp_path), commands.undisturbed(name).state)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["full", "resume"])
def test_results_stay_when_stdout_is_a_full_disk(commands, tmp_path, name):
    with open("/dev/full", "wb") as full:
        outcome = run(tmp_path, *commands[name], stdout=full.fileno())
    assert not outcome.faults_as_error([1], FULL)
    faults = torn(tmp_path, commands.undisturbed(name).state) + leftovers(tmp_path)
    assert not faults
    succeed(tmp_path, *commands[name])
    assert not differences(state_of(tmp_path), commands.undisturbed(name).state)
