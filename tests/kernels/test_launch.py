"""The plan of a launch, the memory it takes, and the choice behind "auto"."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reco_fast.kernels import launch

ARCHITECTURES = list(launch.TILES)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 65536, 1_048_577])
@pytest.mark.parametrize("rows", [1, 64, 65, 1024, 5000])
def test_the_splits_cover_the_bank_once(
    rows: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    plan = launch.plan.__wrapped__(rows, length, 128, 4, dtype, CPU)
    covered = 0
    slot = 0
    for part in plan.parts:
        assert part.start == covered
        assert part.first_split == slot
        assert part.split_length % plan.tile.bank_rows == 0
        assert (part.splits - 1) * part.split_length < part.length <= part.splits * part.split_length
        assert part.masked or part.length % plan.tile.bank_rows == 0
        covered += part.length
        slot += part.splits
    assert covered == length
    assert slot == plan.splits <= launch.MOST_SPLITS
    assert plan.row_tiles * plan.tile.rows >= rows


class Allocations(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        taken, made = (
            {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(tree) if torch.is_tensor(x)}
            for tree in ((args, kwargs), output)
        )
        self.bytes += sum(size for storage, size in made.items() if storage not in taken)
        return output


class Launches:
    """In the place of a kernel: keeps the grids it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *args, **kwargs: None


MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # of an A100, H100, B200 and MI300


def host_code(
    architecture: str,
    multiprocessors: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[int, list[tuple[int, ...]]]:
    """Bytes that the operator allocates beside its inputs, all together, and the grids of its attention kernel.

    The host code itself runs, on CUDA tensors without content and with the kernels taken out. Whatever looked at a
    value, and with it every allocation by data and every wait for the device, would raise.
    """
    relation_loss = pytest.importorskip("reco_fast.kernels.relation_loss")
    launches = {name: Launches() for name in ("unit_kernel", "attend_kernel", "combine_kernel")}
    for name, kernel in launches.items():
        monkeypatch.setattr(relation_loss.relation_kernels, name, kernel)
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    launch.plan.cache_clear()
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        students, teachers = [[empty(rows, 128) for _ in range(2)] for _ in range(2)]
        banks = [empty(length, 128, dtype=dtype) for _ in range(2)]
        mix = (empty(rows, dtype=torch.long), 0.0, empty(rows))
        weights = (0.0, empty(), 0.0, empty())
        with Allocations() as allocated:
            relation_loss._forward(*students, *teachers, *banks, *mix, 0.2, 0.1, 0.04, *weights, True)
    launch.plan.cache_clear()
    return allocated.bytes, launches["attend_kernel"].grids


@pytest.mark.parametrize("length", [65536, 65535, 1_048_576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_beyond_the_inputs(
    architecture: str, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At N = 1024, D = 128; the gradients, which become outputs, are counted too."""
    for multiprocessors in (MULTIPROCESSORS[architecture], 1000):
        allocated, grids = host_code(architecture, multiprocessors, 1024, length, dtype, monkeypatch)
        assert 2 * 1024 * 128 * 4 < allocated < 16 * 2**20
        assert len(grids) == (2 if length % 2 else 1)


def test_splits_fill_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    _, grids = host_code("sm_90", 132, 256, 65536, torch.bfloat16, monkeypatch)
    programs = 132 * launch.TILES["sm_90"]["bfloat16", 128][1].programs
    assert 0.8 * programs < math.prod(grids[0]) <= programs


def test_auto_takes_the_fastest_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.choose_implementation(256, 65536, 128, CPU) == "sdpa"
    assert launch.choose_implementation(16, 1024, 128, CPU) == "torch"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "MEASURED", (launch.Measured("sm_90", 256 * 65536, "triton", "a test"),))
    assert launch.choose_implementation(256, 65536, 128, gpu) == "triton"
    assert launch.choose_implementation(256, 4096, 128, gpu) == "sdpa"
    assert launch.choose_implementation(256, 65536, 300, gpu) == "torch"


def test_every_row_of_the_table_names_its_source() -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    for row in launch.MEASURED:
        assert row.architecture in ("cpu", *launch.TILES)
        path, section = row.source.split(", ")[0], row.source.split(", ")[1].split(":")[0]
        assert path == "docs/kernels.md"
        assert f"### {section}" in documentation
