"""The report names the bound and the setting that fit, and its page says where the time went."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_traces import GEMM, NCCL, RELU, cpu_trace, event, gpu_trace, threads_and_streams, write
from small_runs import PROFILED_STEPS

from reco_fast.errors import ConfigError
from reco_fast.profiling import report
from reco_fast.profiling.breakdown import newest_trace, read_trace
from reco_fast.profiling.trace import REGIONS
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, DataConfig, ModelConfig, TrainConfig


def config(**sections: Any) -> Config:
    return dataclasses.replace(Config(), **sections)


CPU, GPU = cpu_trace, gpu_trace


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
        (GPU(3, wait=0, kernels={GEMM: 40}, period=100, host=100), config(), "launch", "--profile.enabled only"),
        (
            GPU(3, wait=0, kernels={GEMM: 40}, period=100, host=100),
            config(train=TrainConfig(cuda_graph=False)),
            "launch",
            "--train.batch-size",
        ),
        # The host is late with everything, with the next batch as well.
        (GPU(3, wait=20, kernels={GEMM: 25}, period=100, host=100), config(), "launch", "--profile.enabled only"),
        (GPU(3, wait=0, kernels={GEMM: 60, NCCL: 40}, period=100, host=9), config(), "communication", "batch-size"),
        (GPU(3, wait=0, kernels={GEMM: 30, RELU: 69}, period=100, host=9), config(), "memory", "--data.image-size"),
    ],
)
def test_the_bound_and_the_setting(
    tmp_path: Path, events: list[dict[str, Any]], given: Config, bound: str, advice: str
) -> None:
    verdict = report.judge(read_trace(write(tmp_path, events)), given)
    assert verdict.bound == bound
    assert advice in verdict.advice


def test_what_is_late_on_several_gpus_takes_larger_batches(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, GPU(3, wait=0, kernels={GEMM: 40}, period=100, host=100)))
    (tmp_path / "environment.json").write_text('{"ranks": 2}')
    assert report.surroundings(tmp_path) == (True, 2)
    assert "--train.batch-size" in report.judge(trace, config(), ranks=2).advice


def test_every_advice_is_a_setting_that_exists(tmp_path: Path) -> None:
    known = command_line._flags(Config)
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
    assert "kernel" not in text  # which is about a GPU
    assert f"recorded: {PROFILED_STEPS} steps" in text
    assert (run / "profile.txt").read_text() == text
    assert (run / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_a_gpu_says_whose_time_a_phase_is_and_when_nothing_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, threads_and_streams())
    (tmp_path / "config.json").write_text(json.dumps(Config().to_json()))
    line = {"kind": "train", "step": 2, "images_per_second": 5.0, "data_wait_fraction": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert report.report(report.ReportCommand(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "kernels that the host launched in its range" in text
    rows = dict(re.findall(r"^  (.{17}) +([\d.]+) ms", text, re.MULTILINE))
    times = {name.strip(): float(ms) for name, ms in rows.items()}
    assert list(times) == [*REGIONS, "other", "no kernel running"]
    assert times["no kernel running"] == 29
    # The step is 100 ms; 3 ms of the loader's kernels ran beside the loss's.
    assert sum(times.values()) - times["data_wait"] == pytest.approx(103)


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
