"""How the fused kernel is launched: tiles by architecture, the split of the banks, and what `impl="auto"` means."""

from functools import lru_cache
from typing import NamedTuple

import torch

WIDEST = 256  # of a row, D
MOST_SPLITS = 64  # `combine_kernel` holds one row of each in registers
PARTIAL_BYTES = 14 * 2**20  # bound on the partial results: all workspace stays under 16 MiB at N = 1024, D = 128


class Tile(NamedTuple):
    """One program: `rows` of a row set against `bank_rows` at a time. `programs` of them fit on a multiprocessor."""

    rows: int
    bank_rows: int
    warps: int
    stages: int
    programs: int


# For up to 64 rows, and for more; by bank dtype and by D rounded up. sm_90 with bfloat16 and D = 128 by the clock
# (docs/kernels.md), all else from the compiler: none spills, and the registers and shared memory that
# `compile_matrix.py` reports allow `programs` on a multiprocessor, since only another program overlaps a program's
# softmax with matrix products. sm_80 tiles stay under the 99 KiB of 8.6 and 12.0.
TILES: dict[str, dict[tuple[str, int], tuple[Tile, Tile]]] = {
    "sm_80": {
        ("bfloat16", 64): (Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 3, 3)),
        ("bfloat16", 128): (Tile(64, 64, 4, 3, 2), Tile(64, 64, 4, 3, 2)),
        ("bfloat16", 256): (Tile(64, 32, 8, 3, 1), Tile(64, 32, 8, 3, 1)),
        ("float32", 64): (Tile(32, 32, 4, 2, 3), Tile(32, 32, 4, 2, 3)),
        ("float32", 128): (Tile(32, 32, 4, 2, 2), Tile(32, 32, 4, 2, 2)),
        ("float32", 256): (Tile(16, 32, 8, 2, 1), Tile(16, 32, 8, 2, 1)),
    },
    "sm_90": {
        ("bfloat16", 64): (Tile(64, 64, 4, 3, 4), Tile(128, 64, 8, 3, 2)),
        ("bfloat16", 128): (Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 3, 3)),
        ("bfloat16", 256): (Tile(64, 32, 4, 3, 2), Tile(128, 32, 8, 3, 1)),
        ("float32", 64): (Tile(64, 32, 4, 2, 3), Tile(64, 32, 4, 2, 3)),
        ("float32", 128): (Tile(32, 32, 4, 2, 2), Tile(32, 32, 4, 2, 2)),
        ("float32", 256): (Tile(16, 32, 8, 2, 1), Tile(16, 32, 8, 2, 1)),
    },
    "sm_100": {
        ("bfloat16", 64): (Tile(64, 64, 4, 3, 4), Tile(128, 64, 8, 3, 2)),
        ("bfloat16", 128): (Tile(64, 64, 8, 3, 2), Tile(128, 64, 8, 3, 2)),
        ("bfloat16", 256): (Tile(64, 32, 8, 2, 2), Tile(64, 32, 8, 2, 2)),
        ("float32", 64): (Tile(64, 32, 4, 2, 3), Tile(64, 32, 4, 2, 3)),
        ("float32", 128): (Tile(64, 32, 8, 2, 1), Tile(64, 32, 8, 2, 1)),
        ("float32", 256): (Tile(16, 32, 8, 2, 1), Tile(16, 32, 8, 2, 1)),
    },
    "gfx942": {
        ("bfloat16", 64): (Tile(64, 64, 4, 2, 2), Tile(64, 64, 4, 2, 2)),
        ("bfloat16", 128): (Tile(64, 64, 4, 2, 2), Tile(64, 64, 4, 2, 2)),
        ("bfloat16", 256): (Tile(64, 32, 4, 2, 1), Tile(64, 32, 4, 2, 1)),
        ("float32", 64): (Tile(32, 32, 4, 2, 2), Tile(32, 32, 4, 2, 2)),
        ("float32", 128): (Tile(32, 32, 4, 2, 1), Tile(32, 32, 4, 2, 1)),
        ("float32", 256): (Tile(16, 16, 4, 2, 1), Tile(16, 16, 4, 2, 1)),
    },
}


class Launch(NamedTuple):
    """One launch over `length` bank rows from row `start`, cut into `splits` of `split_length`."""

    start: int
    length: int
    first_split: int
    splits: int
    split_length: int
    masked: bool


class Plan(NamedTuple):
    tile: Tile
    block_d: int
    row_tiles: int
    splits: int
    parts: tuple[Launch, ...]
    partial_dtype: torch.dtype


@lru_cache(maxsize=256)
def plan(rows: int, length: int, width: int, row_sets: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """For `rows` [N, D = `width`] in each of `row_sets`, and banks [K = `length`, D] of `dtype`."""
    name, block_d = ("float32" if dtype == torch.float32 else "bfloat16"), block_width(width)
    tile = TILES[architecture(device)][name, block_d][rows > 64]
    # Unit rows average to at most a unit row, so half precision holds a partial O to 5e-4 of each element: less than
    # rounding the exponentials costs, and half the traffic.
    partial_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    row_tiles = -(-rows // tile.rows)
    tiles, rest = divmod(length, tile.bank_rows)

    parts = []
    splits = 0
    if tiles:
        # One wave of programs, no more splits than the workspace bounds allow, and none that is empty.
        wave = multiprocessors(device) * tile.programs // (row_tiles * row_sets)
        affordable = PARTIAL_BYTES // (row_sets * rows * (width * partial_dtype.itemsize + 4))
        wanted = max(1, min(wave, affordable - 1, MOST_SPLITS - 1, tiles))
        split_tiles = -(-tiles // wanted)
        splits = -(-tiles // split_tiles)
        parts.append(Launch(0, tiles * tile.bank_rows, 0, splits, split_tiles * tile.bank_rows, masked=False))
    if rest:
        parts.append(Launch(tiles * tile.bank_rows, rest, splits, 1, tile.bank_rows, masked=True))
        splits += 1
    return Plan(tile, block_d, row_tiles, splits, tuple(parts), partial_dtype)


def block_width(width: int) -> int:
    """D rounded up to a width that the kernels are compiled for; the rest of a row is masked, not copied."""
    return 64 if width <= 64 else 128 if width <= 128 else 256


def architecture(device: torch.device) -> str:
    """The row of `TILES` for a device. The interpreter, on a CPU, takes that of sm_80."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


class Measured(NamedTuple):
    """For an architecture ("cpu" or a row of `TILES`), from N·K upwards: what was fastest, and where that was seen."""

    architecture: str
    products: int
    implementation: str
    source: str


# The first row that fits decides. `python -m reco_fast.profiling.benchmarks.launch_table` writes the rows of a GPU; on
# one that no benchmark has run on, the choice is PyTorch's own attention.
MEASURED = (
    Measured("sm_90", 1, "triton", "docs/kernels.md, GPU: NVIDIA H200, 2026-11-26"),
    Measured("cpu", 64 * 4096, "sdpa", "docs/kernels.md, CPU: 1.2 to 3.0 times faster than torch, one Xeon thread"),
    Measured("cpu", 1, "torch", "docs/kernels.md, CPU: 1.3 ms against sdpa's 1.7 ms at N 16, K 1024"),
)


def choose_implementation(rows: int, length: int, width: int, device: torch.device) -> str:
    """What `impl="auto"` runs for N = `rows`, K = `length`, D = `width`."""
    here = architecture(device) if device.type == "cuda" else device.type
    if here != "cpu" and width > WIDEST:  # neither Triton's nor PyTorch's fused kernels go wider on a GPU
        return "torch"
    for row in MEASURED:
        if row.architecture == here and rows * length >= row.products:
            return row.implementation
    return "sdpa"
