"""The greedy search: candidates, the two schedules, and the journal that makes it resumable.

`full` gives every candidate a whole epoch (the paper's search). `race` lets all candidates advance
together over the same batches and looks at them again and again. At most a share goes on that falls
as the batches add up (in the spirit of successive halving, arXiv 1502.07943), which bounds the cost
whatever the data, and those whose loss is worse than the leader's beyond doubt drop out sooner.
Finalists run the whole epoch, so the winner's loss is the number that `full` gives. Both are one
loop: `full` is a race with a single look, after the last batch.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hopscotch_common.cli import InputError
from hopscotch_common.data import Batch, append_line, read_jsonl, truncate_partial_line
from hopscotch_common.training import ScaleState, ScaleTrainer

MIN_BATCHES = 4  # a standard deviation of fewer losses says little


@dataclass
class Candidate:
    """A block that might be skipped next, and how far its training has come."""

    block: int
    losses: list[float] = field(default_factory=list)  # one a batch
    state: ScaleState | None = None
    known_loss: float | None = None  # given by --prev: nothing to train

    @property
    def mean_loss(self) -> float:
        """Mean loss of the batches so far, which after an epoch is the search's criterion."""
        return self.known_loss if self.known_loss is not None else statistics.fmean(self.losses)


@dataclass(frozen=True)
class Race:
    """When candidates are compared, and which of them go on.

    first_look: batches before the first comparison, after which at most half go on, and at most
    1 / (1 + n) after n times as many. confidence: standard errors of the paired difference to the
    leader that count as beyond doubt; math.inf drops nobody sooner.
    """

    first_look: int
    confidence: float

    def looks(self, num_batches: int) -> list[int]:
        """Numbers of batches after which to compare: the first look, then every next batch or,
        where there are many, every further eighth; always ends with num_batches."""
        looks = [min(self.first_look, num_batches)]
        while looks[-1] < num_batches:
            looks.append(min(looks[-1] + max(1, looks[-1] // 8), num_batches))
        return looks

    def most_survivors(self, num_candidates: int, batches: int) -> int:
        """How many of the candidates that began may go on after a look at so many batches."""
        if batches < self.first_look:
            return num_candidates
        return max(1, num_candidates * self.first_look // (self.first_look + batches))

    def survivors(self, candidates: Sequence[Candidate], num_candidates: int) -> list[Candidate]:
        """Those of the candidates that go on after a look, by block.

        num_candidates: how many the race began with.
        """
        most = self.most_survivors(num_candidates, len(candidates[0].losses))
        best = sorted(not_ruled_out(candidates, self.confidence), key=_by_loss)[:most]
        return sorted(best, key=lambda candidate: candidate.block)

    def most_batches(self, num_candidates: int, num_batches: int, processes: int = 1) -> int:
        """The most batches that one of so many processes trains in a race."""
        total, done, racing = 0, 0, num_candidates
        for look in self.looks(num_batches):
            total += math.ceil(racing / processes) * (look - done)
            done, racing = look, min(racing, self.most_survivors(num_candidates, look))
        return total


def default_first_look(num_batches: int) -> int:
    """A 32nd of an epoch: the losses of more batches cost more than they tell."""
    return max(1, num_batches // 32)


FULL = Race(first_look=2**62, confidence=math.inf)


def _by_loss(candidate: Candidate) -> tuple[float, int]:
    return candidate.mean_loss, candidate.block


def leader(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest mean loss; the lower index wins a tie."""
    return min(candidates, key=_by_loss)


def not_ruled_out(candidates: Sequence[Candidate], confidence: float) -> list[Candidate]:
    """The candidates whose loss is not beyond doubt worse than the leader's.

    All have seen the same batches, so the losses are compared in pairs, which takes out how hard a
    batch is. The noise of a paired difference is taken as at least its median over the candidates:
    with few batches, some look far too sure by chance. With fewer than MIN_BATCHES all are in doubt.
    """
    best = leader(candidates)
    count = len(best.losses)
    if math.isinf(confidence) or count < MIN_BATCHES or len(candidates) == 1:
        return list(candidates)
    differences = {
        candidate.block: [a - b for a, b in zip(candidate.losses, best.losses, strict=True)]
        for candidate in candidates
        if candidate is not best
    }
    noise = {block: statistics.stdev(values) for block, values in differences.items()}
    typical = statistics.median(noise.values())

    def stays(candidate: Candidate) -> bool:
        if candidate is best:
            return True
        doubt = confidence * max(noise[candidate.block], typical) / math.sqrt(count)
        return statistics.fmean(differences[candidate.block]) <= doubt

    return [candidate for candidate in candidates if stays(candidate)]


@dataclass
class Iteration:
    """What one iteration of the search found."""

    skipped_before: list[int]
    block: int
    loss: float
    losses: dict[int, float]  # full-epoch means, of the finalists (all candidates of `full`)
    dropped: dict[int, dict]  # block -> after how many batches, its mean loss and the leader's
    batch_losses: dict[int, list[float]]
    candidate_epochs: float  # training spent, in epochs of one candidate


class Journal:
    """One JSON line for each candidate and look, flushed as it comes.

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
            self.entries[self._key(record["skipped"], record["block"], len(record["losses"]))] = record

    @staticmethod
    def _key(skipped: Sequence[int], block: int, num_batches: int) -> tuple:
        return tuple(sorted(skipped)), block, num_batches

    def add(self, skipped: Sequence[int], candidate: Candidate) -> None:
        record = {"skipped": list(skipped), "block": candidate.block, "losses": candidate.losses}
        if candidate.state is not None:
            record["state"] = candidate.state.encode()
        self.entries[self._key(skipped, candidate.block, len(candidate.losses))] = record
        if self.file is not None:
            append_line(self.file, record)

    def find(self, skipped: Sequence[int], block: int, num_batches: int) -> Candidate | None:
        record = self.entries.get(self._key(skipped, block, num_batches))
        if record is None:
            return None
        state = ScaleState.decode(record["state"]) if "state" in record else None
        return Candidate(block, record["losses"], state)


@dataclass
class Processes:
    """How candidates spread over processes. gather: one object a process -> all of them, in all."""

    rank: int = 0
    count: int = 1
    gather: Callable[[object], list] = lambda item: [item]


class Progress:
    """What a search tells while it runs; this one says nothing (see `SearchBar`)."""

    def start_iteration(self, num_candidates: int, num_batches: int) -> None: ...

    def on_batch(self, loss: float) -> None: ...

    def restored(self, batches: int) -> None: ...

    def advanced(self, racing: int, best: Candidate) -> None: ...


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
    blocks = [block for block in range(len(trainer.model.model.layers)) if block not in skipped]
    known = [Candidate(block, known_loss=known_losses[block]) for block in blocks if block in known_losses]
    racing = [Candidate(block) for block in blocks if block not in known_losses]
    progress.start_iteration(len(racing), len(batches))
    num_candidates = len(racing)
    dropped, batch_losses, spent = {}, {}, 0
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
            progress.advanced(len(racing), leader(advanced))
        best = leader(advanced)
        batch_losses |= {candidate.block: candidate.losses for candidate in advanced}
        racing = race.survivors(advanced, num_candidates) if look < len(batches) else advanced
        kept = {candidate.block for candidate in racing}
        for candidate in advanced:
            if candidate.block not in kept:
                dropped[candidate.block] = {
                    "after_batches": look,
                    "mean_loss": candidate.mean_loss,
                    "leader_mean_loss": best.mean_loss,
                }
    finalists = sorted(racing + known, key=lambda candidate: candidate.block)
    winner = leader(finalists)
    return Iteration(
        skipped_before=list(skipped),
        block=winner.block,
        loss=winner.mean_loss,
        losses={candidate.block: candidate.mean_loss for candidate in finalists},
        dropped=dropped,
        batch_losses=batch_losses,
        candidate_epochs=spent / len(batches),
    )


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
    found = journal.find(skipped, candidate.block, look)
    if found is not None:
        progress.restored(look - done)
        return found, False
    trainer.start([*skipped, candidate.block], candidate.state)
    losses = trainer.run(
        batches[done:look],
        f"candidate block {candidate.block}, epoch 0",
        first=done,
        on_batch=progress.on_batch,
    )
    state = trainer.state() if look < len(batches) else None
    return Candidate(candidate.block, candidate.losses + losses, state), True


class SearchBar(Progress):
    """One bar over the whole search, in batches of this process, with the leader and an ETA.

    The total is the most that the search can take: exact for `full`, a little high for a race.
    """

    def __init__(self, num_iterations: int, race: Race, processes: Processes):
        from tqdm import tqdm

        self.bar = tqdm(unit="batch", disable=processes.rank != 0, dynamic_ncols=True)
        self.num_iterations, self.iterations_begun = num_iterations, 0
        self.race, self.processes = race, processes.count

    def start_iteration(self, num_candidates: int, num_batches: int) -> None:
        iterations_left = self.num_iterations - self.iterations_begun
        self.iterations_begun += 1
        self.bar.set_description(f"block {self.iterations_begun}")
        self.bar.total = self.bar.n + sum(
            self.race.most_batches(num_candidates - later, num_batches, self.processes)
            for later in range(iterations_left)
        )
        self.bar.refresh()

    def restored(self, batches: int) -> None:
        self.bar.total -= batches

    def on_batch(self, loss: float) -> None:
        self.bar.update()

    def advanced(self, racing: int, best: Candidate) -> None:
        self.bar.set_postfix_str(f"{racing} racing, leader {best.block} at {best.mean_loss:.4f}")

    def close(self) -> None:
        self.bar.total = self.bar.n
        self.bar.close()
