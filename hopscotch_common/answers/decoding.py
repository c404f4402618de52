"""Greedy answers to batches of prompts by a transformers model's own `generate`."""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hopscotch_common.loading.models import context_length

OnTokens = Callable[[int], None]
GROUPED_SDPA = "hopscotch_grouped_sdpa"
ROOM = 256  # tokens by which each answer can grow in a new batch


@dataclass(frozen=True)
class Answer:
    """One finished answer. token_ids ends with the stop token if finish_reason is "stop"."""

    index: int  # of the prompt
    token_ids: list[int]
    finish_reason: str  # "stop", or "length": cut off at max_tokens or at the end of the context


def grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention kernel for transformers: sdpa that copies no keys or values when decoding.

    Stock sdpa with a mask repeats each key and value for every query head that shares it. For a
    single query token those heads can be rows of one query instead, and nothing is repeated.

    query: [rows, heads, queries, dim]; key, value: [rows, kv_heads, columns, dim]; attention_mask:
    [rows, 1, queries, columns] or None. Returns ([rows, queries, heads, dim], None).
    """
    rows, heads, queries, dim = query.shape
    if queries != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, dim), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def decode(
    model,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    stop_ids: set[int],
    max_tokens_per_batch: int,
    on_tokens: OnTokens = lambda count: None,
) -> Iterator[Answer]:
    """Answer batches of prompts of similar length greedily by the model's own `generate`, the shortest first.

    A batch ends when half of its answers have ended, or when it fills max_tokens_per_batch (rows times
    columns, padding included; a prompt that exceeds it runs alone) or the model's context. Unfinished answers
    wait, and continue with others of similar length once these fill a batch. So one long answer does not hold
    up many, and few answers are in memory alone.
    """
    # not the model's own config, which may penalize repetitions, for example
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    said: list[list[int]] = [[] for _ in prompts]

    def length(index: int) -> int:
        return len(prompts[index]) + len(said[index])

    def fitting(by_length: Iterable[int]) -> list[int]:
        """The first ones, at least one, that fit into a batch together."""
        found: list[int] = []
        for index in by_length:
            if found and (len(found) + 1) * (length(index) + ROOM) > max_tokens_per_batch:
                break
            found.append(index)
        return found

    new, begun = deque(sorted(range(len(prompts)), key=length)), []
    while new or begun:
        begun.sort(key=length)
        batch = fitting(begun)
        if len(batch) == len(begun):  # they leave room for new ones
            batch = fitting(heapq.merge(begun, new, key=length))
        taken = set(batch)
        begun = [index for index in begun if index not in taken]
        while new and new[0] in taken:
            new.popleft()
        rows = [prompts[index] + said[index] for index in batch]
        left = [limits[index] - len(said[index]) for index in batch]
        columns = min(max_tokens_per_batch // len(batch), context_length(model.config))
        said_now = _generate(model, rows, left, stop_ids, columns, on_tokens)
        for index, tokens in zip(batch, said_now, strict=True):
            for token in tokens:
                said[index].append(token)
                if token in stop_ids or len(said[index]) == limits[index]:
                    yield Answer(index, said[index], "stop" if token in stop_ids else "length")
                    break
            else:
                begun.append(index)


def _generate(
    model,
    rows: list[list[int]],
    limits: list[int],
    stop_ids: set[int],
    columns: int,
    on_tokens: OnTokens,
) -> list[list[int]]:
    """Run a batch of `decode`: each row's continuation, with extra tokens after rows that end early.

    columns: the length at which a batch of several rows ends.
    """
    width = len(rows[-1])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows]).to(model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).to(model.device)
    stops = torch.tensor(sorted(stop_ids)).to(model.device)
    last_columns = torch.tensor([width + limit for limit in limits]).to(model.device)
    ended = torch.zeros_like(last_columns, dtype=torch.bool)

    def ends(ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Which rows have ended, after each token; all of them if the batch ends."""
        on_tokens(len(rows) - int(ended.sum()))
        ended.logical_or_(torch.isin(ids[:, -1], stops) | (last_columns <= ids.shape[1]))
        full = len(rows) > 1 and ids.shape[1] >= columns
        return ended | full | (2 * ended.sum() >= len(rows))

    output = model.generate(ids, attention_mask=mask, max_new_tokens=max(limits), stopping_criteria=[ends])
    return output[:, width:].tolist()
