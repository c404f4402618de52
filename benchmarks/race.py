"""What races with other settings would have cost and picked, replayed from full searches.

    python block_selection.py --model smollm --data_path data.jsonl --num_blocks 4 --output full.json
    python benchmarks/race.py full.json [more.json …]

A report of `--search full` holds every candidate's loss on every batch, so any schedule can be
replayed without training; a screening of several batches needs what `untrained.py` records
besides. Writes benchmarks/results/race.json.
"""

import argparse
import itertools
import json
from pathlib import Path

import measuring

from hopscotch_common.schedules import (
    SCREENING_COST,
    Candidate,
    Race,
    default_first_look,
    leader,
)


def replay(
    batch_losses: dict[int, list[float]], race: Race, untrained: dict[int, list[float]] | None = None
) -> tuple[int, float]:
    """(the block a race picks, what it spends in candidate-epochs).

    untrained: losses before training by block and batch, where the screening sees more batches
    than one; a full search's first loss is that of the first batch before training.
    """
    num_batches = len(next(iter(batch_losses.values())))
    blocks = list(batch_losses)
    screened = race.screened_batches(len(blocks), num_batches)
    spent = len(blocks) * screened * SCREENING_COST
    if screened:
        seen = batch_losses if screened == 1 else untrained
        if seen is None or len(seen[blocks[0]]) < screened:
            raise SystemExit(f"a screening of {screened} batches needs what benchmarks/untrained.py records")
        blocks.sort(key=lambda block: sum(seen[block][:screened]))
        blocks = sorted(blocks[: race.most_trained(len(blocks))])
    racing = [Candidate(block) for block in blocks]
    done = 0
    for look in race.looks(num_batches):
        spent += len(racing) * (look - done)
        racing = [Candidate(c.block, batch_losses[c.block][:look]) for c in racing]
        if look < num_batches:
            racing = race.survivors(racing, len(batch_losses))
        done = look
    return leader(racing).block, spent / num_batches


def judge(iterations: list[dict], untrained: list[dict] | None, race_of) -> list[dict]:
    """A race's result in each recorded iteration, beside the full search's."""
    results = []
    for number, iteration in enumerate(iterations):
        losses = {int(block): values for block, values in iteration["batch_losses"].items()}
        means = {block: sum(values) / len(values) for block, values in losses.items()}
        before = {int(b): values for b, values in untrained[number].items()} if untrained else None
        block, spent = replay(losses, race_of(len(next(iter(losses.values())))), before)
        best = min(means, key=means.get)
        results.append(
            {
                "picked": block,
                "best": best,
                "excess_loss": means[block] / means[best] - 1,
                "candidates": len(losses),
                "candidate_epochs": spent,
                "share": spent / len(losses),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="+", type=Path, help="reports of --search full")
    parser.add_argument(
        "--first_look", nargs="+", type=int, default=[0], help="0: the default, by the number of batches"
    )
    parser.add_argument("--screening", nargs="+", type=float, default=[1.0, 0.5, 0.33, 0.25])
    parser.add_argument("--confidence", nargs="+", type=float, default=[1.0, 1.5, 2.0, 3.0, 4.0, 99.0])
    arguments = parser.parse_args()
    reports = {path.stem: json.loads(path.read_text()) for path in arguments.reports}
    untrained = {
        path.stem: json.loads(path.with_suffix(".untrained.json").read_text())
        for path in arguments.reports
        if path.with_suffix(".untrained.json").exists()
    }
    schedules = []
    for first_look, screening, confidence in itertools.product(
        arguments.first_look, arguments.screening, arguments.confidence
    ):

        def race_of(num_batches: int, settings=(first_look, confidence, screening)) -> Race:
            return Race(settings[0] or default_first_look(num_batches), *settings[1:])

        by_report = {
            name: judge(report["iterations"], untrained.get(name), race_of)
            for name, report in reports.items()
        }
        every = [result for results in by_report.values() for result in results]
        row = {
            "first_look": first_look,
            "screening": screening,
            "confidence": confidence,
            "same_picks": sum(r["picked"] == r["best"] for r in every),
            "iterations": len(every),
            "worst_excess_loss": max(r["excess_loss"] for r in every),
            "median_share": measuring.median([r["share"] for r in every]),
            "worst_share": max(r["share"] for r in every),
        }
        schedules.append(row | {"by_report": by_report})
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    data = {
        name: {key: report["data"][key] for key in ("samples", "tokens")}
        | {
            "model": report["model"],
            "batches": len(next(iter(report["iterations"][0]["batch_losses"].values()))),
            "seed": report["arguments"]["seed"],
        }
        for name, report in reports.items()
    }
    measuring.save("race", {"recorded": data, "schedules": schedules})


if __name__ == "__main__":
    main()
