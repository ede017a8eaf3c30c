"""Processes as tests start them, and as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["ENVIRONMENT", "environment_with", "torchrun", "torchrun_line"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # ranks that share these cores


def environment_with(folder: Path, module: str, source: str) -> dict[str, str]:
    """`ENVIRONMENT` of processes that find the Python `module` with this source, which is put into `folder`."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(source)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**ENVIRONMENT, "PYTHONPATH": path}


def torchrun_line(*arguments: object, ranks: int = 2) -> list[str]:
    """The command that starts `ranks` processes here with `arguments`: a script or `-m` and a module, then theirs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *map(str, arguments)]


def torchrun(*arguments: object, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    """What became of it. Does not raise when ranks fail."""
    line = torchrun_line(*arguments, ranks=ranks)
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=False)
