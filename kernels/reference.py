"""The ReCo loss in plain PyTorch, twice, each with the signature of the fused kernel in `relation_loss.py`.

`reco_loss_torch` is the definition: every formula as the paper states it, with N×K logits in memory.
`reco_loss_sdpa` needs no custom kernel and no N×K matrix: with unit rows, each product with a memory bank is an
attention whose keys and values are the bank, so PyTorch's own attention kernels return all that is needed.

Source of the objective: Zhang et al., arXiv 2211.01796, section 3; temperatures as in the first author's code.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ReCoLossOutput(NamedTuple):
    """Means over the batch, 0-d float32. Only `total` carries a gradient."""

    total: Tensor
    instance: Tensor
    global_relation: Tensor
    local_relation: Tensor
    teacher_entropy: Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of `x` [N, D] at length 1, in float32. A row shorter than 1e-19 is taken for zero: it becomes zero, and gets
    a zero gradient."""
    x = x.float()
    square = (x * x).sum(dim=-1, keepdim=True)
    nonzero = ~(square < torch.finfo(torch.float32).tiny)
    # The inner `where` keeps rsqrt's infinite slope at 0 out of the backward pass (0 · inf is NaN).
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


def mix_target(query: Tensor, key: Tensor, permutation: Tensor, mix_ratio: float | Tensor, anchor: str) -> Tensor:
    """`stopgrad(unit(λ·a + (1−λ)·k[π]))` for unit rows [N, D], with a = q (`anchor="query"`) or k (`"key"`)."""
    ratio = mix_ratio[:, None] if isinstance(mix_ratio, Tensor) and mix_ratio.dim() == 1 else mix_ratio
    own = query if anchor == "query" else key
    return unit(ratio * own + (1 - ratio) * key[permutation]).detach()


def reco_loss_torch(
    query: Tensor,
    query_mix: Tensor,
    key: Tensor,
    key_weak: Tensor,
    bank: Tensor,
    bank_weak: Tensor,
    permutation: Tensor,
    mix_ratio: float | Tensor,
    *,
    temperature: float,
    student_temperature: float,
    teacher_temperature: float,
    global_weight: float | Tensor,
    local_weight: float | Tensor,
    mix_anchor: str,
) -> ReCoLossOutput:
    """The definition. Arguments as in `reco_fast.reco_loss`; holds four [N, K] matrices and their gradients."""
    q, k = unit(query), unit(key).detach()
    # Copies, since backward reads them and the caller may overwrite the banks before it.
    bank, bank_weak = (b.detach().to(torch.float32, copy=True) for b in (bank, bank_weak))
    positive_is_first = torch.zeros(len(q), dtype=torch.long, device=q.device)
    global_relation, local_relation, teacher_entropy = q.new_zeros(3).unbind()

    def against_bank(x: Tensor, target: Tensor) -> Tensor:
        logits = torch.cat([(x * target).sum(dim=-1, keepdim=True), x @ bank.T], dim=1)
        return F.cross_entropy(logits / temperature, positive_is_first)

    instance = against_bank(q, k)
    if not is_off(global_weight):
        teacher = torch.softmax(unit(key_weak).detach() @ bank_weak.T / teacher_temperature, dim=1)
        student = torch.log_softmax(q @ bank_weak.T / student_temperature, dim=1)
        global_relation = -(teacher * student).sum(dim=1).mean()
        teacher_entropy = torch.special.entr(teacher).sum(dim=1).mean()
    if not is_off(local_weight):
        local_relation = against_bank(unit(query_mix), mix_target(q, k, permutation, mix_ratio, mix_anchor))
    total = instance + global_weight * global_relation + local_weight * local_relation
    parts = (instance, global_relation, local_relation, teacher_entropy)
    return ReCoLossOutput(total, *(part.detach() for part in parts))


def reco_loss_sdpa(
    query: Tensor,
    query_mix: Tensor,
    key: Tensor,
    key_weak: Tensor,
    bank: Tensor,
    bank_weak: Tensor,
    permutation: Tensor,
    mix_ratio: float | Tensor,
    *,
    temperature: float,
    student_temperature: float,
    teacher_temperature: float,
    global_weight: float | Tensor,
    local_weight: float | Tensor,
    mix_anchor: str,
) -> ReCoLossOutput:
    """The same numbers from PyTorch's attention kernels, in O(N·D·splits) memory. Arguments as in `reco_loss`.

    A bfloat16 bank is copied in another dtype, see `BFLOAT16_ATTENTION`; rows are rounded to it before the products.
    """
    q, k = unit(query), unit(key).detach()
    bank = _for_attention(bank)
    global_relation, local_relation, teacher_entropy = q.new_zeros(3).unbind()

    def against_bank(x: Tensor, target: Tensor) -> Tensor:
        # cross-entropy of [x·t, x·Bankᵀ]/τ with the positive first = softplus(lse_negatives − positive)
        negatives, _ = bank_attention(x, bank, temperature)
        return F.softplus(negatives - (x * target).sum(dim=-1) / temperature).mean()

    instance = against_bank(q, k)
    if not is_off(global_weight):
        k_weak, bank_weak = unit(key_weak).detach(), _for_attention(bank_weak)
        lse_teacher, teacher_mean = bank_attention(k_weak, bank_weak, teacher_temperature)
        lse_student, _ = bank_attention(q, bank_weak, student_temperature)
        # −Σ_j p_j log s_j = lse_s − ⟨q, Σ_j p_j b_j⟩/τ_s, and the teacher's entropy likewise with itself
        global_relation = (lse_student - (q * teacher_mean).sum(dim=-1) / student_temperature).mean()
        teacher_entropy = (lse_teacher - (k_weak * teacher_mean).sum(dim=-1) / teacher_temperature).mean()
    if not is_off(local_weight):
        local_relation = against_bank(unit(query_mix), mix_target(q, k, permutation, mix_ratio, mix_anchor))
    total = instance + global_weight * global_relation + local_weight * local_relation
    parts = (instance, global_relation, local_relation, teacher_entropy)
    return ReCoLossOutput(total, *(part.detach() for part in parts))


# PyTorch's attention rounds what it returns to the dtype of what it is given. bfloat16's 8 bits are too few where two
# such means nearly cancel (O_s − O_t of clustered rows: gradients 1.2e-2 off), so it gets bfloat16 banks in a
# dtype that has more: float16 on CUDA, where products in it cost the same, and float32 on a CPU.
BFLOAT16_ATTENTION = {"cuda": torch.float16, "cpu": torch.float32}


def _for_attention(bank: Tensor) -> Tensor:
    return bank.to(BFLOAT16_ATTENTION[bank.device.type]) if bank.dtype == torch.bfloat16 else bank


def is_off(weight: float | Tensor) -> bool:
    """Whether a term does no work. A tensor weight is never looked at: that would synchronise the device."""
    return not isinstance(weight, Tensor) and weight == 0


def bank_attention(x: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [N] of `x·Bankᵀ/τ`, and `softmax(x·Bankᵀ/τ)·Bank` [N, D], both float32.

    The log-sum-exp is differentiable in `x` (its gradient is the second output over τ); the second output is not.
    """
    lse, mean = _BankAttention.apply(x, bank, temperature)
    return lse, mean


class _BankAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        lse, mean = _attend_in_splits(x.detach().to(bank.dtype), bank, 1 / temperature)
        ctx.save_for_backward(mean, x)
        ctx.scale = 1 / temperature
        ctx.mark_non_differentiable(mean)
        return lse, mean

    @staticmethod
    def backward(ctx, grad_lse: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        mean, x = ctx.saved_tensors
        return differentiable_once(mean * (grad_lse * ctx.scale)[:, None], x, "sdpa"), None, None


def differentiable_once(grad: Tensor, x: Tensor, impl: str) -> Tensor:
    """`grad`, a gradient in `x` from which autograd shall not go on: RuntimeError where it would."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled code refuses of itself
        return _DifferentiableOnce.apply(grad, x, impl)
    return grad


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.impl = impl
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _: Tensor) -> None:  # type: ignore[no-untyped-def]
        raise RuntimeError(f'impl: "{ctx.impl}" has no second derivative; expected "torch" where one is needed')


class CudaAttention(NamedTuple):
    """How a bank in half precision meets PyTorch's attention on a GPU."""

    kernel: Literal["flash", "cudnn"] = "flash"
    programs: int = 2
    """Row tiles of 128 for each multiprocessor, by cutting the bank into splits that ride in the batch dimension
    (flash-decoding): N is small and K large. 0: the kernel cuts the bank itself, if at all."""


CUDA_ATTENTION = CudaAttention()


def _attend_in_splits(x: Tensor, bank: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `x` [N, D] over `bank` [K, D]: log-sum-exp [N] and mean [N, D], float32."""
    length = len(bank)
    splits = _split_count(len(x), length, x.device)
    body = length - length % splits
    parts = [_attend(x.expand(splits, *x.shape), bank[:body].view(splits, body // splits, -1), scale)]
    if body < length:
        parts.append(_attend(x[None], bank[None, body:], scale))
    lse, mean = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    if len(lse) == 1:
        return lse[0], mean[0].float()
    total = torch.logsumexp(lse, dim=0)
    share = (lse - total).exp().to(mean.dtype)
    return total, torch.bmm(share.T[:, None], mean.transpose(0, 1))[:, 0].float()


def _split_count(rows: int, length: int, device: torch.device) -> int:
    if device.type != "cuda" or CUDA_ATTENTION.programs == 0:
        return 1
    tiles = CUDA_ATTENTION.programs * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles // -(-rows // 128), length // 512))  # none shorter than 512 bank rows


def _attend(x: Tensor, bank: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's attention kernel that also returns the log-sum-exp. `x` [S, N, D], `bank` [S, K, D]; [S, N] float32 and
    [S, N, D]."""
    rows = x.shape[1]
    width = x.shape[2]
    pad = -width % 8  # the CUDA kernels want rows of whole 16-byte words
    if pad:  # a pad by nothing would copy the bank
        x, bank = F.pad(x, (0, pad)), F.pad(bank, (0, pad))
    x, bank = x[:, None], bank[:, None]
    if x.device.type != "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, bank, bank, scale=scale)
    elif x.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(x, bank, bank, None, True, scale=scale)
    elif CUDA_ATTENTION.kernel == "cudnn":
        x = x.contiguous()  # cuDNN takes no rows that share memory
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(x, bank, bank, None, True, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(x, bank, bank, scale=scale)
    return lse.reshape(len(x), -1)[:, :rows].float(), out[:, 0, :, :width]
