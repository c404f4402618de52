"""Processes that a launcher starts: what they share, and how they part."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from driving import start
from test_search import write_data
from test_training import random_samples

ROOT = Path(__file__).parent.parent

# Two processes that talk in all of their groups and leave at once, as a script does after its last write.
# The second one ends by an error where it is told to.
PARTS = """
import atexit
import pathlib
import sys
import torch
from hopscotch_common.errors import HopscotchError
from hopscotch_common.training.distributed import join_processes


def say_how_it_ends():
    threads = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    together = torch.distributed.is_initialized() or any("gloo" in name for name in threads)
    print("together" if together else "parted")


def talk(processes, how):
    for number in (1, 2):
        processes.group(number)
    assert processes.gather(processes.rank) == [0, 1]
    processes.check_alike({"seed": 1})
    assert processes.everyone.reduce(torch.ones(2)).tolist() == [2, 2]
    if how == "other":
        processes.check_alike({"seed": processes.rank})
    if how in ("error", "lost") and processes.rank == 1:
        sys.exit(2)
    if how == "lost":
        processes.gather(0)


atexit.register(say_how_it_ends)
try:
    with join_processes("cpu") as processes:
        talk(processes, sys.argv[1])
except HopscotchError as error:
    print(error)
    sys.exit(3)
"""


def ranks() -> list[dict[str, str]]:
    """The environments of two processes that are to find one another, as a launcher makes them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def run_two(how: str) -> list[tuple[int, str]]:
    """Exit code and stdout of each of two processes that run PARTS."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PARTS, how],
            env=common | rank,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks()
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    return [(process.returncode, words) for process, words in zip(started, said, strict=True)]


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("error", 2)])
def test_processes_part_in_good_order_with_their_exit_codes(how, code):
    """Where they stayed together, one in six such runs aborted while the interpreter closed."""
    assert run_two(how) == [(0, "parted"), (code, "parted")]


def test_processes_that_were_started_otherwise_all_say_so():
    line = "process 1 has seed = 1, and process 0 has 0: start all with one command"
    for code, words in run_two("other"):
        assert code == 3 and words.startswith(line) and words.endswith("\nparted")


def test_one_that_loses_the_others_says_so_in_a_line():
    (code, words), other = run_two("lost")
    assert other == (2, "parted")
    assert code == 3 and re.fullmatch("process 0 cannot talk with the others.*\nparted", words)


@pytest.mark.parametrize(
    ("script", "more"), [("block_selection.py", []), ("param_scale.py", ["--blocks_to_skip", "1"])]
)
def test_scripts_refuse_processes_over_other_data(tiny_folder, tmp_path, script, more):
    started = []
    for rank, environment in enumerate(ranks()):
        write_data(tmp_path / f"{rank}.jsonl", random_samples(8, seed=rank))
        output = "--output" if script.startswith("block") else "--output_dir"
        where = ["--data_path", f"{rank}.jsonl", output, "out"]
        command = [script, "--model", tiny_folder(), "--device", "cpu", *where, *more]
        started.append(start(tmp_path, *command, env=environment))
    for end in [running.wait() for running in started]:
        assert end.code == 2 and end.out == ""
        assert "error: process 1 has data = " in end.complaint
    assert not list(tmp_path.glob("out*"))
