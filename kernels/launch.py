"""How the fused kernel is launched: tile shapes by architecture, the split of the bank, and what `impl="auto"` means."""

from functools import lru_cache
from typing import NamedTuple

import torch

WORKSPACE_BYTES = 14 * 2**20  # for partial results; with the rest, under 16 MiB at N = 1024, D = 128
MOST_SPLITS = 64  # `_combine_kernel` holds a row of each in registers
WIDEST = 256


class Tile(NamedTuple):
    """One program: `rows` of a row set against `bank_rows` at a time; `programs` of them fit a multiprocessor."""

    rows: int
    bank_rows: int
    warps: int
    stages: int
    programs: int


class Part(NamedTuple):
    """One launch over `length` bank rows from `start`, in `splits` of `split_length`."""

    start: int
    length: int
    first_split: int
    splits: int
    split_length: int
    masked: bool


class Plan(NamedTuple):
    tile: Tile
    block_d: int
    sets: int
    row_tiles: int
    splits: int
    parts: tuple[Part, ...]
    partial_dtype: torch.dtype


def block_width(width: int) -> int:
    return next(block for block in (64, 128, 256) if width <= block)


@lru_cache(maxsize=256)
def plan(rows: int, length: int, width: int, sets: int, dtype: torch.dtype, device: torch.device) -> Plan:
    block_d = block_width(width)
    tile = Tile(64, 64, 4, 3, 2)
    multiprocessors = 132
    partial_dtype = torch.float16 if dtype == torch.bfloat16 else torch.float32
    row_tiles = -(-rows // tile.rows)
    tiles, left = divmod(length, tile.bank_rows)
    wanted = multiprocessors * tile.programs // (row_tiles * sets)
    affordable = WORKSPACE_BYTES // (sets * rows * (width * partial_dtype.itemsize + 4)) - (left > 0)
    splits = max(1, min(wanted, affordable, MOST_SPLITS - 1, tiles))
    parts = []
    if tiles:
        tiles_a_split = -(-tiles // splits)
        splits = -(-tiles // tiles_a_split)
        parts.append(Part(0, tiles * tile.bank_rows, 0, splits, tiles_a_split * tile.bank_rows, False))
    else:
        splits = 0
    if left:
        parts.append(Part(tiles * tile.bank_rows, left, splits, 1, tile.bank_rows, True))
        splits += 1
    return Plan(tile, block_d, sets, row_tiles, splits, tuple(parts), partial_dtype)


def choose_implementation(rows: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """What `impl="auto"` runs."""
    return "sdpa"
