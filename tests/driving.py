"""Command lines as real processes that start in milliseconds: forked from one that has loaded torch.

`start` runs a command line of the suite in a process of its own, which signals, full disks and other
processes can hit. `Fault` makes it stop at a call that changes files. Nothing of the project is loaded
before the fork, so a command runs as it would from a shell.

`state_of` reads what a folder holds in a form that can be compared, without times and process numbers;
`torn` and `leftovers` say what no reader should ever see, and what should not stay.
"""

import atexit
import builtins
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("granite", "llama", "mistral", "qwen2", "qwen3")
PRELOADED = (
    *("torch._dynamo", "torch.distributed", "torch.optim", "accelerate", "datasets", "tqdm"),
    *("instructlab.training.data_process", "instructlab.training.sampler"),
    *("transformers.generation", "transformers.models.auto"),
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
)
FILE_CALLS = ("replace", "rename", "fsync", "link", "unlink", "remove", "mkdir", "rmdir")
FIGURES = Path(os.environ["HOPSCOTCH_FIGURES"]).absolute() if "HOPSCOTCH_FIGURES" in os.environ else None
TIMEOUT = 300  # seconds that a command of a test may take


@dataclass(frozen=True)
class Fault:
    """A signal that a process sends itself at its `call`-th file call (from 1) below its folder.

    File calls are FILE_CALLS, and `open` to write. after: once the call is done, instead of before it.
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
        """The last line on stderr."""
        lines = [line for line in re.split(r"[\r\n]+", self.err) if line.strip()]
        return lines[-1] if lines else ""

    def faults_as_error(self, codes: Container[int], pattern: str) -> list[str]:
        """What is not as it should be with a command that had to fail: its exit code, a traceback, and
        one line that says "error" and matches `pattern`, the last one."""
        found = []
        if self.code not in codes:
            found.append(f"exit code {self.code}")
        if "Traceback" in self.err:
            found.append(f"a traceback that ends in: {self.complaint}")
        elif "error: " not in self.complaint or not re.search(pattern, self.complaint):
            found.append(f"the last line is: {self.complaint}")
        if self.err.count("error: ") > 1:
            found.append(f"{self.err.count('error: ')} lines of errors")
        return found


@dataclass
class Running:
    """A command line under way. Its process leads a process group of its own."""

    pid: int
    pipes: list[threading.Thread] = field(default_factory=list, repr=False)
    texts: dict[str, bytearray] = field(default_factory=dict, repr=False)
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
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pipe in self.pipes:
            pipe.join(timeout)
        return Outcome(os.waitstatus_to_exitcode(self.ended), self.text("out"), self.text("err"))

    def text(self, which: str) -> str:
        """What it has written so far; which: "out" or "err"."""
        return self.texts[which].decode(errors="replace")

    def stopped(self) -> bool:
        """Wait until a `Fault` with SIGSTOP stops it; False where it ends before."""
        deadline = time.monotonic() + TIMEOUT
        while (state := process_state(self.pid)) not in "TZ":
            assert time.monotonic() < deadline, f"after {TIMEOUT} s it neither stands still nor has ended"
            time.sleep(0.002)
        return state == "T"


def process_state(pid: int) -> str:
    """R, S, T (stopped), Z (ended), … by /proc."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


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


def launch(folder: Path, command: Sequence, processes: int) -> str:
    """Run a command as `accelerate launch` would, in several processes on the CPU; stdout of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world = sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # as a user's accelerate configuration has it, with which transformers loads weights on one process only
    world |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    numbers = map(str, range(processes))
    ranks = [start(folder, *command, env=world | {"RANK": n, "LOCAL_RANK": n}) for n in numbers]
    ends = [running.wait() for running in ranks]
    assert [end.code for end in ends] == [0] * processes, ends[0].err
    assert not any(end.out for end in ends[1:])
    assert f"; {processes} process(es)" in ends[0].err
    return ends[0].out


def _drain(descriptor: int, text: bytearray) -> None:
    with open(descriptor, "rb", buffering=0) as pipe:
        while part := pipe.read(65536):
            text += part


# The commands


@dataclass
class Undisturbed:
    """What a command leaves when nothing happens to it: its folder's state, stdout, and how long it took."""

    state: dict[str, object]
    out: str
    seconds: float


class Commands:
    """Every command line of the suite, by name, over a tiny model; each runs in a folder of its own.

    model: its folder. inputs: an empty folder for what the commands read.
    """

    def __init__(self, model: Path, inputs: Path):
        self.inputs = inputs
        questions = [f"What is {i} plus {i * i}?" for i in range(12)]
        answers = (conversation(question, f"{i + i * i}.") for i, question in enumerate(questions))
        write_lines(inputs / "data.jsonl", samples(12))
        write_lines(inputs / "prompts.jsonl", ({"question": question} for question in questions))
        write_lines(inputs / "answers.jsonl", answers)
        on_cpu = ("--device", "cpu")
        data = ("--data_path", inputs / "data.jsonl", "--batch_size", 4)
        model = ("--model", model)
        search = ("block_selection.py", *model, *data, *on_cpu, "--num_blocks", 2, "--output", "report.json")
        scale = ("param_scale.py", *model, *data, *on_cpu, "--num_epochs", 2, "--output_dir", "scaled")
        export = ("-m", "hopscotch_common.export")
        succeed(inputs, *scale, "--blocks_to_skip", 1, "--validation_split", 0.25)
        (checkpoint,) = inputs.glob("scaled/*_scaled_epoch_1")
        self.made: dict[str, Undisturbed] = {}
        self.lines = {
            "generate": (
                "generate_model_gt_data.py", *model, *on_cpu, "--input_file", inputs / "prompts.jsonl",
                "--output_file", "tiny_math_final.jsonl", "--max_tokens", 6, "--keep_truncated",
                "--backend", "transformers", "--max_tokens_per_batch", 256,
            ),
            "process": (
                "process_gt_data.py", *model, "--input_file", inputs / "answers.jsonl",
                "--output_dir", "out", "--num_cpu_procs", 2,
            ),
            "full": search,
            "race": (*search, "--search", "race"),
            "resume": (*scale, "--blocks_to_skip", 1, "--resume", "--validation_split", 0.25),
            "scale_export": (*scale, "--blocks_to_skip", 1, "--export", "folded"),
            "unscaled": ("unscaled_ckpt.py", *model, "--blocks_to_skip", 1, "--output_dir", "unscaled"),
            "export": (*export, checkpoint, "--format", "nemotron_nas", "--output", "nas", *on_cpu),
            "report": ("-m", "hopscotch_common.report", inputs / "scaled"),
        }  # fmt: skip

    def __getitem__(self, name: str) -> tuple:
        return self.lines[name]

    def undisturbed(self, name: str) -> Undisturbed:
        """The command's outcome in an empty folder."""
        if name not in self.made:
            folder = self.inputs / f"undisturbed-{name}"
            folder.mkdir()
            started = time.monotonic()
            outcome = succeed(folder, *self[name])
            assert not leftovers(folder)
            self.made[name] = Undisturbed(state_of(folder), outcome.out, time.monotonic() - started)
        return self.made[name]


def samples(count: int) -> list[dict]:
    """Tokenized answers of 5 to 19 random tokens, all but the first counted in the loss."""
    numbers = random.Random(0)
    ids = [[numbers.randrange(3, 250) for _ in range(numbers.randrange(5, 20))] for _ in range(count)]
    return [{"input_ids": tokens, "labels": [-100, *tokens[1:]]} for tokens in ids]


def conversation(question: str, answer: str) -> dict:
    """A question and its answer, as step 2 reads them."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write a JSONL file."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# The process that all commands are forked from


class Server:
    """The parent of all commands, in a process of its own, asked over a socket."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "NUMBA_DISABLE_JIT": "1",  # as the project does, and to be set before numba is loaded
        }
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
        os.setpgid(pid, pid)  # here as well, so that it is done before anyone signals the group
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


def leave(become: Callable[[], None]) -> None:
    """Run what a child shall be and end the process as Python would, without taking torch apart (0.6 s)."""
    code = 0
    try:
        become()
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code)


def _arm(fault: Fault, folder: Path) -> None:
    """Count this process's file calls below `folder`, and send the signal at the one that is meant.

    Those of processes that it forks do not count.
    """
    calls, process = 0, os.getpid()

    def is_below(target) -> bool:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.abspath(target)
        return Path(path).is_relative_to(folder)

    def wrap(real, is_open=False):
        @functools.wraps(real)
        def wrapped(target, *args, **kwargs):
            nonlocal calls
            writes = not is_open or set(kwargs.get("mode", args[0] if args else "r")) & set("wax+")
            counted = os.getpid() == process and bool(writes)
            counted = counted and (kwargs.get("dir_fd") is not None or is_below(target))
            calls += counted
            hit = counted and calls == fault.call
            if hit and not fault.after:
                os.kill(process, fault.signal)
            try:
                return real(target, *args, **kwargs)
            finally:
                if hit and fault.after:
                    os.kill(process, fault.signal)

        return wrapped

    for name in FILE_CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    builtins.open = io.open = wrap(open, is_open=True)


# What folders hold

VOLATILE = re.compile(r"(^|_)(pid|host|time|seconds|date|started)($|_)")  # keys of JSON objects
TEMPORARY = re.compile(r"^\.|\.(tmp|old|lock)$|processing-")
FINISHED = re.compile(r"(^data|_final)\.jsonl$")  # JSONL that never grows: others are journals


def grows(path: Path) -> bool:
    """Whether a file gets a line at a time while a command runs."""
    return path.suffix == ".jsonl" and not FINISHED.search(path.name)


def state_of(folder: Path) -> dict[str, object]:
    """{relative path: content} of all files below a folder but `leftovers`.

    JSON is parsed, without VOLATILE keys; of a file that grows line by line, the sorted lines: an
    interrupted run may have come by them in another order. Other files are their SHA-256.
    """
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: _content(path)
        for name, path in names.items()
        if not any(TEMPORARY.search(part) for part in Path(name).parts)
    }


def _content(path: Path) -> object:
    if grows(path):
        return sorted(path.read_text().splitlines())
    if path.suffix == ".json":
        return _stable(json.loads(path.read_text()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if not VOLATILE.search(key)}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def leftovers(folder: Path) -> list[str]:
    """What only a running command may need: dot files, temporary and lock files, and such folders."""
    found = []
    for parent, folders, files in os.walk(folder):
        found += [Path(parent, name) for name in folders + files if TEMPORARY.search(name)]
        folders[:] = [name for name in folders if not TEMPORARY.search(name)]
    return sorted(str(path.relative_to(folder)) for path in found)


def torn(folder: Path, complete: dict[str, object]) -> list[str]:
    """What a reader would find half-written in `folder` now. complete: its state when all is done.

    JSON that does not parse, a line that does not (of a file that grows, the last may be cut), any
    other file that is not as it will be, and a checkpoint that lacks files.
    """
    found = []
    for parent, folders, files in os.walk(folder):  # does not mind what goes meanwhile
        folders[:] = [name for name in folders if not TEMPORARY.search(name)]
        for path in (Path(parent, name) for name in files if not TEMPORARY.search(name)):
            name = str(path.relative_to(folder))
            with contextlib.suppress(FileNotFoundError):
                found += [f"{name}: {fault}" for fault in _faults_of_file(path, complete.get(name))]
    for checkpoint in {str(Path(name).parent) for name in complete if name.endswith("/config.json")}:
        names = {Path(name).name for name in complete if str(Path(name).parent) == checkpoint}
        with contextlib.suppress(FileNotFoundError):
            missing = names - _list_one_folder(folder / checkpoint, names)
            found += [f"{checkpoint} without {name}" for name in sorted(missing)]
    return found


def _faults_of_file(path: Path, complete: object) -> list[str]:
    content = path.read_bytes()
    lines = [content] if path.suffix == ".json" else content.split(b"\n")[:-1]
    if path.suffix in (".json", ".jsonl"):
        for line in lines:
            try:
                json.loads(line)
            except ValueError as error:
                return [f"not JSON ({error})"]
    is_final = path.suffix != ".json" and not grows(path)
    if is_final and complete is not None and hashlib.sha256(content).hexdigest() != complete:
        return ["not as it is in the end"]
    return []


def _list_one_folder(path: Path, at_least: set[str]) -> set[str]:
    """The names in a folder, of one and the same folder even where another takes its place meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            names = set(os.listdir(descriptor))
            if at_least <= names or os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return names
        finally:
            os.close(descriptor)


@contextmanager
def watched(folder: Path, complete: dict[str, object]) -> Iterator[list[str]]:
    """Read `folder` over and over meanwhile; the list fills with what was `torn`."""
    seen: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.extend(fault for fault in torn(folder, complete) if fault not in seen)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """The files in which two states differ."""
    return sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))


# The figures in docs/reliability.md


def record(what: str, figure: str) -> None:
    """Where HOPSCOTCH_FIGURES names a Markdown file, set a row of its table, with the command for it."""
    if FIGURES is None:
        return
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    row = f"| {what} | {figure} | `pytest '{test}'` |"
    lines = FIGURES.read_text().splitlines() if FIGURES.exists() else []
    same = [number for number, line in enumerate(lines) if line.startswith(f"| {what} |")]
    if same:
        lines[same[0]] = row
    else:
        last = max((number for number, line in enumerate(lines) if line.startswith("|")), default=len(lines))
        lines.insert(last + 1, row)
    FIGURES.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # so that no child's collection touches, and so copies, what it was forked with
    become = serve(socket.socket(fileno=int(sys.argv[1])))
    if become:
        leave(become)
