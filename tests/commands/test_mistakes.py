"""A seeded share of what `python tests/mistakes.py` tries by the hundred."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("check", "count"), [("commands", 14), ("folders", 10)])
def test_mistakes_and_damage_end_in_a_run_or_in_one_line(check: str, count: int) -> None:
    script = Path(__file__).with_name("mistakes.py")
    line = [sys.executable, str(script), check, "--count", str(count)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{check}: {count} cases" in done.stdout
    assert " 0 wrong" in done.stdout
