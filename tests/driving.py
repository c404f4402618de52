"""Command lines as real processes that start in milliseconds: forked from one that has loaded torch.

`start` runs a command line of the suite in a process of its own, which signals, full disks and other
processes can hit. `Fault` makes it stop at a call that changes files. Nothing of the project is loaded
before the fork, so a command runs as it would from a shell.

`state_of` reads what a folder holds in a form that can be compared, without times and process numbers;
`torn` and `leftovers` say what no reader should ever see, and what should not stay.
"""

import atexit
import dataclasses
import functools
import gc
import hashlib
import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "torch._dynamo",
    "torch.distributed",
    "torch.optim",
    "accelerate",
    "datasets",
    "instructlab.training.data_process",
    "instructlab.training.sampler",
    "tqdm",
    "transformers.generation",
    "transformers.models.auto",
    "transformers.models.granite.modeling_granite",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
FILE_CALLS = ("replace", "rename", "fsync", "link", "unlink", "remove", "mkdir", "rmdir")
TIMEOUT = 300  # seconds that a command of a test may take


@dataclass(frozen=True)
class Fault:
    """A signal that a process sends itself at its `call`-th file call (from 1) below its folder.

    File calls are FILE_CALLS. after: once the call is done, instead of before it.
    """

    call: int
    after: bool = False
    signal: int = signal.SIGKILL


@dataclass
class Outcome:
    """How a command ended. code: the exit code, or minus the signal that ended it."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Its lines on stderr that are neither a progress bar nor a log line before the last."""
        lines = [line for line in re.split(r"[\r\n]+", self.err) if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class Running:
    """A command line under way. Its process leads a process group of its own."""

    pid: int
    pipes: list[threading.Thread] = field(default_factory=list)
    texts: dict[str, bytearray] = field(default_factory=dict)
    ended: int | None = None  # wait status

    def kill(self, number: int) -> None:
        """Send a signal as a user would: Ctrl-C reaches the process group, others the process."""
        if self.ended is None:
            (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.ended is None:
            self.ended = server().ask("poll", pid=self.pid)
        return self.ended is not None

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Wait for its end; what is left of its process group is killed then."""
        deadline = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"a command ran for more than {timeout} s: {self.text('err')}")
            time.sleep(0.002)
        with suppress_missing():
            os.killpg(self.pid, signal.SIGKILL)
        for pipe in self.pipes:
            pipe.join(timeout)
        return Outcome(os.waitstatus_to_exitcode(self.ended), self.text("out"), self.text("err"))

    def text(self, which: str) -> str:
        """What it has written so far; which: "out" or "err"."""
        return self.texts[which].decode(errors="replace")

    def wait_until_stopped(self) -> None:
        """Wait until a `Fault` with SIGSTOP has stopped it."""
        while process_state(self.pid) not in "TZ":
            time.sleep(0.002)
        assert process_state(self.pid) == "T", f"it ended before: {self.wait()}"


@contextmanager
def suppress_missing() -> Iterator[None]:
    """Nothing is wrong with a process or file that is gone already."""
    try:
        yield
    except (ProcessLookupError, FileNotFoundError):
        pass


def process_state(pid: int) -> str:
    """R, S, T (stopped), Z (ended), … by /proc."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now."""
    with suppress_missing():
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(match.group(1)) * 1024 if match else 0
    return 0


def start(
    folder: Path,
    *command: object,
    fault: Fault | None = None,
    file_limit: int | None = None,
    env: dict[str, str] | None = None,
    stdout: int | None = None,
) -> Running:
    """Run a command line in `folder`: a script's name, or "-m module", and its arguments.

    file_limit: bytes that a file may have (RLIMIT_FSIZE). stdout: a descriptor to write to instead.
    """
    running = Running(0, texts={"out": bytearray(), "err": bytearray()})
    ends = []
    for name in ("out", "err"):
        if name == "out" and stdout is not None:
            ends.append(os.dup(stdout))
            continue
        reading, writing = os.pipe()
        ends.append(writing)
        thread = threading.Thread(target=_drain, args=(reading, running.texts[name]), daemon=True)
        thread.start()
        running.pipes.append(thread)
    running.pid = server().ask(
        "start",
        ends,
        folder=str(folder),
        command=[str(word) for word in command],
        fault=dataclasses.asdict(fault) if fault else None,
        file_limit=file_limit,
        env=env or {},
    )
    for end in ends:
        os.close(end)
    return running


def run(folder: Path, *command: object, **options) -> Outcome:
    """`start`, and wait for the end."""
    return start(folder, *command, **options).wait()


def succeed(folder: Path, *command: object, **options) -> Outcome:
    """`run`, which must end well."""
    outcome = run(folder, *command, **options)
    assert outcome.code == 0, outcome.err
    return outcome


def _drain(descriptor: int, text: bytearray) -> None:
    with open(descriptor, "rb", buffering=0) as pipe:
        while part := pipe.read(65536):
            text += part


# The process that all commands are forked from


class Server:
    """The parent of all commands, in a process of its own, asked over a socket."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self.socket, self.lock = ours, threading.Lock()
        atexit.register(self.close)

    def ask(self, what: str, descriptors: list[int] | None = None, **request) -> int | None:
        with self.lock:
            message = json.dumps({"what": what, **request}).encode()
            socket.send_fds(self.socket, [message], descriptors or [])
            return json.loads(self.socket.recv(65536))

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


@functools.cache
def server() -> Server:
    """The one server of this test session."""
    return Server()


def serve(channel: socket.socket) -> Callable[[], None] | None:
    """Answer requests until the other end closes; in a forked child: what it shall run."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not message:
            return None
        request = json.loads(message)
        if request["what"] == "poll":
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            channel.send(json.dumps(status if pid else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            return functools.partial(_become, request, descriptors)
        channel.send(json.dumps(pid).encode())
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request: dict, descriptors: list[int]) -> None:
    """In a forked child: be the command of a request, as if a shell had started it."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    if request["fault"]:
        _arm(Fault(**request["fault"]), Path(request["folder"]).resolve())
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    words = request["command"]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def _arm(fault: Fault, folder: Path) -> None:
    """Count this process's file calls below `folder`, and send the signal at the one that is meant."""
    calls = 0

    def is_below(target) -> bool:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.abspath(target)
        return Path(path).is_relative_to(folder)

    def wrap(real):
        @functools.wraps(real)
        def wrapped(target, *args, **kwargs):
            nonlocal calls
            counted = kwargs.get("dir_fd") is not None or is_below(target)
            calls += counted
            if counted and calls == fault.call and not fault.after:
                os.kill(os.getpid(), fault.signal)
            result = real(target, *args, **kwargs)
            if counted and calls == fault.call and fault.after:
                os.kill(os.getpid(), fault.signal)
            return result

        return wrapped

    for name in FILE_CALLS:
        setattr(os, name, wrap(getattr(os, name)))


# What folders hold

VOLATILE = re.compile(r"pid|host|time|seconds|_per_second|date|started")  # keys of JSON objects
APPENDED = ("journal.jsonl", "_math.jsonl", ".partial.jsonl")  # files that grow while a command runs


def state_of(folder: Path) -> dict[str, object]:
    """{relative path: content} of all files below a folder, dot files included.

    JSON is parsed, without VOLATILE keys; of a file that grows line by line, the sorted lines: an
    interrupted run may have come by them in another order. Other files are their SHA-256.
    """
    return {
        str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _content(path: Path) -> object:
    if path.name.endswith(APPENDED):
        return sorted(path.read_text().splitlines())
    if path.suffix == ".json":
        return _stable(json.loads(path.read_text()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if not VOLATILE.search(key)}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def leftovers(folder: Path) -> list[str]:
    """What only a running command may need: dot files, temporary and lock files."""
    temporary = re.compile(r"^\.|\.(tmp|old|lock)$|processing-")
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if temporary.search(p.name))


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """The files in which two states differ."""
    return sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
