"""Signals: which let a run save itself, and Ctrl-C anywhere else."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import ENVIRONMENT
from small_runs import SMALL, write_classes, write_pictures

from reco_fast import evaluate, train
from reco_fast.distributed.stopping import StopRequest
from reco_fast.evaluation import pictures
from reco_fast.settings import command_line

LONG = "--run.log-every 1 --train.epochs 100000 --data.loader torch --data.workers 1".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("signals") / "my images", 32)


def training(images: Path, folder: Path) -> list[str]:
    arguments = ["-m", "reco_fast.train", "cifar10", "--data.path", images, "--run.dir", folder, *SMALL, *LONG]
    return [str(part) for part in (sys.executable, *arguments)]


def ignores(process: int, number: signal.Signals) -> bool:
    (mask,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_run_saves_itself_and_says_how_to_go_on(name: str, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    pipe = subprocess.PIPE
    line = training(images, folder)
    with subprocess.Popen(
        line, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=ENVIRONMENT
    ) as running:
        assert running.stdout is not None
        for shown in running.stdout:
            if shown.startswith("step 2 "):
                workers = subprocess.check_output(["pgrep", "-P", str(running.pid)], text=True).split()
                assert all(ignores(int(worker), signal.Signals[name]) for worker in workers)
                for process in (running.pid, *map(int, workers)):  # Slurm's reaches each process of the job
                    os.kill(process, signal.Signals[name])
                break
        rest, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    stopped_at = int(rest.split("stopped at step ")[1].split()[0])
    assert f"({name}); go on with --run.dir '{folder}'" in rest
    assert (folder / "checkpoints" / f"step-{stopped_at:09d}.safetensors").exists()


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal_name is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal_name == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_reader_has_gone_saves_itself(images: Path, tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(training(images, tmp_path / "run"), stdout=pipe, stderr=pipe, env=ENVIRONMENT) as running:
        assert running.stdout is not None
        for shown in running.stdout:
            if shown.startswith(b"step 2 "):
                break
        running.stdout.close()
        assert running.stderr is not None
        errors = running.stderr.read()
        assert running.wait(timeout=120) == 0, errors
    assert b"Traceback" not in errors
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


SLOW = {  # a stand-in for a library that takes its time, and that turns an interrupt into another error
    "torch.py": "import time\nprint('importing', flush=True)\ntry: time.sleep(60)\nexcept BaseException: 1 / 0\n"
}


@pytest.mark.parametrize(
    "command",
    ["reco_fast.train cifar10", "reco_fast.evaluate x", "reco_fast embed x", "reco_fast.profiling.report x"],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(command: str, tmp_path: Path) -> None:
    for name, text in SLOW.items():
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", *command.split()]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    assert (running.returncode, errors) == (130, "interrupted\n")


def test_a_program_that_imports_reco_fast_keeps_its_handlers() -> None:
    code = "import signal, reco_fast; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


def test_ctrl_c_in_a_command_is_one_line_and_130(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            command_line.run(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capfd.readouterr().err == "interrupted\n"


def test_an_evaluation_is_kept_whatever_the_terminal_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "train", 16)
    write_classes(tmp_path / "val", 4, seed=1)
    data = ["--data.path", str(tmp_path / "train"), "--data.val-path", str(tmp_path / "val")]
    options = ["--data.loader", "torch", "--train.max-steps", "1", "--run.dir", str(tmp_path / "run")]
    run = train.train(*train.parse(["cifar10", *SMALL, *data, *options]))
    monkeypatch.setattr(pictures, "available", lambda: False)  # they take long
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    evaluate.evaluate(evaluate.EvaluateCommand(run, device="cpu"))
    assert b"tau = 0.1" in written.getvalue()
    assert json.loads((run / "evaluation.json").read_text())["knn_top1"] is not None
    line = [sys.executable, "-m", "reco_fast.evaluate", "--help"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    help_ = subprocess.run(line, capture_output=True, env=environment, check=False)
    assert help_.returncode == 0, help_.stderr
