"""Experimental Hopper (sm_90) versions of `attend_kernel`, bfloat16 and D = 128, in Triton's Gluon (Triton 3.6).

Same outputs as `reco_fast.kernels.relation_kernels.attend_kernel` with MASKED=False, ONLINE=False: partial O [sets, N,
splits, D] (float16, divided by the sum of the cut exponentials) and partial lse [sets, N, splits] (base 2). K has to be
a multiple of two bank tiles (128).

Discipline (S_j = rows·tile_jᵀ, P_j = exp2(S_j·scale − scale) cut to bfloat16, O += P_j·tile_j):

* a bank tile is fetched once, by TMA; its `full` barrier is waited for before S_j is issued, which makes the tile
  readable for both S_j and O += P_j·tile_j;
* matrix products are issued in the order S_0, S_1, PV_0, S_2, PV_1, … and finish in that order
  ("ahead"). After PV_j is issued, one wait for all but the latest product says that S_{j+1} may be read and that PV_{j−1} is over; nothing else waits.
  S_{j+1} is read only after that wait, O only after the last one, which waits for all;
* the registers of P_j belong to the matrix product until it is over. Neither Triton nor ptxas keeps them: a loop of one
  step writes P_{j+1} into them while PV_j still reads them, without a word from ptxas, which
  PTX leaves undefined. So the loop has two steps,
  whose P are two sets of registers ("ahead"), or P is written only once the last PV is over ("late");
* a fetch brings two tiles (a group). The slot of group g − 1 is fetched anew in the middle of group g: after the wait
  that covers its last product AND a barrier of all warps that read it (each warp waits for its own products only).

`hazards.py` follows every path of the machine code and finds registers of unfinished products that are touched;
`phases.py` runs the barriers under random schedules.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

D = 128
MOST_SPLITS = 64
PARTIAL_BYTES = 14 * 2**20
# One compiled kernel serves all sizes.
UNSPECIALISED = ["N", "K", "bank_row", "bank_weak_row", "split_groups", "splits"]


class Variant(NamedTuple):
    order: str  # "sync": each product waited for; "ahead" and "late": see `_step` and `_step_late`
    specialised: bool  # one warp fetches; else all warps do all
    rows: int  # of one program
    tile: int  # bank rows of one step; a fetch brings two tiles
    stages: int  # fetches in shared memory
    warps: int  # of the kernel; a specialised one adds four that consume and one that fetches
    programs: int  # that fit on a multiprocessor
    held: bool  # the rows stay in registers; else in shared memory


VARIANTS = {  # the most promising first
    "specialised": Variant("late", True, 128, 64, 4, 4, 1, False),
    "ahead128": Variant("ahead", False, 128, 64, 4, 8, 1, False),
    "ahead64": Variant("ahead", False, 64, 64, 3, 4, 2, False),
    "specialisedheld": Variant("late", True, 128, 64, 5, 4, 1, True),
    "late128": Variant("late", False, 128, 64, 4, 8, 1, False),
    "late128held": Variant("late", False, 128, 64, 4, 8, 1, True),
    "sync64": Variant("sync", False, 64, 64, 3, 4, 2, False),
}


@gluon.jit
def _place(row_set, bank_row, bank_weak_row, scale, student_scale, teacher_scale, LOCAL: gl.constexpr):
    """Which of `unit_rows` a row set reads, the row of `banks` at which its bank starts, and its scale."""
    which = gl.where(row_set > LOCAL + 1, 2, gl.where(row_set == LOCAL, LOCAL, 0))
    weak = row_set > LOCAL
    scale = gl.where(row_set > LOCAL + 1, teacher_scale, gl.where(weak, student_scale, scale))
    return which, gl.where(weak, bank_weak_row, bank_row), scale


@gluon.jit
def _fetch(banks, start, g, groups, ring, full, TILE: gl.constexpr, STAGES: gl.constexpr):
    """Group g of this split, two bank tiles, into its slot; nothing if there is no such group."""
    slot = g % STAGES
    barrier = full.index(slot)
    mbarrier.expect(barrier, 2 * TILE * 128 * 2, pred=g < groups)
    row = start + g * (2 * TILE)
    tma.async_copy_global_to_shared(banks, [row, 0], barrier, ring.index(slot), pred=g < groups)


@gluon.jit
def _in_thread(p, ROWS: gl.constexpr, TILE: gl.constexpr):
    """Sums [ROWS, 8] of every eighth column, which one thread holds: no shuffle in the loop."""
    return gl.sum(gl.reshape(p, [ROWS, TILE // 8, 8]), axis=1)


@gluon.jit
def _exponentials(logits, scale, total, weight, ROWS: gl.constexpr, TILE: gl.constexpr):
    """Cut to what bfloat16 holds, but float32; and their sums, before and after."""
    p = gl.exp2(logits * scale - scale)
    total += _in_thread(p, ROWS, TILE)
    p = (p.to(gl.uint32, bitcast=True) & 0xFFFF0000).to(gl.float32, bitcast=True)
    weight += _in_thread(p, ROWS, TILE)
    return p, total, weight


@gluon.jit
def _operand(p, P_LAYOUT: gl.constexpr):
    return gl.convert_layout(p.to(gl.bfloat16), P_LAYOUT)


@gluon.jit
def _finish(partial_mean, partial_lse, mean, total, weight, scale, row_set, first_row, split, N, splits,
            ROWS: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    row_layout: gl.constexpr = gl.SliceLayout(1, MMA)
    total = gl.convert_layout(gl.sum(total, axis=1), row_layout)
    weight = gl.convert_layout(gl.sum(weight, axis=1), row_layout)
    mean = mean * (1.0 / weight)[:, None]
    out = ((row_set * N + first_row) * splits + split).to(gl.int64)
    row = gl.arange(0, ROWS, layout=row_layout)
    gl.store(partial_lse + out + row * splits, scale + gl.log2(total), mask=first_row + row < N)
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, MMA))
    ptrs = partial_mean + out * 128 + row[:, None] * (splits * 128) + column[None, :]
    valid = (first_row + row < N)[:, None] & (column < 128)[None, :]
    gl.store(ptrs, mean.to(partial_mean.dtype.element_ty), mask=valid)


@gluon.jit
def _load_rows(unit_rows, which, first_row, N, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    valid = (first_row + row < N)[:, None] & (column < 128)[None, :]
    ptrs = unit_rows + (which * N + first_row).to(gl.int64) * 128 + row[:, None] * 128 + column[None, :]
    return gl.load(ptrs, mask=valid, other=0.0)


@gluon.jit
def _tile(ring, slot, HALF: gl.constexpr, TILE: gl.constexpr):
    return ring.index(slot).slice(HALF * TILE, TILE, 0)


@gluon.jit
def _logits(rows, tile, none):
    """Issues S of a tile."""
    return warpgroup_mma(rows, tile.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _step(rows, here, following, logits, mean, total, weight, scale, none, ROWS: gl.constexpr, TILE: gl.constexpr,
          P_LAYOUT: gl.constexpr):  # fmt: skip
    """The tile `here`, whose logits are at hand, and the logits of the tile `following`, which is full."""
    next_logits = _logits(rows, following, none)
    p, total, weight = _exponentials(logits, scale, total, weight, ROWS, TILE)
    mean = warpgroup_mma(_operand(p, P_LAYOUT), here, mean, is_async=True)
    next_logits, mean = warpgroup_mma_wait(1, deps=(next_logits, mean))
    return next_logits, mean, total, weight


@gluon.jit
def _step_late(rows, here, following, p, mean, total, weight, scale, none, ROWS: gl.constexpr, TILE: gl.constexpr,
               P_LAYOUT: gl.constexpr):  # fmt: skip
    """The same in fewer registers: P of the tile `here` is at hand, in and out. Only its own product overlaps the
    exponentials, and P of the next tile is written when that product no longer reads the registers of this one."""
    logits = _logits(rows, following, none)
    mean = warpgroup_mma(p, here, mean, is_async=True)
    logits, mean = warpgroup_mma_wait(1, deps=(logits, mean))
    wide, total, weight = _exponentials(logits, scale, total, weight, ROWS, TILE)
    mean, wide = warpgroup_mma_wait(0, deps=(mean, wide))
    return _operand(wide, P_LAYOUT), mean, total, weight

@gluon.jit
def _consume_all(rows, none, mean, total, weight, scale, groups, ring, full, empty, banks, start, ROWS: gl.constexpr,
                 TILE: gl.constexpr, STAGES: gl.constexpr, P_LAYOUT: gl.constexpr, ORDER: gl.constexpr,
                 FETCHES: gl.constexpr):  # fmt: skip
    """The loop over all groups. In its middle, group g - 1 is done with in this warp: its last product was issued
    before the latest that has been waited for. So then, once all warps are there, its slot is fetched anew (FETCHES) or
    the producer told."""
    mbarrier.wait(full.index(0), 0)
    if ORDER == "sync":
        for g in range(0, groups):
            slot = g % STAGES
            mbarrier.wait(full.index(slot), (g // STAGES) & 1)
            for half in gl.static_range(2):
                tile = _tile(ring, slot, half, TILE)
                logits = warpgroup_mma_wait(0, deps=(_logits(rows, tile, none),))
                p, total, weight = _exponentials(logits, scale, total, weight, ROWS, TILE)
                mean = warpgroup_mma(_operand(p, P_LAYOUT), tile, mean, is_async=True)
                mean = warpgroup_mma_wait(0, deps=(mean,))
                if half == 0:
                    _free(banks, start, g, groups, ring, full, empty, TILE, STAGES, FETCHES)
    elif ORDER == "ahead":
        logits = warpgroup_mma_wait(0, deps=(_logits(rows, _tile(ring, 0, 0, TILE), none),))
        for g in range(0, groups - 1):
            slot = g % STAGES
            other = _tile(ring, slot, 1, TILE)
            logits, mean, total, weight = _step(rows, _tile(ring, slot, 0, TILE), other, logits, mean, total, weight,
                                                scale, none, ROWS, TILE, P_LAYOUT)  # fmt: skip
            _free(banks, start, g, groups, ring, full, empty, TILE, STAGES, FETCHES)
            slot = (g + 1) % STAGES
            mbarrier.wait(full.index(slot), ((g + 1) // STAGES) & 1)
            logits, mean, total, weight = _step(rows, other, _tile(ring, slot, 0, TILE), logits, mean, total, weight,
                                                scale, none, ROWS, TILE, P_LAYOUT)  # fmt: skip
        slot = (groups - 1) % STAGES
        other = _tile(ring, slot, 1, TILE)
        logits, mean, total, weight = _step(rows, _tile(ring, slot, 0, TILE), other, logits, mean, total, weight, scale,
                                            none, ROWS, TILE, P_LAYOUT)  # fmt: skip
        p, total, weight = _exponentials(logits, scale, total, weight, ROWS, TILE)
        mean = warpgroup_mma(_operand(p, P_LAYOUT), other, mean, is_async=True)
        mean = warpgroup_mma_wait(0, deps=(mean,))
    else:
        logits = warpgroup_mma_wait(0, deps=(_logits(rows, _tile(ring, 0, 0, TILE), none),))
        p, total, weight = _exponentials(logits, scale, total, weight, ROWS, TILE)
        p = _operand(p, P_LAYOUT)
        for g in range(0, groups - 1):
            slot = g % STAGES
            other = _tile(ring, slot, 1, TILE)
            p, mean, total, weight = _step_late(rows, _tile(ring, slot, 0, TILE), other, p, mean, total, weight, scale,
                                                none, ROWS, TILE, P_LAYOUT)  # fmt: skip
            _free(banks, start, g, groups, ring, full, empty, TILE, STAGES, FETCHES)
            slot = (g + 1) % STAGES
            mbarrier.wait(full.index(slot), ((g + 1) // STAGES) & 1)
            p, mean, total, weight = _step_late(rows, other, _tile(ring, slot, 0, TILE), p, mean, total, weight, scale,
                                                none, ROWS, TILE, P_LAYOUT)  # fmt: skip
        slot = (groups - 1) % STAGES
        other = _tile(ring, slot, 1, TILE)
        p, mean, total, weight = _step_late(rows, _tile(ring, slot, 0, TILE), other, p, mean, total, weight, scale,
                                            none, ROWS, TILE, P_LAYOUT)  # fmt: skip
        mean = warpgroup_mma(p, other, mean, is_async=True)
        mean = warpgroup_mma_wait(0, deps=(mean,))
    return mean, total, weight


@gluon.jit
def _free(banks, start, g, groups, ring, full, empty, TILE: gl.constexpr, STAGES: gl.constexpr, FETCHES: gl.constexpr):
    if FETCHES:
        gl.thread_barrier()
        _fetch(banks, start, g + STAGES - 1, groups, ring, full, TILE, STAGES)
    else:
        mbarrier.arrive(empty.index((g + STAGES - 1) % STAGES), count=1, pred=g > 0)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attend_gluon(banks, unit_rows, partial_mean, partial_lse, N, K, bank_row, bank_weak_row, split_groups, splits,
                 scale, student_scale, teacher_scale, ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
                 LOCAL: gl.constexpr, HELD: gl.constexpr, ORDER: gl.constexpr):  # fmt: skip
    """All warps do all, 16 rows each."""
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)

    row_set = gl.program_id(1)
    split = gl.program_id(2)
    first_row = gl.program_id(0) * ROWS
    which, bank_row, scale = _place(row_set, bank_row, bank_weak_row, scale, student_scale, teacher_scale, LOCAL)
    first_group = split * split_groups
    groups = gl.minimum(K // (2 * TILE) - first_group, split_groups)
    start = bank_row + first_group * (2 * TILE)

    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * TILE, 128], banks.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(STAGES - 1):  # one slot stays empty for the first turn of the loop
        _fetch(banks, start, i, groups, ring, full, TILE, STAGES)

    if HELD:
        rows = _load_rows(unit_rows, which, first_row, N, ROWS, gl.DotOperandLayout(0, S_LAYOUT, 2))
    else:
        ROWS_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
        raw = _load_rows(unit_rows, which, first_row, N, ROWS, ROWS_LAYOUT)
        rows = gl.allocate_shared_memory(gl.bfloat16, [ROWS, 128], gl.NVMMASharedLayout(128, 16, rank=2), raw)
        fence_async_shared()
        gl.thread_barrier()

    none = gl.zeros([ROWS, TILE], gl.float32, S_LAYOUT)
    total = _in_thread(none, ROWS, TILE)
    weight = _in_thread(none, ROWS, TILE)
    mean = gl.zeros([ROWS, 128], gl.float32, O_LAYOUT)
    mean, total, weight = _consume_all(rows, none, mean, total, weight, scale, groups, ring, full, full, banks, start,
                                       ROWS, TILE, STAGES, P_LAYOUT, ORDER, True)  # fmt: skip
    _finish(partial_mean, partial_lse, mean, total, weight, scale, row_set, first_row, split, N, splits, ROWS, O_LAYOUT)


@gluon.jit
def _produce(banks, start, groups, ring, full, empty, TILE: gl.constexpr, STAGES: gl.constexpr):
    """One warp: fetches every group, once both consumers have left its slot."""
    for g in range(0, groups):
        mbarrier.wait(empty.index(g % STAGES), ((g // STAGES) & 1) ^ 1)
        _fetch(banks, start, g, groups, ring, full, TILE, STAGES)


@gluon.jit
def _consume(unit_rows, partial_mean, partial_lse, N, splits, scale, which, row_set, first_row, split, groups, ring,
             full, empty, rows_memory, TILE: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
             ORDER: gl.constexpr, HALF: gl.constexpr):  # fmt: skip
    """Four warps, 64 rows."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    first_row += HALF * 64
    if HELD:
        rows = _load_rows(unit_rows, which, first_row, N, 64, gl.DotOperandLayout(0, S_LAYOUT, 2))
    else:
        ROWS_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        rows = rows_memory.index(HALF)
        rows.store(_load_rows(unit_rows, which, first_row, N, 64, ROWS_LAYOUT))
        fence_async_shared()
        gl.thread_barrier()
    none = gl.zeros([64, TILE], gl.float32, S_LAYOUT)
    total = _in_thread(none, 64, TILE)
    weight = _in_thread(none, 64, TILE)
    mean = gl.zeros([64, 128], gl.float32, O_LAYOUT)
    mean, total, weight = _consume_all(rows, none, mean, total, weight, scale, groups, ring, full, empty, full, 0, 64,
                                       TILE, STAGES, P_LAYOUT, ORDER, False)  # fmt: skip
    _finish(partial_mean, partial_lse, mean, total, weight, scale, row_set, first_row, split, N, splits, 64, O_LAYOUT)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attend_specialised(banks, unit_rows, partial_mean, partial_lse, N, K, bank_row, bank_weak_row, split_groups, splits,
                       scale, student_scale, teacher_scale, ROWS: gl.constexpr, TILE: gl.constexpr,
                       STAGES: gl.constexpr, LOCAL: gl.constexpr, HELD: gl.constexpr,
                       ORDER: gl.constexpr):  # fmt: skip
    """Two consumers of 64 rows and four warps each, and one warp that fetches for both."""
    gl.static_assert(ROWS == 128)
    row_set = gl.program_id(1)
    split = gl.program_id(2)
    first_row = gl.program_id(0) * ROWS
    which, bank_row, scale = _place(row_set, bank_row, bank_weak_row, scale, student_scale, teacher_scale, LOCAL)
    first_group = split * split_groups
    groups = gl.minimum(K // (2 * TILE) - first_group, split_groups)
    start = bank_row + first_group * (2 * TILE)

    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * TILE, 128], banks.layout)
    rows_memory = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], gl.NVMMASharedLayout(128, 16, rank=2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize([
        (_consume, (unit_rows, partial_mean, partial_lse, N, splits, scale, which, row_set, first_row, split, groups,
                    ring, full, empty, rows_memory, TILE, STAGES, HELD, ORDER, 0)),
        (_consume, (unit_rows, partial_mean, partial_lse, N, splits, scale, which, row_set, first_row, split, groups,
                    ring, full, empty, rows_memory, TILE, STAGES, HELD, ORDER, 1)),
        (_produce, (banks, start, groups, ring, full, empty, TILE, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


class Plan(NamedTuple):
    grid: tuple[int, int, int]
    split_groups: int  # of two tiles
    splits: int


def plan(rows: int, length: int, row_sets: int, variant: Variant, multiprocessors: int) -> Plan:
    """As `reco_fast.kernels.launch.plan`, but for a length that is a whole number of tiles."""
    assert length % (2 * variant.tile) == 0 and length > 0, "K has to be a multiple of two tiles"
    row_tiles, groups = -(-rows // variant.rows), length // (2 * variant.tile)
    wave = multiprocessors * variant.programs // (row_tiles * row_sets)
    affordable = PARTIAL_BYTES // (row_sets * rows * (D * 2 + 4))
    wanted = max(1, min(wave, affordable - 1, MOST_SPLITS - 1, groups))
    split_groups = -(-groups // wanted)
    splits = -(-groups // split_groups)
    return Plan((row_tiles, row_sets, splits), split_groups, splits)


def descriptor(bank: torch.Tensor, bank_weak: torch.Tensor, tile: int) -> tuple[TensorDescriptor, int, int]:
    """One descriptor of the memory that both banks lie in, [rows, D], and the row at which either starts: so that one
    copy instruction serves all row sets. What lies between them is never fetched."""
    for x in (bank, bank_weak):
        assert x.dtype == torch.bfloat16 and x.shape == (len(bank), D) and x.is_contiguous()
    first, last = sorted((bank, bank_weak), key=torch.Tensor.data_ptr)
    apart, rest = divmod(last.data_ptr() - first.data_ptr(), D * 2)
    assert rest == 0 and apart + len(bank) < 2**31, "the banks have to lie whole rows apart"
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    banks = TensorDescriptor(first, [apart + len(bank), D], [D, 1], [2 * tile, D], layout)
    return banks, 0 if bank is first else apart, 0 if bank_weak is first else apart


def attend(unit_rows, bank, bank_weak, partial_mean, partial_lse, chosen: Plan, scales, variant: Variant,
           local: bool = True, warmup: bool = False):  # fmt: skip
    """`scales`: log₂e/τ, log₂e/τ_s, log₂e/τ_t. `partial_mean` [sets, N, splits, D], `partial_lse` [sets, N, splits]."""
    kernel = attend_specialised if variant.specialised else attend_gluon
    banks, bank_row, bank_weak_row = descriptor(bank, bank_weak, variant.tile)
    arguments = (banks, unit_rows, partial_mean, partial_lse, unit_rows.shape[1], len(bank), bank_row, bank_weak_row,
                 chosen.split_groups, chosen.splits, *scales)  # fmt: skip
    options = {"ROWS": variant.rows, "TILE": variant.tile, "STAGES": variant.stages, "LOCAL": int(local),
               "HELD": variant.held, "ORDER": variant.order, "num_warps": variant.warps}  # fmt: skip
    if variant.specialised:
        options["maxnreg"] = 168  # 12 warps of them are all there are; then the consumers take from the producer
    if warmup:
        return kernel.warmup(*arguments, grid=chosen.grid, **options)
    return kernel[chosen.grid](*arguments, **options)
