"""Configs and weights of the models that `models.py` names: checked, then loaded."""

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging as transformers_logging

from hopscotch_common import files, scales
from hopscotch_common.errors import InputError, is_out_of_memory, logger, reason_of
from hopscotch_common.loading.models import ModelRef
from hopscotch_common.scales.modeling_hopscotch import FAMILIES, PREFIX, REFUSED, family_classes

# Quantisation methods over which scales train, and those over which they do if transformers unpacks the
# weights, as on a CPU.
TRAINABLE, UNPACKED = ("bitsandbytes",), ("fp8", "mxfp4")


def read_config(ref: ModelRef, checkpoint: bool = False):
    """Return the stock config of a model; raise InputError unless it is sound and its architecture supported.

    checkpoint: whether the model may also be a Hopscotch checkpoint, whose own config is then returned. Its
    classes are then registered with transformers, so that no code in its folder is asked for.
    """
    folder = ref.folder(weights=False)
    values = files.read_json(folder / "config.json", "fetch the model again, or give another folder")
    kind = str(values.get("model_type"))
    stock_kind = kind.removeprefix(PREFIX)
    if kind != stock_kind and not checkpoint:
        raise InputError(f"{ref.source} is a Hopscotch checkpoint already: give its base model instead")
    check_supported(stock_kind, ref.source)
    if kind != stock_kind:
        config_class, model_class = hopscotch_classes(kind)
        AutoConfig.register(kind, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers checks some fields, and stumbles over others
        raise InputError(
            f"{folder / 'config.json'}: describes no model ({reason_of(error)}); fetch the model again"
        ) from error


def check_supported(model_type: str, where: object) -> None:
    """Raise InputError, which says `where`, unless a `model_type` of transformers is in FAMILIES."""
    if model_type in FAMILIES:
        return
    what = f"{where}: architecture {model_type!r} is not supported"
    if model_type in REFUSED:
        raise InputError(f"{what}: {REFUSED[model_type]}; give another model")
    raise InputError(
        f"{what}; supported are {', '.join(FAMILIES)}; give such a decoder-only language model, or describe "
        "its decoder layer in FAMILIES in hopscotch_common/scales/modeling_hopscotch.py"
    )


def hopscotch_classes(model_type: str) -> tuple[type, type]:
    """(config class, causal LM class) of a stock or `hopscotch_` model type."""
    config_class, _, model_class = family_classes(model_type.removeprefix(PREFIX))
    return config_class, model_class


def hopscotch_config(
    base_config, skipped_blocks=(), scale_granularity: str = "layer", replacement_rank: int = 0
):
    """Return the Hopscotch config of a stock one; a model with it may be loaded from base weights."""
    config_class, _ = hopscotch_classes(base_config.model_type)
    values = base_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    config = config_class(
        **values,
        skipped_attention_blocks=list(skipped_blocks) or None,
        scale_granularity=scale_granularity,
        replacement_rank=replacement_rank,
    )
    config.dtype = base_config.dtype
    config.new_scales = True
    return config


def resolve_device(device: str):
    """Return `--device` as a torch device, None for GPUs to `split`; raise InputError if it is not there."""
    if device == "split":  # without CUDA, device_map="auto" would take Apple's GPU
        return None if torch.cuda.is_available() else torch.device("cpu")
    if device == "auto":
        use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
        if use_cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        # slurm may show each process only a GPU of its own
        return torch.device("cuda", rank % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device; give cpu, cuda, cuda:N or split") from error
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: not supported; give cpu, cuda, cuda:N or split")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: {torch.cuda.device_count()} CUDA devices here; try cpu")
    return resolved


def load_model(
    ref: ModelRef,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "auto",
    quantization: str | None = None,
    scale_granularity: str = "layer",
    replacement_rank: int = 0,
):
    """Load the model with scaled decoder layers, no block skipped and all scales 1, in eval mode.

    With scales of 1 its logits equal the stock class's bit for bit. Weights are frozen; only the scales
    require gradients. quantization: None, or one of QUANTIZATIONS. scale_granularity: one of GRANULARITIES.
    replacement_rank: if above 0, each block has a map for when it is skipped, zero until `fit_maps`. Raises
    InputError for a quantised base that gives no gradients.
    """
    config = hopscotch_config(
        read_config(ref), scale_granularity=scale_granularity, replacement_rank=replacement_rank
    )
    method = quantized_by(config)
    if method not in (None, *TRAINABLE, *UNPACKED):
        raise no_gradients(ref, method)
    _, model_class = hopscotch_classes(config.model_type)
    resolved = resolve_device(device)
    options = {"config": config, "dtype": dtype, "device_map": device_map(resolved)}
    if attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        stored = config.dtype if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = quantization_config(quantization, resolved, stored)
    if attn_implementation == "flex_attention" and (resolved is None or resolved.type == "cpu"):
        raise InputError("--attn_implementation flex_attention: trains on one GPU only; give sdpa")
    model = load_whole(model_class, ref.folder(), bar=not ref.embedded, **options)  # it loads in a second
    if method in UNPACKED and getattr(model, "hf_quantizer", None) is not None:
        raise no_gradients(ref, method)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"--device {device}: {ref.source} does not fit the GPUs here, and what lies elsewhere cannot "
            "train; use more GPUs, or weights that bitsandbytes quantised"
        )
    scales.freeze_base(model)
    return model


def quantized_by(config) -> str | None:
    """The method by which a base's stored weights are quantised, None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    return str(settings.get("quant_method", "bitsandbytes")).lower()  # older bitsandbytes settings lack it


def no_gradients(ref: ModelRef, method: str) -> InputError:
    """The error for a base over whose weights no scales train."""
    return InputError(
        f"{ref.source}: its weights are quantised ({method}), and their kernels give no gradients, or none "
        "that are right; give the model that it was made of (--quantization trains over quantised weights)"
    )


def device_map(device) -> str | dict:
    """transformers' device_map for a device; for None, over all GPUs."""
    return "auto" if device is None else {"": device}


def load_whole(model_class, folder: Path, bar: bool = False, **options):
    """Load a model in eval mode; all its weights come from the folder's files, and none there is left over.

    bar: whether to show transformers' own. options go to `from_pretrained`. Raises InputError if transformers
    would make up a weight, ignore one, or cannot read one.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    if not bar:
        transformers_logging.disable_progress_bar()
    try:
        model, found = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # a config or weights can make a model's code raise anything
        if is_out_of_memory(error):
            raise
        remedy = "check its config.json and its weights"
        if isinstance(error, ImportError):
            remedy = "install it, or give another --attn_implementation"
        elif "automatic conversion" in str(error):  # from torchao, if its groups do not divide a width
            remedy = "use --quantization int8"
        raise InputError(f"{folder}: cannot be loaded ({reason_of(error)}); {remedy}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    check_loaded(folder, found)
    kernel = model.config._attn_implementation or ""
    if "flash" in kernel and model.dtype == torch.float32:
        raise InputError(f"--attn_implementation {kernel}: computes in 16 bits only; give --dtype bfloat16")
    if model.dtype == torch.bfloat16 and lacks_bfloat16(model.device):
        logger.warning(
            "this GPU has no units for bfloat16, and is slow at it: --dtype float16 suits it better"
        )
    return model.eval()


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU from before bfloat16, such as T4 and V100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def check_loaded(folder: Path, found: dict) -> None:
    """Raise InputError if transformers' loading info names missing, mismatched or unexpected weights."""
    for kind, what in (
        ("missing_keys", "is missing from its weights"),
        ("mismatched_keys", "has another shape than its config.json says"),
        ("unexpected_keys", "is among its weights, but no part of what its config.json says"),
    ):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise InputError(f"{folder}: {first} {what} ({len(found[kind])} such); both must be one model's")


def quantization_config(quantization: str, device, dtype: torch.dtype | None = None):
    """Return settings to quantise while loading: bitsandbytes on CUDA, torchao (weights only) elsewhere.

    device: None when split. dtype: the model's. bitsandbytes' int4 is NF4, over which adapters are trained;
    its int8 also quantises activations (LLM.int8).
    """
    if device is None or device.type == "cuda":
        _require("bitsandbytes", "--quantization on CUDA")
        if quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        # bitsandbytes' defaults are FP4, and products in float32
        compute = dtype or torch.bfloat16
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    _require("torchao", "--quantization on a CPU")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if quantization == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what} needs {package}, which is not installed: pip install {package}")
