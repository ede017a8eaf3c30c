"""Time the loss forward and backward in every implementation, beside what the card can do.

    python -m reco_fast.profiling.benchmarks.kernels --output DIR [--only triton sdpa] [--rows 256] [--lengths 65536]
        [--tiles]

Each result is written to `DIR/kernels.json` and `DIR/kernels.md` as soon as it is there; `DIR/kernels.png` follows each
length. On a GPU a step is captured in a CUDA graph and each replay is timed by device events, with a cold L2 cache as
in training; a step that cannot be captured is launched eagerly, and says so. On a CPU, small sizes by the wall clock.
`launch_table.py` enters what was fastest into the table that `impl="auto"` follows.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from reco_fast.kernels import launch
from reco_fast.kernels.reference import BFLOAT16_ATTENTION, CudaAttention, reco_loss_sdpa, reco_loss_torch
from reco_fast.profiling.machine import Machine, device_name
from reco_fast.run.files import write_json, write_text
from reco_fast.run.run_folder import environment
from reco_fast.settings import command_line
from reco_fast.settings.typed import at_home

SETTINGS: dict[str, Any] = {
    "temperature": 0.2,
    "student_temperature": 0.1,
    "teacher_temperature": 0.04,
    "global_weight": 1.0,
    "local_weight": 2.0,
    "mix_anchor": "key",
}
WIDTH = 128
GPU_ROWS, GPU_LENGTHS = (256, 1024, 4096), (4096, 65536, 1048576)
CPU_ROWS, CPU_LENGTHS = (16, 64, 256), (1024, 4096, 16384)
# Spill-free on sm_90 for D = 128 and bfloat16, by `compile_matrix.py`: for `--tiles`.
TILES = (
    launch.Tile(64, 32, 4, 4, 4),
    launch.Tile(64, 64, 4, 2, 3),
    launch.Tile(64, 64, 4, 3, 3),
    launch.Tile(64, 128, 4, 2, 2),
    launch.Tile(128, 32, 8, 3, 1),
    launch.Tile(128, 64, 8, 3, 1),
)


@dataclass
class Result:
    implementation: str
    rows: int
    length: int
    device: str
    milliseconds: float | None = None  # median, forward and backward
    launches: int = 0
    timed: str = ""
    extra_mebibytes: float | None = None  # peak beyond inputs and the two gradients
    teraflops: float | None = None  # of the 16·N·K·D that the loss and its gradients need
    share_of_ceiling: float | None = None
    loss: float | None = None  # the same inputs everywhere, so a wrong one shows
    failed: str = ""


def _autocast(*arguments: Any, **settings: Any) -> Any:
    with torch.autocast(arguments[0].device.type, torch.bfloat16, cache_enabled=False):
        return reco_loss_torch(*arguments, **settings)


def _triton(*arguments: Any, **settings: Any) -> Any:
    from reco_fast.kernels.relation_loss import reco_loss_triton

    return reco_loss_triton(*arguments, **settings)


def _compiled(*arguments: Any, **settings: Any) -> Any:
    return torch.compile(_autocast, dynamic=False)(*arguments, **settings)


def _sdpa_bfloat16(*arguments: Any, **settings: Any) -> Any:
    with patch.dict(BFLOAT16_ATTENTION, dict.fromkeys(BFLOAT16_ATTENTION, torch.bfloat16)):
        return reco_loss_sdpa(*arguments, **settings)


def _sdpa_by(attention: CudaAttention) -> Callable[..., Any]:
    def function(*arguments: Any, **settings: Any) -> Any:
        with patch("reco_fast.kernels.reference.CUDA_ATTENTION", attention):
            return reco_loss_sdpa(*arguments, **settings)

    return function


# Name: the function and the dtype of its banks. The `sdpa`s are PyTorch's attention: flash attention with the bank's
# splits folded into the batch, unfolded, and cuDNN's; `sdpa-bfloat16` leaves out the copy of the banks that gives
# `sdpa` its accuracy: the fastest that it can be, whatever its gradients. `compiled` is torch.compile of `autocast`,
# which is the definition under bfloat16 autocast; `fp32` is the definition as it stands.
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "triton": (_triton, torch.bfloat16),
    "triton-fp32": (_triton, torch.float32),
    "sdpa": (reco_loss_sdpa, torch.bfloat16),
    "sdpa-bfloat16": (_sdpa_bfloat16, torch.bfloat16),
    "sdpa-unfolded": (_sdpa_by(CudaAttention(programs=0)), torch.bfloat16),
    "sdpa-cudnn": (_sdpa_by(CudaAttention("cudnn", programs=1)), torch.bfloat16),
    "compiled": (_compiled, torch.bfloat16),
    "autocast": (_autocast, torch.bfloat16),
    "fp32": (reco_loss_torch, torch.float32),
}
ON_CPU = ("sdpa", "sdpa-bfloat16", "autocast", "fp32")


class Step:
    """Forward and backward of one implementation on fixed random inputs: calling it returns the loss and gradients."""

    def __init__(self, name: str, rows: int, length: int, device: torch.device) -> None:
        self.function, bank_dtype = IMPLEMENTATIONS[name]
        generator = torch.Generator(device).manual_seed(0)

        def normal(count: int) -> Tensor:
            return torch.randn(count, WIDTH, generator=generator, device=device)

        self.leaves = [normal(rows).requires_grad_() for _ in range(2)]
        self.others = [normal(rows), normal(rows)]
        self.banks = [F.normalize(normal(length)).to(bank_dtype) for _ in range(2)]
        self.mix = [
            torch.randperm(rows, generator=generator, device=device),
            torch.rand(rows, generator=generator, device=device),
        ]

    def __call__(self) -> tuple[Tensor, ...]:
        total = self.function(*self.leaves, *self.others, *self.banks, *self.mix, **SETTINGS).total
        return total.detach(), *torch.autograd.grad(total, self.leaves)


def measure(name: str, rows: int, length: int, device: torch.device, ceiling: float | None = None) -> Result:
    """One row of the report; what went wrong is part of it."""
    result = Result(name, rows, length, device_name(device))
    torch.compiler.reset()
    try:
        step = Step(name, rows, length, device)
        result.loss = float(step()[0])
        (_time_on_gpu if device.type == "cuda" else _time_on_cpu)(step, result)
    except torch.OutOfMemoryError:
        result.failed = "out of memory"
    except Exception as error:  # an unattended run goes on with the next
        result.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if result.milliseconds is not None:
        result.teraflops = 16 * rows * length * WIDTH / result.milliseconds / 1e9
        result.share_of_ceiling = result.teraflops / ceiling if ceiling else None
    return result


def _time_on_gpu(step: Step, result: Result) -> None:
    for _ in range(3):  # compiles
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = step()
    torch.cuda.synchronize()
    produced = sum(x.nbytes for x in outputs)
    result.extra_mebibytes = (torch.cuda.max_memory_allocated() - before - produced) / 2**20
    del outputs
    run: Callable[[], Any] = step
    result.timed = "graph"
    torch.cuda.empty_cache()  # a capture has a pool of its own
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    except Exception as error:
        result.timed = f"eager launches (no capture: {type(error).__name__})"
        torch.cuda.empty_cache()
    times = event_times(run)
    result.milliseconds, result.launches = statistics.median(times), len(times)


def event_times(run: Callable[[], Any], seconds: float = 0.3) -> list[float]:
    """Milliseconds of each of many calls by device events, the L2 cache emptied before each."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def batch(count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    once = statistics.median(batch(3))
    return batch(max(10, min(200, int(1000 * seconds / once))))


def _time_on_cpu(step: Step, result: Result) -> None:
    step()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < 1 and len(times) < 50):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    result.milliseconds, result.launches = statistics.median(times), len(times)
    result.timed = f"wall clock, {torch.get_num_threads()} threads"


def ceilings(device: torch.device) -> dict[str, float]:
    """The bfloat16 matrix rate (TFLOP/s) and the copy bandwidth (TB/s, read and written) of the card, in this run."""
    if device.type != "cuda":
        return {}
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    matrix = statistics.median(event_times(lambda: torch.mm(a, b)))
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(event_times(lambda: target.copy_(source)))
    return {"matrix_teraflops": 2 * 8192**3 / matrix / 1e9, "copy_terabytes": 2 * 2**30 / copy / 1e9}


class Report:
    """Results so far, in a folder: JSON and Markdown after each, a plot at the end."""

    def __init__(self, folder: Path, rates: dict[str, float], architecture: str = "cpu") -> None:
        self.folder, self.rates, self.architecture = folder, rates, architecture
        self.results: list[Result] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment()

    def add(self, result: Result) -> None:
        """Keep `result`, as failed if its loss is not that of the others at its size, and write all there is."""
        for other in self.results:
            same_size = (other.rows, other.length) == (result.rows, result.length)
            if same_size and not other.failed and other.loss and result.loss and not result.failed:
                if not math.isclose(other.loss, result.loss, rel_tol=5e-3):
                    result.failed = f"loss {result.loss:.5f}, but {other.loss:.5f} by {other.implementation}"
                break
        self.results.append(result)
        content = {
            "environment": self.environment,
            "architecture": self.architecture,
            "ceilings": self.rates,
            "results": [asdict(x) for x in self.results],
        }
        write_json(self.folder / "kernels.json", content)
        write_text(self.folder / "kernels.md", self.markdown())

    def markdown(self) -> str:
        rates = ", ".join(f"{name} {value:.1f}" for name, value in self.rates.items())
        lines = [
            f"{self.results[0].device}, torch {torch.__version__}, {self.environment['date'][:10]}, commit "
            f"{(self.environment['git_commit'] or 'unknown')[:7]}; forward and backward, D = {WIDTH}. {rates}",
            "",
            "| N | K | implementation | ms | TFLOP/s | of ceiling | extra MiB | timed by |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for x in self.results:
            cells = [x.rows, x.length, x.implementation]
            if x.failed:
                cells += [x.failed, "", "", "", ""]
            else:
                share = "" if x.share_of_ceiling is None else f"{x.share_of_ceiling:.0%}"
                memory = "" if x.extra_mebibytes is None else f"{x.extra_mebibytes:.1f}"
                cells += [f"{x.milliseconds:.3f}", f"{x.teraflops:.2f}", share, memory, f"{x.launches}, {x.timed}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"

    def plot(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = sorted({x.rows for x in self.results})
        quantities = (("milliseconds", "ms"), ("extra_mebibytes", "extra MiB"))
        figure, axes = pyplot.subplots(2, len(rows), figsize=(4 * len(rows), 7), squeeze=False, sharex=True)
        for column, count in enumerate(rows):
            for line, (quantity, label) in enumerate(quantities):
                panel = axes[line][column]
                for name in dict.fromkeys(x.implementation for x in self.results):
                    of_name = [x for x in self.results if x.rows == count and x.implementation == name]
                    points = sorted((x.length, getattr(x, quantity)) for x in of_name if getattr(x, quantity))
                    if points:
                        panel.plot(*zip(*points, strict=True), marker="o", label=name)
                panel.set(xscale="log", yscale="log", title=f"N = {count}", xlabel="K", ylabel=label)
                if panel.lines:
                    panel.legend()
        figure.tight_layout()
        temporary = self.folder / "kernels.tmp.png"
        figure.savefig(temporary, dpi=120)
        temporary.rename(self.folder / "kernels.png")
        pyplot.close(figure)


def run(
    folder: Path, names: Iterable[str], rows: Sequence[int], lengths: Sequence[int], device: torch.device, tiles: bool
) -> Report:
    """The smallest problems first, so that a run cut short has something to show."""
    report = Report(folder, ceilings(device), launch.architecture(device) if device.type == "cuda" else "cpu")
    ceiling = report.rates.get("matrix_teraflops")
    for length in lengths:
        for count in rows:
            for name in names:
                report.add(measure(name, count, length, device, ceiling))
            for tile in TILES if tiles else ():
                report.add(_measure_tile(tile, count, length, device, ceiling))
            print(report.markdown().splitlines()[-1], flush=True)
        report.plot()
    return report


def _measure_tile(tile: launch.Tile, rows: int, length: int, device: torch.device, ceiling: float | None) -> Result:
    table = launch.TILES[launch.architecture(device)]
    chosen = table["bfloat16", 128]
    table["bfloat16", 128] = (tile, tile)
    launch.plan.cache_clear()
    try:
        result = measure("triton", rows, length, device, ceiling)
    finally:
        table["bfloat16", 128] = chosen
        launch.plan.cache_clear()
    result.implementation = f"triton {tile.rows}×{tile.bank_rows}, {tile.warps} warps, {tile.stages} stages"
    return result


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=at_home, required=True)
    available = list(IMPLEMENTATIONS) if on_gpu else list(ON_CPU)
    parser.add_argument("--only", nargs="+", choices=available, default=available)
    parser.add_argument("--rows", nargs="+", type=int, default=GPU_ROWS if on_gpu else CPU_ROWS)
    parser.add_argument("--lengths", nargs="+", type=int, default=GPU_LENGTHS if on_gpu else CPU_LENGTHS)
    parser.add_argument("--tiles", action="store_true", help="also time the candidates for the launch table (D = 128)")
    arguments = parser.parse_args()
    with Machine().alone():
        report = run(
            arguments.output, arguments.only, arguments.rows, arguments.lengths, device, arguments.tiles and on_gpu
        )
    print(report.markdown())


if __name__ == "__main__":
    command_line.run(main)
