"""Images/s as the batch, the banks, the images and the ranks grow, one of them at a time.

    python -m reco_fast.profiling.benchmarks.growth --output DIR [--batches 32 64 128 256] [--banks ...] [--sizes ...]
        [--ranks 1 2] [--model.arch ...] [--train.batch-size ...] ...

The middle of the table is what the flags of the model say; each row changes one number of it. A row is a process of
its own (for ranks as many, under torchrun) with a batch in memory. Beside a GPU the rows of one rank get ready side by
side and are timed one at a time (`machine.py`). Ranks keep the batch of each: the global batch grows with them. On a
CPU the rows of ranks have as many threads a rank as the largest number of ranks leaves to each: on two cores, one rank
with one thread against two with one each, and the middle of the table is one rank with two. On GPUs each rank has one.

Writes `growth.json` and `growth.md` to --output after each row, and `growth.png` at the end.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reco_fast import distributed
from reco_fast.data.loaders import available_cores
from reco_fast.errors import ConfigError
from reco_fast.method.state import pick_device, pick_precision
from reco_fast.profiling.benchmarks.contestants import trainer
from reco_fast.profiling.benchmarks.step import DEFAULT as STEP
from reco_fast.profiling.benchmarks.step import StepOptions, take_turn, warmup_steps
from reco_fast.profiling.machine import LOCK, Machine, device_name
from reco_fast.run.files import write_json, write_text
from reco_fast.run.run_folder import environment
from reco_fast.settings import command_line
from reco_fast.settings.typed import WithPaths

BESIDE = 4
"""Rows that get ready at once beside a GPU. All at once would fill it: each tries convolutions that take memory."""

FACTORS = {"batch": "--train.batch-size", "K": "--model.bank-size", "size": "--data.image-size", "ranks": ""}


@dataclass(frozen=True)
class Growth(StepOptions, WithPaths):
    batches: tuple[int, ...] = (32, 64, 256)
    banks: tuple[int, ...] = (1024, 4096, 65536)
    sizes: tuple[int, ...] = (64,)
    ranks: tuple[int, ...] = (1, 2)
    rounds: int = 3
    """The median of so many turns counts."""
    steps: int = 2
    """Timed in a turn."""
    warmup: int = 2
    """Steps before the first turn."""
    measure: bool = False
    """Only one row, in the processes that torchrun started; prints it as JSON."""
    output: Path = Path("growth")
    """Folder for growth.json, growth.md and growth.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "steps", "warmup", "batches", "banks", "sizes", "ranks"):
            given = getattr(self, name)
            if min(given if isinstance(given, tuple) else [given], default=1) < 1:
                raise ConfigError(f"--{name}: expected 1 or more, got {given}")


DEFAULT = Growth(model=STEP.model, train=STEP.train)


def measure(growth: Growth) -> dict[str, Any] | None:
    """Times one configuration, together with the other ranks if there are any; the result on rank 0."""
    machine = Machine()
    config = growth.config
    device = pick_device(config.train.device)
    with distributed.process_group(device):
        contestant = trainer(config, device)
        on_gpu = device.type == "cuda"
        take_turn(lambda: contestant.train(contestant.views), 1, device)  # tries convolutions that take memory
        if on_gpu:
            torch.cuda.empty_cache()  # another row gets ready while this one waits
            torch.cuda.reset_peak_memory_stats()
        for _ in range(warmup_steps(growth.warmup, device) - 1):
            contestant.train(contestant.views)
        # Before the turns: a CUDA graph's memory can be seen as it is captured.
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        with machine.alone():
            turns = [
                take_turn(lambda: contestant.train(contestant.views), growth.steps, device)
                for _ in range(growth.rounds)
            ]
        if distributed.rank() != 0:
            return None
        seconds = [turn.seconds_per_step for turn in turns]
        return {
            "device": device_name(device),
            "precision": str(pick_precision(config.train.precision, device)).removeprefix("torch."),
            "images_per_second": config.train.batch_size / statistics.median(seconds),
            "seconds_per_step": seconds,
            "peak_mib": (peak or _resident_bytes()) / 2**20,
        }


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows(growth: Growth) -> list[dict[str, int | str]]:
    """What each row of the table has: the middle first, then one thing changed at a time."""
    middle: dict[str, int | str] = {
        "batch": growth.train.batch_size,
        "K": growth.model.bank_size,
        "size": growth.data.image_size,
        "ranks": 1,
        "threads": available_cores(),
        "changed": "",
    }
    found = [middle]
    for changed, values in (("batch", growth.batches), ("K", growth.banks), ("size", growth.sizes)):
        found += [{**middle, changed: value, "changed": changed} for value in values if value != middle[changed]]
    share = max(1, available_cores() // max(growth.ranks, default=1))
    for ranks in growth.ranks if growth.ranks != (1,) else ():  # one alone is the middle again
        batch = ranks * growth.train.batch_size
        found.append({**middle, "ranks": ranks, "threads": share, "batch": batch, "changed": "ranks"})
    return found


def run_row(row: dict[str, int | str], words: list[str], beside: int = 0, lock: Path | None = None) -> dict[str, Any]:
    """The row with its result, or with why there is none, from processes of its own; `beside` so many other rows, with
    which it shares the machine by `lock`."""
    command = [sys.executable, "-m", "reco_fast.profiling.benchmarks.growth", *words, "--measure"]
    if row["ranks"] != 1:
        command[2:2] = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(row["ranks"]), "-m"]
    for factor in ("batch", "K", "size"):
        command += [FACTORS[factor], str(row[factor])]
    environ = os.environ | {"OMP_NUM_THREADS": str(row["threads"])}
    if beside:  # compilers that would each take all cores
        environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, available_cores() // (1 + beside)))
    with Machine(lock) if lock else nullcontext() as machine:
        share, files = machine.handed_on() if machine else ({LOCK: ""}, ())
        process = subprocess.Popen(
            command, env=environ | share, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=files
        )
    stdout, stderr = process.communicate()
    if process.returncode == 0:
        return row | json.loads(stdout.splitlines()[-1])
    said = [line for line in stderr.splitlines() if "error" in line.lower()] or [f"exit {process.returncode}"]
    return row | {"failed": said[0].strip()}


def markdown(report: dict[str, Any]) -> str:
    done = [row for row in report["rows"] if "failed" not in row]
    commit = (report["environment"]["git_commit"] or "unknown")[:7]
    where = f"{done[0]['device'].split(',')[0]}, {done[0]['precision']}, " if done else ""
    versions = f"torch {report['environment']['packages']['torch']}, commit {commit}"
    lines = [
        f"{report['config']['model']['arch']}, {where}{versions}",
        "",
        "| changed | batch | K | px | ranks × threads | images/s | to the first row | peak MiB a rank |",
        "|---|" + 7 * "---|",
    ]
    for row in report["rows"]:
        cells = [row["changed"], row["batch"], f"{row['K']:,}", row["size"], f"{row['ranks']} × {row['threads']}"]
        if "failed" in row:
            cells += [row["failed"], "", ""]
        else:
            times = row["images_per_second"] / done[0]["images_per_second"]
            cells += [f"{row['images_per_second']:,.1f}", f"{times:.2f}", f"{row['peak_mib']:,.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [row for row in report["rows"] if "failed" not in row]
    figure, axes = pyplot.subplots(1, len(FACTORS), figsize=(11, 2.6), sharey=True, layout="constrained")
    for axis, factor in zip(axes, FACTORS, strict=True):
        part = [row for row in done if row["changed"] in ((factor,) if factor == "ranks" else (factor, ""))]
        points = sorted((row[factor], row["images_per_second"]) for row in part)
        axis.plot(*zip(*points, strict=True), "o-", color="#4477aa") if points else None
        axis.set(xlabel=factor, xscale="log", xticks=[x for x, _ in points])
        axis.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points], minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("images/s")
    axes[0].set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    prog = "python -m reco_fast.profiling.benchmarks.growth"
    growth = command_line.parse(Growth, sys.argv[1:], prog=prog, description=__doc__ or "", default=DEFAULT)
    if growth.measure:
        result = measure(growth)
        if result is not None:
            print(json.dumps(result), flush=True)
        return 0
    growth.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": environment(), "config": growth.config.to_json(), "rows": []}

    def report_row(number: int, row: dict[str, Any]) -> None:
        found[number] = row
        report["rows"] = [found[key] for key in sorted(found)]
        write_json(growth.output / "growth.json", report)
        write_text(growth.output / "growth.md", markdown(report))
        print(json.dumps(row), flush=True)

    found: dict[int, dict[str, Any]] = {}
    planned = dict(enumerate(rows(growth)))
    together = (
        {}
        if pick_device(growth.train.device).type == "cpu"
        else {number: row for number, row in planned.items() if row["ranks"] == 1}
    )
    with ThreadPoolExecutor(BESIDE) as pool:
        shared = min(BESIDE, len(together)) - 1, growth.output / "machine.lock"
        running = {pool.submit(run_row, row, sys.argv[1:], *shared): number for number, row in together.items()}
        for done in as_completed(running):
            report_row(running[done], done.result())
    for number in planned.keys() - together.keys():
        report_row(number, run_row(planned[number], sys.argv[1:]))
    plot(report, growth.output / "growth.png")
    print(markdown(report), end="")
    return 0


if __name__ == "__main__":
    command_line.run(main)
