"""What skipped attention blocks gain: prefill and decode speed, KV cache, weights.

    python benchmarks/inference.py --rounds 5

For 0, 2, 4 and 8 skipped blocks of the embedded model and of a wider random one, in transformers
and in vLLM. The numbers of blocks take turns in every round; figures are medians over rounds. What
a block's attention costs is measured where nothing is skipped, by timing the modules (norm and
attention), so that it owes nothing to the skipping. `gained` is the time that skipping saves over
the time that the skipped modules took. Where the machine's speed drifts, many rounds of one repeat
cancel it best. Results go to benchmarks/results/inference_cpu.json.

    pip install --no-deps .
    python benchmarks/inference.py --engines vllm_forms --rounds 3 --result vllm_forms_cpu

asks how a model with 8 skipped blocks is best served with vLLM: as the checkpoint itself, by this
project's plugin, or exported as nemotron_nas; each against the stock model in vLLM's own code.
`--compiled` lets vLLM compile, as it does unless told otherwise.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measuring
import torch

from hopscotch_common import checkpoints, scales
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.loading import load_model, read_config
from hopscotch_common.models import ModelRef, model_ref

PHASES = ("prefill", "decode")
ENGINES = ("transformers", "vllm", "vllm_forms")
FORMS = ("stock", "nemotron_nas", "checkpoint")
BAR = 0.9  # of attention's measured share
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
        "--repeats", type=int, default=3, help="of each measurement in a round; the median counts"
    )
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles; attention is not timed then")
    parser.add_argument("--result", default="inference_cpu", help="name of the file in benchmarks/results/")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
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

    def once() -> list[float]:
        start = time.perf_counter()
        run(1)
        middle = time.perf_counter()
        run(1 + arguments.new_tokens)
        return [middle - start, time.perf_counter() - middle - (middle - start)]

    def attention_once() -> list[float]:
        seconds = []
        for tokens in (1, 1 + arguments.new_tokens):
            clock = AttentionClock(layers)
            run(tokens)
            clock.remove()
            seconds.append(clock.seconds / len(layers))
        return [seconds[0], seconds[1] - seconds[0]]

    def medians(function) -> dict:
        results = zip(*(function() for _ in range(arguments.repeats)), strict=True)
        return dict(zip(PHASES, map(measuring.median, results), strict=True))

    result = {"seconds": medians(once)}
    if layers is not None:
        result["attention_block_seconds"] = medians(attention_once)
    return result


@torch.inference_mode()
def transformers_rounds(arguments: argparse.Namespace) -> list[dict]:
    """One model, whose blocks are switched off; a measurement of each number of blocks a round."""
    from transformers import DynamicCache

    model = load_model(model_ref(arguments.folders[0]), dtype=arguments.dtype, device="cpu")
    layers = model.model.layers
    prompt = torch.randint(3, model.config.vocab_size, (1, arguments.prompt_tokens))

    def run(new_tokens: int):
        cache = DynamicCache()
        model(prompt, past_key_values=cache, logits_to_keep=1)
        for _ in range(new_tokens - 1):
            model(prompt[:, :1], past_key_values=cache)
        return cache

    rounds = []
    run(2)
    for _ in range(arguments.rounds):
        rounds.append({})
        for count in arguments.counts:
            scales.reset(model, measuring.spread(count, len(layers)))
            cache = run(1)
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            result = measure(run, arguments, layers if count == 0 else None)
            rounds[-1][count] = {"kv_bytes_per_token": size / prompt.shape[1]} | result
    return rounds


def measure_vllm(folder: str, arguments: argparse.Namespace, time_attention: bool = False) -> dict:
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
        max_num_seqs=1,
        gpu_memory_utilization=0.5,  # checked against free memory, even without a GPU
    )
    prompt = {"prompt_token_ids": [3 + i % 1000 for i in range(arguments.prompt_tokens)]}

    def run(new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        llm.generate([prompt], sampling, use_tqdm=False)

    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
    size = 0.0
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        size += len(group.layer_names) * spec.page_size_bytes / spec.block_size
    layers = llm.apply_model(lambda model: model.model.layers)[0] if time_attention else None
    run(2)
    return {"kv_bytes_per_token": size} | measure(run, arguments, layers)


def vllm_rounds(arguments: argparse.Namespace) -> list[dict]:
    """An engine for each number of skipped blocks, started anew in every round."""
    folders = dict(zip(arguments.counts, arguments.folders, strict=True))
    return [
        {
            count: measure_vllm(folder, arguments, count == 0 and not arguments.compiled)
            for count, folder in folders.items()
        }
        for _ in range(arguments.rounds)
    ]


def form_rounds(arguments: argparse.Namespace) -> list[dict]:
    """An engine for each form, started anew in every round."""
    folders = dict(zip(FORMS, arguments.folders, strict=True))
    return [
        {form: measure_vllm(folder, arguments) for form, folder in folders.items()}
        for _ in range(arguments.rounds)
    ]


WORKERS = dict(zip(ENGINES, (transformers_rounds, vllm_rounds, form_rounds), strict=True))


def run_worker(engine: str, arguments: argparse.Namespace, folders: list[str]) -> list[dict]:
    """Measure in a process of its own: vLLM binds threads and memory of the one it runs in."""
    with tempfile.NamedTemporaryFile() as file:
        options = ("rounds", "repeats", "prompt_tokens", "new_tokens")
        settings = [word for name in options for word in (f"--{name}", str(getattr(arguments, name)))]
        settings += ["--dtype", arguments.dtype, "--counts", *map(str, arguments.counts)]
        settings += ["--compiled"] if arguments.compiled else []
        command = [sys.executable, __file__, "--worker", engine, "--output", file.name, *settings]
        subprocess.run([*command, "--folders", *folders], check=True, stdout=sys.stderr)
        return json.loads(Path(file.name).read_text())


def summarise_forms(rounds: list[dict], tokens: dict[str, int]) -> dict:
    """Medians over rounds; how many times as fast as the stock model each form is, within a round."""
    summary = {}
    for form in FORMS:
        summary[form] = {"kv_bytes_per_token": rounds[0][form]["kv_bytes_per_token"]}
        for phase in PHASES:
            seconds = [r[form]["seconds"][phase] for r in rounds]
            speedups = [r["stock"]["seconds"][phase] / s for r, s in zip(rounds, seconds, strict=True)]
            summary[form] |= {
                f"{phase}_tokens_per_second": tokens[phase] / measuring.median(seconds),
                f"{phase}_speedup": measuring.median(speedups),
                f"{phase}_speedup_range": [min(speedups), max(speedups)],
            }
    return summary


def summarise(rounds: list[dict], tokens: dict[str, int], weight_bytes: dict[int, int]) -> dict:
    """Medians over rounds; ratios and gains are taken within a round, so that drift cancels.

    rounds: {skipped count: measurement} of each round, the counts as JSON has them: text.
    """
    rounds = [{int(count): result for count, result in r.items()} for r in rounds]
    summary = {"skipped": {}}
    timed = "attention_block_seconds" in rounds[0][0]
    for phase in PHASES if timed else ():
        shares = [r[0]["attention_block_seconds"][phase] / r[0]["seconds"][phase] for r in rounds]
        summary[f"{phase}_share_of_a_block"] = measuring.median(shares)
    counts = list(rounds[0])
    for count in counts:
        cache = [r[count]["kv_bytes_per_token"] for r in rounds][0]
        entry = {
            "kv_bytes_per_token": cache,
            "kv_bytes_ratio": cache / rounds[0][0]["kv_bytes_per_token"],
            "weight_bytes": weight_bytes[count],
            "weight_bytes_ratio": weight_bytes[count] / weight_bytes[0],
        }
        for phase in PHASES:
            seconds = [r[count]["seconds"][phase] for r in rounds]
            whole = [r[0]["seconds"][phase] for r in rounds]
            entry[f"{phase}_tokens_per_second"] = tokens[phase] / measuring.median(seconds)
            entry[f"{phase}_speedup"] = measuring.median([w / s for w, s in zip(whole, seconds, strict=True)])
            if count and timed:
                cost = [count * r[0]["attention_block_seconds"][phase] for r in rounds]
                gains = [(w - s) / c for w, s, c in zip(whole, seconds, cost, strict=True)]
                entry[f"{phase}_gained"] = measuring.median(gains)
                entry[f"{phase}_gained_range"] = [min(gains), max(gains)]
        summary["skipped"][count] = entry
    most = summary["skipped"][counts[-1]]  # where the gain is largest against the noise
    if timed:
        summary["bar_met"] = all(most[f"{phase}_gained"] >= BAR for phase in PHASES)
    return summary


def benchmark(name: str, arguments: argparse.Namespace, root: Path) -> dict:
    """Each engine on one model."""
    ref = make_wide(root / name) if name == "wide" else model_ref(name)
    name = ref.name
    num_layers = read_config(ref).num_hidden_layers
    exports, sizes = [], {}
    for count in arguments.counts:
        blocks = measuring.spread(count, num_layers)
        values = torch.ones(num_layers, 4)
        values[blocks, 0] = 0
        checkpoint = root / f"{name}-{count}"
        checkpoints.save_checkpoint(checkpoint, ref, blocks, values, {})
        sizes[count] = sum(path.stat().st_size for path in checkpoint.glob("base-*.safetensors"))
        if {"vllm", "vllm_forms"} & set(arguments.engines):
            exports.append(str(root / f"{name}-{count}-nemotron_nas"))
            export_checkpoint(checkpoint, "nemotron_nas", Path(exports[-1]))
    tokens = {"prefill": arguments.prompt_tokens, "decode": arguments.new_tokens}
    stock, results = str(ref.folder()), {}
    for engine in arguments.engines:
        folders = {"transformers": [stock], "vllm": exports}.get(
            engine, [stock, *exports[-1:], str(checkpoint)]
        )
        rounds = run_worker(engine, arguments, folders)
        if engine == "vllm_forms":
            results[engine] = summarise_forms(rounds, tokens)
            shown = results[engine].items()
        else:
            results[engine] = summarise(rounds, tokens, sizes)
            shown = ((f"{count} skipped", entry) for count, entry in results[engine]["skipped"].items())
        for what, entry in shown:
            figures = [f"{k} {v:.3g}" for k, v in entry.items() if not isinstance(v, list)]
            print(f"{name}, {engine}, {what}: {', '.join(figures)}", flush=True)
        results[engine]["rounds"] = rounds
    return results


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.worker:
        arguments.output.write_text(json.dumps(WORKERS[arguments.worker](arguments)))
        return
    results = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as root:
            results[Path(name).name] = benchmark(name, arguments, Path(root))
        measuring.save(arguments.result, {"bar": BAR, "results": results})


if __name__ == "__main__":
    main()
