"""Calls the operator as on an H100 and compiles each launch just as Triton would there; only the launch itself is left
out. Triton derives a kernel's types and constants from the arguments of the call, so this sees what a compile matrix
with signatures written by hand does not.

    python tests/dry_launch.py [--all]
"""

import json
import sys
from typing import Any

import torch
from float64_reference import Problem, make_problem, run
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from reco_fast.kernels import launch, relation_kernels, relation_loss


class Driver:
    """An H100 to compile for, and nothing to run on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Kernel:
    def __init__(self, kernel: Any, compiled: list[str]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch_(*args: Any, **kwargs: Any) -> None:
            code = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert len(code.asm["cubin"]) > 1000
            self.compiled.append(self.kernel.__name__)

        return launch_


def variants(everything: bool) -> dict[str, tuple[Problem, dict[str, Any]]]:
    """Problems, and what replaces their tensors: arguments that are 1, types of all kinds, terms that are off."""
    half, tensor = torch.bfloat16, torch.tensor
    exotic = {
        "permutation": torch.arange(5, dtype=torch.uint8),
        "mix_ratio": torch.rand(5, dtype=half),
    }
    wide = {"permutation": torch.arange(16, dtype=torch.int32), "mix_ratio": tensor(0.5, dtype=torch.float64)}
    double = tensor(1.0, dtype=torch.float64)
    chosen: dict[str, tuple[Problem, dict[str, Any]]] = {
        "one row, one bank row": (make_problem("random", 1, 1, 64), {}),
        "float64 rows, odd types, no global term": (
            make_problem(
                "random", 5, 200, 40, torch.float64, half, global_weight=0, mix_anchor="key", local_weight=double
            ),
            exotic,
        ),
        "below the fixed maximum, no local term": (
            make_problem("teacher_0.02", 16, 64, 64, torch.float16, half, local_weight=0, global_weight=tensor(1.0)),
            {},
        ),
    }
    if everything:
        chosen |= {
            "InfoNCE": (make_problem("random", 5, 200, 64, global_weight=0, local_weight=0), {}),
            "D = 1": (make_problem("random", 3, 33, 1, torch.float16, half), {}),
            "D = 256": (make_problem("random", 100, 200, 256, half, half), {}),
            "many rows": (make_problem("random", 300, 3000, 128, torch.float32, half), {}),
            "tensor weights": (
                make_problem("random", 16, 16, global_weight=tensor(1.0), local_weight=tensor(2.0)),
                wide,
            ),
            "whole numbers": (make_problem("random", 16, 1024, global_weight=1, local_weight=2), {"mix_ratio": 1}),
        }
    return chosen


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(Driver())
    launch.architecture = lambda device: "sm_90"
    launch.multiprocessors = lambda device: 132
    compiled: list[str] = []
    for name in ("unit_kernel", "attend_kernel", "combine_kernel"):
        setattr(relation_kernels, name, Kernel(getattr(relation_kernels, name), compiled))
    for label, (problem, changes) in variants("--all" in sys.argv).items():
        compiled.clear()
        run(relation_loss.reco_loss_triton, Problem(**{**vars(problem), **changes}))
        print(json.dumps({"variant": label, "compiled": compiled}), flush=True)


if __name__ == "__main__":
    main()
