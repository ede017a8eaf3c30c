"""The report finds the time where it was put, and names the bound and the setting that fit."""

import dataclasses
import gzip
import json
import os
import re
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


def event(name: str, category: str, start: float, ms: float, thread: int = 1, **args: int) -> dict[str, Any]:
    timed = {"ts": 1e3 * start, "dur": 1e3 * ms, "pid": 1, "tid": thread}
    return {"ph": "X", "cat": category, "name": name, "args": args} | timed


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


AUTOGRAD = 2  # the thread that launches the kernels of a backward pass on a GPU


def gpu_trace(steps: int, *, wait: float, kernels: dict[str, float], period: float, host: float) -> Events:
    """The host needs `host` ms a step and runs ahead; the device works on `kernels`, a step every `period` ms."""
    events = [event("aten::mm", "cpu_op", 0, host, thread) for thread in (1, AUTOGRAD)]
    for number in range(steps):
        begin, device = number * host, 3 + number * period
        events.append(event(f"ProfilerStep#{number}", "user_annotation", begin, host))
        events.append(event("data_wait", "user_annotation", begin, wait))
        events.append(event("backward", "user_annotation", begin + wait, host - wait))
        for name, ms in kernels.items():
            link = len(events)
            events.append(event("cudaLaunchKernel", "cuda_runtime", begin + wait, 0.01, AUTOGRAD, correlation=link))
            events.append(event(name, "kernel", device, ms, thread=8 if "nccl" in name else 7, correlation=link))
            device += ms
    return events


def threads_and_streams() -> Events:
    """Two steps of 100 ms as a GPU's profiler writes them: two threads launch, a third is of no operator of ours."""
    events = [event("aten::to", "cpu_op", 0, 1), event("AddmmBackward0", "cpu_op", 40, 1, AUTOGRAD)]
    loader = 99
    for step, begin in enumerate((0, 100)):

        def host(name: str, start: float, end: float, begin: int = begin) -> None:
            events.append(event(name, "user_annotation", begin + start, end - start))

        def device(
            launch: str,
            at: float,
            name: str,
            start: float,
            end: float,
            stream: int,
            thread: int = 1,
            begin: int = begin,
        ) -> None:
            link = 7 + len(events)
            kind = "cuda_driver" if launch.startswith("cuL") else "cuda_runtime"
            events.append(event(launch, kind, begin + at, 0.01, thread, correlation=link))
            kind = f"gpu_{name[:6].lower()}" if name.startswith("Mem") else "kernel"
            events.append(event(name, kind, begin + start, end - start, stream, correlation=link, stream=stream))

        host(f"ProfilerStep#{step}", 0, 100)
        host("data_wait", 0, 10)
        device("cudaMemcpyAsync", 5, "Memcpy HtoD (Pinned -> Device)", 6, 8, stream=20)
        host("teacher_forward", 10, 20)
        device("cudaLaunchKernelExC", 11, "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", 20, 30, stream=7)
        host("student_forward", 20, 30)
        device("cuLaunchKernel", 21, "triton_poi_fused_convolution_relu_0", 30, 45, stream=7)
        host("loss", 30, 35)
        device("cuLaunchKernelEx", 31, "attend_kernel", 45, 50, stream=7)
        host("backward", 35, 60)
        device("cudaLaunchKernel", 40, "sm90_xmma_dgrad_implicit_gemm_bf16", 50, 70, stream=7, thread=AUTOGRAD)
        device("cudaLaunchKernel", 45, "resize_kernel", 46, 49, stream=30, thread=loader)
        device("cudaLaunchKernelExC", 50, "ncclDevKernel_AllReduce", 65, 80, stream=24, thread=AUTOGRAD)
        host("optimizer", 60, 62)
        device("cudaLaunchKernel", 61, "multi_tensor_apply_kernel", 80, 85, stream=7)
        device("cudaLaunchKernel", 63, "reduce_kernel", 85, 86, stream=7)
        host("moving_average", 64, 66)
        device("cudaMemsetAsync", 65, "Memset (Device)", 86, 88, stream=7)
        host("enqueue", 66, 68)
        # The ranges of a GPU, where a torch has them: of what the main thread has launched.
        events.append(event(f"ProfilerStep#{step}", "gpu_user_annotation", begin + 20, 30, thread=7))
        events.append(event("backward", "gpu_user_annotation", begin + 50, 0, thread=7))
    # Launched before the recording: one that ends before the first step begins on the GPU, one that does not.
    events.append(event("reduce_kernel", "kernel", 1, 3, thread=7, correlation=1))
    events.append(event("reduce_kernel", "kernel", 88, 1, thread=30, correlation=2))
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


# Names of CPU operators and of GPU kernels.
MATRIX_WORK = (
    "aten::mm",
    "aten::baddbmm_",
    "aten::convolution_backward",
    "reco_fast::winograd_convolution",
    "reco_fast::relation_loss",
    "attend_kernel",
    "ampere_sgemm_128x64_nn",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
    "nvjet_sm100_tst_64x32_64x16_2x1_2cta_v_bz_TNT",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
    "execute_segment_k_off_kernel__5x_cudnn",
    "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4_warpsize2x2x1",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<> >>",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4_nhwc_align8>()",
    "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, __nv_bfloat16, float>()",
    "void wgrad_alg0_engine<float, 128, 6, 7, 3, 3, 5, false, 512>(int, int, int, float const*)",
    "void cudnn::detail::dgrad_engine<float, 512, 6, 5, 3, 3, 3, false>(int, int, int, float const*)",
    "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int)",
    "cudnn_infer_ampere_scudnn_128x64_relu_xregs_large_nn_v1",
    "cudnn_infer_volta_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1",
    "cudnn_generated_fort_native_sdpa_sm90_knob_26_64x64x128_1x4x1_kernel0_0",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false> >()",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)",
    "triton_tem_fused_mm_3",
    "triton_tem_fused__to_copy_convolution_7",
)
MEMORY_WORK = (
    "aten::batch_norm",
    "aten::sum",
    "triton_poi_fused__native_batch_norm_legit_functional_convolution_relu_12",
    "triton_red_fused_convolution_backward_native_batch_norm_backward_4",
    "triton_per_fused_addmm_mean_2",
    "triton_for_fused_2",
    "triton_unk_fused_convolution_mean_5",
    "combine_kernel",
    "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__nv_bfloat16, __nv_bfloat16, float, float, 512, true, true, 0>()",
    "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 128, true, 1>(float, float, float, float)",
    "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true, (cudnnKernelDataType_t)2>()",
    "void cudnn::ops::convertTensor_kernel<float, __half, float, (cudnnKernelDataType_t)0>()",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, true, false>()",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >()",
    "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>()",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::FusedSgd>()",
    "Memcpy HtoD (Pinned -> Device)",
    "Memset (Device)",
)


@pytest.mark.parametrize(("name", "matrix"), [(name, 1) for name in MATRIX_WORK] + [(name, 0) for name in MEMORY_WORK])
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


def test_a_phase_of_a_gpu_is_what_was_launched_in_it_by_any_thread(tmp_path: Path) -> None:
    found = read_trace(write(tmp_path, threads_and_streams()))
    assert (found.device, found.steps) == ("GPU", 2)
    assert found.phases_ms == pytest.approx(
        {
            "data_wait": 10,  # the host's
            "teacher_forward": 10,
            "student_forward": 15,
            "loss": 5,
            "backward": 30,  # two kernels with 5 ms in common
            "optimizer": 5,
            "moving_average": 2,
            "enqueue": 0,
        }
    )
    assert found.step_ms == pytest.approx(100)
    assert found.busy == pytest.approx(0.71)
    assert found.other_ms == pytest.approx(2 + 3 + 1 + 1)  # loader's copy, loader's thread, no range, no launch
    assert found.operators_per_step == 9  # without those of the loader's thread
    assert found.exposed_communication == pytest.approx(0.1)


def test_kernels_that_overlap_on_a_stream_keep_their_whole_time(tmp_path: Path) -> None:
    events = gpu_trace(2, wait=0, kernels={GEMM: 10}, period=20, host=20)
    link = next(event["args"]["correlation"] for event in events if event["cat"] == "kernel")
    events.append(event(RELU, "kernel", 12, 10, thread=7, correlation=link))  # begins 1 ms before the first ends
    assert read_trace(write(tmp_path, events)).matrix == pytest.approx(20 / 30)


def test_the_end_of_a_single_recorded_step_is_the_hosts_or_its_last_kernels(tmp_path: Path) -> None:
    for host in (50, 5):
        found = read_trace(write(tmp_path, gpu_trace(1, wait=0, kernels={GEMM: 40}, period=0, host=host)))
        assert found.step_ms == pytest.approx(47 if host == 50 else 40)


def test_a_replayed_graph_outside_all_ranges_is_other(tmp_path: Path) -> None:
    events = [
        event
        for event in gpu_trace(2, wait=10, kernels={GEMM: 40, RELU: 20}, period=100, host=100)
        if event["name"] != "backward"
    ]
    found = read_trace(write(tmp_path, events))
    assert (found.step_ms, found.other_ms) == pytest.approx((100, 60))


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
