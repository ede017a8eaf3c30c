"""One page about the speed of a run: `python -m reco_fast.profiling.report RUN_DIR`.

Where a step's time goes, how fast the run was, what bounds it and why, and the one setting most likely to help. Prints
the page and leaves it in the run folder as `profile.txt`, with a picture, `profile.png`. The run must have a trace:
train with --profile.enabled.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import tyro

from reco_fast.errors import ConfigError
from reco_fast.profiling.breakdown import Breakdown, newest_trace, read_trace
from reco_fast.run.files import parse_json, read_json, read_text, write_text
from reco_fast.run.run_folder import read_config
from reco_fast.settings import command_line
from reco_fast.settings.config import Config
from reco_fast.settings.terminal import show
from reco_fast.settings.typed import WithPaths, one_line

Bound = Literal["data", "compute", "memory", "launch", "communication"]
MATTERS = 0.15  # a share of the step below which another bound is looked for
MOSTLY = 0.5
# Of a logged step; the first three are always there.
NUMBERS = ("step", "images_per_second", "data_wait_fraction", "step_ms_p50", "step_ms_p95", "model_flops_utilisation")
GPU_PHASES = (
    "A phase is the time of the kernels that the host launched in its range; data_wait is the host's and passes beside",
    "them. The other rows add up to the step, and to more where kernels of two rows ran at once.",
)


class Verdict(NamedTuple):
    bound: Bound
    reason: str
    advice: str


def judge(found: Breakdown, config: Config, *, has_dali: bool = True, ranks: int = 1) -> Verdict:
    """What bounds the step of each rank, and the setting to try on a machine with or without DALI.

    The first that holds of: waiting for data, waiting for other ranks, a device (or operators) idle while the host
    works, then the kind of work that fills most of the time.
    """
    waited = found.share("data_wait")
    idle = 1 - found.busy
    # On a GPU the host may wait for data while the device still works: only what leaves it idle costs time. Where the
    # host is late with everything, the time in which it fetches a batch is a part of that.
    lost = min(waited, idle) if found.device == "GPU" else waited
    late = found.device == "GPU" and idle - lost > max(lost, 2 * MATTERS)
    if lost > MATTERS and not late:
        return Verdict(
            "data", f"{lost:.0%} of the step passes in waiting for the next batch", _data_advice(config, has_dali)
        )
    if found.exposed_communication > MATTERS:
        return Verdict(
            "communication",
            f"{found.exposed_communication:.0%} of the step is communication behind which nothing else runs",
            _communication_advice(config),
        )
    if idle - lost > 2 * MATTERS:
        what = "the GPU runs no kernel" if found.device == "GPU" else "no operator runs"
        return Verdict(
            "launch",
            f"in {idle - lost:.0%} of the step {what} while the host is busy with Python and with starting "
            f"{found.operators_per_step:.0f} of them a step",
            _launch_advice(found, config, ranks),
        )
    if found.matrix > MOSTLY:
        reason = f"{found.matrix:.0%} of the time of operators is convolutions and matrix products"
        return Verdict("compute", reason, _compute_advice(found, config))
    return Verdict(
        "memory",
        f"{1 - found.matrix:.0%} of the time of operators is norms, activations, pooling and copies, which move memory",
        _memory_advice(found, config),
    )


def _data_advice(config: Config, has_dali: bool) -> str:
    if not has_dali:
        return "--data.loader dali: pip install 'reco-fast[dali]'; one decode for all views, in threads"
    if config.data.loader == "torch":
        return "--data.loader dali: one decode for all views, in threads instead of processes"
    if config.data.workers:
        return f"--data.workers: more than the {config.data.workers} of this run, up to one for each core"
    return "images stored smaller: at twice --data.image-size they decode faster and lose little"


def _communication_advice(config: Config) -> str:
    if config.model.key_norm == "shuffle":
        return "--model.key-norm split: shuffle gathers whole image batches from all ranks"
    return "--train.batch-size: a larger one, since gradients are exchanged once a step"


def _launch_advice(found: Breakdown, config: Config, ranks: int) -> str:
    if not _compiled(found, config):
        return "--train.compile: fewer and larger operators"
    if found.device == "GPU" and config.train.cuda_graph is None and ranks == 1:
        return "--profile.enabled only to look: without it a step is one CUDA graph, and one launch"
    return "--train.batch-size: a larger one gives each operator more to do"


def _compute_advice(found: Breakdown, config: Config) -> str:
    if config.train.precision == "fp32":
        return "--train.precision auto: matrix units work in bf16 or fp16 where there are any"
    if not _compiled(found, config):
        return "--train.compile: norms and activations are folded into fewer passes"
    return "more ranks (torchrun --nproc-per-node), or a smaller --model.arch: the arithmetic itself is the limit"


def _memory_advice(found: Breakdown, config: Config) -> str:
    if not _compiled(found, config):
        return "--train.compile: norms, activations and additions become one pass over memory"
    if config.train.precision == "fp32":
        return "--train.precision auto: half the bytes where the device computes in bf16 or fp16"
    return "--data.image-size: fewer pixels, the bytes of every activation shrink with them"


def _compiled(found: Breakdown, config: Config) -> bool:
    return config.train.compile if config.train.compile is not None else found.device == "GPU"


def training_lines(run: Path) -> list[dict[str, Any]]:
    """What the run logged. Raises ConfigError where it logged nothing."""
    path = run / "metrics.jsonl"
    # A kill may cut the last line short.
    lines = [parse_json(line, path) for line in read_text(path).splitlines() if line.endswith("}")]
    train = [line for line in lines if isinstance(line, dict) and line.get("kind") == "train"]
    for line in train:
        for name in NUMBERS:
            if type(line.get(name)) not in (int, float) and (name in NUMBERS[:3] or line.get(name) is not None):
                raise ConfigError(f"{path}: expected a number as {name}, got {line.get(name)!r}")
    if not train:
        raise ConfigError(f"{path}: expected logged steps, got none; see --run.log-every")
    return train


def surroundings(run: Path) -> tuple[bool, int]:
    """Whether DALI was installed where the run trained, and its ranks; yes and 1 if nobody noted it."""
    path = run / "environment.json"
    noted = read_json(path) if path.exists() else None
    noted = noted if isinstance(noted, dict) else {}
    packages, ranks = noted.get("packages"), noted.get("ranks")
    has_dali = not isinstance(packages, dict) or any(packages[n] for n in packages if n.startswith("nvidia-dali"))
    return has_dali, ranks if isinstance(ranks, int) else 1


def page(run: Path, found: Breakdown, logged: list[dict[str, Any]], config: Config, verdict: Verdict) -> str:
    def median(name: str) -> float | None:
        values = [line[name] for line in logged if line.get(name) is not None]
        return statistics.median(values) if values else None

    speed = [f"{median('images_per_second'):,.0f} images/s", f"data wait {median('data_wait_fraction'):.1%}"]
    if (p50 := median("step_ms_p50")) is not None and (p95 := median("step_ms_p95")) is not None:
        speed.append(f"step p50 {p50:,.1f} ms, p95 {p95:,.1f} ms")
    if (utilisation := median("model_flops_utilisation")) is not None:
        speed.append(f"model FLOPs at {utilisation:.1%} of a large matrix product's rate")
    lines = [
        _printable(
            f"{run}: {config.loss.objective} with {config.model.arch}, {config.data.image_size} px, "
            f"batch {config.train.batch_size}, K = {config.model.bank_size:,}, on a {found.device}"
        ),
        "",
        f"whole run, medians: {'; '.join(speed)}",
        f"recorded: {found.steps} steps of {found.step_ms:,.1f} ms under the profiler, which itself takes time",
        *(GPU_PHASES if found.device == "GPU" else ()),
        "",
        *(_bar(name, value, found.step_ms) for name, value in found.rows_ms.items()),
        "",
        f"bound: {verdict.bound}, because {verdict.reason}",
        f"try:   {verdict.advice}",
    ]
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """One line that any terminal shows: file names need not be UTF-8."""
    return one_line(text).encode("utf-8", "backslashreplace").decode()


def _bar(name: str, ms: float, step_ms: float) -> str:
    return f"  {name:17} {ms:10,.2f} ms {ms / step_ms:6.1%}  {'█' * round(40 * ms / step_ms)}".rstrip()


def picture(found: Breakdown, logged: list[dict[str, Any]], verdict: Verdict, path: Path) -> None:
    """Phases of the step, and images/s over the run."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the picture needs matplotlib; pip install 'reco-fast[profile]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=(3, 2))
    rows = found.rows_ms
    colours = ["#4477aa" if name in found.phases_ms else "#bbbbbb" for name in rows]
    bars = left.barh(list(rows), list(rows.values()), color=colours)
    left.bar_label(bars, [f"{ms / found.step_ms:.0%}" for ms in rows.values()], padding=3)
    left.margins(x=0.12)
    left.invert_yaxis()
    left.set(xlabel="ms a step", title=f"a step of {found.step_ms:,.0f} ms; bound: {verdict.bound}")
    right.plot([line["step"] for line in logged], [line["images_per_second"] for line in logged], "o-", color="#4477aa")
    right.set(xlabel="step", ylabel="images/s", title="throughput")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class ReportCommand(WithPaths):
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run with a trace."""


def main() -> NoReturn:
    command_line.serve("profiling.report", ReportCommand, report, __doc__)


def report(command: ReportCommand) -> int:
    """Print the page, and leave it and its picture in the run folder. Raises ConfigError."""
    run = command.run_dir
    found = read_trace(newest_trace(run))
    config, logged = read_config(run), training_lines(run)
    has_dali, ranks = surroundings(run)
    verdict = judge(found, config, has_dali=has_dali, ranks=ranks)
    text = page(run, found, logged, config, verdict)
    write_text(run / "profile.txt", text)
    picture(found, logged, verdict, run / "profile.png")
    show(text.rstrip("\n"))
    return 0


if __name__ == "__main__":
    main()
