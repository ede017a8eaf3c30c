"""What several ranks do together: agree on a stop, each in the same step and at once."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launchers import ENVIRONMENT, torchrun, torchrun_line
from small_runs import SMALL, write_pictures

LONG = (
    "--run.log-every 100000 --train.epochs 100000 --run.checkpoint-steps 5 --data.loader torch --data.workers 1"
).split()
AGREE = """
import torch
from reco_fast import distributed
from reco_fast.distributed.stopping import Agreement
with distributed.process_group(torch.device("cpu")):
    agreement, rank = Agreement(), distributed.rank()
    answers = [agreement.any(step == 3 and rank == 1, step == 5 and rank == 0) for step in range(4)]
    agreement.forget()
    answers += [agreement.any(step == 3 and rank == 1, step == 5 and rank == 0) for step in range(4, 8)]
    agreement.forget()
    assert answers == [[False, False]] * 6 + [[False, True], [False, False]], answers
"""
ENDS = """
import pathlib, torch
from reco_fast import distributed
def gloo():
    return any("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
def train():
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))(torch.ones(2, 4)).sum().backward()
    print(gloo(), flush=True)
with distributed.process_group(torch.device("cpu")):
    train()
print(gloo(), flush=True)
"""
AGAIN = """
import os, time, torch
from reco_fast import distributed
attempt, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
time.sleep(3 * attempt * (rank == 0))  # the other one comes first, and finds what the first attempt has left
with distributed.process_group(torch.device("cpu")):
    ranks = distributed.all_gather(torch.tensor([rank])).tolist()
    if attempt == 0:
        time.sleep(30 * (rank == 0))
        os._exit(1)
print(f"ranks {ranks} in attempt {attempt}")
"""
FAILS_FIRST = """
import torch
from reco_fast import distributed
def work():
    raise ValueError("the same on each rank")
with distributed.process_group(torch.device("cpu")):
    try:
        distributed.first_rank_first(work)
    except ValueError as error:
        print(f"{error} {distributed.rank()}", flush=True)
    distributed.barrier()
"""
WRONG = """
import os, time
from reco_fast.errors import ConfigError
from reco_fast.settings import command_line
def main():
    rank = os.environ["RANK"]
    time.sleep(2 * (rank == "0"))  # the other one finds the mistake first
    raise ConfigError(f"--data.path: expected \\x1b[31mred on rank {rank}")
command_line.run(main)
"""


def test_gloo_ends_with_the_group(tmp_path: Path) -> None:
    """A thread of it that outlives the interpreter aborts one run in some fifty, which was done."""
    (tmp_path / "ends.py").write_text(ENDS)
    done = torchrun(tmp_path / "ends.py")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall("True|False", done.stdout)) == ["False", "False", "True", "True"]


def test_ranks_hear_of_a_flag_one_step_later_and_forget_together(tmp_path: Path) -> None:
    (tmp_path / "agree.py").write_text(AGREE)
    done = torchrun(tmp_path / "agree.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_ranks_find_each_other_after_one_of_them_was_lost(tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(AGAIN)
    done = torchrun("--max-restarts=1", tmp_path / "again.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ranks [0, 1] in attempt 1") == 2


def test_what_fails_on_the_first_rank_fails_on_the_others_too(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS_FIRST)
    done = torchrun(tmp_path / "fails.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same on each rank") == 2


def test_a_mistake_is_the_first_and_the_last_thing_that_torchrun_shows(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    done = torchrun(tmp_path / "wrong.py")
    line = "error: --data.path: expected \\x1b[31mred on rank 0"
    assert done.stderr.splitlines().count(line) == 1
    assert "on rank 1" not in done.stderr
    summary = done.stderr.rpartition("Root Cause")[2]
    assert line in summary, done.stderr
    assert "exitcode  : 2" in summary


@pytest.mark.parametrize("to", ["one rank", "launcher"])
def test_sigterm_stops_all_ranks_within_steps_and_saves(to: str, tmp_path: Path) -> None:
    data = ["--data.path", write_pictures(tmp_path / "images", 64), "--run.dir", tmp_path / "run"]
    line = torchrun_line("-m", "reco_fast.train", "cifar10", *data, *SMALL, *LONG)
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(line, stdout=log, stderr=log, env=ENVIRONMENT) as running,
    ):
        while not (found := list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))):
            time.sleep(0.05)
            assert running.poll() is None, (tmp_path / "log").read_text()[-3000:]
        if to == "launcher":
            running.send_signal(signal.SIGTERM)
        else:
            ranks = subprocess.check_output(["pgrep", "-P", str(running.pid)], text=True).split()
            os.kill(int(ranks[-1]), signal.SIGTERM)
        code = running.wait(timeout=300)
    shown = (tmp_path / "log").read_text()
    assert shown.count("stopped at step ") == 1, shown
    stopped_at = int(shown.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped_at:09d}.safetensors").exists()
    newest = max(int(path.stem.removeprefix("step-")) for path in found)
    assert stopped_at < newest + 30, (newest, stopped_at)  # not at the log line, a hundred thousand steps on
    if to == "one rank":
        assert code == 0, shown
