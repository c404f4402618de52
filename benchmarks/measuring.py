"""What the benchmarks share: result files, tables, the machine, processes of their own, time, FLOPs."""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hopscotch_common.files import write_json  # noqa: E402
from hopscotch_common.loading.models import ModelRef  # noqa: E402
from hopscotch_common.report import package_versions  # noqa: E402
from hopscotch_common.scales.modeling_hopscotch import head_dim_of  # noqa: E402
from hopscotch_common.search import schedule  # noqa: E402
from hopscotch_common.training.batches import Batch  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
median = statistics.median


def add_result_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """--result and --table. name: of the file, as the help tells it."""
    parser.add_argument("--result", type=Path, help=f"default: benchmarks/results/{name}.json")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, measure nothing")


def result_of(arguments: argparse.Namespace, kind: str) -> tuple[str, Path]:
    """(the name of --model, which need not be here; the result file), as --table and --plot want them."""
    name = Path(arguments.model).name.removesuffix(".gguf")
    return name, arguments.result or RESULTS / f"{kind}_{name}.json"


def figures_in(path: Path) -> list[dict]:
    """What a file of `Results` holds."""
    return json.loads(path.read_text())["figures"]


class Results:
    """A result file that grows: written again after each figure, and taken up by the next run.

    settings: what all figures depend on. A file of other settings is refused, with what differs.
    The file holds command and machine of the last run, `settings`, `figures`, a list of {"of": …} | what was
    measured, and `measured`, the processor and the day of each of them.
    """

    def __init__(self, path: Path, settings: dict):
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they read back
        self.path, self.settings, self.figures = path, settings, []
        self.measured: list[str] = []
        if path.exists():
            content = json.loads(path.read_text())
            different = [name for name in settings if content["settings"].get(name) != settings[name]]
            if different:
                raise SystemExit(f"{path}: made with another {', '.join(different)}; move it away")
            self.figures = content["figures"]
            self.measured = content.get("measured") or ["not recorded"] * len(self.figures)

    def measure(self, of: dict, work: Callable[..., dict], *arguments) -> dict:
        """The figures of a setting: from the file, or else work(*arguments), which are written at once."""
        found = next((figure for figure in self.figures if figure["of"] == of), None)
        if found is None:
            found = {"of": of} | work(*arguments)
            print(found, file=sys.stderr, flush=True)
            self.figures.append(found)
            self.measured.append(f"{processor_name()}, {time.strftime('%Y-%m-%d')}")
            names = ("settings", "figures", "measured")
            save_as(self.path, {name: getattr(self, name) for name in names})
        else:
            print(f"{self.path}: holds {of} already; name another --result to measure it", file=sys.stderr)
        return found


def settings_of(arguments: argparse.Namespace, names: str) -> dict:
    """Arguments by name: of a file (data for --data_path) its SHA-256, of a model what it stands for."""

    def setting(value: object) -> object:
        if isinstance(value, list):
            return [setting(each) for each in value]
        if isinstance(value, Path):
            return hashlib.sha256(value.read_bytes()).hexdigest()
        return value.source if isinstance(value, ModelRef) else value

    return {name.removesuffix("_path"): setting(getattr(arguments, name)) for name in names.split()}


def save_as(path: Path, content: dict) -> None:
    """Write a result, with the command and the machine, to a file of any name."""
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    write_json(path, {"command": command, "machine": machine()} | content)


def machine() -> dict:
    """Cores, processor, GPU where there is one, and package versions."""
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"cores": os.cpu_count(), "processor": processor_name()} | gpu | {"versions": package_versions()}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def title(*cells: object) -> list[str]:
    """The head of a Markdown table."""
    return [row(*cells), "|---" * len(cells) + "|"]


def apart(work: Callable[..., dict], *arguments) -> dict:
    """work(*arguments) in a process of its own; what it prints goes to stderr. work: a module's function."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawning, initializer=os.dup2, initargs=(2, 1)) as process:
        return process.submit(work, *arguments).result()


def spread(count: int, num_layers: int) -> list[int]:
    """`count` blocks, evenly spread, without block 0."""
    return [1 + i * (num_layers - 1) // count for i in range(count)]


def default_race(num_batches: int) -> schedule.Schedule:
    """The race that `block_selection.py --search race` runs when it is told no more."""
    import block_selection

    return schedule.named("race", num_batches, block_selection.SCREENING)


def count_flops(model, batches: Iterable[Batch], skipped: int) -> float:
    """FLOPs of a training step on each batch: 4 a weight and token (forward, and the gradient of the
    input), plus causal attention.

    The LM head counts for loss-counted tokens only, padding not at all. Attention is two products
    forward and four backward, over half of the square. skipped: how many attention blocks are.
    """
    config = model.config
    layers = config.num_hidden_layers
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    mlp = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    active = attention * (layers - skipped) + mlp * layers
    width = config.num_attention_heads * head_dim_of(config)
    total = 0.0
    for batch in batches:
        prefix = 0 if batch.prefix is None else batch.prefix.shape[1]
        total += 4 * active * prefix + (layers - skipped) * 6 * width * prefix**2
        for minibatch in batch.minibatches:
            lengths = [len(sample) - minibatch.prefix_length for sample in minibatch.samples]
            total += 4 * active * sum(lengths)
            total += 4 * model.lm_head.weight.numel() * len(minibatch.targets)
            total += (layers - skipped) * 6 * width * sum(n * n + 2 * n * prefix for n in lengths)
    return total


def matmul_rate(
    shapes: Sequence[Sequence[int]],
    rows: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    repeats: int = 6,
) -> float:
    """FLOP/s of the products of so many rows with weights [out, in], forward and input gradient.

    The best of the repeats; of one, where that took more than 5 s (an emulated dtype).
    """
    options = {"dtype": dtype, "device": device}
    work = [(torch.randn(rows, i, **options), torch.randn(o, i, **options)) for o, i in shapes]

    def products() -> None:
        for x, weight in work:
            out = x @ weight.T
            out @ weight

    best = math.inf
    for _ in range(repeats):
        best = min(best, seconds(products, device))
        if best > 5:
            break
    return sum(4 * x.shape[0] * weight.numel() for x, weight in work) / best


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """What `work` takes, with all that it leaves a GPU to do."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward()` keeps for backward besides the model's own weights, on all devices.

    A storage that several operations save counts once.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    found: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # else it holds the graph that holds it, and both stay
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())
