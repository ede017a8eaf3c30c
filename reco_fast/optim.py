"""Optimizers and schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reco_fast.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD (PyTorch's fused kernel) or LARS, with no decay on norm and bias parameters unless `decay_all`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in parameters if p.dim() <= 1]
    matrices = [p for p in parameters if p.dim() > 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "adapt": True},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_all else 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    lr = torch.tensor(config.lr, device=parameters[0].device)
    optimizer: torch.optim.Optimizer
    if config.name == "lars":
        optimizer = LARS(groups, lr=lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=True)
    # Zeros from the start: where the scaler skips the very first step, fused SGD would keep uninitialised memory.
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """From the next step on. Written to the device where the rate is there, so that a captured step reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each weight matrix is scaled by η·‖w‖/‖g + λw‖ (arXiv 1708.03888, eq. 6).

    Groups with `adapt=False` (norm and bias parameters) take the plain step. A few multi-tensor kernels a step and
    no synchronisation. As in PyTorch's fused optimizers, a scaler or the caller may set `grad_scale` (0-d, what
    gradients were multiplied by) and `found_inf` (0-d, 1 where this step must change nothing).
    """

    _step_supports_amp_scaling = True  # so that GradScaler leaves both to `step`, and does not wait for the device
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float | Tensor, momentum: float = 0.9, trust: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "adapt": True, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: list[Tensor] = [p.grad for p in weights]
            if self.grad_scale is not None:
                gradients = list(torch._foreach_div(gradients, self.grad_scale))
            if self.found_inf is not None:
                gradients = [torch.where(self.found_inf > 0, 0.0, g) for g in gradients]
            updates: list[Tensor] = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if group["adapt"]:
                scales = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
                trust = torch.where((scales[0] > 0) & (scales[1] > 0), group["trust"] * scales[0] / scales[1], 1.0)
                torch._foreach_mul_(updates, list(trust.unbind()))
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in weights]
            momentum, lr = group["momentum"], group["lr"]
            if self.found_inf is not None:
                momentum, lr = torch.where(self.found_inf > 0, 1.0, momentum), (1 - self.found_inf) * lr
                torch._foreach_mul_(updates, 1 - self.found_inf)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(weights, torch._foreach_mul(buffers, lr))


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def ramp(step: int, total: int, share: float) -> float:
    """Linear up to 1 over the first `share` of `total` steps, then 1."""
    return min(1.0, (step + 1) / (share * total)) if share > 0 else 1.0
