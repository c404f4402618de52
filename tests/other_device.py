"""A second device on a machine that has only a CPU, to find tensors that were left on the wrong one.

A `Far` tensor keeps its numbers on the CPU and says that it lies on device `meta`. While `two_devices` is
on, operations on tensors of both devices raise, as CUDA would; what is made of far tensors is far. What
CUDA allows is allowed: copies, CPU tensors without dimensions, and CPU indices into a far tensor.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

FAR = torch.device("meta")
COPYING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")


class MixedDevices(RuntimeError):
    """An operation got tensors of both devices."""


class Far(torch.Tensor):
    """A tensor on the other device; `near` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor):
        layout = dict(strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype)
        far = torch.Tensor._make_wrapper_subclass(cls, near.size(), device=FAR, **layout)
        far.near = near
        return far

    def __repr__(self) -> str:
        return f"Far({self.near})"

    def item(self):
        return self.near.item()

    def tolist(self):
        return self.near.tolist()

    def __getitem__(self, index):
        return super().__getitem__(_tensors_for_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_tensors_for_lists(index), value)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def _tensors_for_lists(index):
    """torch makes tensors of lists on the device itself, where `meta` would lose their numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part, dtype=torch.long) if isinstance(part, list) else part for part in parts)


class two_devices(TorchDispatchMode):  # noqa: N801  used as torch's own modes are
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args: tuple, kwargs: dict):
    """An operation's result on the device of its tensors or, where it names one, on that."""
    leaves, tree = tree_flatten((args, kwargs))
    leaves = [_taken_in(leaf) for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, tree)
    far = [leaf for leaf in leaves if isinstance(leaf, Far)]
    near = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Far) and x.dim()]
    indexes = operation._schema.name in INDEXING and isinstance(args[0], Far)
    if far and near and operation not in COPYING and not indexes:
        raise MixedDevices(
            f"{operation} of tensors {[(x.device.type, tuple(x.shape)) for x in (*far, *near)]}"
        )
    asked = kwargs.get("device")
    ends_far = torch.device(asked) == FAR if asked is not None else bool(far)
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    result = operation(*_near(args), **_near(kwargs))
    if isinstance(result, torch.Tensor) and operation._schema.name.endswith("_"):
        return args[0]  # what was written to stays where it is
    if operation is COPYING[0] and asked is None:
        ends_far = isinstance(args[0], Far)
    if not ends_far:
        return result
    same = {id(tensor.near): tensor for tensor in far}
    return tree_map_only(torch.Tensor, lambda tensor: same.get(id(tensor)) or Far(tensor), result)


def _near(tree):
    return tree_map_only(Far, lambda tensor: tensor.near, tree)


def _taken_in(leaf):
    """torch.tensor([], device="meta"), of which transformers makes caches, passes by the mode."""
    if (
        isinstance(leaf, torch.Tensor)
        and leaf.device == FAR
        and not isinstance(leaf, Far)
        and not leaf.numel()
    ):
        return Far(torch.empty(leaf.shape, dtype=leaf.dtype))
    return leaf


def to_far(model: torch.nn.Module) -> torch.nn.Module:
    """Move a model's parameters and buffers to the other device, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            moved = torch.nn.Parameter(Far(parameter.detach()), requires_grad=parameter.requires_grad)
            module._parameters[name] = moved
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = Far(buffer.detach())
    return model
