"""The examples run, learn, and stay short."""

import runpy
from pathlib import Path

PLAIN_LOOP = Path(__file__).parents[1] / "examples" / "plain_loop.py"


def test_plain_loop_learns() -> None:
    losses = runpy.run_path(str(PLAIN_LOOP))["train"](steps=40)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_plain_loop_is_short() -> None:
    assert len(PLAIN_LOOP.read_text(encoding="utf-8").splitlines()) < 60
