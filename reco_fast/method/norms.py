"""Batch norms as a step uses them: of groups of the batch in one pass, and their running averages."""

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MANY_VALUES = 1024  # a group and channel: from here on PyTorch's group norm is fast on a CPU


class _Kept(_BatchNorm):
    """A batch norm that is in eval mode whatever the modules around it are told."""

    def train(self, mode: bool = True) -> "_Kept":
        return super().train(False)


def batch_norms(*modules: nn.Module) -> list[_BatchNorm]:
    """But for those whose statistics are kept."""
    found = (m for module in modules for m in module.modules())
    return [m for m in found if isinstance(m, _BatchNorm) and not isinstance(m, _Kept)]


def keep_statistics(module: nn.Module) -> None:
    """Make every batch norm in `module`, and in copies of it, use its running averages and leave them as they are."""
    norm: Any
    for norm in batch_norms(module):
        norm.eval().__class__ = _kept(norm.__class__)


@functools.cache
def _kept(kind: type) -> type:
    return type(f"Kept{kind.__name__}", (_Kept, kind), {})


class _NormOfGroups(torch.autograd.Function):
    """x [N, C, ...] normalised by `mean` and `var` [groups, C], which are those of its equal parts.

    Statistics are laid out by image, as `x` is, and not `x` by group: a compiler fuses pointwise operations of one
    shape alone. And the gradient is written out, because then one pass over `x` and what comes back gives all its sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        out = (x.to(mean.dtype) - _per_image(mean, x)) * _per_image(rstd * weight, x)
        out = out + bias.view(-1, *[1] * (x.dim() - 2))
        # Compiled by PyTorch 2.11, a cast here that changes nothing would make gradients zero.
        return out if x.dtype == out.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        wide, centred = grad.to(mean.dtype), x.to(mean.dtype) - _per_image(mean, x)
        total = torch.sum(*_parts(wide, len(mean)))
        along = torch.sum(*_parts(wide * centred, len(mean))) * rstd
        values = x.numel() // mean.numel()
        slope = _per_image(along * rstd / values, x)
        out = (wide - _per_image(total / values, x) - centred * slope) * _per_image(rstd * weight, x)
        return out.to(x.dtype), along.sum(0).to(weight.dtype), total.sum(0).to(weight.dtype), None, None, None


def _parts(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """x [N, C, ...] as [groups, N/groups, C, ...], and the dimensions within a group and channel."""
    return x.unflatten(0, (groups, -1)), (1, *range(3, x.dim() + 1))


def _per_image(statistics: Tensor, x: Tensor) -> Tensor:
    """[groups, C] as [N, C, 1, ...], for `x` [N, C, ...]."""
    rows = statistics[:, None].expand(-1, len(x) // len(statistics), -1).flatten(0, 1)
    return rows.view(*rows.shape, *[1] * (x.dim() - 2))


class _Grouped(_BatchNorm):
    """A batch norm that, in training mode, takes each group of the batch [views·n, C, ...] by itself, as calls with
    each of `torch.chunk(groups)` of one view after the other would, running averages included. Channels-last stays so.
    """

    groups: int
    views: int
    shares: Tensor  # [views·groups] float32: a group's part in the running averages, the last group's last

    def forward(self, input: Tensor) -> Tensor:
        return self.then(self._normalise(input)) if self.training else super().forward(input)

    def then(self, normalised: Tensor) -> Tensor:
        return normalised

    def _normalise(self, x: Tensor) -> Tensor:
        images = len(x) // self.views
        rows = -(-images // self.groups)
        values = rows * x[0, 0].numel()
        equal = images % rows == 0 and values > 1
        if equal and (x.is_cuda or torch.compiler.is_compiling()):
            return self._plain(x, len(x) // rows, values)
        # On a CPU without a compiler, sums over the outer dimensions are slow but for those inside of these operators.
        fits = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and self.weight is not None
        if equal and fits and values >= MANY_VALUES:
            return self._as_group_norm(x, rows, values)
        running = self.running_mean, self.running_var
        momentum = self.momentum or 0.0
        parts = (part for view in x.split(images) for part in view.split(rows))
        return torch.cat([F.batch_norm(p, *running, self.weight, self.bias, True, momentum, self.eps) for p in parts])

    def _plain(self, x: Tensor, groups: int, values: int) -> Tensor:
        """A reduction and a pointwise pass, for a compiler to fuse with what is around them."""
        weight = x.new_ones(x.shape[1]) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[1]) if self.bias is None else self.bias
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(*_parts(wide, groups), correction=0)
        self._follow(mean, var, values)
        out: Tensor = _NormOfGroups.apply(x, weight, bias, mean, var, self.eps)
        return out

    def _as_group_norm(self, x: Tensor, rows: int, values: int) -> Tensor:
        """A group of images is one tall image in memory, and a group norm with one channel a group norms that."""
        groups, (channels, height) = len(x) // rows, x.shape[1:3]
        tall = x.unflatten(0, (groups, rows)).transpose(1, 2).flatten(2, 3)  # [groups, C, rows·H, W]
        out, mean, rstd = torch.native_group_norm(
            tall, self.weight, self.bias, groups, channels, values, channels, self.eps
        )
        self._follow(mean.view(groups, -1), rstd.view(groups, -1).pow(-2).sub_(self.eps), values)
        return out.unflatten(2, (rows, height)).transpose(1, 2).flatten(0, 1)

    def _follow(self, mean: Tensor, var: Tensor, values: int) -> None:
        """The running averages after one group [C] of `mean`, `var` [groups, C] after the other."""
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            return
        kept, shares = (1 - self.momentum) ** len(mean), self.shares[-len(mean) :]
        self.running_mean.addmv_(mean.detach().T, shares, beta=kept)
        self.running_var.addmv_(var.detach().T, shares, beta=kept, alpha=values / (values - 1))


class _GroupedAct(_Grouped):
    """timm's, which drops out and activates what it has normalised."""

    drop: nn.Module
    act: nn.Module

    def then(self, normalised: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(normalised))
        return activated


@functools.cache
def _grouped(kind: type) -> type | None:
    """The class that takes groups in place of `kind`. timm's is known by its name: a network without it does without
    the seconds in which timm is imported."""
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return type(f"Grouped{kind.__name__}", (_Grouped, kind), {})
    if (kind.__module__, kind.__name__) == ("timm.layers.norm_act", "BatchNormAct2d"):
        return type(f"Grouped{kind.__name__}", (_GroupedAct, kind), {})
    return None


def can_group(model: nn.Module) -> bool:
    """Whether `use_groups` knows every batch norm in `model`. A subclass may do anything around its norm."""
    norms: list[Any] = [*batch_norms(model)]
    return all(_grouped(norm.__class__) is not None and norm.momentum is not None for norm in norms)


def use_groups(model: nn.Module, groups: int, views: int = 1) -> None:
    """Make every batch norm in `model` one of `groups` in each of the batch's `views`; parameters and buffers stay."""
    norm: Any
    for norm in batch_norms(model):
        momentum = norm.momentum or 0.0
        device = None if norm.running_mean is None else norm.running_mean.device
        powers = torch.arange(groups * views - 1, -1, -1, device=device)
        norm.__class__ = _grouped(norm.__class__)
        norm.groups, norm.views = groups, views
        norm.register_buffer("shares", momentum * (1 - momentum) ** powers, persistent=False)


class NormBuffers:
    """What forward passes change in the batch norms of student and teacher before it is known whether the gradient is
    finite. A few kernels whatever the number of layers, and nothing waits for the device."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        """Of a `teacher` whose batch norms are in eval mode nothing changes."""
        norms = {"student": batch_norms(student), "teacher": [n for n in batch_norms(teacher) if n.training]}
        tracking = {name: [n for n in found if n.track_running_stats] for name, found in norms.items()}
        every = itertools.chain.from_iterable(tracking.values())
        self._averages = [getattr(norm, name) for norm in every for name in ("running_mean", "running_var")]
        counts = {name: [norm.num_batches_tracked for norm in found] for name, found in tracking.items()}
        self._counts = {name: [count for count in found if count is not None] for name, found in counts.items()}

    def copy(self) -> Tensor | None:
        """The running averages, one after the other; None where there are none."""
        return torch.cat(self._averages) if self._averages else None

    @torch.no_grad()
    def restore(self, values: Tensor | None, where: Tensor) -> None:
        """Back to `values` where the 0-d tensor `where` is not 0."""
        now = self.copy()
        if values is not None and now is not None:
            kept = torch.where(where != 0, values, now).split([average.numel() for average in self._averages])
            torch._foreach_copy_(self._averages, kept)

    @torch.no_grad()
    def count(self, skipped: Tensor, **batches: int) -> None:
        """Add to `num_batches_tracked`, which the running modules leave alone, the passes of `student` and `teacher`,
        but none where `skipped` is not 0."""
        passed = (skipped == 0).long()
        for name, number in batches.items():
            if self._counts[name]:
                torch._foreach_add_(self._counts[name], passed, alpha=number)
