"""One card in eight minutes: memory, training, screening, maps, and inference with skipped blocks.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --sections "saved, a layer" --device cpu --result saved_activations.json
    python benchmarks/gpu.py --table --result benchmarks/results/gpu_h100_80gb_hbm3.json

A Llama-3.1-8B with random weights is made on the card; nothing is downloaded. This needs torch and
transformers and, for the batches, instructlab-training, datasets and pydantic (with --no-deps:
also dill, multiprocess, pydantic-core, annotated-types, typing-inspection; numba, pandas,
pyarrow, xxhash, aiofiles, rich). Where numba-cuda keeps numba from compiling, set NUMBA_DISABLE_JIT=1.

Each section's figures go to benchmarks/results/gpu_{card}.json as they come; the same command continues with
those that are missing. A section that may not end within --minutes is skipped, and named.
"""

import argparse
import gc
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import measuring
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from hopscotch_common.loading.loader import hopscotch_classes, hopscotch_config, resolve_device
from hopscotch_common.scales import freeze_base
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.training import IGNORE_INDEX, MAPS_RATE, TrainingOptions
from hopscotch_common.training.batches import Sample
from hopscotch_common.training.loss import Originals, summed_loss
from hopscotch_common.training.replacement import collect, solve
from hopscotch_common.training.trainer import EpochBatches, ScaleTrainer, prepare_model

LEARNING_RATE = 1e-2
CANDIDATE = 4  # the block that is skipped where one candidate stands for all


@dataclass(frozen=True)
class Size:
    """What is measured.

    answers: fewest and most tokens of one; prompts, long_prompts: (rows, tokens);
    rank: of maps in skipped blocks' place.
    """

    config: dict
    answers: tuple[int, int] = (100, 700)
    batch_size: int = 32
    training_batches: int = 4
    matmul_rows: int = 8192
    prompts: tuple[int, int] = (8, 1024)
    long_prompts: tuple[int, int] = (16, 8192)
    rank: int = 16
    new_tokens: int = 32
    repeats: int = 5


LONG_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, **LONG_ROPE),
)
TINY = LLAMA | dict(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
SIZES = {
    "llama-3.1-8b": Size(LLAMA),
    "tiny": Size(TINY, (12, 40), 4, 1, 64, (2, 12), (2, 40), new_tokens=3, repeats=1),
}


@dataclass(frozen=True)
class Bench:
    """On what it is measured."""

    size: Size
    device: torch.device
    dtype: torch.dtype

    def model(self, attention: str = "sdpa", skipped: Iterable[int] = (), rank: int = 0, **changes):
        """A model with random weights, made on the device; skipped blocks hold no weights, maps of a rank."""
        config = hopscotch_config(LlamaConfig(**self.size.config | changes), skipped, replacement_rank=rank)
        _, model_class = hopscotch_classes(config.model_type)
        model = self._made(model_class, config, attention)
        freeze_base(model)
        return model

    def stock_model(self):
        """transformers' own, of the same size."""
        return self._made(LlamaForCausalLM, LlamaConfig(**self.size.config), "sdpa")

    def _made(self, model_class: type, config, attention: str):
        gc.collect()  # what the section before this one left
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        with self.device:
            model = model_class._from_config(config, dtype=self.dtype, attn_implementation=attention)
        return model.eval()

    def answers(self, count: int, lengths: tuple[int, int]) -> list[Sample]:
        """Random answers of so few to so many tokens, a third of each a prompt that does not count."""
        generator, vocabulary, samples = random.Random(0), range(self.size.config["vocab_size"]), []
        for _ in range(count):
            ids = generator.choices(vocabulary, k=generator.randint(*lengths))
            samples.append(Sample(ids, [IGNORE_INDEX] * (len(ids) // 3) + ids[len(ids) // 3 :]))
        return samples

    def seconds(self, work: Callable[[], object], repeats: int = 0) -> float:
        """Median over the repeats (0: the size's), after one that does not count."""
        work()
        repeats = repeats or self.size.repeats
        return measuring.median([measuring.seconds(work, self.device) for _ in range(repeats)])

    def reset_peak(self) -> None:
        """Start counting `peak` anew; nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self, name: str = "peak_bytes") -> dict:
        """Most bytes of a GPU that tensors took since `reset_peak`; nothing on a CPU."""
        return {name: torch.cuda.max_memory_allocated(self.device)} if self.device.type == "cuda" else {}


def matmul(bench: Bench) -> dict:
    """The card's rate at the products of a decoder layer, the best of many."""
    layer = Bench(bench.size, torch.device("meta"), bench.dtype).model().model.layers[0]
    shapes = [module.weight.shape for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    rate = measuring.matmul_rate(shapes, bench.size.matmul_rows, bench.dtype, bench.device, repeats=30)
    return {"rows": bench.size.matmul_rows, "flops_per_second": rate}


def saved(bench: Bench, attention: str) -> dict:
    """What a training step keeps for its backward pass."""
    model = bench.model(attention)
    batches = EpochBatches(model, bench.answers(4, bench.size.answers), TrainingOptions(LEARNING_RATE, 4))
    minibatch = batches.epoch()[0].minibatches[0].to(bench.device)
    total = measuring.saved_bytes(model, lambda: summed_loss(model, minibatch))
    layers, tokens = len(model.model.layers), minibatch.num_tokens
    return {"tokens": tokens, "bytes_per_token_and_layer": total / tokens / layers}


def saved_by_a_layer(bench: Bench) -> dict:
    """Bytes a token of a layer between others: what three layers keep less what two do, of two rows."""
    ids = torch.arange(512, device=bench.device).view(2, -1)
    mask = torch.ones_like(ids)
    mask[0, -10:] = 0
    kept = {}
    for layers in (2, 3):
        model = bench.model(num_hidden_layers=layers, vocab_size=512)
        for name, attention_mask in (("bytes_per_token", None), ("bytes_per_token_padded", mask)):
            forward = partial(model.model, ids, attention_mask=attention_mask, use_cache=False)
            kept[name] = measuring.saved_bytes(model, forward) - kept.get(name, 0)
    return {name: size // ids.numel() for name, size in kept.items()}


def training(bench: Bench, attention: str = "sdpa", rank: int = 0, **flags) -> dict:
    """Training steps on answers of mixed lengths. flags: of TrainingOptions.

    KL takes the original model's outputs from where a search keeps them; they are computed before.
    """
    size, device = bench.size, bench.device
    options = TrainingOptions(LEARNING_RATE, size.batch_size, **flags)
    model = bench.model(attention, rank=rank)
    prepare_model(model, options)
    samples = bench.answers(size.batch_size * size.training_batches, size.answers)
    batches = EpochBatches(model, samples, options).epoch()
    originals = Originals(model) if options.loss == "kl" else None
    if originals is not None:
        originals.keep(batches)
    of_maps = LEARNING_RATE * MAPS_RATE
    trainer = ScaleTrainer(model, LEARNING_RATE, [CANDIDATE], originals=originals, map_learning_rate=of_maps)
    warm_up = measuring.seconds(lambda: trainer.run(batches, "epoch 0"), device)
    bench.reset_peak()
    seconds = measuring.seconds(lambda: trainer.run(batches, "epoch 1"), device)
    rate = measuring.count_flops(model, batches, skipped=1) / seconds
    runs = [minibatch.num_tokens for batch in batches for minibatch in batch.minibatches]
    return {
        "tokens_per_second": sum(map(len, samples)) / seconds,
        "flops_per_second": rate,
        "tokens_per_step": sum(map(len, samples)) / len(batches),
        "padded_tokens_per_step": sum(runs) / len(batches),
        "largest_minibatch_tokens": max(runs),
        "warm_up_seconds": warm_up,
    } | bench.peak()


def screening(bench: Bench) -> dict:
    """Every candidate screened on a batch, against a training step of one on the same batch."""
    samples = bench.answers(bench.size.batch_size, bench.size.answers)
    trainer = CandidateTrainer(bench.model(), samples, TrainingOptions(LEARNING_RATE, bench.size.batch_size))
    blocks, batches = trainer.candidates([]), trainer.batches.epoch()
    scales = ScaleTrainer(trainer.model, LEARNING_RATE, [CANDIDATE])
    step = bench.seconds(lambda: scales.run(batches, "epoch 0"))
    all_blocks = bench.seconds(lambda: trainer.screen([], blocks, 0, lambda share: None))
    return {"cost_of_a_training_step": all_blocks / len(blocks) / step, "seconds_of_a_step": step}


def fitting(bench: Bench) -> dict:
    """Maps fitted for every block, as a search does, and for a quarter, against a training step a batch."""
    size = bench.size
    num_layers = size.config["num_hidden_layers"]
    options = TrainingOptions(LEARNING_RATE, size.batch_size)
    model = bench.model(rank=size.rank)
    batches = EpochBatches(model, bench.answers(size.batch_size, size.answers), options).epoch()
    scales = ScaleTrainer(model, LEARNING_RATE, [CANDIDATE])
    figures = {"seconds_of_a_step": bench.seconds(lambda: scales.run(batches, "epoch 0"))}
    for name, count in (("quarter", num_layers // 4), ("all", num_layers)):
        blocks = measuring.spread(count, num_layers) if count < num_layers else range(num_layers)
        bench.reset_peak()
        seconds = bench.seconds(lambda blocks=blocks: collect(model, batches, blocks), repeats=1)
        figures |= {f"{name}_blocks": count, f"{name}_seconds_a_batch": seconds}
        figures |= bench.peak(f"{name}_peak_bytes")
    sums = collect(model, batches, [CANDIDATE])[CANDIDATE]
    return figures | {"seconds_to_solve_a_block": bench.seconds(lambda: solve(sums, size.rank), repeats=1)}


@torch.inference_mode()
def inference(bench: Bench, eighths: int | None, rank: int = 0, long: bool = False) -> dict:
    """Prefill and decode with the KV cache, so many eighths of the attention blocks skipped.

    None: of the stock model, which has no scales to multiply by either. rank: of maps in their place. The
    cache is transformers' dynamic one, which copies a layer's keys and values for each token; so skipping
    gains more with it than with one that does not.
    """
    num_layers = bench.size.config["num_hidden_layers"]
    blocks = measuring.spread(num_layers * (eighths or 0) // 8, num_layers)
    model = bench.stock_model() if eighths is None else bench.model(skipped=blocks, rank=rank)
    cache = DynamicCache()
    shape, repeats = (bench.size.long_prompts, 2) if long else (bench.size.prompts, 0)
    prompts = torch.randint(model.config.vocab_size, shape, device=bench.device)

    def prefill() -> None:
        nonlocal cache
        cache = DynamicCache()
        model(prompts, past_key_values=cache, logits_to_keep=1)

    def decode() -> None:
        token = prompts[:, :1]
        for _ in range(bench.size.new_tokens):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    bench.reset_peak()
    prefill_seconds = bench.seconds(prefill, repeats)
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    decode_seconds = bench.seconds(decode, repeats)
    return {
        "blocks_skipped": len(blocks),
        "rows": shape[0],
        "prompt_tokens": shape[1],
        "prefill_tokens_per_second": prompts.numel() / prefill_seconds,
        "decode_tokens_per_second": len(prompts) * bench.size.new_tokens / decode_seconds,
        "kv_bytes_per_token": kv_bytes / prompts.numel(),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    } | bench.peak()


@dataclass(frozen=True)
class Section:
    """run: measures; its figures by name. expected: seconds, generously; by it what still fits is judged.

    missing: what the section needs and this machine lacks.
    """

    expected: float
    run: Callable[[], dict]
    missing: str | None = None


def all_sections(bench: Bench) -> dict[str, Section]:
    """In the order of their worth; the seconds expected are an H100's."""
    flash = "flash_attention_2"
    lacks = None if is_flash_attn_2_available() else "flash_attn"
    rank = bench.size.rank
    maps = dict(rank=rank, loss="kl")
    return {
        "matmul": Section(20, partial(matmul, bench)),
        "saved, sdpa": Section(20, partial(saved, bench, "sdpa")),
        "saved, flash": Section(20, partial(saved, bench, flash), lacks),
        "saved, a layer": Section(20, partial(saved_by_a_layer, bench)),
        "training, sdpa": Section(30, partial(training, bench)),
        "training, flash": Section(30, partial(training, bench, flash), lacks),
        "screening": Section(60, partial(screening, bench)),
        "inference, stock": Section(30, partial(inference, bench, None)),
        "inference, none skipped": Section(30, partial(inference, bench, 0)),
        "inference, 1/8 skipped": Section(30, partial(inference, bench, 1)),
        "inference, 1/4 skipped": Section(30, partial(inference, bench, 2)),
        "inference, 1/4 replaced": Section(30, partial(inference, bench, 2, rank)),
        "long, stock": Section(30, partial(inference, bench, None, long=True)),
        "long, none skipped": Section(30, partial(inference, bench, 0, long=True)),
        "long, 1/4 skipped": Section(30, partial(inference, bench, 2, long=True)),
        "long, 1/4 replaced": Section(30, partial(inference, bench, 2, rank, long=True)),
        "fitting maps": Section(30, partial(fitting, bench)),
        "training, kl": Section(40, partial(training, bench, loss="kl")),
        "training, kl and maps": Section(40, partial(training, bench, **maps)),
        "training, checkpointing": Section(30, partial(training, bench, gradient_checkpointing=True)),
    }


def run(sections: Mapping[str, Section], minutes: float, results: measuring.Results) -> dict[str, str]:
    """Measure the sections in turn, as many as the minutes allow; what was skipped or failed, and why.

    A machine on which sections take longer than expected is taken to need as much more for the rest.
    """
    start = time.perf_counter()
    spent = planned = 0.0
    without = {}
    done = {figure["of"]["section"] for figure in results.figures}
    for name, section in sections.items():
        if name in done:
            continue
        begun = time.perf_counter()
        expected = section.expected * (max(1.0, spent / planned) if planned else 1.0)
        left = start + 60 * minutes - begun
        if section.missing:
            without[name] = f"skipped, no {section.missing} here"
        elif expected > left:
            without[name] = f"skipped, may take {expected:.0f} s, and {max(left, 0):.0f} s are left"
        else:
            try:
                results.measure({"section": name}, section.run)
                spent, planned = spent + time.perf_counter() - begun, planned + section.expected
            except Exception as error:  # whatever it is, the other sections' figures are wanted
                traceback.print_exc()
                without[name] = f"failed, {type(error).__name__}: {error}"
        print(f"{time.perf_counter() - start:4.0f} s  {name}", file=sys.stderr, flush=True)
    return without


def table(figures: Iterable[dict]) -> list[str]:
    """A line for each section."""
    rates = [f["flops_per_second"] for f in figures if f["of"]["section"] == "matmul"]
    lines = []
    for figure in figures:
        numbers = {key: value for key, value in figure.items() if key != "of"}
        if "tokens_per_step" in figure and rates:
            numbers.setdefault("share_of_matmul_rate", figure["flops_per_second"] / rates[0])
        shown = [f"{key} {value:.4g}" for key, value in numbers.items()]
        lines.append(f"{figure['of']['section']}: {', '.join(shown)}")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", choices=SIZES, default="llama-3.1-8b")
    parser.add_argument("--sections", nargs="+", help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="skip what would not end within so many")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    measuring.add_result_arguments(parser, "gpu_{card}")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    size, device = SIZES[arguments.config], resolve_device(arguments.device)
    path, without = arguments.result, {}
    if path is None:
        if device.type == "cpu" or arguments.config == "tiny":
            parser.error("--result: needed on a CPU and with the tiny config, which say nothing of a card")
        card = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower().removeprefix("nvidia "))
        path = measuring.RESULTS / f"gpu_{card}.json"
    if not arguments.table:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        sections = all_sections(Bench(size, device, getattr(torch, arguments.dtype)))
        if unknown := set(arguments.sections or []) - set(sections):
            parser.error(f"--sections: no {', '.join(unknown)}; there are {'; '.join(sections)}")
        wanted = {name: sections[name] for name in arguments.sections or sections}
        settings = {"config": arguments.config, "dtype": arguments.dtype, "size": asdict(size)}
        without = run(wanted, arguments.minutes, measuring.Results(path, settings))
    print("\n".join(table(measuring.figures_in(path)) + [f"{name}: {why}" for name, why in without.items()]))
    return 1 if any(why.startswith("failed") for why in without.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
