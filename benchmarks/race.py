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

from hopscotch_common.search.schedule import FULL, Candidate, Schedule, default_first_look
from hopscotch_common.search.search import Iteration, Search


class Recorded:
    """Stands in for `CandidateTrainer`: gives what a full search recorded, and trains nothing.

    batch_losses: by block, one a batch. untrained: losses before training by block and batch, where
    a screening sees more batches than one; a full search's first loss is that of the first batch
    before training.
    """

    def __init__(self, batch_losses: dict[int, list[float]], untrained: dict[int, list[float]] | None = None):
        self.batch_losses, self.untrained = batch_losses, untrained
        self.num_batches = len(next(iter(batch_losses.values())))

    def candidates(self, skipped) -> list[int]:
        return sorted(self.batch_losses)

    def train(self, skipped, candidate: Candidate, look: int, group, on_batch) -> Candidate:
        return Candidate(candidate.block, self.batch_losses[candidate.block][:look])

    def screen(self, skipped, blocks, batch: int, on_screened) -> dict[int, float]:
        seen = self.batch_losses if batch == 0 else self.untrained
        if seen is None or batch >= len(seen[blocks[0]]):
            raise SystemExit(f"a screening of batch {batch} needs what benchmarks/untrained.py records")
        return {block: seen[block][batch] for block in blocks}


def replay(recorded: Recorded, rule: Schedule) -> Iteration:
    """The search of one block, by the search's own code, over what was recorded."""
    return Search(recorded, rule).next_block([])


def judge(iterations: list[dict], untrained: list[dict] | None, rule_of) -> list[dict]:
    """A race's result in each recorded iteration, beside the full search's."""
    results = []
    for number, iteration in enumerate(iterations):
        losses = {int(block): values for block, values in iteration["batch_losses"].items()}
        before = {int(b): values for b, values in untrained[number].items()} if untrained else None
        recorded = Recorded(losses, before)
        raced, full = replay(recorded, rule_of(recorded.num_batches)), replay(recorded, FULL)
        results.append(
            {
                "picked": raced.block,
                "best": full.block,
                "excess_loss": full.losses[raced.block] / full.loss - 1,
                "candidates": len(losses),
                "candidate_epochs": raced.candidate_epochs,
                "share": raced.candidate_epochs / len(losses),
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

        def rule_of(num_batches: int, settings=(first_look, confidence, screening)) -> Schedule:
            return Schedule(settings[0] or default_first_look(num_batches), *settings[1:])

        by_report = {
            name: judge(report["iterations"], untrained.get(name), rule_of)
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
