"""Optimizers and schedules."""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reco_fast.errors import ConfigError
from reco_fast.settings.config import ModelConfig, OptimConfig

BUILD_APEX = (  # the README of https://github.com/NVIDIA/apex, July 2026
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
MOST_ADAMW = 0.01  # well above the rates that are usual with AdamW, below those with SGD


def optimizer_name(config: OptimConfig, backbone: nn.Module) -> str:
    """`config.name`, or what auto takes for this backbone. Raises ConfigError for adamw at a rate of sgd."""
    auto = config.name == "auto"
    normalised = any(isinstance(module, _BatchNorm) for module in backbone.modules())  # frozen ones as well
    name = ("sgd" if normalised else "adamw") if auto else config.name
    if name == "adamw" and config.lr > MOST_ADAMW:  # it would train all the same, but badly
        why = " (auto took it because the backbone has no batch norm)" if auto else ""
        raise ConfigError(f"--optim.lr: expected at most {MOST_ADAMW} with adamw{why}, got {config.lr}")
    return name


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW (PyTorch's fused kernels), LARS, or one by NVIDIA Apex, for an encoder or a backbone alone. Weights
    of layers decay; norms, biases, tokens and positions do not, unless `decay_all`. Raises ConfigError where Apex is
    asked for and not there, and as `optimizer_name` does."""
    name = optimizer_name(config, getattr(model, "backbone", model))
    named = [(own, p) for own, p in model.named_parameters() if p.requires_grad]
    weights = [p for own, p in named if _is_weight(own, p)]
    others = [p for own, p in named if not _is_weight(own, p)]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": config.weight_decay, "adapt": True},
        {"params": others, "weight_decay": config.weight_decay if config.decay_all else 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    lr = torch.tensor(config.lr, device=named[0][1].device)
    optimizer: torch.optim.Optimizer
    states, betas = ["momentum_buffer"], (config.momentum, 0.999)
    if name == "lars":
        optimizer = LARS(groups, lr=lr, momentum=config.momentum)
    elif name == "apex-sgd":
        optimizer = _apex(config, "FusedSGD", _apex_sgd, groups, momentum=config.momentum, set_grad_none=True)
    elif name == "apex-lamb":
        optimizer = _apex(config, "FusedMixedPrecisionLamb", _apex_lamb, groups, betas=betas)
        states = ["exp_avg", "exp_avg_sq"]
    elif name == "adamw":
        # The fused kernels can be captured in any case; without the flag PyTorch refuses to.
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True, capturable=True)
        states = ["exp_avg", "exp_avg_sq"]
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=True)
    # Zeros from the start: where the scaler skips the very first step, fused SGD would keep uninitialised memory.
    for _, parameter in named:
        optimizer.state[parameter].update({state: torch.zeros_like(parameter) for state in states})
        if name == "adamw":
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return optimizer


def _is_weight(name: str, parameter: Tensor) -> bool:
    """Whether a layer multiplies by it: weights of norms have one dimension; tokens, positions and layer scales, which
    may have more, have other names."""
    return parameter.dim() > 1 and name.rpartition(".")[2].endswith("weight")


def _apex(
    config: OptimConfig, name: str, adapt: Callable[[Any], Any], groups: list[dict[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """Apex's class `name`, made to take `found_inf` and `grad_scale` as LARS below does."""
    try:
        kind = getattr(importlib.import_module("apex.optimizers"), name)
        return adapt(kind)(groups, lr=config.lr, **options)
    except (ImportError, AttributeError, RuntimeError) as error:  # none, PyPI's, or one built without its kernels
        raise ConfigError(
            f"--optim.name {config.name}: expected NVIDIA Apex with its CUDA kernels (not the apex on PyPI, which is "
            f"another project), got {str(error).splitlines()[0]!r}; to build it: {BUILD_APEX}"
        ) from None


def _apex_sgd(base: Any) -> Any:
    class ApexSGD(base):
        _step_supports_amp_scaling = True

        def step(self, closure: None = None) -> None:
            scale, found_inf = _scaling(self)
            if scale is not None:
                gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_div_(gradients, scale)
            if found_inf is not None:
                self._dummy_overflow_buf.copy_(found_inf)  # where this is not 0, Apex's kernels return at once
            super().step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad()  # takes no argument: it was told in its constructor

    return ApexSGD


def _apex_lamb(base: Any) -> Any:
    class ApexLAMB(base):
        _step_supports_amp_scaling = True

        def step(self, closure: None = None) -> None:
            scale, found_inf = _scaling(self)
            device = self.param_groups[0]["params"][0].device
            none, one = torch.zeros(1, device=device), torch.ones(1, device=device)
            given = _Scale(none if found_inf is None else found_inf, one if scale is None else scale)
            super().step(grad_scaler=given)

    return ApexLAMB


def _scaling(optimizer: torch.optim.Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """`grad_scale` and `found_inf`, attributes that a GradScaler or the step sets (and which may not be None then)."""
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


class _Scale(NamedTuple):
    """What Apex's LAMB asks a GradScaler for."""

    found_inf: Tensor
    scale: Tensor

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return self.scale


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

    def __init__(self, params: Any, lr: float | Tensor, momentum: float = 0.9, trust: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "adapt": True, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        scale, found_inf = _scaling(self)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: list[Tensor] = [p.grad for p in weights]
            if scale is not None:
                gradients = list(torch._foreach_div(gradients, scale))
            if found_inf is not None:
                gradients = [torch.where(found_inf > 0, 0.0, g) for g in gradients]
            updates: list[Tensor] = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if group["adapt"]:
                scales = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
                trust = torch.where((scales[0] > 0) & (scales[1] > 0), group["trust"] * scales[0] / scales[1], 1.0)
                torch._foreach_mul_(updates, list(trust.unbind()))
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in weights]
            momentum, lr = group["momentum"], group["lr"]
            if found_inf is not None:
                momentum, lr = torch.where(found_inf > 0, 1.0, momentum), (1 - found_inf) * lr
                torch._foreach_mul_(updates, 1 - found_inf)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(weights, torch._foreach_mul(buffers, lr))


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def ramp(step: int, total: int, share: float, first: int = 0) -> float:
    """0 before the step `first`, then linear up to 1 over `share` of `total` steps, then 1."""
    if step < first:
        return 0.0
    return min(1.0, (step - first + 1) / (share * total)) if share > 0 else 1.0


def teacher_momentum(step: int, total: int, config: ModelConfig) -> float:
    """Half a cosine from `teacher_momentum` to its end, if it has one (BYOL, arXiv 2006.07733, section 3.2)."""
    begin, end = config.teacher_momentum, config.teacher_momentum_end
    return begin if end is None else end - (end - begin) * 0.5 * (1 + math.cos(math.pi * step / total))
