"""What a run reports."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import metrics

from reco_fast.run.diagnostics import Finding, Spread
from reco_fast.run.meter import AHEAD, Meter
from reco_fast.run.report import RunLog


def test_log_drops_what_came_after_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 1.0, "images_per_second": 10.0, "data_wait_fraction": 0.1, "lr": 0.1}
    values |= {"chance": 2.0, "feature_mean_norm": 0.5, "bank_rank": 12.0}
    collapse = Finding("collapse", "features collapse", new=True)
    with RunLog(tmp_path, 40, 0) as log:
        log.evaluation(0, 0.0, 0.0, 10.0, Spread(0.9, 0.5, 7.0))
        for step in (10, 20, 30):
            log.train({"step": step, "epoch": step / 10} | values, [collapse._replace(new=step == 20)] * (step > 10))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    with RunLog(tmp_path, 40, 20) as log:
        log.train({"step": 30, "epoch": 3.0} | values)
        log.bad_images(["a b.jpg\tno JPEG", "b.jpg\tempty"])
    lines = metrics(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("eval", 0),
        ("train", 10),
        ("train", 20),
        ("train", 30),
    ]
    assert (tmp_path / "bad_images.txt").read_text() == "a b.jpg\tno JPEG\nb.jpg\tempty\n"
    assert [line.get("warnings") for line in lines] == [None, None, ["collapse"], None]
    shown = capsys.readouterr().out
    assert "step 30" in shown
    assert shown.count("warning: features collapse\n") == 1
    assert os.listdir(tmp_path / "tensorboard")


def test_a_rank_without_a_folder_reports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(None, 4, 0) as log:
        log.say("hello")
        log.train({"step": 1})
        log.end({})
    assert capsys.readouterr().out == ""


def test_scalars_are_on_the_disk_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file takes what is written when it is flushed, too: TensorFlow's, and those in a bucket."""
    files = pytest.importorskip("tensorboard.compat.tensorflow_stub.io.gfile")
    monkeypatch.delattr(files.LocalFileSystem, "append")
    values = dict.fromkeys(
        "loss chance feature_mean_norm bank_rank images_per_second data_wait_fraction lr".split(), 1.0
    )
    with RunLog(tmp_path, 40, 0) as log:
        for step in (10, 20):
            log.train({"step": step, "epoch": 1.0, **values, f"of step {step}": 1.0})
            (path,) = (tmp_path / "tensorboard").iterdir()
            end = time.monotonic() + 20
            while f"train/of step {step}".encode() not in path.read_bytes():
                assert time.monotonic() < end, step
                time.sleep(0.1)


def test_meter_counts_waiting_and_forgets_what_is_not_training() -> None:
    meter = Meter(torch.device("cpu"))
    time.sleep(0.2)
    meter.restart()
    with meter.waiting():
        time.sleep(0.03)
    time.sleep(0.03)
    meter.add(12)
    rate, waited = meter.read()
    assert meter.images == 12
    assert 0.06 <= meter.seconds < 0.2
    assert rate == pytest.approx(12 / meter.seconds)
    assert 0.2 < waited < 0.9


class Gpu:
    """A stand-in that takes 30 ms a step, with its events and the host's clock; no real time passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.free_at = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool, blocking: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.free_at, gpu.now)

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                assert gpu.now >= other.at, "not there yet"
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr("reco_fast.run.meter.time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self) -> None:
        self.free_at = max(self.free_at, self.now) + 0.03


@pytest.mark.parametrize(("data", "share"), [(0.0, 0.0), (0.02, 0.0), (0.06, 0.5)])
def test_waiting_for_data_on_a_gpu_is_what_the_gpu_waits(
    monkeypatch: pytest.MonkeyPatch, data: float, share: float
) -> None:
    """Data that takes less than a step costs nothing, though the host waits for it all the time."""
    gpu = Gpu(monkeypatch)
    meter = Meter(torch.device("cuda"))
    for _ in range(100):
        with meter.waiting():
            assert gpu.free_at - gpu.now <= AHEAD * 0.03 + 1e-9  # the host is no further ahead
            gpu.now += data
        gpu.step()
        meter.add(1)
    gpu.now = max(gpu.now, gpu.free_at)  # as the host waits for what it logs
    rate, waited = meter.read()
    assert waited == pytest.approx(share, abs=0.02)
    assert rate == pytest.approx(1 / max(0.03, 0.06 if share else 0), rel=0.05)


def test_a_reading_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or steps that are still under way would cost nothing, before an evaluation."""
    gpu = Gpu(monkeypatch)
    meter = Meter(torch.device("cuda"))
    for _ in range(AHEAD):
        with meter.waiting():
            pass
        gpu.step()
        meter.add(1)
    meter.read()
    assert meter.seconds == pytest.approx(AHEAD * 0.03)


def test_what_comes_between_two_steps_that_are_no_training_is_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    meter = Meter(torch.device("cuda"))
    for _ in range(2):
        with meter.waiting():
            pass
        gpu.step()
        meter.add(1)
        gpu.now += 1.0
        meter.restart()
    gpu.now += 0.1
    assert meter.read()[1] == 0
