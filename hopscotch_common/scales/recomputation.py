"""Recomputation in the backward pass of what can be made from less than the stock modules keep.

The weights are frozen, so norms and the elementwise part of gated MLPs have gradients only for their
inputs. The stock modules keep float32 copies and intermediate products for these. Here only the inputs
are kept, in their own dtype, and the rest is recomputed in the backward pass, a few rows at a time.
"""

import functools
import types

import torch
from torch.autograd.function import once_differentiable

from hopscotch_common.scales.modeling_hopscotch import rows_at_once

GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class RMSNorm(torch.autograd.Function):
    """A frozen RMS norm of tensors [..., features] with weights [features]; only the tensor is saved.

    With r = 1 / rms(x) and h = weight * upstream, the gradient is r * h - r^3 * mean(h * x) * x,
    computed in float32, `rows_at_once` rows at a time.
    """

    @staticmethod
    def forward(ctx, norm, tensor, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(tensor, weight)
        return norm(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        tensor, weight = ctx.saved_tensors
        gradient = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for x, h, rows in zip(*map(rows_at_once, (tensor, upstream, gradient)), strict=True):
            x, h = x.float(), h * weight.float()
            r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
            along_x = (h * x).mean(-1, keepdim=True) * r.pow(3)
            rows.copy_(h.mul_(r).addcmul_(x, along_x, value=-1))
        return None, gradient, None, None


class Gated(torch.autograd.Function):
    """`act(gate) * up`, which saves gate and up [..., features], but not act(gate)."""

    @staticmethod
    def forward(ctx, act, gate, up):
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gate, up = ctx.saved_tensors
        leaf = gate.detach().requires_grad_()
        with torch.enable_grad():
            activated = ctx.act(leaf)
        (gate_gradient,) = torch.autograd.grad(activated, leaf, upstream * up)
        return None, gate_gradient, upstream * activated.detach()


def _saves(module: torch.nn.Module, tensor: torch.Tensor) -> bool:
    """Whether autograd would save anything, and save it only for the tensor's gradient.

    Within torch.compile the compiler chooses what to keep.
    """
    return (
        torch.is_grad_enabled()
        and tensor.requires_grad
        and not torch.compiler.is_compiling()
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


class RecomputedNorm:
    """Mixin for a stock RMSNorm. weight_offset: what the class adds to its weights (Gemma: 1)."""

    weight_offset: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = super().forward
        if not _saves(self, hidden_states):
            return norm(hidden_states)
        weight = self.weight.float() + self.weight_offset if self.weight_offset else self.weight
        return RMSNorm.apply(norm, hidden_states, weight, _eps(self))


class RecomputedGatedMLP:
    """Mixin for a stock MLP of `gate_proj`, `up_proj`, `down_proj` and `act_fn`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _saves(self.act_fn, hidden_states) or self.training:
            return super().forward(hidden_states)
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(Gated.apply(self.act_fn, gate, up))


def _eps(norm: torch.nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _weight_offset(norm: torch.nn.Module) -> float | None:
    """What a norm adds to its weights, 0 or 1, inferred from what it computes; None if it is neither."""
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    if weight is None or weight.is_meta or eps is None:  # meta: offloaded, which hooks handle
        return None
    row = torch.linspace(-2, 3, len(weight), device=weight.device, dtype=weight.dtype)[None]
    normed = row.float() * torch.rsqrt(row.float().square().mean() + eps)
    found = norm(row).float()
    made = {offset: normed * (weight.float() + offset) for offset in (0.0, 1.0)}
    nearest = min(made, key=lambda offset: (found - made[offset]).abs().sum().item())
    return nearest if torch.allclose(found, made[nearest], rtol=0.03, atol=1e-3) else None


@functools.cache
def _recomputing_class(mixin: type, stock: type, **attributes) -> type:
    return type(f"Recomputed{stock.__name__}", (mixin, stock), attributes)


def recompute_elementwise(model: torch.nn.Module) -> None:
    """Make RMSNorms and gated MLPs of a model in eval mode save only their inputs.

    Their outputs stay the same bit for bit. Calling it again changes nothing.
    """
    for module in model.modules():
        stock = type(module)
        if isinstance(module, (RecomputedNorm, RecomputedGatedMLP)):
            continue
        if stock.__name__.endswith("RMSNorm"):
            offset = _weight_offset(module)
            if offset is not None:
                _become(module, _recomputing_class(RecomputedNorm, stock, weight_offset=offset))
        elif {name for name, _ in module.named_children()} == GATED_MLP:
            _become(module, _recomputing_class(RecomputedGatedMLP, stock))


def _become(module: torch.nn.Module, new_class: type) -> None:
    module.__class__ = new_class
    if hasattr(module, "_old_forward"):  # accelerate's hooks of a split model call it
        module._old_forward = types.MethodType(new_class.forward, module)
