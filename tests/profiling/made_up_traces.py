"""Traces of known steps, as torch.profiler would write them, in milliseconds."""

import gzip
import json
from pathlib import Path
from typing import Any

__all__ = ["GEMM", "NCCL", "RELU", "cpu_trace", "event", "gpu_trace", "threads_and_streams", "write"]

GEMM, RELU, NCCL = "sm90_xmma_gemm", "vectorized_elementwise_kernel", "ncclDevKernel_AllReduce"

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
