"""What races with other settings would have cost and picked, replayed from full searches.

    python block_selection.py --model smollm --data_path data.jsonl --num_blocks 4 --output full.json
    python benchmarks/race.py full.json [more.json …] --screening 1 .33 .25
    python benchmarks/race.py full.json --first_look 2 --model smollm --data_path data.jsonl
    python benchmarks/race.py --table

A report of `--search full` (by `--loss ce`, without maps) holds every candidate's loss on every batch, so any
schedule can be replayed without training. A screening of several batches also needs losses before training.
With --model and --data_path (the data of the search), these are computed first, and kept beside the report as
full.untrained.json.
Results go to benchmarks/results/race.json.
"""

import argparse
import itertools
import json
from pathlib import Path

import measuring
from measuring import row, title

from hopscotch_common.files import write_json
from hopscotch_common.loading.loader import load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.search.candidates import untrained_losses
from hopscotch_common.search.schedule import FULL, Candidate, Schedule
from hopscotch_common.search.search import Iteration, Search
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import fingerprint, load_samples
from hopscotch_common.training.trainer import EpochBatches


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
            raise SystemExit(f"a screening of batch {batch} needs --model and --data_path")
        return {block: seen[block][batch] for block in blocks}


def replay(recorded: Recorded, rule: Schedule) -> Iteration:
    """The search of one block, by the search's own code, over what was recorded."""
    return Search(recorded, rule).next_block([])


def read_search(path: Path) -> dict:
    """A report that can be replayed; SystemExit for one of another search, loss or with maps."""
    report = json.loads(path.read_text())
    settings = report["arguments"]
    how = (settings.get("search"), settings.get("loss", "ce"), settings.get("replacement_rank") or 0)
    if how != ("full", "ce", 0):
        raise SystemExit(f"{path}: not of --search full and --loss ce without maps; give such a report")
    return report


def untrained_of(path: Path, report: dict, arguments: argparse.Namespace) -> list[dict] | None:
    """What `record_untrained` finds for the report at `path`, kept beside it; None where nothing is there.

    What was kept of another search is computed anew, or refused without --model and --data_path.
    """
    beside = path.with_suffix(".untrained.json")
    skipped = [iteration["skipped_before"] for iteration in report["iterations"]]
    of = {name: report["arguments"][name] for name in ("seed", "batch_size", "dtype")}
    of |= {"data": report["data"]["sha256"], "skipped_before": skipped}
    kept = json.loads(beside.read_text()) if beside.exists() else None
    if (kept is None or kept.get("of") != of) and arguments.model and arguments.data_path:
        kept = {"of": of, "iterations": record_untrained(report, arguments)}
        write_json(beside, kept)
    if kept is not None and kept.get("of") != of:
        raise SystemExit(f"{beside}: of another search; give --model and --data_path, or move it away")
    return kept and kept["iterations"]


def record_untrained(report: dict, arguments: argparse.Namespace) -> list[dict[int, list[float]]]:
    """For each iteration of a report, {block: its loss before training on each of the first batches}."""
    settings = report["arguments"]
    model = load_model(arguments.model, settings["dtype"], "cpu")
    samples = load_samples(arguments.data_path, model.config.vocab_size, max_samples=settings["max_samples"])
    if fingerprint(samples) != report["data"]["sha256"]:
        raise SystemExit(f"{arguments.data_path}: not the data of the report ({report['data']['path']})")
    names = ("learning_rate", "batch_size", "max_tokens_per_batch", "seed")
    options = TrainingOptions(**{name: settings[name] for name in names})
    batches = EpochBatches(model, samples, options).epoch()
    batches = batches[: max(*arguments.first_look, measuring.default_race(len(batches)).first_look)]
    recorded = []
    for iteration in report["iterations"]:
        skipped, blocks = iteration["skipped_before"], [int(block) for block in iteration["batch_losses"]]
        found = [untrained_losses(model, batch, skipped, blocks, "batch") for batch in batches]
        recorded.append({block: [losses[block] for losses in found] for block in blocks})
    return recorded


def judge(report: dict, untrained: list[dict] | None, rule_of) -> list[dict]:
    """A race's result in each recorded iteration, beside the full search's. rule_of: a number of batches."""
    results = []
    for number, iteration in enumerate(report["iterations"]):
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


def replay_all(reports: dict[str, dict], untrained: dict[str, list | None], look, screening) -> dict:
    """`judge` of every report, by name."""

    def rule_of(num_batches: int) -> Schedule:
        return Schedule(look or measuring.default_race(num_batches).first_look, screening)

    found = {name: judge(report, untrained[name], rule_of) for name, report in reports.items()}
    return {"by_report": found}


def table(figures: list[dict]) -> list[str]:
    """Markdown: a row for each schedule, over all iterations; and one for each report of the default's."""

    def cells(every: list[dict]) -> list:
        same = sum(result["picked"] == result["best"] for result in every)
        worst = max(result["excess_loss"] for result in every)
        shares = [result["share"] for result in every]
        return [len(every), same, f"{worst:.1%}", f"{measuring.median(shares):.2f}", f"{max(shares):.2f}"]

    names = ("iterations", "same pick", "worst excess loss", "median share of full's work", "worst")
    lines = title("first look", "screening", *names)
    for figure in figures:
        every = [result for results in figure["by_report"].values() for result in results]
        lines.append(row(*figure["of"].values(), *cells(every)))
    lines += ["", *title("search", *names)]
    default = measuring.default_race(1)
    for figure in figures:
        if list(figure["of"].values()) == [0, default.screening]:
            lines += [row(name, *cells(results)) for name, results in figure["by_report"].items()]
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="*", type=Path, help="reports of --search full")
    parser.add_argument("--model", type=model_ref)
    parser.add_argument("--data_path", type=Path, help="the data that they searched on")
    parser.add_argument("--first_look", type=int, nargs="+", default=[0], help="0: the default of a race")
    parser.add_argument("--screening", type=float, nargs="+", default=[1.0, 0.5, 0.33, 0.25])
    measuring.add_result_arguments(parser, "race")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / "race.json"
    if not arguments.table:
        if not arguments.reports:
            parser.error("reports are needed to replay them")
        reports = {report.stem: read_search(report) for report in arguments.reports}
        untrained = {p.stem: untrained_of(p, reports[p.stem], arguments) for p in arguments.reports}
        recorded = {
            name: {key: report["data"][key] for key in ("samples", "tokens")}
            | {
                "model": report["model"],
                "batches": len(next(iter(report["iterations"][0]["batch_losses"].values()))),
                "seed": report["arguments"]["seed"],
            }
            for name, report in reports.items()
        }
        results = measuring.Results(path, recorded)
        for schedule in itertools.product(arguments.first_look, arguments.screening):
            of = dict(zip(("first_look", "screening"), schedule, strict=True))
            results.measure(of, replay_all, reports, untrained, *schedule)
    print("\n".join(table(measuring.figures_in(path))))


if __name__ == "__main__":
    main()
