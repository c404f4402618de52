"""Processed samples, their batches and minibatches, and the halving of those that do not fit into memory."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import recursively_apply, send_to_device
from transformers import DataCollatorWithFlattening

from hopscotch_common.errors import InputError, TrainingError, is_out_of_memory, logger, progress
from hopscotch_common.files import read_jsonl
from hopscotch_common.training import IGNORE_INDEX, TrainingOptions

MIN_SHARED = 0.2  # share of a batch's tokens: less is not worth a pass of its own

Result = TypeVar("Result")

# Compiling instructlab-training's packing loops takes ten seconds in every process; running them takes none.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")


@dataclass(frozen=True)
class Sample:
    """One processed answer. labels are -100 where the loss does not count, the first always.

    where: the file and line that it came from, for errors.
    """

    input_ids: list[int]
    labels: list[int]
    where: str = dataclasses.field(default="an answer", compare=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_counted_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def load_samples(
    path: Path,
    vocab_size: int,
    max_positions: int | None = None,
    max_tokens: int | None = None,
    max_samples: int | None = None,
) -> list[Sample]:
    """Read and check processed data (`input_ids`, `labels` on each line), at most max_samples lines.

    Raises InputError, with the line, for anything that training could not use: other fields,
    lengths that differ, ids beyond the vocabulary, a label other than its token or -100, no
    loss-counted token, more than max_positions tokens (the model's context) or max_tokens (a
    minibatch's budget).
    """
    samples, numbers = [], {}
    records = itertools.islice(read_jsonl(path), max_samples)
    for number, record in progress(records, f"reading {path.name}"):
        where = f"{path}, line {number}"
        sample = _sample(record, vocab_size, where, numbers)
        if max_positions is not None and len(sample) > max_positions:
            raise InputError(
                f"{where}: {len(sample)} tokens, but the model's context has {max_positions}; "
                "process the data with a smaller --max_seq_len"
            )
        if max_tokens is not None and len(sample) > max_tokens:
            raise InputError(
                f"{where}: {len(sample)} tokens do not fit --max_tokens_per_batch {max_tokens}; "
                "raise it, or process the data with a smaller --max_seq_len"
            )
        samples.append(sample)
    return samples


def _sample(record: dict, vocab_size: int, where: str, numbers: dict[int, int]) -> Sample:
    """A record's sample. numbers: each token id that was read, so that memory holds it once."""
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
    ids = [numbers.setdefault(token, token) for token in ids]
    counted = [
        IGNORE_INDEX if label == IGNORE_INDEX else token for label, token in zip(labels, ids, strict=True)
    ]
    sample = Sample(ids, [IGNORE_INDEX, *counted[1:]], where)  # nothing predicts the first token
    if sample.num_loss_counted_tokens == 0:
        raise InputError(f"{where}: no label counts for the loss (all are {IGNORE_INDEX})")
    return sample


def _ints(values) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over token ids and labels, in order: equal for equal training data."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.input_ids, sample.labels]).encode())
    return digest.hexdigest()


def describe(samples: Sequence[Sample], path: Path) -> dict:
    """Return what a report says of the samples that were used, and of their file."""
    return {
        "path": str(path),
        "sha256": fingerprint(samples),
        "samples": len(samples),
        "tokens": sum(len(sample) for sample in samples),
        "loss_counted_tokens": sum(sample.num_loss_counted_tokens for sample in samples),
    }


def split_samples(
    samples: Sequence[Sample], validation_split: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Return (training, held-out) samples; at least one of each if the split is not 0.

    Samples that ask the same, or go on from it, stay together, so that nothing held out was trained on.
    Raises InputError if there are too few to split.
    """
    if validation_split <= 0:
        return list(samples), []
    groups = _asking_the_same(samples)
    if len(groups) < 2:
        raise InputError(
            f"--validation_split needs at least 2 samples that ask different things, there are {len(groups)}"
        )
    count = max(round(len(samples) * validation_split), 1)
    held_out: set[int] = set()
    chosen = random.Random(seed).sample(groups, min(count, len(groups) - 1))
    for group in chosen:
        if len(held_out) + len(group) <= count:
            held_out.update(group)
    held_out = held_out or set(min(groups, key=len))
    return (
        [sample for i, sample in enumerate(samples) if i not in held_out],
        [sample for i, sample in enumerate(samples) if i in held_out],
    )


def _asking_the_same(samples: Sequence[Sample]) -> list[list[int]]:
    """Group the samples by index: all of a group begin with what one reads before its first answer."""

    def asked(index: int) -> list[int]:
        ids, start = samples[index].input_ids, _first_counted(samples[index])
        return ids[:start] if start > 1 else ids  # else the text counts from its start

    groups: list[list[int]] = []
    first: list[int] = []
    for index in sorted(range(len(samples)), key=asked):  # a prompt comes after those that it begins with
        prompt = asked(index)
        if not groups or prompt[: len(first)] != first:
            groups.append([])
            first = prompt
        groups[-1].append(index)
    return sorted(groups)


@dataclass(frozen=True)
class Minibatch:
    """A part of a batch that runs at once, without the first `prefix_length` tokens of its samples.

    packed: its samples are joined into one row, for attention kernels that take sequence borders (flash
    attention); otherwise each is a row, padded on the right, where nothing attends.
    inputs: what the base model takes: input_ids [rows, length] and, if rows are padded, an
    attention_mask [rows, length]; for packed rows position_ids [1, length] and their borders as flash
    attention takes them.
    predicting: indices into the flattened [rows * length] positions whose next token counts for
    the loss; targets: those next tokens, same length.
    """

    samples: tuple[Sample, ...]
    prefix_length: int
    packed: bool
    inputs: dict
    predicting: torch.Tensor
    targets: torch.Tensor

    @staticmethod
    def of(samples: Sequence[Sample], packed: bool = False, prefix_length: int = 0) -> "Minibatch":
        """Make a minibatch of samples by transformers' and instructlab-training's collate functions."""
        from instructlab.training.sampler import padded_mb_collate_fn

        items = [
            {
                "input_ids": sample.input_ids[prefix_length:],
                "labels": sample.labels[prefix_length:],
                "num_loss_counted_tokens": sample.num_loss_counted_tokens,
            }
            for sample in samples
        ]
        if packed:  # without the borders, transformers looks for them in every layer
            inputs = dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True)(items))
            labels = inputs.pop("labels")
        else:
            item = padded_mb_collate_fn(items, None, 0)
            inputs, labels = {"input_ids": item["input_ids"]}, item["labels"]
            if not bool(item["attention_mask"].all()):  # else the kernel's own causal mask is faster
                inputs["attention_mask"] = item["attention_mask"]
        next_labels = torch.full_like(labels, IGNORE_INDEX)
        next_labels[:, :-1] = labels[:, 1:]  # a packed sample's first label is -100: none crosses a border
        next_labels = next_labels.flatten()
        predicting = (next_labels != IGNORE_INDEX).nonzero().squeeze(1)
        return Minibatch(tuple(samples), prefix_length, packed, inputs, predicting, next_labels[predicting])

    @property
    def num_tokens(self) -> int:
        """Tokens that run, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def attention_mask(self) -> torch.Tensor | None:
        return self.inputs.get("attention_mask")

    def split(self) -> list["Minibatch"]:
        """Split it into two minibatches of half the samples each."""
        half = len(self.samples) // 2
        return [
            Minibatch.of(part, self.packed, self.prefix_length)
            for part in (self.samples[:half], self.samples[half:])
        ]

    def whole(self) -> "Minibatch":
        """The same samples with their prefix in each row."""
        return Minibatch.of(self.samples, self.packed) if self.prefix_length else self

    def to(self, device) -> "Minibatch":
        """Copy it to a device; with CUDA, the copies do not wait for the work that is queued there."""
        tensors = (self.inputs, self.predicting, self.targets)
        is_cuda = torch.device(device).type == "cuda"
        if is_cuda:
            tensors = recursively_apply(torch.Tensor.pin_memory, tensors)
        inputs, predicting, targets = send_to_device(tensors, device, non_blocking=is_cuda)
        return dataclasses.replace(self, inputs=inputs, predicting=predicting, targets=targets)


@dataclass(frozen=True)
class Batch:
    """One optimizer step: this process's minibatches, and the loss-counted tokens of all processes.

    prefix: token ids [1, tokens] that every sample begins with, none of which is predicted for the
    loss and none of which the minibatches hold; None if they hold whole samples.
    """

    minibatches: list[Minibatch]
    num_loss_counted_tokens: int
    prefix: torch.Tensor | None = None


class Batches(Sequence[Batch]):
    """An epoch's batches, each made when it is asked for: all of them at once may not fit into memory.

    chosen: the samples of each. make: the batch of some samples.
    """

    def __init__(self, make: Callable[[list[Sample]], Batch], chosen: Sequence[list[Sample]]):
        self._make, self._chosen = make, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Batches(self._make, self._chosen[index])
        return self._make(self._chosen[index])

    @property
    def num_loss_counted_tokens(self) -> int:
        return sum(sample.num_loss_counted_tokens for chosen in self._chosen for sample in chosen)


def make_batches(
    samples: Sequence[Sample],
    options: TrainingOptions,
    max_tokens: int,
    epoch: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
    packed: bool = False,
    share_prefix: bool = False,
) -> Batches:
    """Make an epoch's batches, in the order that (options.seed, epoch) gives.

    instructlab-training's packers split each batch of samples into minibatches of similar length and of at
    most max_tokens tokens (padding included; more if a sample is longer), and spread them over processes.
    How it is split changes memory and speed, not the batch's loss or gradient.
    share_prefix: tokens that all samples of a batch begin with become its `prefix`, if that saves enough;
    they still count in each row, which attends to them.
    """
    from instructlab.training.batch_packer import batch_lengths_to_minibatches_lpt
    from instructlab.training.padded_batch_packer import batch_lengths_to_minibatches_padded
    from instructlab.training.sampler import EpochSampler

    pack = batch_lengths_to_minibatches_lpt if packed else batch_lengths_to_minibatches_padded
    sampler = EpochSampler(len(samples), seed=options.seed, epoch=epoch)
    order = list(sampler) if shuffle else list(range(len(samples)))

    def batch_of(chosen: list[Sample]) -> Batch:
        prefix = shared_prefix(chosen) if share_prefix else []
        lengths = [len(sample) for sample in chosen]
        most = max_tokens
        if world_size > 1 and not packed:  # the packer deals out whole minibatches: a few would not go round
            most = min(most, math.ceil(sum(lengths) / (4 * world_size)))
        rows = pack(lengths, max(most, *lengths), world_size, rank)
        parts = [[chosen[i] for i in indices if i >= 0] for indices in rows]  # -1: nothing for this process
        return Batch(
            [Minibatch.of(part, packed, len(prefix)) for part in parts if part],
            sum(sample.num_loss_counted_tokens for sample in chosen),
            torch.tensor([prefix]) if prefix else None,
        )

    starts = range(0, len(order), options.batch_size)
    return Batches(
        batch_of, [[samples[i] for i in order[start : start + options.batch_size]] for start in starts]
    )


def shared_prefix(samples: Sequence[Sample]) -> list[int]:
    """Return the first tokens that all samples share and that predict nothing for the loss.

    Empty if sharing them would save little: a pass of its own and masked attention cost time, too.
    """
    predict_nothing = max(0, min(_first_counted(sample) for sample in samples) - 1)
    prefix = os.path.commonprefix([sample.input_ids for sample in samples])[:predict_nothing]
    saved = len(prefix) * (len(samples) - 1) / sum(len(sample) for sample in samples)
    return prefix if saved >= MIN_SHARED else []


def _first_counted(sample: Sample) -> int:
    return next(i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX)


class MinibatchRunner:
    """Runs minibatches one by one, and halves those that do not fit into memory.

    A loss or gradient is a sum over samples, so how they are split does not change it. A size that was once
    too large is split beforehand from then on.
    """

    def __init__(self):
        self.too_large = math.inf  # tokens

    def run(
        self, minibatches: Sequence[Minibatch], function: Callable[[Minibatch], Result], where: str
    ) -> Iterator[tuple[Minibatch, Result]]:
        """Yield (minibatch, function(minibatch)) for each minibatch, or for its parts.

        where: named in errors, for example "epoch 0, batch 3". Raises TrainingError, naming the
        answer, if a single one does not fit.
        """
        for minibatch in minibatches:
            alone, result = len(minibatch.samples) == 1, None
            if alone or minibatch.num_tokens < self.too_large:
                result = _unless_out_of_memory(function, minibatch)
                if result is None:
                    self._learn(minibatch, where)
            if result is None:
                yield from self.run(minibatch.split(), function, where)
            else:
                yield minibatch, result

    def _learn(self, minibatch: Minibatch, where: str) -> None:
        """Remember that a minibatch does not fit; TrainingError if it is a single answer."""
        if len(minibatch.samples) == 1:
            sample = minibatch.samples[0]
            raise TrainingError(
                f"{where}: out of memory with a single answer of {len(sample)} tokens, "
                f"{sample.where}; use --gradient_checkpointing, or a smaller --max_seq_len in step 2"
            )
        tokens = minibatch.num_tokens
        logger.warning("%s: out of memory with %d tokens at once; going on with half", where, tokens)
        self.too_large = min(self.too_large, tokens)


def _unless_out_of_memory(function: Callable[[Minibatch], Result], minibatch: Minibatch) -> Result | None:
    """Return the function's result; None if memory ran out, after freeing all that the function made."""
    try:
        return function(minibatch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # here, where the error no longer holds the frames that hold the tensors
    return None
