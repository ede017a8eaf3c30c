"""The whole step beside what one would run instead.

    python -m reco_fast.profiling.benchmark --against naive supervised torchvision --output DIR
        [--model.arch ...] [--train.batch-size ...] [--model.bank-size ...] [--data.path IMAGES] ...

naive: a plain reference step (`naive.py`). supervised: labels, cross-entropy and the same backbone with the same
settings; by counted operations, 3 encoder passes an image against 8, a step should reach 3/8 of its images/s.
torchvision: the loaders, by `loader_benchmark.py`, on the images of --data.path.

The contestants take turns in one process; a ratio is the median over the rounds of the ratios within a round. Writes
`step.json`, `step.md` and `step.png` to --output.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from reco_fast import cli
from reco_fast.config import Config, ConfigError, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from reco_fast.json_files import write_json
from reco_fast.model import build_encoder
from reco_fast.optim import build_optimizer
from reco_fast.profiling.naive import NaiveReCo
from reco_fast.run_folder import environment
from reco_fast.state import build_state, pick_device, pick_precision
from reco_fast.step import draw, scheduled, train_step

Opponent = Literal["naive", "supervised", "torchvision"]
BOUND = 3 / 8  # 3 forward-units an image against 8: two forward-backward passes and two forward ones
CLASSES = 100


@dataclass(frozen=True)
class Benchmark:
    against: tuple[Opponent, ...] = ("naive", "supervised")
    """With which the whole step is compared."""
    rounds: int = 5
    """In each, every contestant has its turn once."""
    steps: int = 2
    """Timed in a turn."""
    warmup: int = 2
    """Steps before the first round: compilation, and the allocator's and the kernels' first times."""
    output: Path = Path("benchmark")
    """Folder for step.json, step.md and step.png."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: expected 1 or more, got {getattr(self, name)}")

    @property
    def config(self) -> Config:
        return Config(data=self.data, model=self.model, loss=self.loss, optim=self.optim, train=self.train)


DEFAULT = Benchmark(model=ModelConfig(bank_size=16384), train=TrainConfig(batch_size=128))


class Turn(NamedTuple):
    """What one turn took."""

    seconds_per_step: float
    cpu_seconds_per_step: float
    """Of all threads of the process: beside the former it says whether the machine had other work."""
    peak_bytes: int
    """More memory than between steps, on CUDA; elsewhere 0."""


def ours(config: Config, device: torch.device) -> Callable[[], object]:
    state = build_state(config, device)
    size = config.data.image_size
    batch = (config.train.batch_size, 3, size, size)
    views = tuple(torch.randn(batch, device=device).to(memory_format=torch.channels_last) for _ in range(3))
    if device.type == "cuda":
        views = tuple(view.half() for view in views)  # as the loaders give them
    count = 3 if config.loss.uses_global else 2

    def step() -> None:
        draws = draw(state.step, config.train.batch_size, config, device)
        train_step(state, config, views[:count], draws, scheduled(state.step, 1000, config))

    return step


def naive(config: Config, device: torch.device) -> Callable[[], object]:
    model = NaiveReCo(config, device)
    size = config.data.image_size
    views = tuple(torch.randn(config.train.batch_size, 3, size, size, device=device) for _ in range(3))
    permutation = torch.randperm(config.train.batch_size, device=device)
    mix_weights = torch.full((size, size), 0.5, device=device)
    return lambda: model.step(views, permutation, mix_weights)


def supervised(config: Config, device: torch.device) -> Callable[[], object]:
    """The same backbone, precision, memory format, optimizer and compiler; a linear layer and labels instead."""
    encoder = build_encoder(config.model, config.data.image_size)
    model = nn.Sequential(encoder.backbone, nn.Linear(encoder.feature_dim, CLASSES))
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    precision = pick_precision(config.train.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    compiled = config.train.compile if config.train.compile is not None else device.type == "cuda"
    run: Callable[..., Any] = torch.compile(model) if compiled else model
    size = config.data.image_size
    images = torch.randn(config.train.batch_size, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last, dtype=torch.half if device.type == "cuda" else None)
    labels = torch.randint(CLASSES, (config.train.batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(run(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


STEPS: dict[str, Callable[[Config, torch.device], Callable[[], object]]] = {"naive": naive, "supervised": supervised}


def take_turn(step: Callable[[], object], steps: int, device: torch.device) -> Turn:
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = (time.perf_counter() - start) / steps, (time.process_time() - cpu_start) / steps
    return Turn(seconds, cpu_seconds, torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0)


def compare_steps(benchmark: Benchmark, names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """`rounds`: every turn; `results`: for each contestant images/s and how many times as fast ours is."""
    config = benchmark.config
    contestants = {"ours": ours(config, device)} | {name: STEPS[name](config, device) for name in names}
    for step in contestants.values():
        take_turn(step, benchmark.warmup, device)
    turns: list[dict[str, Turn]] = []
    for number in range(benchmark.rounds):
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        turns.append({name: take_turn(contestants[name], benchmark.steps, device) for name in order})
    results: dict[str, dict[str, Any]] = {}
    for name in contestants:
        seconds = statistics.median(turn[name].seconds_per_step for turn in turns)
        ratios = [turn[name].seconds_per_step / turn["ours"].seconds_per_step for turn in turns]
        cpu_ratios = [turn[name].cpu_seconds_per_step / turn["ours"].cpu_seconds_per_step for turn in turns]
        results[name] = {
            "step_ms": 1e3 * seconds,
            "images_per_second": config.train.batch_size / seconds,
            "ours_times_as_fast": statistics.median(ratios),
            "ours_times_as_fast_range": [min(ratios), max(ratios)],
            "cpu_ms": 1e3 * statistics.median(turn[name].cpu_seconds_per_step for turn in turns),
            "cpu_time_ratio": statistics.median(cpu_ratios),
            "cpu_time_ratio_range": [min(cpu_ratios), max(cpu_ratios)],
            "step_memory_mib": max(turn[name].peak_bytes for turn in turns) / 2**20 if device.type == "cuda" else None,
        }
    if "supervised" in results:
        results["supervised"]["ours_share_of_bound"] = results["supervised"]["ours_times_as_fast"] / BOUND
    rounds = [{name: turn._asdict() for name, turn in round_.items()} for round_ in turns]
    return {"results": results, "rounds": rounds}


def compare_loaders(benchmark: Benchmark) -> dict[str, Any]:
    """What `loader_benchmark.py` measures, in a process of its own: worker processes want no model's threads."""
    if benchmark.data.path is None:
        raise ConfigError("--data.path: expected a folder of images for --against torchvision, got nothing")
    command = [sys.executable, "-m", "reco_fast.profiling.loader_benchmark", "--data.path", str(benchmark.data.path)]
    command += ["--image-size", str(benchmark.data.image_size), "--rounds", str(benchmark.rounds)]
    command += ["--batch-size", str(benchmark.train.batch_size)]
    command += ["--workers", str(benchmark.data.workers)] if benchmark.data.workers else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 2:
        raise ConfigError("--against torchvision: the loaders could not be compared, see above")
    done.check_returncode()
    return dict(json.loads(done.stdout.splitlines()[-1]))


def markdown(report: dict[str, Any]) -> str:
    config, commit = report["config"], report["environment"]["git_commit"] or "unknown"
    lines = [
        f"{config['model']['arch']}, {config['data']['image_size']} px, batch {config['train']['batch_size']}, "
        f"K = {config['model']['bank_size']:,}, {report['precision']}, {report['device']}, "
        f"torch {report['environment']['packages']['torch']}, commit {commit[:7]}",
    ]
    if "steps" in report:
        header = "| step | ms | images/s | ours is × as fast (rounds) | CPU ms | × ours (rounds) |"
        lines += ["", header, "|---|" + 5 * "---|"]
        for name, row in report["steps"]["results"].items():
            wall, cpu = (
                f"{row[ratio]:.2f} ({row[f'{ratio}_range'][0]:.2f}–{row[f'{ratio}_range'][1]:.2f})"
                for ratio in ("ours_times_as_fast", "cpu_time_ratio")
            )
            rate = f"{row['images_per_second']:,.1f}"
            lines.append(f"| {name} | {row['step_ms']:.1f} | {rate} | {wall} | {row['cpu_ms']:.1f} | {cpu} |")
        bound = report["steps"]["results"].get("supervised")
        if bound is not None:
            share = 100 * bound["ours_share_of_bound"]
            lines += ["", f"Of the bound, 3/8 of supervised images/s, the step reaches {share:.0f} %."]
    if "loaders" in report:
        lines += ["", "| loader | images/s | × torchvision |", "|---|---|---|"]
        for name, row in report["loaders"]["results"].items():
            lines.append(f"| {name} | {row['images_per_second']:,.0f} | {row['times']['torchvision']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [(key, report[key]["results"]) for key in ("steps", "loaders") if key in report]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5 * len(parts), 2.6), squeeze=False, layout="constrained")
    for axis, (title, results) in zip(axes[0], parts, strict=True):
        bars = axis.barh(list(results), [row["images_per_second"] for row in results.values()], color="#4477aa")
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.set(xlabel="images/s", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    prog = "python -m reco_fast.profiling.benchmark"
    benchmark = cli.parse(Benchmark, sys.argv[1:], prog=prog, description=__doc__ or "", default=DEFAULT)
    config = benchmark.config
    device = pick_device(config.train.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report: dict[str, Any] = {
        "device": name,
        "precision": str(pick_precision(config.train.precision, device)).removeprefix("torch."),
        "environment": environment(),
        "config": config.to_json(),
        "rounds": benchmark.rounds,
        "steps_per_turn": benchmark.steps,
    }
    names = [name for name in STEPS if name in benchmark.against]
    if "naive" in names and config.loss.objective != "reco":
        raise ConfigError(f"--loss.objective: expected reco for --against naive, got {config.loss.objective}")
    if "naive" in names and config.model.bank_size % config.train.batch_size:
        raise ConfigError(
            f"--model.bank-size: expected a multiple of the batch {config.train.batch_size} for --against naive, "
            f"got {config.model.bank_size}"
        )
    if "torchvision" in benchmark.against:
        report["loaders"] = compare_loaders(benchmark)
    if names:
        report["steps"] = compare_steps(benchmark, names, device)
    benchmark.output.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.output / "step.json", report)
    (benchmark.output / "step.md").write_text(markdown(report), encoding="utf-8")
    plot(report, benchmark.output / "step.png")
    print(markdown(report), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
