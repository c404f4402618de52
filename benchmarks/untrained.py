"""What a race's screening sees: the losses before training of every candidate of a full search.

    python benchmarks/untrained.py --model smollm --data_path data.jsonl full.json [more.json …]

Writes full.untrained.json beside each report, for `race.py` to replay screenings of more than one
batch: for each iteration, each candidate's loss on each of the first `--batches` batches.
"""

import argparse
import json
from pathlib import Path

import measuring  # noqa: F401 (puts the project on the path)
from tqdm import tqdm

from hopscotch_common.loading import load_model
from hopscotch_common.models import model_ref
from hopscotch_common.search.screening import untrained_losses
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import fingerprint, load_samples
from hopscotch_common.training.trainer import EpochBatches
from hopscotch_common.writing import write_atomic


def record(
    report: dict, model_name, data_path: Path, num_batches: int | None
) -> list[dict[int, list[float]]]:
    """For each iteration of a report, {block: a loss a batch}."""
    settings = report["arguments"]
    model = load_model(model_name, settings["dtype"], "cpu")
    samples = load_samples(data_path, model.config.vocab_size, max_samples=settings["max_samples"])
    if fingerprint(samples) != report["data"]["sha256"]:
        raise SystemExit(f"{data_path}: not the data of the report ({report['data']['path']})")
    options = TrainingOptions(
        settings["learning_rate"],
        settings["batch_size"],
        settings["max_tokens_per_batch"],
        seed=settings["seed"],
    )
    batches = EpochBatches(model, samples, options).epoch()[:num_batches]
    results = []
    for iteration in report["iterations"]:
        blocks = [int(block) for block in iteration["batch_losses"]]
        losses: dict[int, list[float]] = {block: [] for block in blocks}
        for batch in tqdm(batches, desc=f"without {iteration['skipped_before']}"):
            found = untrained_losses(model, batch, iteration["skipped_before"], blocks, "batch")
            for block, loss in found.items():
                losses[block].append(loss)
        results.append(losses)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="+", type=Path, help="reports of --search full")
    parser.add_argument("--model", type=model_ref, required=True)
    parser.add_argument("--data_path", type=Path, required=True, help="the data that they searched on")
    parser.add_argument("--batches", type=int, help="default: all")
    arguments = parser.parse_args()
    for path in arguments.reports:
        report = json.loads(path.read_text())
        losses = record(report, arguments.model, arguments.data_path, arguments.batches)
        write_atomic(path.with_suffix(".untrained.json"), json.dumps(losses))


if __name__ == "__main__":
    main()
