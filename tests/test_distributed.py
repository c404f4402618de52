"""Processes that a launcher starts: what they share, and how they part."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Two processes that talk in all of their groups and leave at once, as a script does after its last write.
# The second one ends by an error where it is told to.
PARTS = """
import atexit
import sys
import torch
from hopscotch_common.training.distributed import join_processes

atexit.register(lambda: print("together" if torch.distributed.is_initialized() else "parted"))
with join_processes("cpu") as processes:
    for number in (1, 2):
        processes.group(number)
    assert processes.gather(processes.rank) == [0, 1]
    if processes.rank == 1 and "error" in sys.argv:
        sys.exit(2)
"""


def run_two(*arguments: str) -> list[tuple[int, str]]:
    """Exit code and last word of each of two processes, started as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PARTS, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    words = [process.communicate(timeout=120)[0].strip() for process in started]
    return [(process.returncode, word) for process, word in zip(started, words, strict=True)]


def test_processes_part_in_good_order():
    """Where they stayed together, one in six such runs aborted while the interpreter closed."""
    for _ in range(3):
        assert run_two() == [(0, "parted")] * 2


def test_an_error_keeps_its_exit_code():
    for _ in range(3):
        assert run_two("error") == [(0, "parted"), (2, "parted")]
