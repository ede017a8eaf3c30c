"""What a run reports."""

import os
import time
from pathlib import Path

import pytest
import torch
from small_runs import metrics

from reco_fast.diagnostics import Finding, Spread
from reco_fast.metrics import AHEAD, Meter, RunLog


def test_log_drops_what_came_after_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 1.0, "images_per_second": 10.0, "data_wait_fraction": 0.1, "lr": 0.1}
    values |= {"chance": 2.0, "feature_mean_norm": 0.5, "bank_rank": 12.0}
    collapse = Finding("collapse", "features collapse", new=True)
    with RunLog(tmp_path, total_steps=40, first_step=0) as log:
        log.evaluation(0, 0.0, 10.0, Spread(0.9, 0.5, 7.0))
        for step in (10, 20, 30):
            log.train({"step": step, "epoch": step / 10} | values, [collapse._replace(new=step == 20)] * (step > 10))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    with RunLog(tmp_path, total_steps=40, first_step=20) as log:
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
    with RunLog(None, total_steps=4, first_step=0) as log:
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
    with RunLog(tmp_path, total_steps=40, first_step=0) as log:
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


def test_the_host_is_no_further_ahead_of_a_gpu_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait for data all the time. A stand-in for the GPU: each step ends when somebody waits for it."""
    done: list[int] = []

    class Event:
        made = 0

        def __init__(self, blocking: bool) -> None:
            self.step, Event.made = Event.made, Event.made + 1

        def record(self) -> None:
            assert self.step - len(done) <= AHEAD

        def synchronize(self) -> None:
            time.sleep(0.02)
            done.append(self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = Meter(torch.device("cuda"))
    for step in range(6):
        with meter.waiting():
            assert done == list(range(max(0, step - AHEAD)))
        meter.add(1)
    assert meter.read()[1] < 0.1  # waiting for the GPU is no waiting for data
