"""The ReCo loss: one function, one module, and the choice of implementation behind them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.kernels.launch import choose_implementation
from reco_fast.kernels.reference import ReCoLossOutput, is_off, reco_loss_sdpa, reco_loss_torch

__all__ = ["Impl", "MixAnchor", "ReCoLoss", "ReCoLossOutput", "reco_loss"]

Impl = Literal["auto", "triton", "sdpa", "torch"]
MixAnchor = Literal["query", "key"]


def reco_loss(
    query: Tensor,
    query_mix: Tensor | None,
    key: Tensor,
    key_weak: Tensor | None,
    bank: Tensor,
    bank_weak: Tensor | None,
    permutation: Tensor | None,
    mix_ratio: float | Tensor,
    *,
    temperature: float = 0.2,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    global_weight: float | Tensor = 1.0,
    local_weight: float | Tensor = 2.0,
    mix_anchor: MixAnchor = "query",
    impl: Impl = "auto",
) -> ReCoLossOutput:
    """Instance term + global distribution relation + local interpolation relation (arXiv 2211.01796, section 3).

    Args:
        query, query_mix: student projections [N, D] of the first view and of the mixed view, any scale, any float
            dtype; normalised here in float32. They alone get gradients.
        key, key_weak: teacher projections [N, D] of the second strong view and of the weak view.
        bank, bank_weak: memory banks [K, D] of past `key` and `key_weak` rows, unit length, float32 or bfloat16.
            They may be overwritten as soon as this call returns, before `backward()`.
        permutation: [N] integer; image i was mixed with image `permutation[i]`.
        mix_ratio: λ in [0, 1], the share of the image itself: a float, a 0-d tensor or a tensor [N].
        temperature: τ of the instance and local terms. student_temperature, teacher_temperature: of the global term.
        global_weight, local_weight: a float, or a 0-d tensor that a schedule may change. A term whose weight is the
            number 0 does no work and is returned as 0, and what only that term uses (`key_weak` and `bank_weak`;
            `query_mix` and `permutation`) may then be None. With both 0 this is MoCo's InfoNCE.
        mix_anchor: whether the local target mixes the student's `query` (the first author's code) or the teacher's
            `key` (does not let the student run away from the bank) with the other image's key.
        impl: "torch" (the readable definition), "sdpa" (PyTorch's attention kernels), "triton" (one fused pass,
            CUDA), or "auto".

    Returns:
        `ReCoLossOutput` of 0-d float32 tensors; `total` carries the gradient. `global_relation` is the
        cross-entropy; less `teacher_entropy` it is the KL divergence.

    Raises:
        ValueError: a shape, dtype, device, temperature or Python ratio is wrong; it names the argument. Values
            inside tensors are trusted, since looking at them would synchronise the device.
    """
    if is_off(global_weight):
        key_weak, bank_weak = key, bank
    if is_off(local_weight):
        query_mix = query.detach()
        permutation = torch.empty(len(query), dtype=torch.long, device=query.device) if query.dim() else None
    _check_tensors(query, query_mix, key, key_weak, bank, bank_weak, permutation, mix_ratio)
    for name, value in (
        ("temperature", temperature),
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")
    for name, weight in (("global_weight", global_weight), ("local_weight", local_weight)):
        if isinstance(weight, Tensor) and (weight.dim() != 0 or weight.device != query.device):
            raise ValueError(
                f"{name}: expected a number or a 0-d tensor on {query.device}, "
                f"got shape {list(weight.shape)} on {weight.device}"
            )
    if mix_anchor not in ("query", "key"):
        raise ValueError(f'mix_anchor: expected "query" or "key", got {mix_anchor!r}')
    implementation = _implementation(impl, query, bank)
    return implementation(
        query,
        query_mix,
        key,
        key_weak,
        bank,
        bank_weak,
        permutation,
        mix_ratio,
        temperature=temperature,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        global_weight=global_weight,
        local_weight=local_weight,
        mix_anchor=mix_anchor,
    )


class ReCoLoss(nn.Module):
    """`reco_loss` with its settings kept: `loss = ReCoLoss(temperature=0.2)`, then `loss(query, ...).total`."""

    def __init__(
        self,
        *,
        temperature: float = 0.2,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        global_weight: float = 1.0,
        local_weight: float = 2.0,
        mix_anchor: MixAnchor = "query",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.global_weight = global_weight
        self.local_weight = local_weight
        self.mix_anchor: MixAnchor = mix_anchor
        self.impl: Impl = impl

    def forward(
        self,
        query: Tensor,
        query_mix: Tensor | None,
        key: Tensor,
        key_weak: Tensor | None,
        bank: Tensor,
        bank_weak: Tensor | None,
        permutation: Tensor | None,
        mix_ratio: float | Tensor,
    ) -> ReCoLossOutput:
        """`reco_loss` of the same arguments."""
        return reco_loss(
            query,
            query_mix,
            key,
            key_weak,
            bank,
            bank_weak,
            permutation,
            mix_ratio,
            temperature=self.temperature,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            global_weight=self.global_weight,
            local_weight=self.local_weight,
            mix_anchor=self.mix_anchor,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name in _SETTINGS)


_SETTINGS = (
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "global_weight",
    "local_weight",
    "mix_anchor",
    "impl",
)


def _implementation(impl: str, query: Tensor, bank: Tensor) -> Callable[..., ReCoLossOutput]:
    if impl == "auto":
        impl = choose_implementation(len(query), len(bank), query.shape[1], query.device)
    if impl == "torch":
        return reco_loss_torch
    if impl == "sdpa":
        return reco_loss_sdpa
    if impl == "triton":
        # Imported on first use: Triton exists for Linux only, and takes a second.
        from reco_fast.kernels.relation_loss import reco_loss_triton, unsupported

        reason = unsupported(query)
        if reason is not None:
            raise ValueError(f'impl: "triton" {reason}')
        return reco_loss_triton
    raise ValueError(f'impl: expected "auto", "triton", "sdpa" or "torch", got {impl!r}')


def _check_tensors(
    query: Tensor,
    query_mix: Tensor | None,
    key: Tensor,
    key_weak: Tensor | None,
    bank: Tensor,
    bank_weak: Tensor | None,
    permutation: Tensor | None,
    mix_ratio: float | Tensor,
) -> None:
    if not isinstance(query, Tensor) or query.dim() != 2 or 0 in query.shape or not query.is_floating_point():
        raise ValueError(f"query: expected a floating-point tensor [N, D] with N, D ≥ 1, got {_described(query)}")
    rows, width = query.shape
    for name, value in (("query_mix", query_mix), ("key", key), ("key_weak", key_weak)):
        if not isinstance(value, Tensor) or value.shape != query.shape or not value.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor [{rows}, {width}], got {_described(value)}")
    for name, value in (("bank", bank), ("bank_weak", bank_weak)):
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != width or len(value) == 0:
            raise ValueError(f"{name}: expected a tensor [K, {width}] with K ≥ 1, got {_described(value)}")
        if value.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: expected float32 or bfloat16, got {value.dtype}")
    if bank_weak is not None and bank_weak.shape != bank.shape:
        raise ValueError(f"bank_weak: expected the shape of bank, {list(bank.shape)}, got {list(bank_weak.shape)}")
    if not isinstance(permutation, Tensor) or permutation.shape != (rows,) or permutation.dtype not in _INTEGERS:
        raise ValueError(f"permutation: expected an integer tensor [{rows}], got {_described(permutation)}")
    if isinstance(mix_ratio, Tensor):
        if mix_ratio.shape not in ((), (rows,)) or not mix_ratio.is_floating_point():
            raise ValueError(
                f"mix_ratio: expected a number or a floating-point tensor [] or [{rows}], got {_described(mix_ratio)}"
            )
    elif not 0 <= mix_ratio <= 1:
        raise ValueError(f"mix_ratio: expected a number in [0, 1], got {mix_ratio}")
    named: dict[str, object] = {
        "query_mix": query_mix,
        "key": key,
        "key_weak": key_weak,
        "bank": bank,
        "bank_weak": bank_weak,
        "permutation": permutation,
        "mix_ratio": mix_ratio,
    }
    for name, given in named.items():
        if isinstance(given, Tensor) and given.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device} like query, got one on {given.device}")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def loss_runs(impl: Impl, width: int, device: torch.device) -> None:
    """Raises ConfigError where `--loss.impl` cannot be had for embeddings of `width` on `device`."""
    if impl == "triton":
        try:
            from reco_fast.kernels.relation_loss import unsupported
        except ImportError:
            raise ConfigError("--loss.impl: expected auto, sdpa or torch where Triton is not installed") from None
        reason = unsupported(torch.empty(1, width, device=device))
        if reason is not None:
            raise ConfigError(f"--loss.impl triton: {reason}")
