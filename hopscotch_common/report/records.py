"""What tables and pictures know of a run: its report, checked, in plain types."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Run:
    """What every report tells of its run."""

    path: Path
    model: str
    arguments: dict
    versions: dict


@dataclass(frozen=True)
class CountsRun(Run):
    """Step 1 or 2: what became of the prompts or answers."""

    what: str  # "answers" or "data"
    figures: dict


@dataclass(frozen=True)
class Drop:
    """When a candidate left the race, and its mean loss until then."""

    after_batches: int  # 0: before any training
    loss: float


@dataclass(frozen=True)
class Iteration:
    """One pick. Losses are by block; one that is not finite is of a candidate that diverged."""

    skipped_before: tuple[int, ...]
    block: int
    loss: float
    losses: dict[int, float]  # of a whole epoch
    dropped: dict[int, Drop]
    untrained: dict[int, float]
    distances: dict[int, float]  # of the residual stream; empty but where they decided
    candidate_epochs: float
    held_out: dict[str, float]  # by measure; empty where nothing was held out

    @property
    def count(self) -> int:
        """Blocks that are skipped once this one is."""
        return len(self.skipped_before) + 1


@dataclass(frozen=True)
class SearchRun(Run):
    """Step 3."""

    num_layers: int
    skipped: tuple[int, ...]
    iterations: tuple[Iteration, ...]
    data: dict
    original: dict[str, float]  # held-out figures of the original model
    stopped_before: Iteration | None  # the pick that would have cost more than was allowed

    @property
    def criterion(self) -> str:
        """What decided: the loss after training ("trained"), or before it ("untrained"), or "cosine"."""
        search = self.arguments.get("search")
        return search if search in ("untrained", "cosine") else "trained"

    def losses_by_count(self) -> dict[int, float]:
        """The picks' losses by number of blocks skipped."""
        return {iteration.count: iteration.loss for iteration in self.iterations}


@dataclass(frozen=True)
class ScaleMap:
    """The scales of a checkpoint; one that is a vector is told by its mean and its spread."""

    names: tuple[str, ...]  # b_attn, s_attn, b_mlp, s_mlp
    mean: np.ndarray  # [layers, names]
    spread: np.ndarray  # [layers, names], standard deviation over channels; 0 for a scalar
    vectors: tuple[bool, ...]  # by name: a value a channel


@dataclass(frozen=True)
class Epoch:
    number: int
    loss: float  # mean training loss
    held_out: dict[str, float]  # measure -> value, with the scales as they are; empty without a split


@dataclass(frozen=True)
class ScalingRun(Run):
    """Step 4a. `weights` and `scales` are the best epoch's, None where its checkpoint is gone."""

    skipped: tuple[int, ...]
    best_epoch: int
    epochs: tuple[Epoch, ...]
    baselines: dict[str, dict[str, float]]  # original, unscaled -> measure -> held-out value
    checkpoint: Path
    weights: dict | None
    scales: ScaleMap | None
    exports: dict


def join_searches(runs: Sequence[Run]) -> list[Run]:
    """The runs, with a search that goes on from another one's picks joined to it.

    Two are of one search where model, data and what the losses are is the same, and the second began
    with the blocks that the first had skipped at its end.
    """
    joined: list[Run] = []
    for run in runs:
        for place, earlier in enumerate(joined):
            if isinstance(run, SearchRun) and isinstance(earlier, SearchRun) and _goes_on(run, earlier):
                iterations = earlier.iterations + run.iterations
                joined[place] = replace(run, iterations=iterations)
                break
        else:
            joined.append(run)
    return joined


def _goes_on(run: SearchRun, earlier: SearchRun) -> bool:
    def same(a: SearchRun):
        return a.model, a.num_layers, a.data.get("sha256"), a.criterion, a.arguments.get("loss", "ce")

    return same(run) == same(earlier) and set(run.iterations[0].skipped_before) == set(earlier.skipped)
