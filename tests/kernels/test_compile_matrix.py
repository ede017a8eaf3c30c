"""What the kernels are compiled to, for every architecture, without a GPU."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reco_fast.kernels import launch

ARCHITECTURES = list(launch.TILES)
# Of one multiprocessor, for its programs together: of an A100, H100, B200 and MI300.
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}


Matrix = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
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

    @functools.cache
    def rows(architecture: str) -> list[dict[str, Any]]:
        output, error = started[architecture].communicate(timeout=600)
        assert started[architecture].returncode == 0, error[-3000:]
        return [json.loads(line) for line in output.splitlines()]

    yield rows
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_compiles_well(compilers: Matrix, architecture: str) -> None:
    from reco_fast.kernels.compile_matrix import SHARED_LIMIT

    rows = compilers(architecture)
    tiles = {(key, tile) for key, pair in launch.TILES[architecture].items() for tile in pair}
    attend = [row for row in rows if row["kernel"] == "attend_kernel"]
    assert len(attend) == 2 * len(tiles)
    assert len(rows) == len(attend) + 3
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_takes_three_tf32_products_for_one(compilers: Matrix, architecture: str) -> None:
    """Plain TF32 has 11 bits. `test_relation_loss.py` shows that none of the three can be left out."""
    for row in compilers(architecture):
        if row["kernel"] != "attend_kernel":
            continue
        if row["configuration"].startswith("float32"):
            assert row["dots"] == 2 * 3, row
            assert row["tf32_instructions"] % 3 == 0, row
            assert row["tf32_instructions"] > 0 or architecture == "gfx942", row
        else:
            assert row["dots"] == 2, row
            assert row["tf32_instructions"] == 0, row


def test_the_operator_compiles_as_it_is_called() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "dry_launch.py")],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    compiled = {x["variant"]: x["compiled"] for x in map(json.loads, done.stdout.splitlines())}
    assert len(compiled) == 3
    # A bank of whole tiles takes one attention launch; the tail, when there is one, another.
    tailed = ["unit_kernel", "attend_kernel", "attend_kernel", "combine_kernel"]
    assert list(compiled.values()) == [tailed[:1] + tailed[2:], tailed, tailed[:1] + tailed[2:]]
