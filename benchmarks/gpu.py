"""One card in eight minutes: memory, training, screening, the race, maps, and inference with skipped blocks.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --config tiny --device cpu --output /tmp/tiny.json

A Llama-3.1-8B with random weights is made on the card; nothing is downloaded. Needs torch and
transformers and, for the batches, instructlab-training, datasets and pydantic (with --no-deps:
also dill, multiprocess, pydantic-core, annotated-types, typing-inspection; numba, pandas,
pyarrow, xxhash, aiofiles, rich). Where numba-cuda keeps numba from compiling, set NUMBA_DISABLE_JIT=1.

Writes benchmarks/results/gpu_{card}.json anew after each section, so that an interruption loses
one section at most. A section that may not end within --minutes is skipped, and named.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import measuring
import sections
import torch
from sections import Section
from transformers import DynamicCache, LlamaConfig
from transformers.utils import is_flash_attn_2_available

from hopscotch_common.loading import hopscotch_classes, hopscotch_config, resolve_device
from hopscotch_common.scales import freeze_base
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.search.search import Search
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import IGNORE_INDEX, Sample
from hopscotch_common.training.loss import summed_loss
from hopscotch_common.training.memory import MinibatchRunner, free_bytes
from hopscotch_common.training.originals import Originals
from hopscotch_common.training.replacement import collect, solve
from hopscotch_common.training.trainer import EpochBatches, ScaleTrainer, prepare_model

LEARNING_RATE = 1e-2
CANDIDATE = 4  # the block that is skipped where one candidate stands for all


@dataclass(frozen=True)
class Size:
    """What is measured.

    answers, short_answers: fewest and most tokens of one; prompts, long_prompts: (rows, tokens);
    rank: of maps in skipped blocks' place.
    """

    config: dict
    answers: tuple[int, int] = (100, 700)
    short_answers: tuple[int, int] = (48, 128)
    batch_size: int = 32
    training_batches: int = 4
    race_batches: int = 8
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
    "tiny": Size(TINY, (12, 40), (6, 12), 4, 1, 2, 64, (2, 12), (2, 40), new_tokens=3, repeats=1),
}


@dataclass
class Bench:
    """On what it is measured, and what came out so far."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    results: sections.Results = field(default_factory=sections.Results)

    def model(self, attention: str = "sdpa", skipped: Iterable[int] = (), rank: int = 0):
        """A model with random weights, made on the device; skipped blocks hold no weights, maps of a rank."""
        measuring.forget()  # what the section before this one left
        config = hopscotch_config(LlamaConfig(**self.size.config), skipped, replacement_rank=rank)
        _, model_class = hopscotch_classes(config.model_type)
        torch.manual_seed(0)
        with self.device:
            model = model_class._from_config(config, dtype=self.dtype, attn_implementation=attention)
        freeze_base(model)
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
    total = measuring.saved_bytes(lambda: summed_loss(model, minibatch), model.parameters())
    layers, tokens = len(model.model.layers), minibatch.num_tokens
    return {"tokens": tokens, "bytes_per_token_and_layer": total / tokens / layers}


def budget(bench: Bench) -> dict:
    """The token budget that the library chooses, and a step that fills it, without padding."""
    model, options = bench.model(), TrainingOptions(LEARNING_RATE, bench.size.batch_size)
    free = {"free_bytes": free_bytes(bench.device)} if bench.device.type == "cuda" else {}
    tokens = EpochBatches(model, bench.answers(1, bench.size.answers), options).max_tokens
    length = tokens // options.batch_size
    answers = bench.answers(options.batch_size, (length, length))
    batches = EpochBatches(model, answers, replace(options, max_tokens_per_batch=tokens)).epoch()
    (minibatch,) = batches[0].minibatches
    runner = MinibatchRunner()
    trainer = ScaleTrainer(model, LEARNING_RATE, [CANDIDATE], runner=runner)
    measuring.reset_gpu_peak(bench.device)
    seconds = bench.seconds(lambda: trainer.run(batches, "epoch 0"))
    return {
        "budget_tokens": tokens,
        "tokens": minibatch.num_tokens,
        "fits": runner.too_large > tokens,
        "tokens_per_second": minibatch.num_tokens / seconds,
        "weight_bytes": measuring.weight_bytes(model),
    } | (free | measuring.gpu_peak(bench.device))


def training(bench: Bench, attention: str = "sdpa", rank: int = 0, **flags) -> dict:
    """Training steps on answers of mixed lengths. flags: of TrainingOptions.

    KL takes the original model's outputs from where a search keeps them; they are computed before.
    """
    size, device = bench.size, bench.device
    options = TrainingOptions(LEARNING_RATE, size.batch_size, **flags)
    model = bench.model(attention, rank=rank)
    prepare_model(model, options)
    samples = bench.answers(size.batch_size * size.training_batches, size.answers)
    epochs = EpochBatches(model, samples, options)
    batches = epochs.epoch()
    originals = Originals(model) if options.loss == "kl" else None
    if originals is not None:
        originals.keep(batches)
    trainer = ScaleTrainer(
        model, LEARNING_RATE, [CANDIDATE], originals=originals, map_learning_rate=options.map_learning_rate
    )
    warm_up = measuring.seconds(lambda: trainer.run(batches, "epoch 0"), device)
    measuring.reset_gpu_peak(device)
    seconds = measuring.seconds(lambda: trainer.run(batches, "epoch 1"), device)
    rate = measuring.count_flops(model, batches, skipped=1) / seconds
    runs = [minibatch.num_tokens for batch in batches for minibatch in batch.minibatches]
    return {
        "tokens_per_second": sum(map(len, samples)) / seconds,
        "flops_per_second": rate,
        "share_of_matmul_rate": rate / bench.results.figures["matmul"]["flops_per_second"],
        "tokens_per_step": sum(map(len, samples)) / len(batches),
        "padded_tokens_per_step": sum(runs) / len(batches),
        "largest_minibatch_tokens": max(runs),
        "budget_tokens": epochs.max_tokens,
        "warm_up_seconds": warm_up,
    } | measuring.gpu_peak(device)


def screening(bench: Bench) -> dict:
    """Every candidate screened on a batch, against a training step of one on the same batch."""
    samples = bench.answers(bench.size.batch_size, bench.size.answers)
    trainer = CandidateTrainer(bench.model(), samples, TrainingOptions(LEARNING_RATE, bench.size.batch_size))
    blocks, batches = trainer.candidates([]), trainer.batches.epoch()
    scales = ScaleTrainer(trainer.model, LEARNING_RATE, [CANDIDATE])
    step = bench.seconds(lambda: scales.run(batches, "epoch 0"))
    all_blocks = bench.seconds(lambda: trainer.screen([], blocks, 0, lambda share: None))
    return {"cost_of_a_training_step": all_blocks / len(blocks) / step, "seconds_of_a_step": step}


def race(bench: Bench) -> dict:
    """An iteration of the race with its default settings, on short answers."""
    size = bench.size
    samples = bench.answers(size.batch_size * size.race_batches, size.short_answers)
    trainer = CandidateTrainer(bench.model(), samples, TrainingOptions(LEARNING_RATE, size.batch_size))
    batches = trainer.batches.epoch()
    scales = ScaleTrainer(trainer.model, LEARNING_RATE, [CANDIDATE])
    epoch = bench.seconds(lambda: scales.run(batches, "epoch 0"))
    search = Search(trainer, measuring.default_race(trainer.num_batches))
    start = time.perf_counter()
    found = search.next_block([])
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens_per_epoch": sum(map(len, samples)),
        "candidates": len(found.untrained_losses),
        "candidate_epochs": found.candidate_epochs,
        "seconds_of_a_candidate_epoch": epoch,
        "seconds_over_those_of_its_epochs": seconds / (epoch * found.candidate_epochs),
    }


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
        measuring.reset_gpu_peak(bench.device)
        seconds = bench.seconds(lambda blocks=blocks: collect(model, batches, blocks), repeats=1)
        figures |= {f"{name}_blocks": count, f"{name}_seconds_a_batch": seconds}
        figures |= {f"{name}_{key}": value for key, value in measuring.gpu_peak(bench.device).items()}
    sums = collect(model, batches, [CANDIDATE])[CANDIDATE]
    return figures | {"seconds_to_solve_a_block": bench.seconds(lambda: solve(sums, size.rank), repeats=1)}


@torch.inference_mode()
def inference(bench: Bench, eighths: int, rank: int = 0, long: bool = False) -> dict:
    """Prefill and decode with the KV cache, so many eighths of the attention blocks skipped.

    rank: of maps in their place. The cache is transformers' dynamic one, which copies a layer's keys and
    values for each token; so skipping gains more with it than with one that does not.
    """
    num_layers = bench.size.config["num_hidden_layers"]
    blocks = measuring.spread(num_layers * eighths // 8, num_layers)
    model, cache = bench.model(skipped=blocks, rank=rank), DynamicCache()
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

    measuring.reset_gpu_peak(bench.device)
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
        "weight_bytes": measuring.weight_bytes(model),
    } | measuring.gpu_peak(bench.device)


def all_sections(bench: Bench) -> dict[str, Section]:
    """In the order of their worth; the seconds expected are an H100's."""
    flash = "flash_attention_2"
    lacks = None if is_flash_attn_2_available() else "flash_attn"
    return {
        "matmul": Section(20, partial(matmul, bench)),
        "saved, sdpa": Section(20, partial(saved, bench, "sdpa")),
        "saved, flash": Section(20, partial(saved, bench, flash), lacks),
        "budget": Section(30, partial(budget, bench)),
        "training, sdpa": Section(30, partial(training, bench)),
        "training, flash": Section(30, partial(training, bench, flash), lacks),
        "screening": Section(60, partial(screening, bench)),
        "race": Section(60, partial(race, bench)),
        "inference, none skipped": Section(30, partial(inference, bench, 0)),
        "inference, 1/8 skipped": Section(30, partial(inference, bench, 1)),
        "inference, 1/4 skipped": Section(30, partial(inference, bench, 2)),
        "inference, 1/4 replaced": Section(30, partial(inference, bench, 2, bench.size.rank)),
        "long, none skipped": Section(30, partial(inference, bench, 0, long=True)),
        "long, 1/4 skipped": Section(30, partial(inference, bench, 2, long=True)),
        "long, 1/4 replaced": Section(30, partial(inference, bench, 2, bench.size.rank, long=True)),
        "fitting maps": Section(30, partial(fitting, bench)),
        "training, kl": Section(40, partial(training, bench, loss="kl")),
        "training, kl and maps": Section(
            40, partial(training, bench, rank=bench.size.rank, loss="kl", map_learning_rate=1e-3)
        ),
        "training, checkpointing": Section(30, partial(training, bench, gradient_checkpointing=True)),
        "training, compile": Section(90, partial(training, bench, compile_layers=True)),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", choices=SIZES, default="llama-3.1-8b")
    parser.add_argument("--minutes", type=float, default=8.0, help="skip what would not end within so many")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_{card}.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    bench = Bench(SIZES[arguments.config], resolve_device(arguments.device), getattr(torch, arguments.dtype))
    if bench.device.type == "cuda":
        torch.cuda.set_device(bench.device)
    output = arguments.output
    if output is None:
        if bench.device.type == "cpu" or arguments.config == "tiny":
            parser.error("--output: needed on a CPU and with the tiny config, which say nothing of a card")
        output = measuring.RESULTS / f"gpu_{measuring.gpu_slug()}.json"
    settings = {"config": arguments.config, "dtype": arguments.dtype, "size": asdict(bench.size)}

    def keep() -> None:
        measuring.save_as(output, settings | asdict(bench.results))

    sections.run(all_sections(bench), arguments.minutes, bench.results, keep)
    print(bench.results.table())
    return 1 if bench.results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
