"""The greedy search: one iteration over the candidates, and the journal that makes it resumable."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hopscotch_common import scales
from hopscotch_common.cli import InputError
from hopscotch_common.data import Batch, append_line, read_jsonl, truncate_partial_line
from hopscotch_common.distributed import Processes
from hopscotch_common.progress import Progress
from hopscotch_common.schedules import SCREENING_COST, Candidate, Race, leader
from hopscotch_common.screening import untrained_losses
from hopscotch_common.training import ScaleState, ScaleTrainer


@dataclass
class Iteration:
    """What one iteration of the search found."""

    skipped_before: list[int]
    block: int
    loss: float
    losses: dict[int, float]  # full-epoch means, of the finalists (all candidates of `full`)
    # block -> after how many batches of training, its mean loss and the leader's (before any
    # training: of the untrained_losses)
    dropped: dict[int, dict]
    untrained_losses: dict[int, float]  # means of the screened batches; empty without a screening
    batch_losses: dict[int, list[float]]
    candidate_epochs: float  # training in epochs of one candidate, the screening at SCREENING_COST


class Journal:
    """One JSON line for each batch of a screening and each candidate and look, flushed as it comes.

    The first line holds the settings that results depend on. A journal serves any number of
    iterations: entries are keyed by the blocks skipped before. path None keeps nothing.
    """

    def __init__(self, path: Path | None, settings: dict):
        self.path = path
        self.entries: dict[tuple, dict] = {}
        self.file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if truncate_partial_line(path) > 0:
            self._read(settings)
        self.file = open(path, "a", encoding="utf-8")
        if path.stat().st_size == 0:
            append_line(self.file, {"settings": settings})

    def _read(self, settings: dict) -> None:
        lines = [record for _, record in read_jsonl(self.path)]
        written = lines[0].get("settings")
        if not isinstance(written, dict):
            raise InputError(f"{self.path}: not a search journal; name another --output")
        for name in settings:
            if written.get(name) != settings[name]:
                raise InputError(
                    f"{self.path}: was made with {name} = {written.get(name)}, now it is {settings[name]}; "
                    "repeat that setting, name another --output, or delete the journal"
                )
        for record in lines[1:]:
            self._remember(record)

    def _remember(self, record: dict) -> None:
        kind, number = ("untrained", record["batch"]) if "untrained" in record else ("block", record["block"])
        key = (tuple(sorted(record["skipped"])), kind, number)
        if kind == "untrained":
            self.entries[key] = record
        else:
            self.entries.setdefault(key, {})[len(record["losses"])] = record

    def _add(self, record: dict) -> None:
        self._remember(record)
        if self.file is not None:
            append_line(self.file, record)

    def add(self, skipped: Sequence[int], candidate: Candidate) -> None:
        record = {"skipped": list(skipped), "block": candidate.block, "losses": candidate.losses}
        if candidate.state is not None:
            record["state"] = candidate.state.encode()
        self._add(record)

    def find(self, skipped: Sequence[int], block: int, done: int, look: int) -> Candidate | None:
        """The candidate after `look` batches or, where that is not known, after the most that are.

        None where no training of more than `done` batches is known. A longer training tells the
        losses at a look, too, but not the state then.
        """
        known = self.entries.get((tuple(sorted(skipped)), "block", block), {})
        longer = [count for count in known if count >= look]
        shorter = [count for count in known if done < count < look and "state" in known[count]]
        if not longer and not shorter:
            return None
        record = known[min(longer) if longer else max(shorter)]
        losses = record["losses"][:look]
        has_state = "state" in record and len(losses) == len(record["losses"])
        return Candidate(block, losses, ScaleState.decode(record["state"]) if has_state else None)

    def add_untrained(self, skipped: Sequence[int], batch: int, losses: dict[int, float]) -> None:
        as_json = {str(block): loss for block, loss in losses.items()}
        self._add({"skipped": list(skipped), "batch": batch, "untrained": as_json})

    def find_untrained(self, skipped: Sequence[int], batch: int) -> dict[int, float]:
        """Losses by block on a batch before training, as far as they are known."""
        record = self.entries.get((tuple(sorted(skipped)), "untrained", batch), {"untrained": {}})
        return {int(block): loss for block, loss in record["untrained"].items()}


def run_iteration(
    trainer: ScaleTrainer,
    batches: Sequence[Batch],
    skipped: Sequence[int],
    race: Race,
    journal: Journal,
    known_losses: dict[int, float],
    processes: Processes,
    progress: Progress,
) -> Iteration:
    """Find the next block to skip, given those that are.

    known_losses: full-epoch losses of this iteration that need no training (`--prev`). With
    several processes each trains other candidates over the same batches, and every one returns
    the same result.
    """
    blocks = scales.skippable_blocks(trainer.model, skipped)
    known = [Candidate(block, known_loss=known_losses[block]) for block in blocks if block in known_losses]
    racing = [Candidate(block) for block in blocks if block not in known_losses]
    progress.start_iteration(len(racing), len(blocks), len(batches))
    num_candidates = len(racing)
    screened = race.screened_batches(num_candidates, len(batches))
    untrained: dict[int, float] = {}
    dropped, batch_losses, spent = {}, {}, num_candidates * screened * SCREENING_COST
    if screened:
        compared = [candidate.block for candidate in racing]
        untrained = _screen(trainer, batches[:screened], skipped, compared, journal, processes, progress)
        kept = sorted(compared, key=untrained.get)[: race.most_trained(num_candidates)]
        racing = [candidate for candidate in racing if candidate.block in kept]
        for block in set(compared) - set(kept):
            dropped[block] = _dropped(0, untrained[block], untrained[kept[0]])
    for look in race.looks(len(batches)) if racing else []:
        advanced: list[Candidate] = []
        for start in range(0, len(racing), processes.count):
            group = racing[start : start + processes.count]
            mine = group[processes.rank] if processes.rank < len(group) else None
            result = (
                None if mine is None else _advance(trainer, batches, skipped, mine, look, journal, progress)
            )
            gathered = processes.gather(result)[: len(group)]
            for before, (candidate, is_new) in zip(group, gathered, strict=True):
                if is_new:
                    journal.add(skipped, candidate)
                spent += look - len(before.losses)
                advanced.append(candidate)
            if not batch_losses or len(advanced) == len(racing):  # else only the last look knows a leader
                progress.advanced(len(racing), leader(advanced))
        batch_losses |= {candidate.block: candidate.losses for candidate in advanced}
        racing = race.survivors(advanced, num_candidates) if look < len(batches) else advanced
        going_on = {candidate.block for candidate in racing}
        for candidate in advanced:
            if candidate.block not in going_on:
                dropped[candidate.block] = _dropped(look, candidate.mean_loss, leader(advanced).mean_loss)
    finalists = sorted(racing + known, key=lambda candidate: candidate.block)
    winner = leader(finalists)
    return Iteration(
        skipped_before=list(skipped),
        block=winner.block,
        loss=winner.mean_loss,
        losses={candidate.block: candidate.mean_loss for candidate in finalists},
        dropped=dict(sorted(dropped.items())),
        untrained_losses=untrained,
        batch_losses=batch_losses,
        candidate_epochs=spent / len(batches),
    )


def _dropped(after_batches: int, loss: float, leader_loss: float) -> dict:
    return {"after_batches": after_batches, "mean_loss": loss, "leader_mean_loss": leader_loss}


def _screen(
    trainer: ScaleTrainer,
    batches: Sequence[Batch],
    skipped: Sequence[int],
    blocks: Sequence[int],
    journal: Journal,
    processes: Processes,
    progress: Progress,
) -> dict[int, float]:
    """Mean loss of each candidate block on the batches, before any training."""
    losses: dict[int, list[float]] = {block: [] for block in blocks}
    for index, batch in enumerate(batches):
        found = journal.find_untrained(skipped, index)
        missing = [block for block in blocks if block not in found]
        progress.restored((len(blocks) - len(missing)) * SCREENING_COST / processes.count)
        if missing:
            mine = missing[processes.rank :: processes.count]
            part = {}
            if mine:
                part = untrained_losses(
                    trainer.model, batch, skipped, mine, f"screening, batch {index}", progress.on_screened
                )
            for losses_of_one in processes.gather(part):
                found |= losses_of_one
            journal.add_untrained(skipped, index, found)
        for block in blocks:
            losses[block].append(found[block])
    return {block: statistics.fmean(values) for block, values in losses.items()}


def _advance(
    trainer: ScaleTrainer,
    batches: Sequence[Batch],
    skipped: Sequence[int],
    candidate: Candidate,
    look: int,
    journal: Journal,
    progress: Progress,
) -> tuple[Candidate, bool]:
    """Train a candidate up to `look` batches; (the candidate then, whether the journal lacks it)."""
    done = len(candidate.losses)
    found = journal.find(skipped, candidate.block, done, look)
    if found is not None:
        progress.restored(len(found.losses) - done)
        candidate, done = found, len(found.losses)
        if done == look:
            return candidate, False
    progress.on_candidate(candidate.block)
    trainer.start([*skipped, candidate.block], candidate.state)
    losses = trainer.run(
        batches[done:look],
        f"candidate block {candidate.block}, epoch 0",
        first=done,
        on_batch=progress.on_batch,
    )
    state = trainer.state() if look < len(batches) else None
    return Candidate(candidate.block, candidate.losses + losses, state), True
