"""JSONL records in and out, and batches of processed samples."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hopscotch_common.cli import InputError

IGNORE_INDEX = -100
MIN_SHARED = 0.2  # of a batch's tokens: less is not worth a pass of its own


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, record) of every line that is not blank.

    Raises InputError, with the line, for a missing or empty file and for a line that is not a
    JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise InputError(
                    f"{path}, line {number}: a JSON object is needed, not {type(record).__name__}"
                )
            empty = False
            yield number, record
    if empty:
        raise InputError(f"{path}: holds no records")


def check_messages(messages, where: str) -> list[dict]:
    """The messages of a record, checked: a non-empty list of {role, content} with text in each."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: each message needs a 'role' and a 'content'")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{where}: the {message['role']} message has no content")
    return messages


def truncate_partial_line(path: Path) -> int:
    """Cut a last line without its newline (a killed writer's) off a file; the lines that remain."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
    return content.count(b"\n")


def append_line(file, record: dict) -> None:
    """Append one JSON line to an open text file and flush it to disk."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class Sample:
    """One processed answer. labels are -100 where the loss does not count, the first always."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_counted_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def load_samples(
    path: Path, vocab_size: int, max_tokens: int | None = None, max_samples: int | None = None
) -> list[Sample]:
    """Read and check processed data (`input_ids`, `labels` on each line), every line.

    Raises InputError, with the line, for anything that training could not use: other fields,
    lengths that differ, ids beyond the vocabulary, a label other than its token or -100, no
    loss-counted token, more than max_tokens tokens (a minibatch's budget).
    """
    samples = []
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        ids, labels = record.get("input_ids"), record.get("labels")
        if not (_ints(ids) and _ints(labels)):
            raise InputError(
                f"{where}: needs 'input_ids' and 'labels', lists of whole numbers; "
                "make them with process_gt_data.py"
            )
        if len(ids) != len(labels):
            raise InputError(f"{where}: {len(ids)} input_ids but {len(labels)} labels")
        if ids and not (0 <= min(ids) and max(ids) < vocab_size):
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            raise InputError(
                f"{where}: token id {bad} is beyond the model's vocabulary of {vocab_size}; "
                "was the data processed for another model?"
            )
        if any(label not in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True)):
            raise InputError(f"{where}: a label must equal its token or be {IGNORE_INDEX}")
        labels = [IGNORE_INDEX, *labels[1:]]  # nothing predicts the first token
        sample = Sample(ids, labels)
        if sample.num_loss_counted_tokens == 0:
            raise InputError(f"{where}: no label counts for the loss (all are {IGNORE_INDEX})")
        if max_tokens is not None and len(sample) > max_tokens:
            raise InputError(
                f"{where}: {len(sample)} tokens do not fit --max_tokens_per_batch {max_tokens}; "
                "raise it, or process the data with a smaller --max_seq_len"
            )
        samples.append(sample)
    return samples if max_samples is None else samples[:max_samples]


def _ints(values) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over token ids and labels, in order: equal for equal training data."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.input_ids, sample.labels]).encode())
    return digest.hexdigest()


def split_samples(
    samples: Sequence[Sample], validation_split: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out) samples; at least one of each when the split is not 0.

    Raises InputError when there are too few samples to split.
    """
    count = round(len(samples) * validation_split)
    if validation_split > 0:
        if len(samples) < 2:
            raise InputError(f"--validation_split needs at least 2 samples, there is {len(samples)}")
        count = min(max(count, 1), len(samples) - 1)
    held_out = set(random.Random(seed).sample(range(len(samples)), count))
    return (
        [sample for i, sample in enumerate(samples) if i not in held_out],
        [sample for i, sample in enumerate(samples) if i in held_out],
    )


@dataclass(frozen=True)
class Minibatch:
    """A part of a batch that runs at once, without the prefix that its batch shares.

    input_ids: [rows, length]; attention_mask: [rows, length], or None where nothing is padded;
    position_ids: [1, length] for packed rows, otherwise None.
    predicting: indices into the flattened [rows * length] positions whose next token counts for
    the loss; targets: those next tokens, same length.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    predicting: torch.Tensor
    targets: torch.Tensor

    def to(self, device) -> "Minibatch":
        return Minibatch(
            *(None if t is None else t.to(device, non_blocking=True) for t in vars(self).values())
        )


@dataclass(frozen=True)
class Batch:
    """One optimizer step: this rank's minibatches, and the loss-counted tokens of all ranks.

    prefix: token ids [1, tokens] that every sample begins with, none of which is predicted for the
    loss and none of which the minibatches hold; None where they hold whole samples.
    """

    minibatches: list[Minibatch]
    num_loss_counted_tokens: int
    prefix: torch.Tensor | None = None

    def whole_minibatches(self) -> list[Minibatch]:
        """The minibatches with the prefix in each row."""
        if self.prefix is None:
            return self.minibatches
        return [_prepend(self.prefix, minibatch) for minibatch in self.minibatches]


def _prepend(prefix: torch.Tensor, minibatch: Minibatch) -> Minibatch:
    rows, length = minibatch.input_ids.shape
    prefix = prefix.expand(rows, -1)
    mask = minibatch.attention_mask
    row, column = minibatch.predicting // length, minibatch.predicting % length
    return Minibatch(
        torch.cat([prefix, minibatch.input_ids], dim=1),
        None if mask is None else torch.cat([torch.ones_like(prefix), mask], dim=1),
        minibatch.position_ids,
        row * (prefix.shape[1] + length) + prefix.shape[1] + column,
        minibatch.targets,
    )


def make_batches(
    samples: Sequence[Sample],
    batch_size: int,
    max_tokens_per_batch: int,
    seed: int,
    epoch: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
    packed: bool = False,
    share_prefix: bool = False,
    pad_token_id: int = 0,
) -> list[Batch]:
    """An epoch's batches, in the order that (seed, epoch) gives.

    instructlab-training's collator splits each batch of `batch_size` samples into minibatches of
    at most max_tokens_per_batch tokens (padding included), of similar length, and spreads them
    over ranks. How it is split changes memory and speed, not the batch's loss or gradient.
    packed: rows are joined without padding, for attention kernels that take `position_ids` as
    sequence borders (flash attention).
    share_prefix: tokens that all samples of a batch begin with become its `prefix`, where that
    saves enough; they still count in each row, which attends to them.
    """
    # Compiling its packing loops takes ten seconds in every process; running them, milliseconds.
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
    from instructlab.training.sampler import EpochSampler, MaxTokensPerRankCollator

    collate = MaxTokensPerRankCollator(
        max_tokens_per_batch,
        rank=rank,
        world_size=world_size,
        flash_enabled=packed,
        pad_token_id=pad_token_id,
    )
    sampler = EpochSampler(len(samples), seed=seed, epoch=epoch)
    order = list(sampler) if shuffle else list(range(len(samples)))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [samples[i] for i in order[start : start + batch_size]]
        prefix = shared_prefix(chosen) if share_prefix else []
        items = collate([_collator_item(sample, len(prefix)) for sample in chosen])
        batches.append(
            Batch(
                [_minibatch(item) for item in items if item["num_loss_counted_tokens"]],
                sum(sample.num_loss_counted_tokens for sample in chosen),
                torch.tensor([prefix]) if prefix else None,
            )
        )
    return batches


def shared_prefix(samples: Sequence[Sample]) -> list[int]:
    """The first tokens that all samples share and that predict nothing for the loss.

    Empty where sharing them would save little: a pass of its own and masked attention cost time too.
    """
    first = samples[0].input_ids
    length = min(_first_counted(sample) - 1 for sample in samples)
    for sample in samples[1:]:
        length = next((i for i in range(length) if sample.input_ids[i] != first[i]), length)
    saved = length * (len(samples) - 1) / sum(len(sample) for sample in samples)
    return first[:length] if saved >= MIN_SHARED else []


def _first_counted(sample: Sample) -> int:
    return next(i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX)


def _collator_item(sample: Sample, skip: int) -> dict:
    return {
        "input_ids": sample.input_ids[skip:],
        "labels": sample.labels[skip:],
        "len": len(sample),
        "num_loss_counted_tokens": sample.num_loss_counted_tokens,
    }


def _minibatch(item: dict) -> Minibatch:
    labels = item["labels"]
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]  # the first label of a packed sample is -100, so none crosses
    shifted = shifted.flatten()
    predicting = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
    mask = item.get("attention_mask")
    if mask is not None and bool(mask.all()):
        mask = None  # nothing is padded: the kernel's own causal mask is faster
    return Minibatch(item["input_ids"], mask, item.get("position_ids"), predicting, shifted[predicting])
