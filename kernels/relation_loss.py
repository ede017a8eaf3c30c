# mypy: allow-untyped-defs
"""The ReCo loss and its gradient in one streaming pass over the memory banks, in Triton.

Notation: q, m, k, v are the unit rows of `query`, `query_mix`, `key`, `key_weak`; A and B are `bank` and `bank_weak`,
whose K rows a_j and b_j are unit too; τ, τ_s, τ_t are `temperature`, `student_temperature`, `teacher_temperature`.

For a row x, a bank and a temperature, everything the loss needs of the K logits is what attention keeps:

    lse(x, A, τ) = log Σ_j exp(⟨x, a_j⟩/τ)                          the log-sum-exp
    O(x, A, τ)   = Σ_j exp(⟨x, a_j⟩/τ − lse) a_j                    attention with the bank as keys and as values
    ∂lse/∂x      = O/τ

Instance term: cross-entropy of [⟨q, k⟩, q·Aᵀ]/τ with the positive first. With z = lse(q, A, τ) − ⟨q, k⟩/τ,

    loss         = softplus(z)
    ∂loss/∂q     = sigmoid(z) · (O(q, A, τ) − k)/τ

Local term: the same with (m, t) for (q, k), where a is q or k by `mix_anchor` and t is a constant:

    t            = unit(λ·a + (1 − λ)·k[π])

Global term: the teacher's p = softmax(v·Bᵀ/τ_t) is a constant, and Σ_j p_j ⟨q, b_j⟩ = ⟨q, O_t⟩, so

    loss         = lse(q, B, τ_s) − ⟨q, O_t⟩/τ_s                    O_t = O(v, B, τ_t), O_s = O(q, B, τ_s)
    ∂loss/∂q     = (O_s − O_t)/τ_s
    entropy      = lse(v, B, τ_t) − ⟨v, O_t⟩/τ_t                    of the teacher; the divergence is loss − entropy

Through the normalisation q = x/‖x‖ (a zero row stays zero, with zero gradient):

    ∂/∂x         = (g − ⟨g, q⟩ q)/‖x‖                               g = ∂/∂q

Unit rows bound every logit: ⟨x, a_j⟩/τ ≤ 1/τ. So 1/τ serves as the maximum that softmax subtracts, and no running
maximum is needed while exp(−2/τ) is a normal float32 with room for its low bits (τ ≥ 0.026).

Three launches of the kernels in `relation_kernels.py`, and every sum in a fixed order, so the same inputs give the same
bits:
  1. `unit_kernel`: the unit rows q, m and v, rounded to the bank's dtype.
  2. `attend_kernel`: lse and O of each (row tile, row set, bank split), as in flash-decoding: N is small, K is large.
     The row sets are q|A, m|A, q|B and v|B. A bank tile is loaded once for both products. (Launched once more for the
     rest of K when it is no multiple of the tile.)
  3. `combine_kernel`: joins a row's splits, then the formulas above; the last row to be done takes the means.

The products run in the bank's dtype with float32 sums: rows are rounded to it (q̂), and the exponentials are cut to it
before the second product. Two corrections cost next to nothing:

    lse(q)       = lse(q̂) + ⟨q − q̂, O⟩/τ                            to second order in the rounding of the row
    O            = Σ_j p̂_j a_j / Σ_j p̂_j                            the cut exponentials' weights add up to 1
"""

import math
from contextlib import nullcontext
from itertools import zip_longest

import torch
import triton
import triton.language as tl
from torch import Tensor

from reco_fast.kernels import launch, relation_kernels
from reco_fast.kernels.reference import ReCoLossOutput, differentiable_once, is_off
from reco_fast.kernels.relation_kernels import INTERPRETED

LOG2_E = math.log2(math.e)
FIXED_MAXIMUM_TEMPERATURE = 0.026  # exp(−2/τ), and the low part of its TF32 pair, are normal float32 from here on

COMBINE_WARPS = 4


def _forward(
    query: Tensor,
    query_mix: Tensor | None,
    key: Tensor,
    key_weak: Tensor | None,
    bank: Tensor,
    bank_weak: Tensor | None,
    permutation: Tensor | None,
    mix_ratio: float,
    mix_ratio_tensor: Tensor | None,
    temperature: float,
    student_temperature: float,
    teacher_temperature: float,
    global_weight: float,
    global_weight_tensor: Tensor | None,
    local_weight: float,
    local_weight_tensor: Tensor | None,
    anchor_is_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`total` [], `parts` [4], and the gradients of `total` for query, and for query_mix if there is one, float32
    [1 or 2, N, D].

    A term is off when its tensors are None. A tensor beside a number replaces it.
    """
    rows, width = query.shape
    length = len(bank)
    has_global, has_local = bank_weak is not None, query_mix is not None
    row_sets = 1 + has_local + 2 * has_global
    plan = launch.plan(rows, length, width, row_sets, bank.dtype, query.device)
    temperatures = (temperature, student_temperature, teacher_temperature) if has_global else (temperature,)
    weights = (
        global_weight if global_weight_tensor is None else global_weight_tensor,
        local_weight if local_weight_tensor is None else local_weight_tensor,
    )

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    # An absent tensor is replaced by one that no kernel reads.
    query, key, bank = query.contiguous(), key.contiguous(), _row_major(bank)
    query_mix = query if query_mix is None else query_mix.contiguous()
    key_weak = key if key_weak is None else key_weak.contiguous()
    # One kernel reads both banks, so they share a dtype.
    bank_weak = bank if bank_weak is None else _row_major(bank_weak.to(bank.dtype))
    permutation = key if permutation is None else permutation.contiguous()
    unit_rows = new(3, rows, width, dtype=torch.float32 if INTERPRETED else bank.dtype)
    partial_mean = new(row_sets, rows, plan.splits, width, dtype=plan.partial_dtype)
    partial_lse = new(row_sets, rows, plan.splits)
    row_losses = new(4, rows)
    done = new(dtype=torch.int32)
    total, parts, grads = new(), new(4), new(1 + has_local, rows, width)

    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        relation_kernels.unit_kernel[(triton.cdiv(rows, 16), 3)](
            query,
            query_mix,
            key_weak,
            unit_rows,
            done,
            rows,
            D=width,
            BLOCK_D=plan.block_d,
            BLOCK_N=16,
            DTYPE=tl.bfloat16 if bank.dtype == torch.bfloat16 else tl.float32,
            EMULATE=INTERPRETED,
            num_warps=4,
            enable_fp_fusion=True,
        )
        # Whole bank tiles, then what is left of them: a mask in the first launch's loop costs 20 to 50 registers.
        for part in plan.parts:
            relation_kernels.attend_kernel[(plan.row_tiles, row_sets, part.splits)](
                unit_rows,
                bank[part.start :],
                bank_weak[part.start :],
                partial_mean,
                partial_lse,
                rows,
                part.length,
                part.split_length,
                part.first_split,
                plan.splits,
                LOG2_E / temperature,
                LOG2_E / student_temperature,
                LOG2_E / teacher_temperature,
                BANK_STRIDE=bank.stride(0),
                BANK_WEAK_STRIDE=bank_weak.stride(0),
                D=width,
                BLOCK_D=plan.block_d,
                BLOCK_N=plan.tile.rows,
                BLOCK_K=plan.tile.bank_rows,
                LOCAL=has_local,
                MASKED=part.masked,
                ONLINE=min(temperatures) < FIXED_MAXIMUM_TEMPERATURE,
                EMULATE=INTERPRETED,
                num_warps=plan.tile.warps,
                num_stages=plan.tile.stages,
                enable_fp_fusion=True,
            )
        relation_kernels.combine_kernel[(rows,)](
            query,
            query_mix,
            key,
            unit_rows,
            permutation,
            mix_ratio if mix_ratio_tensor is None else mix_ratio_tensor,
            partial_mean,
            partial_lse,
            row_losses,
            done,
            grads,
            total,
            parts,
            rows,
            plan.splits,
            0 if mix_ratio_tensor is None or mix_ratio_tensor.dim() == 0 else mix_ratio_tensor.stride(0),
            1 / temperature,
            1 / student_temperature,
            1 / teacher_temperature,
            *weights,
            D=width,
            BLOCK_D=plan.block_d,
            BLOCK_S=triton.next_power_of_2(plan.splits),
            GLOBAL=has_global,
            LOCAL=has_local,
            ANCHOR_IS_QUERY=anchor_is_query,
            num_warps=COMBINE_WARPS,
            enable_fp_fusion=True,
        )
    return total, parts, grads


def _row_major(bank: Tensor) -> Tensor:
    """`bank` itself when its rows are contiguous; the stride between rows may be anything."""
    return bank if bank.stride(1) == 1 else bank.contiguous()


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[2], *inputs[:2])


def _backward(ctx, grad_total: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    """The gradients are there already: they are only scaled."""
    grads, *inputs = ctx.saved_tensors
    scaled = (grads * grad_total).unbind()
    given = [x if needed else None for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)]
    found = (
        None if x is None else differentiable_once(grad.to(x.dtype), x, "triton")
        for grad, x in zip_longest(scaled, given)
    )
    return *found, *[None] * (len(ctx.needs_input_grad) - 2)


class _RelationLoss(torch.autograd.Function):
    """What `relation_loss_op` does, for code that is not compiled: there the dispatcher of custom operators would take
    the host longer than all else here."""

    @staticmethod
    def forward(*inputs) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for what has no gradient would be a kernel each
        _setup_context(ctx, inputs, output)

    backward = staticmethod(_backward)


relation_loss_op = torch.library.custom_op("reco_fast::relation_loss", _forward, mutates_args=())
relation_loss_op.register_autograd(_backward, setup_context=_setup_context)


@relation_loss_op.register_fake
def _(query: Tensor, query_mix: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    return new(), new(4), new(1 if query_mix is None else 2, *query.shape)


def reco_loss_triton(
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
    """The loss and its gradients in O(N·D·splits) memory, three kernels. Arguments as in `reco_fast.reco_loss`.

    D is at most 256. Products run in the banks' dtype: bfloat16, or float32 by three TF32 products (`tf32x3`).
    """
    has_global, has_local = not is_off(global_weight), not is_off(local_weight)
    function = relation_loss_op if torch.compiler.is_compiling() else _RelationLoss.apply
    total, parts, _ = function(
        query,
        query_mix if has_local else None,
        key.detach(),
        key_weak.detach() if has_global else None,
        bank.detach(),
        bank_weak.detach() if has_global else None,
        permutation if has_local else None,
        *_number_and_tensor(mix_ratio),
        temperature,
        student_temperature,
        teacher_temperature,
        *_number_and_tensor(global_weight),
        *_number_and_tensor(local_weight),
        mix_anchor == "query",
    )
    return ReCoLossOutput(total, *parts.detach().unbind())


def unsupported(query: Tensor) -> str | None:
    """Why the kernels cannot take these rows [N, D], if they cannot."""
    if not (query.is_cuda or INTERPRETED):
        return f"expected tensors on a GPU, got {query.device}"
    if query.shape[1] > launch.WIDEST:
        return f"expected D of at most {launch.WIDEST}, got {query.shape[1]}"
    return None


def _number_and_tensor(x: float | Tensor) -> tuple[float, Tensor | None]:
    """An operator's argument has one type, so a number and a tensor take two places."""
    return (0.0, x.detach()) if isinstance(x, Tensor) else (float(x), None)
