"""Runs the kernel tests in Triton's interpreter, in a process of their own: it is chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0"]
    # One file: further workers, for which the caller may have asked, would only take cores from this one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_relation_loss.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])  # `pytest -rP` shows how many ran
