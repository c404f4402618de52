"""Flags that scripts share, and exports after a run. To be moved to cli.py and export/."""

import argparse
import json
from pathlib import Path

from hopscotch_common.cli import InputError
from hopscotch_common.models import ModelRef


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
