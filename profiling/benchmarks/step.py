"""The whole step beside what one would run instead.

    python -m reco_fast.profiling.benchmarks.step --against naive,lightly,torchvision,supervised --output DIR
        [--model.arch ...] [--train.batch-size ...] [--model.bank-size ...] [--data.path IMAGES] ...

naive: a plain reference step (`naive.py`).
lightly: Lightly's MoCo (`lightly_moco.py`), as its example has it in float32 and with autocast; beside it the trainer
    with --loss.objective moco too, which makes the same encoder passes (ReCo makes twice as many). With --data.path
    also end to end, each with its own loader on the same image files.
supervised: labels, cross-entropy and the same backbone with the same settings; by counted operations, 3 encoder passes
    an image against 8, a step should reach 3/8 of its images/s.
launches: ours and supervised again without a CUDA graph, eager and compiled (on a GPU).
torchvision: the loaders, by `benchmarks/loader.py`, on the images of --data.path.

The contestants take turns in one process; a ratio is the median over the rounds of the ratios within a round. Writes
`step.json`, `step.md` and `step.png` to --output.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from reco_fast.data.loaders import loader_workers
from reco_fast.errors import ConfigError
from reco_fast.method import cuda_graph
from reco_fast.method.state import pick_device, pick_precision
from reco_fast.profiling.benchmarks import contestants
from reco_fast.profiling.benchmarks.contestants import Contestant
from reco_fast.profiling.machine import Machine, device_name
from reco_fast.run.arguments import config_and_rest
from reco_fast.run.files import write_json, write_text
from reco_fast.run.run_folder import environment
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, ModelConfig, StepConfig, TrainConfig
from reco_fast.settings.typed import WithPaths

Opponent = Literal["naive", "lightly", "supervised", "launches", "torchvision"]
OPPONENTS = get_args(Opponent)
BOUND = 3 / 8  # 3 forward-units an image against 8: two forward-backward passes and two forward ones

STEPS: dict[str, dict[str, Callable[[Config, torch.device], Contestant]]] = {
    "naive": {"naive": contestants.naive},
    "lightly": {
        "ours, moco": contestants.moco,
        "lightly": partial(contestants.lightly, autocast=False),
        "lightly, autocast": partial(contestants.lightly, autocast=True),
    },
    "supervised": {"supervised": contestants.supervised},
    "launches": {
        f"{name}, {'compiled' if compiled else 'eager'}": partial(contestants.launched, make, compiled=compiled)
        for name, make in (("ours", contestants.trainer), ("supervised", contestants.supervised))
        for compiled in (False, True)
    },
}
"""Who comes for each opponent, by the name in the tables."""


@dataclass(frozen=True)
class StepOptions(StepConfig):
    @property
    def config(self) -> Config:
        """Of a whole run with this step."""
        return Config(self.data, self.model, self.loss, self.optim, self.train)


@dataclass(frozen=True)
class Benchmark(StepOptions, WithPaths):
    against: tuple[Opponent, ...] = ("naive", "supervised")
    """With which the whole step is compared."""
    rounds: int = 5
    """In each, every contestant has its turn once."""
    steps: int = 2
    """Timed in a turn."""
    warmup: int = 2
    """Steps before the first round, on a GPU as many as a CUDA graph needs: compilation, the allocator's first time."""
    output: Path = Path("benchmark")
    """Folder for step.json, step.md and step.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: expected 1 or more, got {getattr(self, name)}")


DEFAULT = Benchmark(model=ModelConfig(bank_size=16384), train=TrainConfig(batch_size=128))


class Turn(NamedTuple):
    """What one turn took."""

    seconds_per_step: float
    cpu_seconds_per_step: float
    """Of all threads of the process: beside the former it says whether the machine had other work."""
    peak_bytes: int
    """More memory than between steps, on CUDA; elsewhere 0."""


def warmup_steps(given: int, device: torch.device) -> int:
    """So many that a CUDA graph is captured before the clock starts."""
    return max(given, cuda_graph.WARMUP + 2) if device.type == "cuda" else given


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


def compare_steps(
    benchmark: Benchmark, entered: Mapping[str, Contestant], device: torch.device, machine: Machine
) -> dict[str, Any]:
    """Each on a batch in memory, again and again. `rounds`: every turn; `results`: what `_summary` says; `left_out`:
    who needs more memory than there is. Raises ConfigError where that is ours."""

    def turn(name: str, steps: int) -> Turn:
        contestant = entered[name]
        return take_turn(lambda: contestant.train(contestant.views), steps, device)

    warmup = warmup_steps(benchmark.warmup, device)
    left_out, peaks = [], {}
    for name in entered:
        start = time.perf_counter()
        try:
            turn(name, 1)  # tries algorithms that take memory of their own
            if warmup > 1:  # a graph's memory can be seen as it is captured: it keeps it, between steps too
                peaks[name] = turn(name, warmup - 1).peak_bytes
            print(f"{name}: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        except torch.OutOfMemoryError:
            left_out.append(name)
    if "ours" in left_out:
        raise ConfigError(
            f"--train.batch-size: expected a batch that fits, got {benchmark.train.batch_size}: no memory"
        )
    names = [name for name in entered if name not in left_out]
    with machine.alone():
        turns = _alternate(names, benchmark.rounds, lambda name: turn(name, benchmark.steps))
    results = _summary(turns, benchmark.train.batch_size)
    for name, row in results.items():
        cpu = [round_[name].cpu_seconds_per_step / round_["ours"].cpu_seconds_per_step for round_ in turns]
        row["cpu_ms"] = 1e3 * statistics.median(round_[name].cpu_seconds_per_step for round_ in turns)
        row["cpu_time_ratio"], row["cpu_time_ratio_range"] = statistics.median(cpu), [min(cpu), max(cpu)]
        row["step_memory_mib"] = peaks[name] / 2**20 if device.type == "cuda" else None
    for name in results:
        ours = name.replace("supervised", "ours")
        if name != ours and ours in results:
            shares = [turn[name].seconds_per_step / turn[ours].seconds_per_step / BOUND for turn in turns]
            results[name]["ours_share_of_bound"] = statistics.median(shares)
    return {"results": results, "rounds": _plain(turns), "left_out": left_out}


def compare_end_to_end(benchmark: Benchmark, entered: Mapping[str, Contestant], device: torch.device) -> dict[str, Any]:
    """From image files: each with its own loader, which no other contestant's is beside."""
    # So many steps that what a loader made ahead while nobody asked is used up before the clock starts.
    lead = max(warmup_steps(benchmark.warmup, device), 2 * loader_workers(benchmark.data) + 2)

    def turn(name: str) -> Turn:
        contestant = entered[name]
        assert contestant.batches is not None
        with closing(contestant.batches()) as batches:
            take_turn(lambda: contestant.train(next(batches)), lead, device)
            return take_turn(lambda: contestant.train(next(batches)), benchmark.steps, device)

    turns = _alternate([name for name in entered if entered[name].batches is not None], benchmark.rounds, turn)
    return {"results": _summary(turns, benchmark.train.batch_size), "rounds": _plain(turns), "steps_before": lead}


def _alternate(names: list[str], rounds: int, turn: Callable[[str], Turn]) -> list[dict[str, Turn]]:
    """Forwards in one round, backwards in the next, so that nobody always comes first."""
    return [{name: turn(name) for name in (names if number % 2 == 0 else names[::-1])} for number in range(rounds)]


def _summary(turns: list[dict[str, Turn]], batch_size: int) -> dict[str, dict[str, Any]]:
    """For each contestant, ours first, its images/s and how many times as fast ours, and ours with MoCo's loss, is."""
    results: dict[str, dict[str, Any]] = {}
    for name in turns[0]:
        seconds = statistics.median(turn[name].seconds_per_step for turn in turns)
        results[name] = {"step_ms": 1e3 * seconds, "images_per_second": batch_size / seconds}
        for key, reference in (("ours_times_as_fast", "ours"), ("moco_times_as_fast", "ours, moco")):
            if reference in turns[0]:
                ratios = [turn[name].seconds_per_step / turn[reference].seconds_per_step for turn in turns]
                results[name][key], results[name][f"{key}_range"] = (
                    statistics.median(ratios),
                    [min(ratios), max(ratios)],
                )
    return results


def _plain(turns: list[dict[str, Turn]]) -> list[dict[str, Any]]:
    return [{name: turn._asdict() for name, turn in round_.items()} for round_ in turns]


def compare_loaders(benchmark: Benchmark) -> dict[str, Any]:
    """What `benchmarks/loader.py` measures, in a process of its own: worker processes want no model's threads."""
    command = [sys.executable, "-m", "reco_fast.profiling.benchmarks.loader", "--data.path", str(benchmark.data.path)]
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
    for part in ("steps", "end_to_end"):
        if part in report:
            lines += ["", *_table(part.replace("_", " "), report[part]["results"])]
    steps = report.get("steps", {"results": {}})
    shares = {
        name: row["ours_share_of_bound"] for name, row in steps["results"].items() if "ours_share_of_bound" in row
    }
    if shares:
        said = ", ".join(f"{100 * share:.0f} %{name.removeprefix('supervised')}" for name, share in shares.items())
        lines += ["", f"Of the bound, 3/8 of supervised images/s, the step reaches {said}."]
    if steps.get("left_out"):
        lines += ["", f"Out of memory: {', '.join(steps['left_out'])}."]
    if "loaders" in report:
        lines += ["", "| loader | images/s | × torchvision |", "|---|---|---|"]
        for name, row in report["loaders"]["results"].items():
            lines.append(f"| {name} | {row['images_per_second']:,.0f} | {row['times']['torchvision']:.2f} |")
    return "\n".join(lines) + "\n"


def _table(title: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each contestant; ratios as median (smallest–largest)."""
    columns = {"ours is × as fast": "ours_times_as_fast", "ours, moco, is": "moco_times_as_fast"}
    columns["CPU time, × ours"] = "cpu_time_ratio"
    columns = {head: key for head, key in columns.items() if all(key in row for row in results.values())}
    lines = [f"| {' | '.join([title, 'ms', 'images/s', *columns])} |", "|---|" + (2 + len(columns)) * "---|"]
    for name, row in results.items():
        cells = [name, f"{row['step_ms']:.1f}", f"{row['images_per_second']:,.1f}"]
        for key in columns.values():
            low, high = row[f"{key}_range"]
            cells.append(f"{row[key]:.2f} ({low:.2f}–{high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [(key, report[key]["results"]) for key in ("steps", "end_to_end", "loaders") if key in report]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5 * len(parts), 2.6), squeeze=False, layout="constrained")
    for axis, (title, results) in zip(axes[0], parts, strict=True):
        bars = axis.barh(list(results), [row["images_per_second"] for row in results.values()], color="#4477aa")
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.set(xlabel="images/s", title=title.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    # "naive,lightly" as well as "naive lightly"
    words = [word for a in sys.argv[1:] for word in (a.split(",") if set(a.split(",")) & set(OPPONENTS) else [a])]
    prog = "python -m reco_fast.profiling.benchmarks.step"
    default, words = config_and_rest(words, DEFAULT)
    benchmark = command_line.parse(Benchmark, words, prog=prog, description=__doc__ or "", default=default)
    check(benchmark)
    config, against = benchmark.config, benchmark.against
    machine = Machine()
    device = pick_device(config.train.device)
    report: dict[str, Any] = {
        "device": device_name(device),
        "precision": str(pick_precision(config.train.precision, device)).removeprefix("torch."),
        "environment": environment(),
        "config": config.to_json(),
        "rounds": benchmark.rounds,
        "steps_per_turn": benchmark.steps,
    }
    if "torchvision" in against:
        report["loaders"] = compare_loaders(benchmark)
    makers = {
        name: make for opponent, entries in STEPS.items() if opponent in against for name, make in entries.items()
    }
    if makers:
        entered = {name: make(config, device) for name, make in {"ours": contestants.trainer, **makers}.items()}
        report["steps"] = compare_steps(benchmark, entered, device, machine)
        if "lightly" in against and benchmark.data.path is not None:
            report["end_to_end"] = compare_end_to_end(benchmark, entered, device)
    if "lightly" in against:
        report["environment"]["packages"]["lightly"] = version("lightly")
    benchmark.output.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.output / "step.json", report)
    write_text(benchmark.output / "step.md", markdown(report))
    plot(report, benchmark.output / "step.png")
    print(markdown(report), end="")
    return 0


def check(benchmark: Benchmark) -> None:
    """What the opponents ask for. Raises ConfigError."""
    config = benchmark.config
    if "naive" in benchmark.against and config.loss.objective != "reco":
        raise ConfigError(f"--loss.objective: expected reco for --against naive, got {config.loss.objective}")
    if "naive" in benchmark.against and config.model.bank_size % config.train.batch_size:
        raise ConfigError(
            f"--model.bank-size: expected a multiple of the batch {config.train.batch_size} for --against naive, "
            f"got {config.model.bank_size}"
        )
    if "launches" in benchmark.against and pick_device(config.train.device).type != "cuda":
        raise ConfigError("--against launches: expected a CUDA device, which has graphs")
    if "torchvision" in benchmark.against and config.data.path is None:
        raise ConfigError("--data.path: expected a folder of images for --against torchvision, got nothing")


if __name__ == "__main__":
    command_line.run(main)
