"""What the benchmarks share: results as JSON, the machine they were made on, FLOPs, time, peak memory."""

import gc
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hopscotch_common.report.runs import package_versions  # noqa: E402
from hopscotch_common.search.schedule import Schedule, default_first_look  # noqa: E402
from hopscotch_common.training.batches import Batch  # noqa: E402
from hopscotch_common.writing import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict:
    """Cores, processor, GPU where there is one, and package versions."""
    gpu = {"gpu": gpu_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {"cores": os.cpu_count(), "processor": processor_name()} | gpu | {"versions": package_versions()}


def gpu_name() -> str:
    return torch.cuda.get_device_name()


def gpu_slug() -> str:
    """The card's name as a part of a file's name, for example h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", gpu_name().lower().removeprefix("nvidia "))


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name: str, content: dict) -> None:
    """Write benchmarks/results/{name}.json with the command and the machine."""
    save_as(RESULTS / f"{name}.json", content)
    print(f"wrote {RESULTS / name}.json", file=sys.stderr)


def save_as(path: Path, content: dict) -> None:
    """Write a result, with the command and the machine, to a file of any name."""
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    write_json(path, {"command": command, "machine": machine()} | content)


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(count: int, num_layers: int) -> list[int]:
    """`count` blocks, evenly spread, without block 0."""
    return [1 + i * (num_layers - 1) // count for i in range(count)]


def default_race(num_batches: int) -> Schedule:
    """The race that `block_selection.py --search race` runs when it is told no more."""
    import block_selection

    default = block_selection.build_parser().get_default
    return Schedule(default_first_look(num_batches), default("confidence"), default("screening"))


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
    width = config.num_attention_heads * config.head_dim
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


def saved_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # noqa: F841  the graph lives until all is counted
    return sum(storage.nbytes() for storage in kept.values())


def forget() -> None:
    """Give back the memory of models that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_gpu_peak(device: torch.device) -> None:
    """Start counting `gpu_peak` anew; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_peak(device: torch.device) -> dict:
    """Most bytes of a GPU that tensors took since `reset_gpu_peak`; nothing on a CPU."""
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def weight_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def reset_peak_memory(model) -> int:
    """Start counting the process's peak resident size anew (Linux); its present size in bytes.

    The weights are read first: a file that is mapped into memory counts only once it was touched.
    """
    for parameter in model.parameters():
        parameter.sum()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """Peak resident size in bytes since `reset_peak_memory`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
