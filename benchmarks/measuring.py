"""What the benchmarks share: results as JSON, the machine they were made on, peak memory."""

import os
import platform
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hopscotch_common.files import write_json  # noqa: E402
from hopscotch_common.report.runs import package_versions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict:
    """Cores, processor, and package versions."""
    return {"cores": os.cpu_count(), "processor": processor_name(), "versions": package_versions()}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name: str, content: dict) -> None:
    """Write benchmarks/results/{name}.json with the command and the machine."""
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    write_json(RESULTS / f"{name}.json", {"command": command, "machine": machine()} | content)
    print(f"wrote {RESULTS / name}.json", file=sys.stderr)


def median(values: list[float]) -> float:
    return statistics.median(values)


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
