"""The report finds the time where it was put, and names the bound and the setting that fit."""

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import PROFILED_STEPS

from reco_fast import cli
from reco_fast.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from reco_fast.profiling import report
from reco_fast.profiling.breakdown import newest_trace, read_trace
from reco_fast.profiling.trace import REGIONS

Events = list[dict[str, Any]]


def event(name: str, category: str, start: float, ms: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": 1e3 * start, "dur": 1e3 * ms, "pid": 1, "tid": thread}


def cpu_trace(
    steps: int, *, wait: float = 0, mm: float = 0, norm: float = 0, gather: float = 0, idle: float = 0
) -> Events:
    """Steps of data_wait and then a student_forward of the given operators, milliseconds each."""
    events, now = [], 5.0
    for number in range(steps):
        start = now
        events.append(event("data_wait", "user_annotation", now, wait))
        now += wait
        inside = now
        for name, ms in (("aten::conv2d", mm), ("aten::batch_norm", norm), ("gloo:all_gather", gather)):
            events.append(event(name, "cpu_op", now, ms))
            if name == "aten::batch_norm":  # an operator inside the other is not counted twice
                events.append(event("aten::native_batch_norm", "cpu_op", now, ms))
            now += ms
        now += idle
        events.append(event("student_forward", "user_annotation", inside, now - inside))
        events.append(event(f"ProfilerStep#{number}", "user_annotation", start, now - start))
    return events


def gpu_trace(steps: int, *, wait: float, kernels: dict[str, float], period: float, host: float) -> Events:
    """The host needs `host` ms a step and runs ahead; the device works on `kernels`, a step every `period` ms."""
    events = []
    for number in range(steps):
        begin, device = number * host, 3 + number * period
        events.append(event(f"ProfilerStep#{number}", "user_annotation", begin, host))
        events.append(event("data_wait", "user_annotation", begin, wait))
        events.append(event("backward", "user_annotation", begin + wait, host - wait))
        busy = sum(kernels.values())
        events.append(event(f"ProfilerStep#{number}", "gpu_user_annotation", device, busy, thread=7))
        events.append(event("backward", "gpu_user_annotation", device, busy, thread=7))
        for name, ms in kernels.items():
            events.append(event(name, "kernel", device, ms, thread=8 if "nccl" in name else 7))
            device += ms
    return events


def write(folder: Path, events: Events, name: str = "host_1.1.pt.trace.json") -> Path:
    path = folder / "tensorboard" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]})
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


def config(**sections: Any) -> Config:
    return dataclasses.replace(Config(), **sections)


@pytest.mark.parametrize("name", ["host_1.1.pt.trace.json", "host_1.1.pt.trace.json.gz"])
def test_the_breakdown_of_a_known_step(tmp_path: Path, name: str) -> None:
    write(tmp_path, cpu_trace(3, wait=10, mm=30, norm=20, idle=40), name)
    found = read_trace(newest_trace(tmp_path))
    assert (found.device, found.steps) == ("CPU", 3)
    assert found.step_ms == pytest.approx(100)
    assert found.phases_ms == pytest.approx(dict.fromkeys(REGIONS, 0) | {"data_wait": 10, "student_forward": 90})
    assert found.other_ms == pytest.approx(0)
    assert found.busy == pytest.approx(0.5)
    assert found.matrix == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("aten::mm", 1),
        ("aten::baddbmm_", 1),
        ("reco_fast::winograd_convolution", 1),
        ("aten::batch_norm", 0),
        ("aten::sum", 0),
    ],
)
def test_what_counts_as_matrix_work(tmp_path: Path, name: str, matrix: float) -> None:
    step = [event("ProfilerStep#0", "user_annotation", 0, 10), event("ProfilerStep#1", "user_annotation", 10, 10)]
    write(tmp_path, [*step, event(name, "cpu_op", 2, 5), event(name, "cpu_op", 12, 5)])
    assert read_trace(newest_trace(tmp_path)).matrix == matrix


def test_a_host_that_runs_ahead_does_not_shorten_the_step(tmp_path: Path) -> None:
    kernels = {"sm90_xmma_gemm": 60.0, "elementwise_kernel": 30.0}
    write(tmp_path, gpu_trace(5, wait=1, kernels=kernels, period=100, host=5))
    found = read_trace(newest_trace(tmp_path))
    assert found.device == "GPU"
    assert found.step_ms == pytest.approx(100)
    assert found.phases_ms["backward"] == pytest.approx(90)
    assert found.busy == pytest.approx(0.9, abs=0.03)
    assert found.matrix == pytest.approx(2 / 3)


CPU, GPU = cpu_trace, gpu_trace
GEMM, RELU, NCCL = "sm90_xmma_gemm", "vectorized_elementwise_kernel", "ncclDevKernel_AllReduce"


@pytest.mark.parametrize(
    ("events", "given", "bound", "advice"),
    [
        (CPU(3, wait=30, mm=70), config(data=DataConfig(loader="torch")), "data", "--data.loader"),
        (CPU(3, wait=30, mm=70), config(data=DataConfig(workers=1)), "data", "--data.workers"),
        (CPU(3, mm=60, gather=40), config(), "communication", "--train.batch-size"),
        (CPU(3, mm=60, gather=40), config(model=ModelConfig(key_norm="shuffle")), "communication", "--model.key-norm"),
        (CPU(3, mm=50, idle=50), config(), "launch", "--train.compile"),
        (CPU(3, mm=50, idle=50), config(train=TrainConfig(compile=True)), "launch", "--train.batch-size"),
        (CPU(3, mm=80, norm=20), config(train=TrainConfig(precision="fp32")), "compute", "--train.precision"),
        (CPU(3, mm=80, norm=20), config(), "compute", "--train.compile"),
        (CPU(3, mm=20, norm=80), config(), "memory", "--train.compile"),
        (GPU(3, wait=60, kernels={GEMM: 40}, period=100, host=100), config(), "data", "images stored smaller"),
        # The host waits for data most of its time, but it is ahead of a device that never idles.
        (GPU(3, wait=60, kernels={GEMM: 99}, period=100, host=100), config(), "compute", "more ranks"),
        (GPU(3, wait=0, kernels={GEMM: 40}, period=100, host=100), config(), "launch", "--train.batch-size"),
        (GPU(3, wait=0, kernels={GEMM: 60, NCCL: 40}, period=100, host=9), config(), "communication", "batch-size"),
        (GPU(3, wait=0, kernels={GEMM: 30, RELU: 69}, period=100, host=9), config(), "memory", "--data.image-size"),
    ],
)
def test_the_bound_and_the_setting(tmp_path: Path, events: Events, given: Config, bound: str, advice: str) -> None:
    verdict = report.judge(read_trace(write(tmp_path, events)), given)
    assert verdict.bound == bound
    assert advice in verdict.advice


def test_every_advice_is_a_setting_that_exists(tmp_path: Path) -> None:
    known = cli._flags(Config)
    for loader in ("torch", "dali"):
        for compiled in (None, True):
            given = config(data=DataConfig(loader=loader, workers=2), train=TrainConfig(compile=compiled))
            for events in (CPU(2, wait=1), CPU(2, gather=1), CPU(2, idle=1), CPU(2, mm=1), CPU(2, norm=1)):
                first = report.judge(read_trace(write(tmp_path, events)), given).advice.split()[0].strip(":")
                assert first in known | {"more"}, first


def test_the_report_of_a_run(tmp_path: Path, profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    capsys.readouterr()
    assert report.report(report.ReportCommand(run)) == 0
    text = capsys.readouterr().out
    for name in (*REGIONS, "other", "images/s", "p95", "bound: ", "try: ", "a large matrix product"):
        assert name in text
    assert f"recorded: {PROFILED_STEPS} steps" in text
    assert (run / "profile.txt").read_text() == text
    assert (run / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_of_any_bytes_and_a_log_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed while it wrote; and without DALI, which the page then advises."""
    pytest.importorskip("matplotlib")
    run = tmp_path / os.fsdecode(b"a\nb\xff")
    write(run, cpu_trace(2, wait=50, mm=50))
    (run / "config.json").write_text(json.dumps(Config().to_json()))
    (run / "environment.json").write_text('{"packages": {"torch": "2", "nvidia-dali-cuda130": null}}')
    line = {"kind": "train", "step": 2, "images_per_second": 5.0, "data_wait_fraction": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "train", "st')
    assert report.report(report.ReportCommand(run)) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith(f"{tmp_path}/a\\nb\\udcff: reco with")
    assert "bound: data" in text
    assert "reco-fast[dali]" in text
    assert (run / "profile.txt").read_text() == text


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "no json", "cut gzip", "no events", "no steps", "no config", "no log", "foreign log"]
)
def test_what_is_no_profiled_run_is_one_line_and_exit_2(tmp_path: Path, kind: str, refused: Callable[..., str]) -> None:
    run = tmp_path / "run"
    if kind != "missing":
        run.mkdir()
    if kind == "no json":
        write(run, []).write_text('{"traceEvents": [')
    if kind == "no steps":
        write(run, [event("aten::mm", "cpu_op", 0, 1)])
    if kind == "cut gzip":
        path = write(run, cpu_trace(2, mm=1), "host_1.1.pt.trace.json.gz")
        path.write_bytes(path.read_bytes()[:-20])
    if kind == "no events":
        write(run, []).write_text('{"traceEvents": [1, 2]}')
    if kind in ("no config", "no log", "foreign log"):
        write(run, cpu_trace(2, mm=1))
    if kind in ("no log", "foreign log"):
        (run / "config.json").write_text(json.dumps(Config().to_json()))
    if kind == "foreign log":
        (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert str(run) in refused(report.main, run)
    if kind == "empty":
        with pytest.raises(ConfigError, match=r"--profile\.enabled"):
            newest_trace(run)
