"""What a search has computed, so that an interrupted one can resume and another schedule can reuse it."""

import math
from collections.abc import Callable, Iterable, Sequence

from hopscotch_common.errors import InputError
from hopscotch_common.search.schedule import Candidate
from hopscotch_common.training.trainer import ScaleState

KIND = "a search journal"
REMEDY = "name another --output, or delete the journal"


class Journal:
    """The losses of candidates: one record for each batch of a screening and each candidate and look.

    It serves any number of iterations, as records are found by the blocks skipped before.
    records: (place, record) of an earlier run's. append: saves a record (`ResumableLog.append`).
    num_batches: of an epoch; no candidate has more losses.
    Raises InputError, with the place, for an invalid record.
    """

    def __init__(
        self,
        records: Iterable[tuple[str, dict]] = (),
        append: Callable[[dict], None] = lambda record: None,
        num_batches: float = math.inf,
    ):
        self._append = append
        # (blocks skipped before, block) -> batches trained -> the candidate then
        self._trained: dict[tuple[tuple, int], dict[int, Candidate]] = {}
        self._diverged: dict[tuple[tuple, int], Candidate] = {}  # in the batch after its losses
        # (blocks skipped before, batch) -> block -> loss before training
        self._untrained: dict[tuple[tuple, int], dict[int, float]] = {}
        for place, record in records:
            try:
                self._remember(record)
                if len(record.get("losses", ())) > num_batches:
                    raise ValueError("more losses than batches")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{place}: not a record of {KIND}; {REMEDY}") from error

    def _keep(self, record: dict) -> None:
        self._remember(record)
        self._append(record)

    def _remember(self, record: dict) -> None:
        skipped = tuple(sorted(record["skipped"]))
        if "untrained" in record:
            losses = record["untrained"].items()
            known = {int(b): math.inf if loss is None else float(loss) for b, loss in losses}
            self._untrained[skipped, record["batch"]] = known
        else:
            losses = [float(loss) for loss in record["losses"]]
            state = ScaleState.decode(record["state"]) if "state" in record else None
            candidate = Candidate(int(record["block"]), losses, state, diverged=record.get("diverged"))
            key = skipped, candidate.block
            if candidate.diverged is None:
                self._trained.setdefault(key, {})[len(losses)] = candidate
            else:
                self._diverged[key] = candidate

    def add(self, skipped: Sequence[int], candidate: Candidate) -> None:
        record = {"skipped": list(skipped), "block": candidate.block, "losses": candidate.losses}
        if candidate.diverged is not None:
            record["diverged"] = candidate.diverged
        if candidate.state is not None:
            record["state"] = candidate.state.encode()
        self._keep(record)

    def find(self, skipped: Sequence[int], block: int, done: int, look: int) -> Candidate | None:
        """Return the candidate after `look` batches or, if that is not known, after the most that are.

        Returns None if no training of more than `done` batches is known. A longer training also tells the
        losses at a look, but not the state then. A candidate that diverged stays so, but not at a look that
        it passed: the same race over its journal is the same race.
        """
        key = tuple(sorted(skipped)), block
        known, diverged = self._trained.get(key, {}), self._diverged.get(key)
        if look in known:  # exactly this look
            return known[look]
        if diverged is not None:
            if len(diverged.losses) <= look:  # it had ended by then
                return diverged
            known = {len(diverged.losses): diverged} | known
        longer = [count for count in known if count >= look]
        if longer:  # it went further, which tells the losses at this look, but not the state
            return Candidate(block, known[min(longer)].losses[:look])
        shorter = [count for count in known if done < count < look and known[count].state is not None]
        return known[max(shorter)] if shorter else None  # to continue from

    def add_untrained(self, skipped: Sequence[int], batch: int, losses: dict[int, float]) -> None:
        """Add losses by block; a loss is infinite if nothing finite comes out without that block."""
        as_json = {str(block): loss if loss < float("inf") else None for block, loss in losses.items()}
        self._keep({"skipped": list(skipped), "batch": batch, "untrained": as_json})

    def find_untrained(self, skipped: Sequence[int], batch: int) -> dict[int, float]:
        """Return the known losses by block on a batch before training."""
        return dict(self._untrained.get((tuple(sorted(skipped)), batch), {}))
