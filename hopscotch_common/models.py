"""What `--model` names, and where its files lie. Light: what loads them is in `loading.py`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hopscotch_common import embedded, files
from hopscotch_common.errors import InputError

ALIASES = {
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "granite": "ibm-granite/granite-3.0-8b-instruct",
    embedded.NAME: "SmolLM2-135M-Instruct, embedded",
}

GGUF_SUFFIX = ".gguf"
QUANTIZATIONS = ("int8", "int4")  # weight only


@dataclass(frozen=True)
class ModelRef:
    """What `--model` names. `name` goes into file names; `source` is a hub id, a folder or a GGUF file.

    float32: a GGUF is unpacked to float32 weights, not to bfloat16.
    """

    name: str
    source: str
    float32: bool = False

    @property
    def embedded(self) -> bool:
        return self.name == embedded.NAME and self.source == ALIASES[embedded.NAME]

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub, or None where none is known: of a folder outside the hub's cache."""
        if self.embedded:
            return embedded.HUB_ID
        path = Path(self.source)
        cached = re.search(r"models--(.+)/snapshots/", str(path.absolute()))
        if path.exists():
            return cached[1].replace("--", "/", 1) if cached else None
        return self.source

    def folder(self, weights: bool = True) -> Path:
        """The local folder with config, tokenizer and (unless told otherwise) weights.

        A hub id is downloaded into the Hugging Face cache; the embedded model and a GGUF file are
        unpacked once into the user's cache. Raises InputError when none can be had.
        """
        if self.embedded:
            return embedded.folder()
        path = Path(self.source)
        if path.is_dir():
            return path
        if path.is_file():
            import torch

            from hopscotch_common import gguf_files

            return gguf_files.unpacked_folder(path, *([torch.float32] if self.float32 else []))
        return _download(self.source, weights)


def model_ref(word: str) -> ModelRef:
    """What an alias, a folder, a GGUF file or a Hugging Face id names; InputError for any other word."""
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
        return ModelRef(Path(os.path.abspath(path)).name, str(path))  # of a link, its own name
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
    """Tokens that a row may have.

    With longrope (Phi-3.5, Phi-4-mini) that is the length before it: beyond it transformers turns the
    positions of all rows of a batch otherwise, so that what a row gives would depend on its neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return config.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return min(original, config.max_position_embeddings)


def _download(source: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
    if weights:
        patterns += ["*.safetensors"]
    try:
        # Not what lies in folders of its own, nor Mistral's second copy of the weights.
        return Path(
            snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{source} cannot be fetched from the Hugging Face hub ({type(error).__name__}); "
            "check the id and your login, or give a local folder: --model /path/to/model"
        ) from error
