"""Which blocks? This project's search against random blocks and cheaper criteria, at equal numbers of blocks.

    python benchmarks/criteria.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --selection smollm_block_selection.json cosine.json untrained.json
    python benchmarks/criteria.py --model smollm --table

--selection names reports of block_selection.py over the first answers of the data. The answers that they and
--look see should be among the first --skip, which are neither trained on nor held out. Each choice is judged
on the last --held_out answers, without scales and after training scales on --answers of those in between, as
--setting says (see `training.py`).

- search: the picks of a report of --search full or race.
- cosine: those of --search cosine, by similarity of the residual stream before and after a block (LLM-Drop).
- untrained: those of --search untrained, greedy by the loss at scales of 1 (SLEB's criterion).
- random-0 … random-4: drawn from all blocks that can be skipped.
- output: greedy, the block whose skip changes the final distribution of --look answers least, as KL
  (FinerCut's kind).
- weights: one shot, without data, by the least query-key coupling of the weights, after the idea of Gate-Norm
  (arXiv 2512.20636). Its exact definition was not at hand; see `query_key_coupling` for what is computed.

Costs are in candidate-epochs: one is the training steps of one candidate over the answers that the search
saw. Results go to benchmarks/results/criteria_{model}.json after each figure.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import measuring
import torch
from measuring import row, title
from training import Setting, add_study_arguments, setting_name, study

from hopscotch_common import scales
from hopscotch_common.files import read_json
from hopscotch_common.search.schedule import SCREENING_COST
from hopscotch_common.training.batches import Batch, Sample
from hopscotch_common.training.loss import Originals, summed_loss
from hopscotch_common.training.trainer import EpochBatches

RANDOM = [f"random-{seed}" for seed in range(5)]
REPORTED = {"full": "search", "race": "search", "cosine": "cosine", "untrained": "untrained"}  # by --search
CRITERIA = ("search", "cosine", "weights", "untrained", "output", "random")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_study_arguments(parser, held_out=24, epochs=1)
    parser.add_argument("--selection", type=Path, nargs="+", help="reports of block_selection.py")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8], help="blocks to skip")
    parser.add_argument("--look", type=int, default=8, help="answers that the criterion output sees")
    parser.add_argument("--skip", type=int, default=64, help="answers before those to train on")
    parser.add_argument("--answers", type=int, default=64, help="answers to train the scales on")
    parser.add_argument("--setting", type=setting_name, default="layer-ce", help="how to train them")
    measuring.add_result_arguments(parser, "criteria_{model}")
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


def choose(
    arguments: argparse.Namespace,
    model,
    samples: Sequence[Sample],
    reports: dict[str, dict],
    criterion: str,
) -> dict:
    """What a criterion picks, as many blocks as are judged, and what it cost."""
    start, most = time.perf_counter(), max(arguments.counts)
    answers = reports["search"]["data"]["samples"]  # an epoch of a candidate is over these
    if criterion in reports:
        report = reports[criterion]
        cost = sum(iteration["candidate_epochs"] for iteration in report["iterations"][:most])
        cost *= report["data"]["samples"] / answers
        return {"blocks": report["skipped_blocks"][:most], "candidate_epochs": cost}
    possible = scales.skippable_blocks(model, [])
    if criterion in RANDOM:
        draw = random.Random(RANDOM.index(criterion))
        return {"blocks": draw.sample(possible, most), "candidate_epochs": 0.0}
    if criterion == "weights":
        scores = dict(enumerate(query_key_coupling(model)))
        chosen, cost = {"blocks": sorted(possible, key=scores.get)[:most], "scores": scores}, 0.0
    else:
        options = Setting.named(arguments.setting).options(arguments.batch_size)
        batches = EpochBatches(model, samples[: arguments.look], options).in_order()
        chosen = greedily(model, most, lambda *blocks: output_changes(model, batches, *blocks))
        # whole passes; a screening shares the layers below a candidate's, half of a pass
        cost = chosen["candidates"] * 2 * SCREENING_COST * arguments.look / answers
    return chosen | {"candidate_epochs": cost, "seconds": time.perf_counter() - start}


def judge(arguments: argparse.Namespace, model, samples: Sequence[Sample], blocks: Sequence[int]) -> dict:
    """Held-out figures with some blocks skipped, without scales and with trained ones."""
    training = samples[arguments.skip :][: arguments.answers]
    held_out = samples[len(samples) - arguments.held_out :]
    how = (Setting.named(arguments.setting), arguments.batch_size, arguments.epochs)
    return study(model, blocks, training, held_out, *how)


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each criterion and number of blocks; the random ones as mean and range."""
    chosen = {f["of"]["choose"]: f for f in figures if "choose" in f["of"]}
    judged = {(f["of"]["judge"], f["of"]["count"]): f for f in figures if "judge" in f["of"]}
    lines = title(*"blocks,criterion,picks,cost,KL,agreement,KL trained,agreement trained".split(","))

    def cells(parts: Sequence[dict]) -> list[str]:
        """KL and agreement of held-out figures, as mean and range."""
        found = []
        for measure, form in (("kl", "{:.3f}"), ("agreement", "{:.1%}")):
            values = [part[measure] for part in parts]
            text = form.format(statistics.fmean(values))
            if len(values) > 1:
                text += f" ({form.format(min(values))} to {form.format(max(values))})"
            found.append(text)
        return found

    original = [figure["original"] for figure in judged.values()][:1]
    lines.append(row(0, "original", "-", "-", *cells(original), "-", "-"))
    for count in sorted({count for _, count in judged}):
        for criterion in CRITERIA:
            names = RANDOM if criterion == "random" else [criterion]
            names = [name for name in names if (name, count) in judged]
            if not names:
                continue
            picked = chosen[names[0]]
            picks = " ".join(map(str, picked["blocks"][:count])) if len(names) == 1 else "-"
            cost = f"{picked['candidate_epochs']:.1f}"
            if "seconds" in picked:
                cost += f" ({picked['seconds']:.1f} s)"
            found = [judged[name, count] for name in names]
            before = cells([figure["unscaled"] for figure in found])
            after = cells([figure["epochs"][-1]["held_out"] for figure in found])
            lines.append(row(count, criterion, picks, cost, *before, *after))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / f"criteria_{arguments.model.name}.json"
    if not arguments.table:
        if not (arguments.data_path and arguments.selection):
            parser.error("--data_path and --selection are needed to measure")
        if Setting.named(arguments.setting).rank:
            parser.error("--setting: blocks are chosen without maps in their place")
        reports = {}
        for report in map(read_json, arguments.selection):
            reports[REPORTED[report["arguments"]["search"]]] = report
        for name in {"search", *arguments.criteria} & {*REPORTED.values()} - reports.keys():
            parser.error(f"--selection: no report of the criterion {name}; give one")
        names = "model data_path selection look skip answers held_out setting epochs batch_size"
        results = measuring.Results(path, measuring.settings_of(arguments, f"{names} dtype"))
        model, samples = Setting.named(arguments.setting).load(arguments)
        if arguments.skip + arguments.answers + arguments.held_out > len(samples):
            raise SystemExit(f"{arguments.data_path}: {len(samples)} answers are too few")
        for criterion in arguments.criteria:
            for name in RANDOM if criterion == "random" else [criterion]:
                chosen = results.measure({"choose": name}, choose, arguments, model, samples, reports, name)
                if (found := len(chosen["blocks"])) < max(arguments.counts):
                    raise SystemExit(f"{path}: {name} chose {found} blocks; lower --counts, or move it away")
                for count in arguments.counts:
                    blocks = chosen["blocks"][:count]
                    of = {"judge": name, "count": count}
                    results.measure(of, judge, arguments, model, samples, blocks)
    print("\n".join(table(measuring.figures_in(path))))


if __name__ == "__main__":
    main()
