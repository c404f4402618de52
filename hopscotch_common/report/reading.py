"""Reports read back into records that hold what tables and pictures need.

`read_report` takes whatever is on a disk, so everything is checked here, once, against the types of
the records. A report that cannot be read raises an InputError that names the file, what is wrong and
what to do.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from hopscotch_common import files
from hopscotch_common.errors import InputError
from hopscotch_common.report import ANSWERS, ERROR

REMEDY = "make it again, or give a report of one of the scripts, or the output folder of step 2 or 4a"


def _by_measure(value: object) -> object:
    """Return held-out figures without null errors (of a single answer); null itself means no figures."""
    if not isinstance(value, Mapping):
        return {} if value is None else value
    return {k: v for k, v in value.items() if v is not None or not str(k).endswith(ERROR)}


Count = Annotated[int, Field(ge=0, lt=10**15)]  # also the index of a block
Finite = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]  # null: diverged
LossByBlock = dict[Count, Loss]
Measures = Annotated[dict[str, Finite], BeforeValidator(_by_measure)]


def measures_of(*figures: Mapping[str, float]) -> list[str]:
    """Return what held-out figures measure: their names, except of errors and of the number of answers."""
    names = dict.fromkeys(itertools.chain(*figures))
    return [name for name in names if name != ANSWERS and not name.endswith(ERROR)]


class Record(BaseModel):
    """Part of a report. Types are strict: a number is neither text nor Boolean; unknown keys are left out."""

    model_config = ConfigDict(strict=True, frozen=True)


class Run(Record):
    """What every report says of its run."""

    model: str
    arguments: dict[str, object] = {}
    versions: dict[str, object] = {}
    path: Path = Path()  # where it was read from


class CountsRun(Run):
    """Step 1 or 2: what became of the prompts or answers."""

    what: str  # "answers" or "data"
    figures: dict[str, object]


class Drop(Record):
    """When a candidate left the race, and its mean loss until then."""

    after_batches: Count  # 0: before any training
    mean_loss: Loss


class IterationRecord(Record):
    """One pick. Losses are by block; one that is not finite belongs to a candidate that diverged."""

    skipped_before: tuple[Count, ...]
    block: Count
    loss: Finite
    losses: LossByBlock  # of a whole epoch; infinite for those that diverged
    diverged: dict[Count, object] = {}
    dropped: dict[Count, Drop]
    untrained_losses: LossByBlock
    distances: LossByBlock = {}  # of the residual stream, if they decided
    candidate_epochs: Finite
    held_out: Measures = {}  # empty where nothing was held out

    @model_validator(mode="after")
    def _diverged_have_no_loss(self):
        self.losses.update(dict.fromkeys(self.diverged, math.inf))
        return self

    @property
    def count(self) -> int:
        """The number of blocks that are skipped once this one is."""
        return len(self.skipped_before) + 1

    @property
    def candidates(self) -> set[int]:
        return self.losses.keys() | self.dropped.keys() | self.distances.keys()

    @property
    def blocks(self) -> set[int]:
        """All blocks that the record names."""
        return {self.block, *self.skipped_before, *self.candidates, *self.untrained_losses}


class SearchRun(Run):
    """A run of step 3."""

    num_layers: Count
    kv_cache_blocks: Count | None = None  # of the whole model; earlier reports do not say
    skipped_blocks: tuple[Count, ...]
    iterations: tuple[IterationRecord, ...]
    data: dict[str, object] = {}
    original_held_out: Measures = {}
    stopped_before: IterationRecord | None = None  # the pick that would have cost more than was allowed

    @model_validator(mode="after")
    def _check_blocks(self):
        if not self.iterations:
            raise ValueError("iterations: no block was picked, so there is nothing to show")
        picks = [pick for pick in (*self.iterations, self.stopped_before) if pick is not None]
        largest = max(set(self.skipped_blocks).union(*(pick.blocks for pick in picks)))
        if largest >= self.num_layers:
            raise ValueError(f"{largest} is no block of this model, which has {self.num_layers}")
        return self

    @property
    def criterion(self) -> str:
        """What decided: the loss after training ("trained") or before it ("untrained"), or "cosine"."""
        search = self.arguments.get("search")
        return search if search in ("untrained", "cosine") else "trained"

    def losses_by_count(self) -> dict[int, float]:
        """The picks' losses by number of blocks skipped."""
        return {iteration.count: iteration.loss for iteration in self.iterations}


class Epoch(Record):
    epoch: Count
    loss: Finite  # mean training loss
    learning_rate: Finite | None = None
    held_out: dict[str, Measures]  # of "original", "unscaled" and "scaled"; empty without a split

    @property
    def scaled(self) -> dict[str, float]:
        """Held-out figures with the scales as trained so far."""
        return self.held_out.get("scaled", {})


class Weights(Record):
    """Counts of a checkpoint's parameters and KV cache blocks."""

    parameters: Count = Field(gt=0)
    parameters_removed: Count
    parameters_added: Count = 0  # by scales and maps; earlier files do not say
    kv_cache_blocks: Count = Field(gt=0)
    kv_cache_blocks_removed: Count


class Spread(Record):
    """Mean and standard deviation of a scale over the channels, of each layer."""

    mean: tuple[Finite, ...] = Field(min_length=1)
    deviation: tuple[Finite, ...]  # empty if the scale is one number per layer


class Scales(Record):
    """The four scales of a training, all for the same number of layers."""

    b_attn: Spread
    s_attn: Spread
    b_mlp: Spread
    s_mlp: Spread

    @property
    def num_layers(self) -> int:
        return len(self.b_attn.mean)

    @model_validator(mode="after")
    def _check_lengths(self):
        for name, found in self:
            if {len(found.mean), len(found.deviation) or self.num_layers} != {self.num_layers}:
                raise ValueError(f"{name} tells of another number of layers than b_attn")
        return self


class ScalingRun(Run):
    """A run of step 4a. checkpoint, weights and scales are the best epoch's; earlier reports lack them."""

    skipped_blocks: tuple[Count, ...]
    best_epoch: Count
    epochs: tuple[Epoch, ...]
    exports: dict[str, object] = {}
    checkpoint: str = ""
    weights: Weights | None = None
    scales: Scales | None = None

    @model_validator(mode="after")
    def _check_best(self):
        if self.best_epoch not in [epoch.epoch for epoch in self.epochs]:
            raise ValueError(f"best_epoch is {self.best_epoch}, which epochs does not hold")
        if self.scales and max(self.skipped_blocks, default=0) >= self.scales.num_layers:
            raise ValueError(f"skipped_blocks: {max(self.skipped_blocks)} is no block of those in scales")
        return self

    @property
    def untrained_b_attn(self) -> tuple[int, ...]:
        """The skipped blocks with nothing in their place: their b_attn is 0 and not trained."""
        return () if self.arguments.get("replacement_rank") else self.skipped_blocks

    @property
    def best(self) -> Epoch:
        return next(epoch for epoch in self.epochs if epoch.epoch == self.best_epoch)

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Held-out figures of the models to compare with: original, unscaled."""
        found = {
            name: figures for epoch in self.epochs for name, figures in epoch.held_out.items() if figures
        }
        return {name: figures for name, figures in found.items() if name != "scaled"}

    @property
    def compared(self) -> dict[str, str]:
        """The names of `baselines` in words; with maps, training starts at the maps as fitted."""
        before = "maps as fitted" if self.arguments.get("replacement_rank") else "skips without scales"
        return {"original": "original model", "unscaled": before}

    @property
    def measures(self) -> list[str]:
        """What was measured on held-out answers."""
        return measures_of(*(epoch.scaled for epoch in self.epochs))


Parsed = TypeVar("Parsed", bound=Record)


def read_report(path: Path) -> Run:
    """Read the run that `path` holds: a JSON report, or a folder with a report.json or data_report.json.

    Raises InputError for anything else.
    """
    if path.is_dir():
        names = ("report.json", "data_report.json")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
        if not path.is_file():
            raise InputError(f"{path}: no such file; {REMEDY}")
    content = files.read_json(path, REMEDY)
    if "iterations" in content:
        return parse(SearchRun, content, path)
    if "best_epoch" in content:
        return parse(ScalingRun, content, path)
    for what, key in (("answers", "prompts"), ("data", "kept")):
        if key in content and isinstance(content.get("arguments"), dict):
            model = Path(str(content["arguments"].get("model", "model"))).name  # of an id or a folder
            counted = {name: value for name, value in content.items() if isinstance(value, (str, int, float))}
            figures = {name: value for name, value in counted.items() if name not in ("script", "model")}
            return parse(CountsRun, {"model": model} | content | {"what": what, "figures": figures}, path)
    raise InputError(f"{path}: not a report that can be shown; {REMEDY}")


def parse(kind: type[Parsed], content: Mapping, path: Path = Path()) -> Parsed:
    """Make a record from JSON, read or about to be written; an InputError says what is wrong.

    It is parsed as text, because there keys are strings and sequences lists, whoever made the content.
    """
    try:
        record = kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {place}{place and ': '}{message}; {REMEDY}") from error
    return record.model_copy(update={"path": path}) if isinstance(record, Run) else record


def join_searches(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each search that continues from another one's picks joined to that one.

    Two runs are one search if model, data and the kind of losses are the same, and the second began with the
    blocks that the first had skipped at its end.
    """
    joined: list[Run] = []
    for run in runs:
        for place, earlier in enumerate(joined):
            if isinstance(run, SearchRun) and isinstance(earlier, SearchRun) and _goes_on(run, earlier):
                joined[place] = run.model_copy(update={"iterations": earlier.iterations + run.iterations})
                break
        else:
            joined.append(run)
    return joined


def _goes_on(run: SearchRun, earlier: SearchRun) -> bool:
    def same(a: SearchRun):
        how = (a.criterion, a.arguments.get("loss", "ce"), a.arguments.get("replacement_rank") or 0)
        return a.model, a.num_layers, a.data.get("sha256"), *how

    return same(run) == same(earlier) and set(run.iterations[0].skipped_before) == set(earlier.skipped_blocks)
