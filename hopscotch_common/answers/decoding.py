"""Greedy decoding of many prompts at once with a transformers model (continuous batching).

Every row of the running batch writes its next token into the same column of one preallocated KV
cache, the column `clock`; a row is [padding | prompt | what was generated so far], right-aligned:

    slot 0   . . . P P P P g g g g        . masked
    slot 1   . P P P P P P P g g g
    slot 2   . . . . . . P P P P g  <- joined when the answer before it had ended

So a finished answer gives its slot to the next waiting prompt at once, and one long answer holds
nobody up. Prompts wait shortest first. When the batch outgrows its token budget, the longest row
goes back to wait with what it has, and goes on later among its likes.

transformers has continuous batching of its own (`generate_batch`), over a paged cache. On 2 idle CPU
cores this gives 2.7 times its tokens/s in float32 and 2.6 times in bfloat16, and 2.1 and 1.7 times a CPU
second (`benchmarks/generation.py`, SmolLM2, 48 prompts, 3 rounds): there it has no other attention to
offer than one dense mask over all requests.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from hopscotch_common.answers.slot_cache import SlotLayer, SlotStates, empty_cache, slot_layer

HEADROOM = 128  # columns that a rebuilt cache has left to grow into
PREFILL_TOKENS = 4096  # padded prompt tokens that are prefilled at once; bounds activation memory
FIRST_GUESS = 256  # tokens an answer is expected to have, until one has ended


@dataclass
class Row:
    """A prompt and its answer so far. All tokens but the last are in the KV cache."""

    index: int  # of the prompt
    tokens: list[int]
    prompt_length: int
    max_new_tokens: int
    finish_reason: str | None = None

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def append(self, token: int, stop_ids: set[int]) -> None:
        self.tokens.append(token)
        if token in stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) - self.prompt_length >= self.max_new_tokens:
            self.finish_reason = "length"


class GreedyDecoder:
    """Decodes prompts greedily, as many at once as the token budget holds.

    prompts: token ids; limits: the most tokens to generate for each; stop_ids: tokens that end an
    answer; max_tokens_per_batch: rows times columns of the KV cache, padding included. A prompt
    that alone is longer than that runs alone.
    """

    def __init__(
        self,
        model,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        stop_ids: set[int],
        max_tokens_per_batch: int,
        on_tokens: Callable[[int], None] = lambda count: None,
    ):
        self.model, self.stop_ids, self.budget = model, stop_ids, max_tokens_per_batch
        self.on_tokens = on_tokens
        rows = [
            Row(i, list(p), len(p), limit) for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        self.waiting = sorted(rows, key=_longest_first)  # the next one is the last, the shortest
        self.slots: list[Row | None] = []
        self.layers: list[SlotLayer | SlotStates] = []
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self.clock = 0
        self.ended, self.generated = 0, 0

    @torch.inference_mode()
    def run(self) -> Iterator[Row]:
        """Yield each row as its answer ends."""
        while self.waiting or self._live():
            self._admit()
            yield from self._take_finished()
            live = self._live()
            if not live:
                continue
            if not self.waiting and len(live) <= 3 * len(self.slots) // 4:
                self._rebuild(live)
            if self.clock == self.mask.shape[1]:
                self._rebuild(self._put_back_longest(live))
            self._step()
            self.on_tokens(len(live))
            yield from self._take_finished()

    def _live(self) -> list[int]:
        return [slot for slot, row in enumerate(self.slots) if row is not None]

    def _width(self, slots: list[int]) -> int:
        """Columns that the longest of these rows fills."""
        return max((len(self.slots[slot].tokens) - 1 for slot in slots), default=0)

    def _take_finished(self) -> Iterator[Row]:
        for slot in self._live():
            row = self.slots[slot]
            if row.finish_reason:
                self.slots[slot] = None
                self.ended += 1
                self.generated += len(row.generated)
                yield row

    def _admit(self) -> None:
        """Fill the batch from the waiting rows, when enough of it is free to be worth a prefill."""
        live = self._live()
        free = len(self.slots) - len(live)
        count = self._count_that_fits(live)
        if count <= free + len(live) // 8:  # a few more slots are not worth moving the cache
            count = min(count, free)
        if count == 0 or (count < len(live) // 16 and count < len(self.waiting)):
            return
        newcomers = [self.waiting.pop() for _ in range(count)]
        longest = len(newcomers[-1].tokens)
        if count > free or longest > self.clock:
            self._rebuild(live, extra=count, columns=max(self._width(live), longest))
        slots = iter([slot for slot, row in enumerate(self.slots) if row is None])
        part: list[Row] = []
        for row in newcomers:
            if part and (len(part) + 1) * len(row.tokens) > PREFILL_TOKENS:
                self._prefill(part, [next(slots) for _ in part])
                part = []
            part.append(row)
        self._prefill(part, [next(slots) for _ in part])

    def _count_that_fits(self, live: list[int]) -> int:
        mean = self.generated / self.ended if self.ended else FIRST_GUESS
        growth = max(HEADROOM, round(mean))
        width, rows = self._width(live), len(live)
        for count, row in enumerate(reversed(self.waiting)):
            width = max(width, len(row.tokens))
            if rows + count and (rows + count + 1) * (width + growth) > self.budget:
                return count
        return len(self.waiting)

    def _put_back_longest(self, live: list[int]) -> list[int]:
        """Slots that stay when the cache has to grow; the longest rows that no longer fit wait."""
        live = sorted(live, key=lambda slot: len(self.slots[slot].tokens))
        while len(live) > 1 and len(live) * (self._width(live) + HEADROOM) > self.budget:
            bisect.insort(self.waiting, self.slots[live.pop()], key=_longest_first)
        return live

    def _rebuild(self, keep: list[int], extra: int = 0, columns: int | None = None) -> None:
        """Move the rows in slots `keep` to a new cache with `extra` empty slots.

        columns: how many the rows end at; by default what the longest needs.
        """
        columns = self._width(keep) if columns is None else columns
        used = min(columns, self.clock)

        def moved(old: torch.Tensor, column_axis: int | None) -> torch.Tensor:
            shape = [len(keep) + extra, *old.shape[1:]]
            if column_axis is not None:
                shape[column_axis] = columns + HEADROOM
            new = old.new_zeros(shape)  # zeros, not empty: a masked NaN would still be a NaN
            target = new
            if column_axis is not None:
                target = new.narrow(column_axis, columns - used, used)
                old = old.narrow(column_axis, self.clock - used, used)
            target[: len(keep)] = old[keep]
            return new

        for layer in self.layers:
            layer.move(moved, columns)
        self.mask = moved(self.mask, 1)
        self.slots = [self.slots[slot] for slot in keep] + [None] * extra
        self.clock = columns

    def _prefill(self, rows: list[Row], slots: list[int]) -> None:
        """Run whole prompts through the model, left-padded, and copy their cache into `slots`."""
        length = max(len(row.tokens) for row in rows)
        padded = [[0] * (length - len(row.tokens)) + row.tokens for row in rows]
        mask = [[0] * (length - len(row.tokens)) + [1] * len(row.tokens) for row in rows]
        mask = torch.tensor(mask).to(self.model.device)
        cache = empty_cache(self.model.config)
        tokens = self._forward(padded, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if not self.layers:
            self.layers = [slot_layer(layer, *self.mask.shape, self.clock) for layer in cache.layers]
        start = self.clock - length
        for layer, filled in zip(self.layers, cache.layers, strict=True):
            layer.fill(slots, filled, self.clock)
        self.mask[slots] = 0
        self.mask[slots, start : self.clock] = mask
        for slot, row, token in zip(slots, rows, tokens, strict=True):
            self.slots[slot] = row
            row.append(token, self.stop_ids)
        self.on_tokens(len(rows))

    def _step(self) -> None:
        """One more token for every row. Free slots run along with token 0; nothing reads them."""
        self.mask[:, self.clock] = 1
        last = [[row.tokens[-1] if row else 0] for row in self.slots]
        positions = [[len(row.tokens) - 1 if row else 0] for row in self.slots]
        positions = torch.tensor(positions).to(self.model.device)
        tokens = self._forward(last, self.mask[:, : self.clock + 1], positions, Cache(layers=self.layers))
        self.clock += 1
        for row, token in zip(self.slots, tokens, strict=True):
            if row is not None:
                row.append(token, self.stop_ids)

    def _forward(self, ids: list[list[int]], mask, positions, cache) -> list[int]:
        """The most likely next token of each row."""
        logits = self.model(
            input_ids=torch.tensor(ids).to(self.model.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(-1).tolist()


def _longest_first(row: Row) -> int:
    return -len(row.tokens)
