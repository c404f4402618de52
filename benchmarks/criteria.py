"""Which blocks? This project's search against random blocks and cheaper criteria, at equal numbers of blocks.

    python benchmarks/criteria.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --selection smollm_block_selection.json
    python benchmarks/criteria.py --model smollm --table

Greedy criteria look at the first --look answers of the data, one-shot ones at the first --calibration: keep
these below --skip, so that they are neither trained on nor held out. Each choice is judged on the last
--held_out answers, without scales and after training them on --answers of those in between.

- search: the picks of a report of block_selection.py.
- swap: those, exchanged one for one as long as that lowers the untrained loss (at most twice around).
- warm: the same race, but each candidate starts from the scales that the last pick was left with.
- random-0 … random-4: drawn from all blocks that can be skipped.
- cosine: one shot, by the similarity of the residual stream before and after a block (LLM-Drop).
- untrained: greedy, the block without which the loss at scales of 1 is lowest (SLEB's criterion).
- output: greedy, the block without which the final distribution changes least, as KL (FinerCut's kind).
- weights: one shot, no data: least query-key coupling of the weights, after the idea of Gate-Norm
  (arXiv 2512.20636). Its exact definition was not at hand; see `query_key_coupling` for what is computed.

Costs are in candidate-epochs: training steps of one candidate over the answers that the search saw. Results
go to benchmarks/results/criteria_{model}.json after each figure.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import measuring
import torch
from growing import GrowingResults

from hopscotch_common import cli, scales
from hopscotch_common.loading import load_model
from hopscotch_common.search.candidates import CandidateTrainer
from hopscotch_common.search.distances import stream_distances
from hopscotch_common.search.schedule import SCREENING_COST
from hopscotch_common.search.screening import untrained_losses
from hopscotch_common.search.search import Search
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Batch, Sample, load_samples
from hopscotch_common.training.loss import summed_loss
from hopscotch_common.training.memory import MinibatchRunner
from hopscotch_common.training.originals import Originals
from hopscotch_common.training.trainer import EpochBatches, ScaleState, ScaleTrainer, evaluate

RANDOM_SEEDS = range(5)
ONE_SHOT, GREEDY = ("cosine", "weights"), ("untrained", "output")
CHOICES = ("search", "swap", "warm", *ONE_SHOT, *GREEDY, "random")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=cli.model, required=True)
    parser.add_argument("--data_path", type=Path, help="processed data of step 2")
    parser.add_argument("--selection", type=Path, help="report of block_selection.py, on the same answers")
    parser.add_argument("--criteria", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8], help="blocks to skip")
    parser.add_argument("--calibration", type=int, default=32, help="answers that one-shot criteria see")
    parser.add_argument("--look", type=int, default=8, help="answers that greedy criteria see")
    parser.add_argument("--skip", type=int, default=64, help="answers before those to train on")
    parser.add_argument("--answers", type=int, default=64, help="answers to train the scales on")
    parser.add_argument("--held_out", type=int, default=24, help="answers to judge by")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--granularity", choices=["layer", "channel"], default="layer")
    parser.add_argument("--loss", choices=["ce", "kl"], default="ce")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/criteria_{model}.json")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, measure nothing")
    return parser


@torch.no_grad()
def query_key_coupling(model) -> list[float]:
    """Of each layer, the root of the sum over heads of |W_q^T W_k|², Frobenius norms, float32.

    A head's queries and keys are W_q x and W_k x, so x'^T W_q^T W_k x is its attention score but for rotary
    positions, biases and the norm's weight. Each key head counts with every query head that it serves.
    """
    heads = model.config.num_attention_heads
    coupling = []
    for layer in model.model.layers:
        queries = layer.self_attn.q_proj.weight.float().unflatten(0, (heads, -1))
        keys = layer.self_attn.k_proj.weight.float().unflatten(0, (model.config.num_key_value_heads, -1))
        keys = keys.repeat_interleave(heads // len(keys), dim=0)
        # |W_q^T W_k|² = trace((W_q W_q^T)(W_k W_k^T)), products of the heads' width only
        squares = (queries @ queries.mT) * (keys @ keys.mT)
        coupling.append(squares.sum().sqrt().item())
    return coupling


@torch.no_grad()
def output_changes(
    model, batches: Sequence[Batch], skipped: Sequence[int], blocks: Sequence[int]
) -> dict[int, float]:
    """KL(original || model) at loss-counted tokens with each block skipped besides `skipped`, scales 1."""
    changes = dict.fromkeys(blocks, 0.0)
    for batch in batches:
        for minibatch in (part.whole() for part in batch.minibatches):
            original = Originals(model)(minibatch)
            for block in blocks:
                scales.reset(model, [*skipped, block])
                changes[block] += summed_loss(model, minibatch.to(model.device), original=original).item()
    tokens = sum(batch.num_loss_counted_tokens for batch in batches)
    return {block: change / tokens for block, change in changes.items()}


def mean_untrained_losses(
    model, batches: Sequence[Batch], skipped: Sequence[int], blocks: Sequence[int]
) -> dict[int, float]:
    """The mean over batches of the loss with each block skipped besides `skipped`, scales 1."""
    found = [untrained_losses(model, batch, skipped, blocks, "untrained") for batch in batches]
    return {block: statistics.fmean(losses[block] for losses in found) for block in blocks}


def greedily(model, count: int, score: Callable[[list[int], list[int]], dict[int, float]]) -> dict:
    """Pick `count` blocks, each time the one with the lowest score, and count the candidates.

    score: of (skipped, candidates).
    """
    blocks, candidates = [], 0
    for _ in range(count):
        possible = scales.skippable_blocks(model, blocks)
        found = score(blocks, possible)
        blocks.append(min(found, key=found.get))
        candidates += len(possible)
    return {"blocks": blocks, "candidates": candidates}


def swapped(blocks: Sequence[int], score: Callable[[list[int], list[int]], dict[int, float]], model) -> dict:
    """`blocks`, each exchanged for the block with the lowest score beside the others, twice around at most.

    score: of (skipped, candidates).
    """
    blocks, candidates = list(blocks), 0
    for _ in range(2):
        before = list(blocks)
        for place in range(len(blocks)):
            others = blocks[:place] + blocks[place + 1 :]
            found = score(others, scales.skippable_blocks(model, others))
            candidates += len(found)
            blocks[place] = min(found, key=lambda block: (found[block], block != before[place]))
        if blocks == before:
            break
    return {"blocks": blocks, "candidates": candidates}


class WarmTrainer(CandidateTrainer):
    """A `CandidateTrainer` whose candidates start from some scales, with Adam's moments at 0."""

    warm: ScaleState | None = None

    def train(self, skipped, candidate, *arguments):
        if candidate.state is None and self.warm is not None:
            candidate = dataclasses.replace(candidate, state=self.warm)
        return super().train(skipped, candidate, *arguments)


def warm_search(model, samples: Sequence[Sample], options: TrainingOptions, most: int) -> dict:
    """The picks of a race in which each iteration's candidates start from the last pick's scales."""
    trainer = WarmTrainer(model, samples, options)
    search = Search(trainer, measuring.default_race(trainer.num_batches))
    blocks, losses, cost = [], [], 0.0
    for _ in range(most):
        found = search.next_block(blocks)
        trainer.warm = ScaleState(
            torch.cat([found.state.tensors[:1], torch.zeros_like(found.state.tensors[1:])])
        )
        blocks.append(found.block)
        losses.append(found.loss)
        cost += found.candidate_epochs
    return {"blocks": blocks, "losses": losses, "candidate_epochs": cost}


def choose(arguments: argparse.Namespace, model, samples: Sequence[Sample], criterion: str) -> dict:
    """What a criterion picks, as many blocks as are judged, and what it cost."""
    start, most = time.perf_counter(), max(arguments.counts)
    possible = scales.skippable_blocks(model, [])
    options = TrainingOptions(arguments.learning_rate, arguments.batch_size)
    calibration, look = samples[: arguments.calibration], samples[: arguments.look]
    report = json.loads(arguments.selection.read_text())
    seen = report["data"]["samples"]  # by the search: what an epoch of a candidate is
    cost = {"candidate_epochs": 0.0}
    if criterion == "search":
        cost["candidate_epochs"] = sum(i["candidate_epochs"] for i in report["iterations"][:most])
        return {"blocks": report["skipped_blocks"][:most]} | cost
    if criterion == "warm":
        as_searched = TrainingOptions(report["arguments"]["learning_rate"], report["arguments"]["batch_size"])
        found = warm_search(model, samples[:seen], as_searched, most)
        return found | {"seconds": time.perf_counter() - start}
    if criterion.startswith("random"):
        draw = random.Random(int(criterion.removeprefix("random-")))
        return {"blocks": draw.sample(possible, most)} | cost
    if criterion in ONE_SHOT:
        if criterion == "cosine":
            batches = EpochBatches(model, calibration, options).in_order()
            scores = stream_distances(model, batches, [], possible, MinibatchRunner())
        else:
            scores = dict(enumerate(query_key_coupling(model)))
        chosen = {"blocks": sorted(possible, key=scores.get)[:most], "scores": scores}
        if criterion == "cosine":
            cost["candidate_epochs"] = 2 * SCREENING_COST * len(calibration) / seen  # one forward pass
    else:
        batches = EpochBatches(model, look, options).in_order()
        rule = output_changes if criterion == "output" else mean_untrained_losses

        def score(skipped: list[int], blocks: list[int]) -> dict[int, float]:
            return rule(model, batches, skipped, blocks)

        if criterion == "swap":
            found = [swapped(report["skipped_blocks"][:count], score, model) for count in arguments.counts]
            chosen = {
                "by_count": {str(len(each["blocks"])): each["blocks"] for each in found},
                "candidates": sum(each["candidates"] for each in found),
            }
        else:
            chosen = greedily(model, most, score)
        # untrained shares the layers below a candidate's, half of a pass; output takes whole passes
        passes = chosen["candidates"] * (2 if criterion == "output" else 1) * SCREENING_COST
        cost["candidate_epochs"] = passes * len(look) / seen
    return chosen | cost | {"seconds": time.perf_counter() - start}


def picked(chosen: dict, count: int) -> list[int]:
    """So many blocks of a criterion's choice."""
    return chosen["by_count"][str(count)] if "by_count" in chosen else chosen["blocks"][:count]


def judge(arguments: argparse.Namespace, model, samples: Sequence[Sample], blocks: Sequence[int]) -> dict:
    """Held-out figures with some blocks skipped, without scales and with trained ones."""
    options = TrainingOptions(arguments.learning_rate, arguments.batch_size, loss=arguments.loss)
    held_out = EpochBatches(model, samples[len(samples) - arguments.held_out :], options).in_order()
    scales.reset(model, blocks)
    figures = {"unscaled": dataclasses.asdict(evaluate(model, held_out, "unscaled"))}
    if not blocks:
        return figures
    start = time.perf_counter()
    training = EpochBatches(model, samples[arguments.skip :][: arguments.answers], options)
    originals = Originals(model) if options.loss == "kl" else None
    trainer = ScaleTrainer(model, options.learning_rate, blocks, originals=originals)
    for epoch in range(arguments.epochs):
        trainer.run(training.epoch(epoch), f"epoch {epoch}")
    seconds = time.perf_counter() - start
    return figures | {
        "scaled": dataclasses.asdict(evaluate(model, held_out, "scaled")),
        "training_seconds": seconds,
    }


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each criterion and number of blocks; the random ones as mean and range."""

    def row(*cells: object) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    chosen = {f["of"]["choose"]: f for f in figures if "choose" in f["of"]}
    judged = {(f["of"]["judge"], f["of"]["count"]): f for f in figures if "judge" in f["of"]}
    title = ["blocks", "criterion", "picks", "cost", "KL", "agreement", "KL, scaled", "agreement, scaled"]
    lines = [row(*title), "|---" * len(title) + "|"]

    def cells(parts: Sequence[dict]) -> list[str]:
        found = []
        for state in ("unscaled", "scaled"):
            for measure, form in (("kl", "{:.3f}"), ("agreement", "{:.1%}")):
                values = [part[state][measure] for part in parts]
                text = form.format(statistics.fmean(values))
                if len(values) > 1:
                    text += f" ({form.format(min(values))} to {form.format(max(values))})"
                found.append(text)
        return found

    for count in sorted({count for _, count in judged if count}):
        for criterion in CHOICES:
            names = [name for name in chosen if name.split("-")[0] == criterion and (name, count) in judged]
            if not names:
                continue
            picks = " ".join(map(str, picked(chosen[names[0]], count))) if len(names) == 1 else "-"
            cost = f"{chosen[names[0]]['candidate_epochs']:.1f}"
            if "seconds" in chosen[names[0]]:
                cost += f" ({chosen[names[0]]['seconds']:.1f} s)"
            name = criterion if len(names) == 1 else f"{criterion}, {len(names)} seeds"
            lines.append(row(count, name, picks, cost, *cells([judged[n, count] for n in names])))
    return lines


def settings_of(arguments: argparse.Namespace) -> dict:
    """What all figures of a result file depend on."""
    names = ("calibration", "look", "skip", "answers", "held_out", "epochs", "learning_rate", "batch_size")
    names += ("granularity", "loss", "dtype")
    files = {"data": arguments.data_path, "selection": arguments.selection}
    return {
        "model": arguments.model.source,
        **{name: getattr(arguments, name) for name in names},
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
    }


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    result = arguments.result or measuring.RESULTS / f"criteria_{arguments.model.name}.json"
    if arguments.table:
        print("\n".join(table(json.loads(result.read_text())["figures"])))
        return
    if not (arguments.data_path and arguments.selection):
        parser.error("--data_path and --selection are needed to measure")
    results = GrowingResults(result, settings_of(arguments))
    model = load_model(arguments.model, arguments.dtype, "cpu", scale_granularity=arguments.granularity)
    samples = load_samples(arguments.data_path, model.config.vocab_size)
    if arguments.skip + arguments.answers + arguments.held_out > len(samples):
        raise SystemExit(f"{arguments.data_path}: {len(samples)} answers are too few")
    names = []
    for criterion in arguments.criteria:
        names += [f"random-{seed}" for seed in RANDOM_SEEDS] if criterion == "random" else [criterion]
    results.measure(lambda: judge(arguments, model, samples, []), judge="original", count=0)
    for name in names:
        chosen = results.measure(lambda name=name: choose(arguments, model, samples, name), choose=name)
        for count in arguments.counts:
            blocks = picked(chosen, count)
            figure = results.measure(
                lambda blocks=blocks: judge(arguments, model, samples, blocks), judge=name, count=count
            )
            print(name, blocks, figure, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
