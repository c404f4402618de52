"""The search against the plain way: time per candidate, memory, share of the machine's matrix product rate.

    python benchmarks/search.py --model smollm --data_path data/smollm-processed-data/data.jsonl --race
    python benchmarks/search.py --table

The plain way (`plain_losses`) gives the same losses. For each candidate it loads the stock model anew, pads
batches in the order in which samples arrive, computes attention in every layer (a skipped one is multiplied
by zero), and takes the loss from the full logits at every position.

Each figure comes from a process of its own, the kinds in turn, `--runs` times; the table has medians.
`--race` also runs a whole iteration with `--search race`. Results go to benchmarks/results/search_cpu.json.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import measuring
import torch
from measuring import median, row, title
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from hopscotch_common.loading.loader import load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.search.candidates import CandidateTrainer, untrained_losses
from hopscotch_common.search.search import Search
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import load_samples
from hopscotch_common.training.trainer import ScaleTrainer


class ScaledLayer(nn.Module):
    """A stock decoder layer inside the method's two equations."""

    def __init__(self, layer: nn.Module, skip: bool):
        super().__init__()
        self.layer = layer
        self.b_attn = nn.Parameter(torch.zeros(1) if skip else torch.ones(1), requires_grad=not skip)
        self.s_attn = nn.Parameter(torch.ones(1))
        self.b_mlp = nn.Parameter(torch.ones(1))
        self.s_mlp = nn.Parameter(torch.ones(1))

    def forward(self, x, **kwargs):
        multiplier = getattr(self.layer, "residual_multiplier", 1.0)
        attention, _ = self.layer.self_attn(hidden_states=self.layer.input_layernorm(x), **kwargs)
        x = self.b_attn * multiplier * attention + self.s_attn * x
        mlp = self.layer.mlp(self.layer.post_attention_layernorm(x))
        return self.b_mlp * multiplier * mlp + self.s_mlp * x


def load_plain(folder: Path, skipped: set[int]) -> nn.Module:
    """The stock model with scaled layers; only scales train."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval().requires_grad_(False)
    layers = [ScaledLayer(layer, index in skipped) for index, layer in enumerate(model.model.layers)]
    model.model.layers = nn.ModuleList(layers)
    return model


def plain_losses(
    model: nn.Module, samples: list[dict], batch_size: int, learning_rate: float, seed: int
) -> list[float]:
    """One epoch of one candidate: the mean loss of each batch. samples: processed data."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for start in range(0, len(order), batch_size):
        batch = [samples[i] for i in order[start : start + batch_size]]
        ids, labels, mask = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
            for rows, padding in (
                ([s["input_ids"] for s in batch], 0),
                ([s["labels"] for s in batch], -100),
                ([[1] * len(s["input_ids"]) for s in batch], 0),
            )
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def reset_peak_memory(model) -> int:
    """Start counting the process's peak resident size anew (Linux); its present size in bytes.

    The weights are read first: a file that is mapped into memory counts only once it was touched.
    """
    for parameter in model.parameters():
        parameter.sum()
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def reference(arguments: argparse.Namespace) -> dict:
    """One candidate the plain way, loading included, as that way loads a model a candidate."""
    lines = arguments.data_path.read_text().splitlines()[: arguments.max_samples]
    samples, folder = [json.loads(line) for line in lines], arguments.model.folder()
    start = time.perf_counter()
    model = load_plain(folder, {arguments.candidate})
    weights = reset_peak_memory(model)
    losses = plain_losses(model, samples, arguments.batch_size, 1e-2, 42)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": sum(losses) / len(losses), "bytes": _memory("VmHWM") - weights}


def prepared(arguments: argparse.Namespace) -> CandidateTrainer:
    """What trains the candidates of the search."""
    model = load_model(arguments.model, device="cpu")
    samples = load_samples(arguments.data_path, model.config.vocab_size, max_samples=arguments.max_samples)
    return CandidateTrainer(model, samples, TrainingOptions(1e-2, arguments.batch_size))


def ours(arguments: argparse.Namespace) -> dict:
    """One candidate of the search; the model is loaded once for all, so its loading does not count."""
    trainer = prepared(arguments)
    batches = trainer.batches.epoch()
    weights = reset_peak_memory(trainer.model)
    start = time.perf_counter()
    losses = ScaleTrainer(trainer.model, 1e-2, [arguments.candidate]).run(batches, "epoch 0")
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "loss": sum(losses) / len(losses),
        "bytes": _memory("VmHWM") - weights,
        "flops": measuring.count_flops(trainer.model, batches, skipped=1),
    }


def race(arguments: argparse.Namespace) -> dict:
    """A whole iteration of the race with the default settings."""
    trainer = prepared(arguments)
    search = Search(trainer, measuring.default_race(trainer.num_batches))
    start = time.perf_counter()
    found = search.next_block([])
    return {
        "seconds": time.perf_counter() - start,
        "block": found.block,
        "loss": found.loss,
        "candidate_epochs": found.candidate_epochs,
        "candidates": len(found.untrained_losses),
    }


def screening(arguments: argparse.Namespace) -> dict:
    """Screening every candidate on two batches, against a training step of one on the same batches."""
    trainer = prepared(arguments)
    model, blocks = trainer.model, trainer.candidates([])
    training = screened = 0.0
    for batch in trainer.batches.epoch()[:2]:
        scales = ScaleTrainer(model, 1e-2, [arguments.candidate])
        training += measuring.seconds(partial(scales.run, [batch] * 3, "epoch 0")) / 3
        screened += measuring.seconds(partial(untrained_losses, model, batch, [], blocks, "batch"))
    return {"cost_of_a_training_step": screened / len(blocks) / training}


def matmul(arguments: argparse.Namespace) -> dict:
    """FLOP/s of the model's own matrix products, forward and input gradient, by dtype."""
    trainer = prepared(arguments)
    model = trainer.model
    rows = sorted(part.num_tokens for batch in trainer.batches.epoch() for part in batch.minibatches)
    rows = rows[len(rows) // 2]
    shapes = [m.weight.shape for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    shapes.append(model.lm_head.weight.shape)
    rates = {
        str(dtype).removeprefix("torch."): measuring.matmul_rate(shapes, rows, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {"rows": rows, "flops_per_second": rates}


def table(figures: list[dict]) -> list[str]:
    """Markdown: what the search takes against the plain way; medians over runs."""
    kinds = ("reference", "ours", "matmul", "screening", "race")
    runs = {kind: [f for f in figures if f["of"]["kind"] == kind] for kind in kinds}
    seconds, size = (
        {kind: median([run[name] for run in runs[kind]]) for kind in ("reference", "ours")}
        for name in ("seconds", "bytes")
    )
    shares = [
        run["flops"] / run["seconds"] / max(product["flops_per_second"].values())
        for run, product in zip(runs["ours"], runs["matmul"], strict=True)
    ]
    apart = abs(runs["ours"][0]["loss"] - runs["reference"][0]["loss"])
    lines = title("a candidate", "the plain way", "ours", "ratio")
    ratio = f"{seconds['reference'] / seconds['ours']:.2f} times as fast"
    lines.append(row("seconds", *(f"{value:.1f}" for value in seconds.values()), ratio))
    ratio = f"{size['ours'] / size['reference']:.0%}"
    lines.append(row("bytes above the weights", *(f"{value:.3g}" for value in size.values()), ratio))
    lines.append(row("share of the matrix product rate", "-", f"{median(shares):.2f}", "-"))
    lines.append(row("loss", "-", "-", f"{apart:.1e} apart"))
    if runs["screening"]:
        cost = median([run["cost_of_a_training_step"] for run in runs["screening"]])
        lines.append(row("screening it on a batch, in training steps", "-", f"{cost:.2f}", "-"))
    for run in runs["race"]:
        plain = seconds["reference"] * run["candidates"]  # a candidate's median times their number
        ratio = f"{plain / run['seconds']:.1f} times as fast"
        lines.append(row("a race's iteration, seconds", f"{plain:.0f}", f"{run['seconds']:.0f}", ratio))
        lines.append(row("its candidate-epochs", run["candidates"], f"{run['candidate_epochs']:.1f}", "-"))
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_ref)
    parser.add_argument("--data_path", type=Path)
    parser.add_argument("--max_samples", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--candidate", type=int, default=5, help="the block whose epoch is timed")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--race", action="store_true", help="also time one whole iteration of a race")
    measuring.add_result_arguments(parser, "search_cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / "search_cpu.json"
    if not arguments.table:
        if not (arguments.model and arguments.data_path):
            parser.error("--model and --data_path are needed to measure")
        names = "model data_path max_samples batch_size candidate"
        results = measuring.Results(path, measuring.settings_of(arguments, names))
        kinds = [reference, ours, matmul, *([screening] if arguments.race else [])]
        runs = [(work, run) for run in range(arguments.runs) for work in kinds]
        for work, run in runs + ([(race, 0)] if arguments.race else []):
            of = {"kind": work.__name__, "run": run}
            results.measure(of, measuring.apart, work, arguments)
    print("\n".join(table(measuring.figures_in(path))))


if __name__ == "__main__":
    main()
