"""Several processes (`accelerate launch --multi_gpu`): they share a search's candidates, or each batch."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from hopscotch_common.errors import HopscotchError, InputError, reason_of
from hopscotch_common.loading.loader import resolve_device

# A process may wait for another's whole epoch, for example if its own candidate diverged in the first batch.
# One that ends does not make the others wait: its connections close.
TIMEOUT = timedelta(days=1)

Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over processes, in place


@dataclass(frozen=True)
class Group:
    """Processes that share each batch. index: which of the groups; rank and size: in the group.

    reduce: sums a tensor over the group, in place; None if a process is alone.
    """

    index: int = 0
    rank: int = 0
    size: int = 1
    reduce: Reduce | None = None


@dataclass
class Processes:
    """This process among those that a launcher started. gather: one object per process -> all, in all."""

    rank: int = 0
    count: int = 1
    gather: Callable[[object], list] = lambda item: [item]
    _groups: dict[int, Group] = field(default_factory=dict)
    _made: dict[int, object] = field(default_factory=dict)  # torch's groups by number, until they part

    def check_alike(self, settings: dict) -> None:
        """Raise InputError, in all processes, unless these settings are the same in all."""
        first, *_ = all_settings = self.gather(settings)
        for rank, others in enumerate(all_settings):
            for name, value in first.items():
                if others.get(name) != value:
                    raise InputError(
                        f"process {rank} has {name} = {others.get(name)!r}, and process 0 has {value!r}: "
                        "start all with one command, over the same data and model"
                    )

    @property
    def everyone(self) -> Group:
        """All processes as one group."""
        return self.group(1)

    def group(self, number: int) -> Group:
        """Return this process's group when all are spread over `number` groups, 1 to `count`.

        All processes must ask for the same numbers in the same order.
        """
        if number not in self._groups:
            members: list[list[int]] = [[] for _ in range(number)]
            for rank in range(self.count):
                members[rank * number // self.count].append(rank)
            mine = self.rank * number // self.count
            if number < self.count:
                self._made[number], _ = torch.distributed.new_subgroups_by_enumeration(members, TIMEOUT)
            reduce = functools.partial(self._sum, number) if len(members[mine]) > 1 else None
            place = (mine, members[mine].index(self.rank), len(members[mine]))
            self._groups[number] = Group(*place, reduce)
        return self._groups[number]

    def _sum(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor, group=self._made[number])
        return tensor


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that accelerate launched, and yield this one's place; part on leaving.

    device: `--device`. Processes communicate over NCCL, or over gloo if they run on CPUs. Within the context,
    a communication error becomes a HopscotchError: mostly another process ended, and says why itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (device == "split" or device.startswith("cuda:")):
        raise InputError(
            f"--device {device} with a launcher would put every process's model on the same GPUs; leave "
            "--device out, or start the script without the launcher"
        )
    for sharding in ("FSDP", "DEEPSPEED"):  # set in the user's accelerate configuration, for other trainings:
        os.environ[f"ACCELERATE_USE_{sharding}"] = "false"  # transformers would give all but rank 0 zeros
    place = resolve_device(device)
    state = PartialState(cpu=place is not None and place.type == "cpu", timeout=TIMEOUT)
    if state.num_processes == 1:
        yield Processes()
        return
    processes = Processes(state.process_index, state.num_processes, lambda item: gather_object([item]))
    failed = True
    try:
        yield processes
        failed = False
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise HopscotchError(
            f"process {processes.rank} cannot talk with the others: if one of them ended, its own line says "
            f"why ({reason_of(error)})"
        ) from error
    finally:
        processes._made.clear()  # torch's groups, whose threads live as long as something holds them
        # A gloo thread that is left when the interpreter closes aborts the process. NCCL would wait for all
        # processes, and after an error the others may hang in something else.
        if not failed or state.backend == "gloo":
            state.destroy_process_group()
