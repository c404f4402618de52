"""Several processes (`accelerate launch --multi_gpu`): they share a search's candidates, or each batch."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass
class Processes:
    """How candidates spread over processes. gather: one object a process -> all of them, in all."""

    rank: int = 0
    count: int = 1
    gather: Callable[[object], list] = lambda item: [item]


def join_processes(device: str) -> Processes:
    """This process's place among those that accelerate launched; joins them on first use.

    device: `--device`. Processes talk over NCCL, or over gloo where they run on CPUs. One that has
    no candidate waits for the others' whole epoch, so the timeout is long.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
    if state.num_processes == 1:
        return Processes()
    return Processes(state.process_index, state.num_processes, lambda item: gather_object([item]))


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor, in place, over the processes that share each batch."""
    torch.distributed.all_reduce(tensor)
    return tensor
