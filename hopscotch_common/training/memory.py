"""What runs at once: a token budget by the memory that is there, and halves of what does not fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from hopscotch_common.errors import TrainingError, logger
from hopscotch_common.training.batches import Layout, Minibatch, Sample
from hopscotch_common.training.loss import summed_loss

CPU_TOKENS = 512  # few answers at a time are as fast as many, waste less on padding and need less memory
PROBE_TOKENS = 1024
MARGIN = 0.8  # of the free memory: fragments, and the logits of a few rows, take the rest

Result = TypeVar("Result")


def token_budget(model, samples: Sequence[Sample], layout: Layout, requested: int | None) -> int:
    """Tokens that run at once: as requested, else by device, and never below the longest sample.

    On a GPU a probe measures the memory that a token takes in a training step. Of a model that is
    spread over GPUs, the fullest one decides.
    """
    if requested is not None:
        return requested
    longest = max(len(sample) for sample in samples)
    devices = gpus_of(model)
    if not devices:
        return max(CPU_TOKENS, longest)
    taken = bytes_per_token(model, samples, layout, devices)
    budgets = {device: int(MARGIN * free_bytes(device) / taken[device]) for device in devices}
    tightest = min(budgets, key=budgets.get)
    logger.info(
        "%d tokens at once: %.0f kB a token, %.1f GB free on %s (--max_tokens_per_batch sets it)",
        max(budgets[tightest], longest),
        taken[tightest] / 1e3,
        free_bytes(tightest) / 1e9,
        tightest,
    )
    return max(budgets[tightest], longest)


def gpus_of(model) -> set[torch.device]:
    """The GPUs that hold a model's parameters."""
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process may still take, its allocator's cache included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_per_token(model, samples: Sequence[Sample], layout: Layout, devices) -> dict[torch.device, float]:
    """Peak memory above the weights of one training step, a token, on each of the (CUDA) devices."""
    ids = max(samples, key=len).input_ids[:PROBE_TOKENS]
    if len(ids) < PROBE_TOKENS:
        ids = (ids * math.ceil(PROBE_TOKENS / len(ids)))[:PROBE_TOKENS]
    minibatch = Minibatch.of([Sample(ids, ids)], layout).to(model.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = {}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    try:
        torch.autograd.grad(summed_loss(model, minibatch), parameters, allow_unused=True)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory in a training step of {PROBE_TOKENS} tokens; use --gradient_checkpointing, "
            "--device split or --dtype bfloat16"
        ) from error
    return {d: max(1, torch.cuda.max_memory_allocated(d) - before[d]) / PROBE_TOKENS for d in devices}


class MinibatchRunner:
    """Runs minibatches one by one, and halves of those that do not fit into memory.

    A loss or gradient is a sum over samples, so how they are split does not change it. What turned
    out too large once is split beforehand from then on.
    """

    def __init__(self):
        self.too_large = math.inf  # tokens

    def run(
        self, minibatches: Sequence[Minibatch], function: Callable[[Minibatch], Result], where: str
    ) -> Iterator[tuple[Minibatch, Result]]:
        """(minibatch, function(minibatch)) of each minibatch, or of its parts.

        where: named in errors, for example "epoch 0, batch 3". Raises TrainingError, naming the
        answer, when a single one does not fit.
        """
        waiting = list(reversed(minibatches))
        while waiting:
            minibatch = waiting.pop()
            splits = len(minibatch.samples) > 1
            if not (splits and minibatch.num_tokens >= self.too_large):
                result = _unless_out_of_memory(function, minibatch)
                if result is not None:
                    yield minibatch, result
                    continue
                if not splits:
                    sample = minibatch.samples[0]
                    raise TrainingError(
                        f"{where}: out of memory with a single answer of {len(sample)} tokens, "
                        f"{sample.where}; use --gradient_checkpointing, or a smaller --max_seq_len in step 2"
                    )
                logger.warning(
                    "%s: out of memory with %d tokens at once; going on with half",
                    where,
                    minibatch.num_tokens,
                )
                self.too_large = min(self.too_large, minibatch.num_tokens)
            waiting += reversed(minibatch.split())


def _unless_out_of_memory(function: Callable[[Minibatch], Result], minibatch: Minibatch) -> Result | None:
    """The function's result; None when memory ran out, with all that it had made freed."""
    try:
        return function(minibatch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # here, where the error no longer holds the frames that hold the tensors
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is torch's way to say so, which differs by device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
