"""Several processes (`accelerate launch`): candidates spread over them, or each batch."""

import torch

from hopscotch_common.search import Processes


def candidate_processes() -> Processes:
    """This process's place among those that share a search's candidates."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    if state.num_processes == 1:
        return Processes()
    return Processes(state.process_index, state.num_processes, lambda item: gather_object([item]))


def rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where no launcher started several."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def sum_over_processes():
    """A function that sums a tensor over the processes that share each batch; None if alone."""
    from accelerate import PartialState

    if PartialState().num_processes == 1:
        return None

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    return reduce
