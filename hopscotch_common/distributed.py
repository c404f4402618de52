"""Several processes (`accelerate launch --multi_gpu`): candidates spread over them, or each batch."""

import torch

from hopscotch_common.search import Processes


def process_state(device: str):
    """accelerate's state of this process, which joins the others on first use.

    device: `--device`. Processes talk over NCCL, or over gloo where they run on CPUs.
    """
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def candidate_processes(device: str) -> Processes:
    """This process's place among those that share a search's candidates."""
    from accelerate.utils import gather_object

    state = process_state(device)
    if state.num_processes == 1:
        return Processes()
    return Processes(state.process_index, state.num_processes, lambda item: gather_object([item]))


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor, in place, over the processes that share each batch."""
    torch.distributed.all_reduce(tensor)
    return tensor
