# mypy: allow-untyped-defs
# ruff: noqa: SIM102, SIM300
"""The three Triton kernels of `relation_loss.py`, in the order of their launch.

That module's docstring derives the formulas and gives the notation. Every pointer is to contiguous rows, but for the
banks, whose rows may lie further apart.
"""

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when the kernels below were defined

# Which of `unit_rows` a row set reads.
QUERY = tl.constexpr(0)
MIX = tl.constexpr(1)
TEACHER = tl.constexpr(2)


@triton.jit
def _unit(x):
    """Rows of `x` (last axis) at length 1, and 1/‖x‖; both 0 for a row of zeros, or whose square is not a normal
    number: a GPU's reciprocal root takes that for 0."""
    square = tl.sum(x * x, axis=len(x.shape) - 1, keep_dims=True)
    nonzero = ~(square < 1.1754944e-38)
    inverse = tl.where(nonzero, tl.rsqrt(tl.where(nonzero, square, 1.0)), 0.0)
    return x * inverse, inverse


@triton.jit
def _low(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """float32 `x` in the dtype of the products. Triton's interpreter has no bfloat16 product and its casts truncate:
    there, `x` stays float32 with its bits rounded to nearest even. Such values multiply exactly, as on a GPU."""
    if EMULATE and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _tf32_parts(x, EMULATE: tl.constexpr):
    """float32 `x` as the sum of two numbers for a TF32 product: its leading 11 bits, and the rest. The tensor cores cut
    the rest to 11 bits; Triton's interpreter has no TF32, so there it is cut here."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    low = x - high
    if EMULATE:
        low = (low.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def _dot(a, b, sum, EMULATE: tl.constexpr):
    """`sum` + a·b by one TF32 product. Tensor cores cut their sums towards zero where they should round, Triton's
    interpreter rounds: there, the sum is cut here."""
    if not EMULATE:
        return tl.dot(a, b, sum, input_precision="tf32")
    product = tl.dot(a, b, input_precision="tf32")
    rounded = sum + product
    added = rounded - sum
    lost = (sum - (rounded - added)) + (product - added)  # exact (Knuth's TwoSum)
    away = (rounded > 0) & (lost < 0) | (rounded < 0) & (lost > 0)
    return (rounded.to(tl.int32, bitcast=True) - away.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _dot_tf32x3(a_high, a_low, b_high, b_low, N: tl.constexpr, M: tl.constexpr, EMULATE: tl.constexpr):
    """a·b [N, M] to float32 accuracy on tensor cores, small products first. (`input_precision="tf32x3"` does the same,
    but splits the rows in every turn of the loop, which spills registers.) It takes no sum to add to: one that stays in
    the tensor cores from tile to tile is cut in every turn, and at K = 65,536 three of its digits are gone."""
    sum = _dot(a_low, b_high, tl.zeros([N, M], tl.float32), EMULATE)
    sum = _dot(a_high, b_low, sum, EMULATE)
    return _dot(a_high, b_high, sum, EMULATE)


@triton.jit
def _number(x):
    """A scalar argument that is either a number or a pointer to one (a schedule in a captured graph)."""
    if isinstance(x, tl.tensor):  # the interpreter passes plain floats
        if x.dtype.is_ptr():
            x = tl.load(x).to(tl.float32)
    return x


@triton.jit
def unit_kernel(query, query_mix, key_weak, unit_rows, done, N, D: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """The unit rows of q, m and v into `unit_rows` [3, N, D], in the dtype of the products; `done` = 0."""
    which = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    valid = (row < N)[:, None] & (column < D)[None, :]
    offset = row[:, None] * D + column[None, :]
    if which == QUERY:
        raw = tl.load(query + offset, mask=valid, other=0.0).to(tl.float32)
    elif which == MIX:
        raw = tl.load(query_mix + offset, mask=valid, other=0.0).to(tl.float32)
    else:
        raw = tl.load(key_weak + offset, mask=valid, other=0.0).to(tl.float32)
    unit, _ = _unit(raw)
    tl.store(unit_rows + which * N * D + offset, _low(unit, DTYPE, EMULATE), mask=valid)
    tl.store(done, 0)


@triton.jit
def attend_kernel(unit_rows, bank, bank_weak, partial_mean, partial_lse, N, K, split_length, first_split, splits,
                  scale, student_scale, teacher_scale, BANK_STRIDE: tl.constexpr, BANK_WEAK_STRIDE: tl.constexpr,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  LOCAL: tl.constexpr, MASKED: tl.constexpr, ONLINE: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """Partial O [sets, N, splits, D] and lse [sets, N, splits] (base 2) of one row tile, row set and bank split.

    The row sets are q|A, then m|A if LOCAL, then q|B and v|B: as many as the grid has. The scales are log₂e/τ.
    MASKED allows any K; without it K is a multiple of BLOCK_K.
    """
    DTYPE: tl.constexpr = bank.dtype.element_ty
    row_set = tl.program_id(1)
    which = QUERY
    stride = BANK_STRIDE
    if LOCAL and row_set == 1:
        which = MIX
    if row_set > LOCAL:
        bank = bank_weak
        stride = BANK_WEAK_STRIDE
        scale = student_scale
    if row_set > LOCAL + 1:
        which = TEACHER
        scale = teacher_scale

    first_row = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    row_valid = first_row + row < N
    column_valid = (column < D)[None, :]
    valid = row_valid[:, None] & column_valid
    unit_rows += (which * N + first_row).to(tl.int64) * D
    rows = tl.load(unit_rows + row[:, None] * D + column[None, :], mask=valid, other=0.0)

    if DTYPE == tl.float32:
        rows_high, rows_low = _tf32_parts(rows, EMULATE)

    start = tl.program_id(2) * split_length
    length = tl.minimum(K - start, split_length)
    in_tile = tl.arange(0, BLOCK_K)
    tile_ptrs = bank + start.to(tl.int64) * stride + in_tile[:, None] * stride + column[None, :]
    peak = tl.full([BLOCK_N], -float("inf") if ONLINE else 1.0, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)  # Σp
    weight = tl.zeros([BLOCK_N], tl.float32)  # Σp̂, with p̂ the p cut for the second product
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # Σp̂·a
    for first in range(0, length, BLOCK_K):
        if MASKED:
            tile = tl.load(tile_ptrs, mask=(first + in_tile < length)[:, None] & column_valid, other=0.0)
        elif D < BLOCK_D:
            tile = tl.load(tile_ptrs, mask=column_valid, other=0.0)
        else:
            tile = tl.load(tile_ptrs)
        tile_ptrs += BLOCK_K * stride
        if EMULATE:
            tile = tile.to(tl.float32)
        if DTYPE == tl.float32:
            tile_high, tile_low = _tf32_parts(tile, EMULATE)
            logits = _dot_tf32x3(rows_high, rows_low, tile_high.T, tile_low.T, BLOCK_N, BLOCK_K, EMULATE)
        else:
            logits = tl.dot(rows, tile.T)
        if MASKED:
            logits = tl.where((first + in_tile < length)[None, :], logits, -float("inf"))
        if ONLINE:
            new_peak = tl.maximum(peak, tl.max(logits, axis=1))
            shrink = tl.exp2((peak - new_peak) * scale)
            total, weight, mean = total * shrink, weight * shrink, mean * shrink[:, None]
            peak = new_peak
            p = tl.exp2((logits - peak[:, None]) * scale)
        else:
            p = tl.exp2(logits * scale - scale)
        total += tl.sum(p, axis=1)
        if DTYPE == tl.float32:
            p_high, p_low = _tf32_parts(p, EMULATE)
            mean += _dot_tf32x3(p_high, p_low, tile_high, tile_low, BLOCK_N, BLOCK_D, EMULATE)
        else:
            # Cutting spreads no wider than rounding, takes one instruction, and leaves a number that can be summed.
            p = (p.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
            weight += tl.sum(p, axis=1)
            mean = tl.dot(_low(p, DTYPE, EMULATE), tile, mean)

    mean *= (1 / (total if DTYPE == tl.float32 else weight))[:, None]
    out = ((row_set * N + first_row) * splits + first_split + tl.program_id(2)).to(tl.int64)
    tl.store(partial_lse + out + row * splits, peak * scale + tl.log2(total), mask=row_valid)
    ptrs = partial_mean + out * D + row[:, None] * (splits * D) + column[None, :]
    tl.store(ptrs, mean.to(partial_mean.dtype.element_ty), mask=valid)


@triton.jit
def _join(partial_mean, partial_lse, index, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """lse (base 2) and O [BLOCK_D] of one row of one set over all bank splits."""
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse + index * splits + split, mask=split < splits, other=-float("inf"))
    peak = tl.max(lse, axis=0)
    share = tl.exp2(lse - peak)
    total = tl.sum(share, axis=0)
    ptrs = partial_mean + (index * splits + split)[:, None] * D + column[None, :]
    mean = tl.load(ptrs, mask=(split < splits)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    return peak + tl.log2(total), tl.sum(mean * (share / total)[:, None], axis=0)


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), accurate where it is small: log1p by Kahan's correction of log(1 + e)."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(z, 0.0) + log1p


@triton.jit
def _row_mean(losses, N):
    """Of what other programs wrote: past the L1 cache, which does not hear of it."""
    BLOCK: tl.constexpr = 1024
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        lanes += tl.load(losses + row, mask=row < N, other=0.0, cache_modifier=".cg")
    return tl.sum(lanes, axis=0) / N


@triton.jit
def combine_kernel(query, query_mix, key, unit_rows, permutation, mix_ratio, partial_mean, partial_lse, row_losses,
                   done, grads, total, parts, N, splits, mix_ratio_stride, inverse_temperature,
                   inverse_student_temperature, inverse_teacher_temperature, global_weight, local_weight,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, GLOBAL: tl.constexpr,
                   LOCAL: tl.constexpr, ANCHOR_IS_QUERY: tl.constexpr):  # fmt: skip
    """One row: its losses into `row_losses` [4, N], and ∂total/∂query and ∂total/∂query_mix into `grads` [1 + LOCAL, N,
    D]. The row that is done last takes the means, always in the same order: `parts` [4] of instance, global, local and
    teacher entropy, and `total`, their weighted sum."""
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    here = row * D + column

    q, q_inverse = _unit(tl.load(query + here, mask=inside, other=0.0).to(tl.float32))
    k, _ = _unit(tl.load(key + here, mask=inside, other=0.0).to(tl.float32))
    q_lost = q - tl.load(unit_rows + QUERY * N * D + here, mask=inside, other=0.0).to(tl.float32)

    # instance: softplus(z), sigmoid(z)(O − k)/τ, with lse(q) = lse(q̂) + ⟨q − q̂, O⟩/τ to second order in q − q̂
    lse, mean = _join(partial_mean, partial_lse, row, splits, D, BLOCK_D, BLOCK_S)
    z = lse * LN_2 + tl.sum(q_lost * mean - q * k, axis=0) * inverse_temperature
    tl.store(row_losses + row, _softplus(z))
    grad = (mean - k) * (tl.sigmoid(z) * inverse_temperature)

    if GLOBAL:
        lse_s, mean_s = _join(partial_mean, partial_lse, (1 + LOCAL) * N + row, splits, D, BLOCK_D, BLOCK_S)
        lse_t, mean_t = _join(partial_mean, partial_lse, (2 + LOCAL) * N + row, splits, D, BLOCK_D, BLOCK_S)
        v_low = tl.load(unit_rows + TEACHER * N * D + here, mask=inside, other=0.0).to(tl.float32)
        # global: lse_s − ⟨q, O_t⟩/τ_s, (O_s − O_t)/τ_s; the teacher's entropy: lse_t − ⟨v, O_t⟩/τ_t
        loss = lse_s * LN_2 + tl.sum(q_lost * mean_s - q * mean_t, axis=0) * inverse_student_temperature
        entropy = lse_t * LN_2 - tl.sum(v_low * mean_t, axis=0) * inverse_teacher_temperature
        tl.store(row_losses + N + row, loss)
        tl.store(row_losses + 3 * N + row, entropy)
        grad += (mean_s - mean_t) * (_number(global_weight) * inverse_student_temperature)

    # through the normalisation, and the mean over the batch: (g − ⟨g, q⟩ q)/(‖x‖ N)
    grad = (grad - tl.sum(grad * q, axis=0) * q) * (q_inverse / N)
    tl.store(grads + here, grad, mask=inside)

    if LOCAL:
        lse, mean = _join(partial_mean, partial_lse, N + row, splits, D, BLOCK_D, BLOCK_S)
        m, m_inverse = _unit(tl.load(query_mix + here, mask=inside, other=0.0).to(tl.float32))
        m_lost = m - tl.load(unit_rows + MIX * N * D + here, mask=inside, other=0.0).to(tl.float32)
        # local target: t = unit(λ·a + (1 − λ)·k[π])
        other = tl.load(permutation + row).to(tl.int64) * D + column
        k_other, _ = _unit(tl.load(key + other, mask=inside, other=0.0).to(tl.float32))
        ratio = _number(mix_ratio + row * mix_ratio_stride)
        target, _ = _unit(ratio * (q if ANCHOR_IS_QUERY else k) + (1.0 - ratio) * k_other)
        z = lse * LN_2 + tl.sum(m_lost * mean - m * target, axis=0) * inverse_temperature
        tl.store(row_losses + 2 * N + row, _softplus(z))
        grad = (mean - target) * (_number(local_weight) * tl.sigmoid(z) * inverse_temperature)
        grad = (grad - tl.sum(grad * m, axis=0) * m) * (m_inverse / N)
        tl.store(grads + (N + row) * D + column, grad, mask=inside)

    tl.debug_barrier()  # all of this row is written
    if tl.atomic_add(done, 1, sem="acq_rel") == N - 1:
        instance = _row_mean(row_losses, N)
        loss = instance
        global_relation = 0.0
        local_relation = 0.0
        entropy = 0.0
        if GLOBAL:
            global_relation = _row_mean(row_losses + N, N)
            entropy = _row_mean(row_losses + 3 * N, N)
            loss += _number(global_weight) * global_relation
        if LOCAL:
            local_relation = _row_mean(row_losses + 2 * N, N)
            loss += _number(local_weight) * local_relation
        tl.store(total, loss)
        tl.store(parts, instance)
        tl.store(parts + 1, global_relation)
        tl.store(parts + 2, local_relation)
        tl.store(parts + 3, entropy)
