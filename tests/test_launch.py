"""The launch table, compiled for every architecture without a GPU; the plan of a launch; the choice behind "auto"."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reco_fast.kernels import launch

ARCHITECTURES = list(launch.TILES)
# Of one multiprocessor, for its programs together: of an A100, H100, B200 and MI300.
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The compile matrix of each architecture in a process of its own, all at once: Triton compiles on one core, and
    this process may have its interpreter switched on."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "reco_fast.kernels.compile_matrix", "--json", "--architecture"]
    started = {
        name: subprocess.Popen(
            [*command, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in ARCHITECTURES
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_compiles_well(compilers: dict[str, Any], architecture: str) -> None:
    from reco_fast.kernels.compile_matrix import SHARED_LIMIT

    output, error = compilers[architecture].communicate(timeout=600)
    assert compilers[architecture].returncode == 0, error[-3000:]
    rows = [json.loads(line) for line in output.splitlines()]
    tiles = {(key, tile) for key, pair in launch.TILES[architecture].items() for tile in pair}
    attend = [row for row in rows if row["kernel"] == "_attend_kernel"]
    assert len(attend) == 2 * len(tiles)
    assert len(rows) == len(attend) + 5
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT[architecture], row
        assert row["instructions"] > 50, row
    for row in attend:
        assert sum(row["tensor_instructions"].values()) > 0, row
        if row["configuration"].endswith("fixed maximum"):  # the case whose speed matters
            programs, warps = row["programs"], row["warps"]
            assert row["shared_bytes"] * programs <= SHARED_BYTES[architecture], row
            if architecture != "gfx942":
                registers = -(-row["registers"] // 8) * 8  # given out in eights
                assert registers * 32 * warps * programs <= 65536, row


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_workspace_stays_under_16_mib(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At N = 1024, K = 65536, D = 128, whatever the number of multiprocessors."""
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1000)
    plan = launch.plan.__wrapped__(1024, 65536, 128, 4, dtype, CPU)
    unit_rows = 3 * 1024 * 128 * dtype.itemsize
    partial = 4 * 1024 * plan.splits * (128 * plan.partial_dtype.itemsize + 4)
    row_losses = 4 * 1024 * 4
    saved_for_backward = 2 * 1024 * 128 * 4
    assert unit_rows + partial + row_losses + saved_for_backward < 16 * 2**20


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
    documentation = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    for row in launch.MEASURED:
        assert row.architecture in ("cpu", *launch.TILES)
        path, section = row.source.split(", ")[0], row.source.split(", ")[1].split(":")[0]
        assert path == "docs/kernels.md"
        assert f"### {section}" in documentation
