"""What skipped attention blocks gain: prefill and decode speed, KV cache, weights.

    python benchmarks/inference.py --rounds 5
    python benchmarks/inference.py --table

It measures 0, 2, 4 and 8 skipped blocks of the embedded model and of a wider random one, in transformers and
in vLLM, with one prompt at a time or --rows of them. The numbers of blocks take turns in every round, and
each round begins with another one; figures are medians over rounds. In transformers they are compared with
the stock model, which has no scales to multiply by, and with ours with nothing skipped. `gained` is the time
that skipping saves, against the first model of a round (stock in transformers), over the time that the
skipped blocks (norm and attention) take in that model. Their modules are timed there, so that figure owes
nothing to the skipping. Where the machine's speed drifts, many rounds of one repeat cancel that best. Results
go to benchmarks/results/inference_cpu.json.

    pip install --no-deps .
    python benchmarks/inference.py --engines vllm_forms --rounds 3 --result vllm_forms_cpu.json

compares two ways to serve a model with 8 skipped blocks in vLLM: the checkpoint itself, by this project's
plugin, and its nemotron_nas export; each against the stock model in vLLM's own code. `--compiled` lets vLLM
compile, which is vLLM's default.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measuring
import torch
from measuring import median, row, title

from hopscotch_common import checkpoints, scales
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.loading.loader import load_model, read_config
from hopscotch_common.loading.models import ModelRef, model_ref

PHASES = ("prefill", "decode")
ENGINES = ("transformers", "vllm", "vllm_forms")
WIDE = dict(
    vocab_size=8192,
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=["smollm", "wide"], help="wide, or what --model of the scripts takes"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 2, 4, 8], help="skipped blocks; 0 first")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES[:2])
    parser.add_argument("--rounds", type=int, default=5, help="of each engine")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of a measurement in a round; the median counts"
    )
    parser.add_argument("--rows", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles; attention is not timed then")
    measuring.add_result_arguments(parser, "inference_cpu")
    return parser


def make_wide(folder: Path) -> ModelRef:
    """A random Llama with the proportions of a larger model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDE)).save_pretrained(folder)
    return ModelRef("wide", str(folder))


class AttentionClock:
    """Seconds spent in the attention blocks (norm and attention) of decoder layers, on a CPU."""

    def __init__(self, layers):
        self.seconds, self.started, self.hooks = 0.0, 0.0, []
        for layer in layers:
            for module in (layer.input_layernorm, layer.self_attn):
                self.hooks.append(module.register_forward_pre_hook(self._start, prepend=True))
                self.hooks.append(module.register_forward_hook(self._stop))

    def _start(self, *_):
        self.started = time.perf_counter()

    def _stop(self, *_):
        self.seconds += time.perf_counter() - self.started

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def measure(run, arguments: argparse.Namespace, layers=None) -> dict:
    """Median seconds of prefill and of decoding; where layers are given, those of one attention block.

    run(n): run the prompt and generate n tokens. Decoding is what n more tokens than 1 take longer.
    """

    def attention_seconds(tokens: int) -> float:
        clock = AttentionClock(layers)
        run(tokens)
        clock.remove()
        return clock.seconds / len(layers)

    def medians(seconds) -> dict:
        pairs = [(seconds(1), seconds(1 + arguments.new_tokens)) for _ in range(arguments.repeats)]
        return {"prefill": median([a for a, _ in pairs]), "decode": median([b - a for a, b in pairs])}

    result = {"seconds": medians(lambda tokens: measuring.seconds(lambda: run(tokens)))}
    if layers is not None:
        result["attention_block_seconds"] = medians(attention_seconds)
    return result


@torch.inference_mode()
def transformers_rounds(arguments: argparse.Namespace, folder: str) -> list[dict]:
    """The stock model, and ours with blocks switched off; a measurement of each number of blocks a round."""
    from transformers import AutoModelForCausalLM, DynamicCache

    ours = load_model(model_ref(folder), dtype=arguments.dtype, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=arguments.dtype).eval()
    num_layers = len(ours.model.layers)
    prompt = torch.randint(3, ours.config.vocab_size, (arguments.rows, arguments.prompt_tokens))

    def measured(name: str) -> dict:
        model = stock if name == "stock" else ours
        if name != "stock":
            scales.reset(ours, measuring.spread(int(name), num_layers))

        def run(new_tokens: int):
            cache = DynamicCache()
            model(prompt, past_key_values=cache, logits_to_keep=1)
            for _ in range(new_tokens - 1):
                model(prompt[:, :1], past_key_values=cache)
            return cache

        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in run(2).layers)
        result = measure(run, arguments, stock.model.layers if name == "stock" else None)
        return {"kv_bytes_per_token": size / (prompt.numel() + arguments.rows)} | result

    return in_turn(["stock", *map(str, arguments.counts)], arguments.rounds, measured)


def in_turn(names: list[str], rounds: int, measured: Callable[[str], dict]) -> list[dict]:
    """Rounds of {name: measured(name)}; another name begins each, so that the order favours none."""
    found = []
    for number in range(rounds):
        first = number % len(names)
        figures = {name: measured(name) for name in names[first:] + names[:first]}
        found.append({name: figures[name] for name in names})
    return found


def measure_vllm(folder: str, arguments: argparse.Namespace, time_attention: bool) -> dict:
    """Start vLLM on a folder, and measure it."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in this process, so modules can be timed
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    gc.collect()  # the last engine's memory, before this one takes its own
    llm = LLM(
        folder,
        dtype=arguments.dtype,
        trust_remote_code=True,  # for the config class of nemotron_nas
        enforce_eager=not arguments.compiled,  # compiled, modules could not be timed
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=arguments.prompt_tokens + arguments.new_tokens + 8,
        max_num_seqs=arguments.rows,
        gpu_memory_utilization=0.5,  # checked against free memory, even without a GPU
    )
    prompt = {"prompt_token_ids": [3 + i % 1000 for i in range(arguments.prompt_tokens)]}

    def run(new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        llm.generate([prompt] * arguments.rows, sampling, use_tqdm=False)

    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
    size = 0.0
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        size += len(group.layer_names) * spec.page_size_bytes / spec.block_size
    layers = llm.apply_model(lambda model: model.model.layers)[0] if time_attention else None
    run(2)
    return {"kv_bytes_per_token": size} | measure(run, arguments, layers)


def vllm_rounds(arguments: argparse.Namespace, folders: dict[str, str]) -> list[dict]:
    """An engine for each of what is compared, started anew in every round."""

    def measured(name: str) -> dict:
        return measure_vllm(folders[name], arguments, name == "0" and not arguments.compiled)

    return in_turn(list(folders), arguments.rounds, measured)


def benchmark(name: str, arguments: argparse.Namespace, results: measuring.Results) -> None:
    """Each engine on one model, in a process of its own: vLLM binds threads and memory of its process."""
    with tempfile.TemporaryDirectory() as root:
        ref = make_wide(Path(root, name)) if name == "wide" else model_ref(name)
        num_layers = read_config(ref).num_hidden_layers
        exports, sizes = {}, {}
        for count in arguments.counts:
            blocks = measuring.spread(count, num_layers)
            values = torch.ones(num_layers, 4)
            values[blocks, 0] = 0
            checkpoint = Path(root, f"{ref.name}-{count}")
            checkpoints.save_checkpoint(checkpoint, ref, blocks, values, {})
            sizes[str(count)] = sum(path.stat().st_size for path in checkpoint.glob("base-*.safetensors"))
            if {"vllm", "vllm_forms"} & set(arguments.engines):
                exports[str(count)] = f"{checkpoint}-nemotron_nas"
                export_checkpoint(checkpoint, "nemotron_nas", Path(exports[str(count)]))
        stock = str(ref.folder())

        def measured(engine: str) -> dict:
            if engine == "transformers":
                rounds = measuring.apart(transformers_rounds, arguments, stock)
            else:
                forms = {
                    "stock": stock,
                    "nemotron_nas": [*exports.values()][-1],
                    "checkpoint": str(checkpoint),
                }
                rounds = measuring.apart(vllm_rounds, arguments, exports if engine == "vllm" else forms)
            return {"weights": sizes, "rounds": rounds}

        for engine in arguments.engines:
            results.measure({"model": ref.name, "engine": engine}, measured, engine)


def table(figures: list[dict], settings: dict) -> list[str]:
    """Markdown, medians over rounds; ratios and gains are taken within a round, so that drift cancels.

    Gains and KV bytes are against the first of what a round compares: the stock model, or nothing skipped.
    """

    def cell(values: list[float]) -> str:
        return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    whats = ("tokens/s", "times stock", "times 0 skipped", "gained")
    columns = [f"{phase}, {what}" for phase in PHASES for what in whats]
    lines = title("model", "engine", "skipped or form", *columns, "KV bytes", "weights")
    for figure in figures:
        rounds, weights = figure["rounds"], figure["weights"]
        first, *_ = rounds[0]
        for name in rounds[0]:
            cells = []
            for phase in PHASES:
                whole, own = ([r[which]["seconds"][phase] for r in rounds] for which in (first, name))
                tokens = settings["prompt_tokens" if phase == "prefill" else "new_tokens"]
                tokens *= settings["rows"]
                times = [
                    cell([r[base]["seconds"][phase] / r[name]["seconds"][phase] for r in rounds])
                    if base in rounds[0]
                    else "-"
                    for base in ("stock", "0")
                ]
                gained = "-"
                if "attention_block_seconds" in rounds[0][first]:
                    block = [r[first]["attention_block_seconds"][phase] for r in rounds]
                    if name == first:
                        share = median([c / a for c, a in zip(block, whole, strict=True)])
                        gained = f"a block takes {share:.1%}"
                    elif name != "0":
                        saved = zip(whole, own, block, strict=True)
                        gained = cell([(a - b) / (int(name) * c) for a, b, c in saved])
                cells += [f"{tokens / median(own):.1f}", *times, gained]
            kv, whole_kv = (rounds[0][which]["kv_bytes_per_token"] for which in (name, first))
            known = name in weights and "0" in weights
            size = f"{weights[name] / weights['0']:.2f}" if known else "-"
            lines.append(row(*figure["of"].values(), name, *cells, f"{kv / whole_kv:.2f}", size))
    return lines


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    path = arguments.result or measuring.RESULTS / "inference_cpu.json"
    if not arguments.table:
        names = "counts dtype rounds repeats rows prompt_tokens new_tokens compiled"
        results = measuring.Results(path, measuring.settings_of(arguments, names))
        for name in arguments.models:
            benchmark(name, arguments, results)
    content = json.loads(path.read_text())
    print("\n".join(table(content["figures"], content["settings"])))


if __name__ == "__main__":
    main()
