"""Processes as torchrun starts them."""

import os
import subprocess
import sys

__all__ = ["ENVIRONMENT", "torchrun", "torchrun_line"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # ranks that share these cores


def torchrun_line(*arguments: object, ranks: int = 2) -> list[str]:
    """The command that starts `ranks` processes here with `arguments`: a script or `-m` and a module, then theirs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *map(str, arguments)]


def torchrun(*arguments: object, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    """What became of it. Does not raise when ranks fail."""
    line = torchrun_line(*arguments, ranks=ranks)
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=False)
