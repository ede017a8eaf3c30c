"""The unattended session: every command line is understood, and nothing that goes wrong ends it or loses a result."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from reco_fast import train
from reco_fast.profiling.benchmarks import gpu_session, growth, step
from reco_fast.profiling.benchmarks.gpu_parts import Task, parts
from reco_fast.profiling.benchmarks.gpu_session import Session, pack
from reco_fast.settings import command_line

PYTHON = [sys.executable, "-c"]


def recorded(folder: Path) -> dict[str, str]:
    return {name: x["ended"] for name, x in json.loads((folder / "session.json").read_text())["parts"].items()}


def test_a_part_that_fails_or_hangs_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "GRACE", 1)
    chosen = {
        "fails": Task(20, [[*PYTHON, "raise SystemExit(3)"], [*PYTHON, "print('never')"]]),
        "hangs": Task(2, [[*PYTHON, "import time; print('here', flush=True); time.sleep(60)"]]),
        "missing": Task(20, [["/no/such/program"]]),
        "works": Task(20, [[*PYTHON, "print('one')"], [*PYTHON, "print('two')"]]),
        "long": Task(1000, [[*PYTHON, "print('never')"]]),
        "cut": Task(1000, [[*PYTHON, "import time; time.sleep(60)"]], "check"),
    }
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "session.json").write_text(json.dumps({"parts": {"earlier": {"ended": "done"}}}))
    assert not Session(folder, 3).run({name: part for name, part in chosen.items() if name == "cut"})
    assert not Session(folder, 900).run({name: part for name, part in chosen.items() if name != "cut"})
    how = recorded(folder)
    assert how.pop("cut") == "stopped after 3 s"  # by the budget, not by its own limit
    assert how.pop("missing").startswith("did not start")
    assert how.pop("long").startswith("left out: ")
    assert how == {"earlier": "done", "fails": "exit 3", "hangs": "stopped after 2 s", "works": "done"}
    assert (folder / "fails.log").read_text() == ""
    assert (folder / "works.log").read_text() == "one\ntwo\n"
    assert json.loads((folder / "session.json").read_text())["environment"]["packages"]["torch"]
    assert Session(folder, 900).run({"works": chosen["works"]})


# Says that it is there and waits for another to be, or for 20 seconds; 0 if the other came.
MEET = """
import sys, time
from pathlib import Path
mine, other = map(Path, sys.argv[1:])
mine.touch()
until = time.monotonic() + 20
while not other.exists() and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(not other.exists())
"""


def test_checks_run_side_by_side_and_what_is_timed_alone(tmp_path: Path) -> None:
    def meet(mine: str, other: str, kind: Any) -> Task:
        return Task(60, [[*PYTHON, MEET.replace("20", "1" if kind == "alone" else "20"), mine, other]], kind)

    one, two, three, four = (str(tmp_path / name) for name in ("one", "two", "three", "four"))
    together = {"a": meet(one, two, "check"), "b": meet(two, one, "benchmark")}
    session = Session(tmp_path / "session", 900)
    assert not session.run({"c": meet(three, four, "alone"), "d": meet(four, three, "alone"), **together})
    how = recorded(tmp_path / "session")
    assert how == {"a": "done", "b": "done", "c": "exit 1", "d": "done"}  # d found what c had left


def test_the_pack_holds_results_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "session"
    for name in ("a.json", "run/metrics.jsonl", "run/tensorboard/x.pt.trace.json.gz", "run/checkpoints/1.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "run" / "memory_1.pickle").write_text("code")
    (folder / "part.log").write_text("start" + "x" * gpu_session.LOG_BYTES)
    (folder / "taken-away.json").symlink_to(folder / "nothing")  # as if removed after it was listed
    with tarfile.open(pack(folder)) as tar:
        names = set(tar.getnames())
        assert names == {"a.json", "part.log", "run/metrics.jsonl", "run/tensorboard_x.pt.trace.json.gz"}
        log = tar.extractfile("part.log")
        assert log is not None
        assert not log.read().startswith(b"start")
    monkeypatch.setattr(gpu_session, "PACK_BYTES", 100)
    with tarfile.open(pack(folder)) as tar:
        assert "part.log" not in tar.getnames()
        assert "a.json" in tar.getnames()


def test_a_benchmark_is_timed_when_the_checks_are_done(tmp_path: Path) -> None:
    """Also one that has begun long before it asks: its share is held from its start."""
    timed = "from reco_fast.profiling.machine import Machine\nwith Machine().alone(): print(time.monotonic())"
    parts = {
        "check": Task(60, [[*PYTHON, "import time; time.sleep(2); print(time.monotonic())"]], "check"),
        "benchmark": Task(60, [[*PYTHON, f"import time\ntime.sleep(0.5)\n{timed}"]], "benchmark"),
    }
    folder = tmp_path / "session"
    assert Session(folder, 900).run(parts)
    check, benchmark = (float((folder / f"{name}.log").read_text()) for name in parts)
    assert benchmark > check


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_that_is_cut_leaves_what_was_done(tmp_path: Path, by: int) -> None:
    script = tmp_path / "session.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from reco_fast.profiling.benchmarks.gpu_parts import Task\n"
        "from reco_fast.profiling.benchmarks.gpu_session import Session\n"
        "first = Task(60, [[sys.executable, '-c', 'print(1)']])\n"
        "sleeps = 'import os, time; print(os.getpid(), flush=True); time.sleep(99)'\n"
        "endless = Task(60, [[sys.executable, '-c', sleeps]])\n"
        "Session(Path(sys.argv[1]), 900).run({'first': first, 'endless': endless})\n"
    )
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, script, folder])
    log = folder / "endless.log"
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        started = int(log.read_text())
    finally:
        process.send_signal(by)
        process.wait(20)
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert {"session.json", "first.log"} <= set(tar.getnames())
        recorded_last = tar.extractfile("session.json")
        assert recorded_last is not None
        done = json.load(recorded_last)
    assert done["parts"]["first"]["ended"] == "done"
    if by == signal.SIGTERM:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{started}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{started}").exists()
    else:
        os.kill(started, signal.SIGKILL)


def test_a_rehearsal_takes_few_images(tmp_path: Path) -> None:
    for number in range(5):
        for folder in ("train/cat", "train/dog", "test/cat"):
            (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / folder / f"{number}.jpg").write_text(folder)
    for _ in range(2):  # the second time over the first's
        chosen = gpu_session.few(tmp_path / "images", tmp_path / "few", each=2)
    found = sorted(path.relative_to(chosen).as_posix() for path in chosen.rglob("*.jpg"))
    assert found == [f"{folder}/{n}.jpg" for folder in ("test/cat", "train/cat", "train/dog") for n in range(2)]
    assert (chosen / "train/dog/1.jpg").read_text() == "train/dog"


@pytest.mark.parametrize("tiny", [[], ["--tiny"]])
def test_images_without_a_split_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    (tmp_path / "train").mkdir()
    given = ["--output", str(tmp_path / "out"), "--budget", "1", "--data.path", str(tmp_path), *tiny]
    monkeypatch.setattr(sys, "argv", ["gpu_session", *given])
    with pytest.raises(SystemExit) as stop:
        gpu_session.main()
    assert stop.value.code == 2
    assert f"--data.path: expected a folder with train/ and test/, got {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("tiny", [False, True])
def test_every_command_line_is_understood(tmp_path: Path, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # as where all extras are installed
    known = parts(tmp_path, tmp_path / "cifar", tmp_path / "photographs", tiny)
    assert {"kernel-tests", "train-torch", "kernels", "tiles", "step-resnet18", "step-resnet50", "profile"} <= set(
        known
    )
    assert {"plain-resnet50", "loader-32", "loader-224", "profile-224", "growth", "quality-moco"} <= set(known)
    assert {"lightly", "lightly-224", "loader-tests", "train-dali"} <= set(known)
    for part in known.values():
        for _, word, module, *arguments in part.commands:
            if word != "-m":
                assert (gpu_session.HERE / word).is_file()
            elif module == "reco_fast.train":
                config, _ = train.parse(arguments)
                assert config.data.path in (str(tmp_path / "cifar" / "train"), str(tmp_path / "photographs"))
            elif module == "reco_fast.profiling.benchmarks.step":
                parsed = command_line.parse(step.Benchmark, arguments, prog="", description="", default=step.DEFAULT)
                assert parsed.model.arch == ("timm/test_resnet" if tiny else parsed.model.arch)
                assert parsed.against
            elif module == "reco_fast.profiling.benchmarks.growth":
                grown = command_line.parse(growth.Growth, arguments, prog="", description="", default=growth.DEFAULT)
                assert grown.batches == ((8,) if tiny else (256, 1024, 2048, 4096))
            else:
                file = f"{module.removeprefix('reco_fast.').replace('.', '/')}.py"
                assert module == "pytest" or (gpu_session.HERE / file).is_file()
                assert all((gpu_session.HERE / a).is_file() for a in arguments if a.startswith("tests/"))
