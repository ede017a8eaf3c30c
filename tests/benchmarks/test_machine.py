"""Benchmarks get ready together and are timed one at a time."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from reco_fast.profiling.machine import LOCK, Machine

# Gets ready, from when all three have begun to, for so long, then is timed; says when it did what.
PROCESS = """
import sys, time
from pathlib import Path
from reco_fast.profiling.machine import Machine
machine = Machine(Path(sys.argv[1]))
print("ready", time.monotonic(), flush=True)
Path(sys.argv[1] + "." + sys.argv[2]).touch()
until = time.monotonic() + 30
while len(list(Path(sys.argv[1]).parent.glob("lock.*"))) < 3 and time.monotonic() < until:
    time.sleep(0.01)  # one may start seconds after another
time.sleep(float(sys.argv[2]))
with machine.alone():
    print("begins", time.monotonic(), flush=True)
    time.sleep(0.3)
    print("ends", time.monotonic(), flush=True)
"""


def test_nobody_is_timed_while_another_gets_ready_or_is_timed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    commands = [[sys.executable, "-c", PROCESS, str(lock), wait] for wait in ("0.1", "1.0", "0.5")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [dict(line.split() for line in process.communicate(timeout=60)[0].splitlines()) for process in started]
    times = [{name: float(time) for name, time in x.items()} for x in said]
    assert max(x["ready"] for x in times) < min(x["begins"] for x in times)  # they got ready together
    order = sorted(times, key=lambda x: x["begins"])
    assert order[0]["begins"] >= max(x["ready"] for x in times) + 1.0  # not before the slowest was ready
    assert all(one["ends"] <= other["begins"] for one, other in itertools.pairwise(order))


def test_without_a_session_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCK, raising=False)
    with Machine().alone(), Machine().alone():
        pass
