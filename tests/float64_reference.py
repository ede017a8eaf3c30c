"""The ReCo loss and its gradients in float64, written from the paper's formulas: softmax over whole logits, and
the gradient of each term by hand. Also the problems that the implementations are compared on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reco_fast.kernels.reference import ReCoLossOutput

DEFAULTS: dict[str, Any] = {
    "temperature": 0.2,
    "student_temperature": 0.1,
    "teacher_temperature": 0.04,
    "global_weight": 1.0,
    "local_weight": 2.0,
    "mix_anchor": "query",
}


@dataclass
class Problem:
    """The arguments of `reco_loss`: tensors by position, settings by name."""

    query: Tensor
    query_mix: Tensor
    key: Tensor
    key_weak: Tensor
    bank: Tensor
    bank_weak: Tensor
    permutation: Tensor
    mix_ratio: float | Tensor
    settings: dict[str, Any] = field(default_factory=lambda: dict(DEFAULTS))

    def tensors(self) -> tuple[Any, ...]:
        names = ("query", "query_mix", "key", "key_weak", "bank", "bank_weak", "permutation", "mix_ratio")
        return tuple(getattr(self, name) for name in names)


@dataclass
class Result:
    losses: np.ndarray  # [5]: total, instance, global_relation, local_relation, teacher_entropy
    grad_query: np.ndarray
    grad_query_mix: np.ndarray


KINDS = ("random", "clustered", "equal_rows", "positive_in_bank", "teacher_0.02", "ratio_0", "ratio_1", "zero_vectors")


def make_problem(
    kind: str,
    rows: int,
    length: int,
    width: int = 128,
    row_dtype: torch.dtype = torch.float32,
    bank_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> Problem:
    """Raw rows of many scales and unit banks. The kinds are `KINDS`."""
    generator = torch.Generator().manual_seed(rows * 1_000_003 + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    row_sets = [normal(rows, width) * normal(rows, 1).exp() for _ in range(4)]
    banks = [normal(length, width) for _ in range(2)]
    ratio: float | Tensor = torch.rand(rows, generator=generator)
    if kind == "clustered":  # every vector lies near one of four directions, so that softmax is peaked
        centres = 4 * normal(4, width)
        row_sets = [centres[torch.arange(rows) % 4] + x for x in row_sets]
        banks = [centres[torch.arange(length) % 4] + x for x in banks]
    elif kind == "equal_rows":
        row_sets = [x[:1].expand(rows, width) for x in row_sets]
        banks = [x[:1].expand(length, width) for x in banks]
    elif kind == "positive_in_bank":
        row_sets[2] = 2 * banks[0][torch.arange(rows) % length]
    elif kind == "teacher_0.02":  # below the fixed maximum's range
        settings = {"teacher_temperature": 0.02} | settings
    elif kind == "ratio_0":
        ratio = 0.0
    elif kind == "ratio_1":
        ratio = torch.tensor(1.0)
    elif kind == "zero_vectors":
        row_sets = [x.index_fill(0, torch.tensor([position % rows]), 0.0) for position, x in enumerate(row_sets)]
    query, query_mix, key, key_weak = (x.to(row_dtype).to(device) for x in row_sets)
    bank, bank_weak = (torch.nn.functional.normalize(x).to(bank_dtype).to(device) for x in banks)
    permutation = torch.randperm(rows, generator=generator).to(device)
    if isinstance(ratio, Tensor):
        ratio = ratio.to(device)
    return Problem(query, query_mix, key, key_weak, bank, bank_weak, permutation, ratio, DEFAULTS | settings)


def solve(problem: Problem, at_once: int = 128) -> Result:
    """The answer in float64, for `at_once` rows at a time, which bounds the memory."""
    raw_q, raw_m, raw_k, raw_v, bank_a, bank_b = (x.detach().double() for x in problem.tensors()[:6])
    s = {name: float(value) if name != "mix_anchor" else value for name, value in problem.settings.items()}
    all_q, all_m, all_k, all_v = (_unit(x) for x in (raw_q, raw_m, raw_k, raw_v))
    ratio = torch.as_tensor(problem.mix_ratio, dtype=torch.float64, device=raw_q.device).reshape(-1, 1)
    anchor = all_q if s["mix_anchor"] == "query" else all_k
    targets = _unit(ratio * anchor + (1 - ratio) * all_k[problem.permutation.long()])
    losses, grads_q, grads_m = [], [], []
    for q, m, k, v, target in zip(*(x.split(at_once) for x in (all_q, all_m, all_k, all_v, targets)), strict=True):
        instance, grad_q = _contrast(q, k, bank_a, s["temperature"])
        local, grad_m = _contrast(m, target, bank_a, s["temperature"])
        teacher, log_teacher = _softmax(v @ bank_b.T / s["teacher_temperature"])
        student, log_student = _softmax(q @ bank_b.T / s["student_temperature"])
        relation = -(teacher * log_student).sum(dim=1)
        entropy = -(teacher * log_teacher).sum(dim=1)
        grads_q.append(grad_q + s["global_weight"] * (student - teacher) @ bank_b / s["student_temperature"])
        grads_m.append(s["local_weight"] * grad_m)
        total = instance + s["global_weight"] * relation + s["local_weight"] * local
        has_global, has_local = s["global_weight"] != 0, s["local_weight"] != 0
        losses.append(torch.stack([total, instance, relation * has_global, local * has_local, entropy * has_global]))
    rows = len(all_q)
    return Result(
        torch.cat(losses, dim=1).mean(dim=1).cpu().numpy(),
        (_through_unit(raw_q, torch.cat(grads_q)) / rows).cpu().numpy(),
        (_through_unit(raw_m, torch.cat(grads_m)) / rows).cpu().numpy(),
    )


def run(implementation: Any, problem: Problem, upstream: float = -3.0) -> Result:
    """Losses, and gradients divided by the upstream gradient, of an implementation on fresh leaves."""
    query, query_mix = (x.detach().clone().requires_grad_() for x in (problem.query, problem.query_mix))
    output: ReCoLossOutput = implementation(query, query_mix, *problem.tensors()[2:], **problem.settings)
    (output.total * upstream).backward()
    assert not any(part.requires_grad for part in output[1:])
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (query, query_mix)]
    assert [x.dtype for x in grads] == [problem.query.dtype, problem.query_mix.dtype]
    losses = np.array([float(x.detach()) for x in output])
    return Result(losses, _array(grads[0]) / upstream, _array(grads[1]) / upstream)


@dataclass
class Errors:
    """Relative errors; the parts' are absolute below 1, since entropy and cross-entropy may vanish."""

    total: float
    parts: float
    grad_query: float
    grad_query_mix: float


def errors(found: Result, expected: Result) -> Errors:
    difference = np.abs(found.losses - expected.losses)
    return Errors(
        float(difference[0] / np.abs(expected.losses[0])),
        float((difference / np.maximum(1, np.abs(expected.losses))).max()),
        _frobenius(found.grad_query, expected.grad_query),
        _frobenius(found.grad_query_mix, expected.grad_query_mix),
    )


def _frobenius(found: np.ndarray, expected: np.ndarray) -> float:
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / (norm or 1.0)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _inverse_norm(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0.0)


def _unit(x: Tensor) -> Tensor:
    return x * _inverse_norm(x)


def _through_unit(x: Tensor, grad: Tensor) -> Tensor:
    u = _unit(x)
    return (grad - (grad * u).sum(dim=1, keepdim=True) * u) * _inverse_norm(x)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    shifted = logits - logits.amax(dim=1, keepdim=True)
    log = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return log.exp(), log


def _contrast(x: Tensor, target: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of [x·t, x·Bankᵀ]/τ with the positive first, and its gradient in x."""
    positive = (x * target).sum(dim=1, keepdim=True)
    p, log_p = _softmax(torch.cat([positive, x @ bank.T], dim=1) / temperature)
    p[:, 0] -= 1
    return -log_p[:, 0], (p[:, :1] * target + p[:, 1:] @ bank) / temperature
