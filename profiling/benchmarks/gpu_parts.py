"""What `gpu_session.py` runs: commands by name, with a limit of seconds."""

import importlib.util
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch

TINY = {
    "train": "--model.arch timm/test_resnet --model.bank-size 64 --train.batch-size 16 --train.max-steps 12 "
    "--model.key-norm batch --run.log-every 2",
    "profiling.benchmarks.step": "--model.arch timm/test_resnet --data.image-size 32 --model.bank-size 64 "
    "--train.batch-size 16 --rounds 1 --steps 1 --warmup 1",
    "profiling.benchmarks.growth": "--model.arch timm/test_resnet --model.bank-size 64 --train.batch-size 16 "
    "--batches 8 --banks 64 --sizes 32 --rounds 1 --steps 1 --warmup 1",
    "profiling.benchmarks.kernels": "--rows 16 --lengths 256",
    "profiling.benchmarks.loader": "--batch-size 8 --batches 2 --rounds 1",
    "pytest": "--collect-only",
    "accuracy": "--kinds random --rows 1 --lengths 65",
}


class Task(NamedTuple):
    seconds: int
    commands: list[list[str]]
    kind: Literal["check", "benchmark", "alone"] = "alone"
    """A check has no figures that depend on what runs beside it, a benchmark sees to that itself."""


def parts(output: Path, images: Path | None, photographs: Path | None, tiny: bool) -> dict[str, Task]:
    """By name, in the order of what matters first."""
    on_gpu = torch.cuda.is_available()

    def module(name: str, *arguments: object) -> list[str]:
        own = name if name == "pytest" else f"reco_fast.{name}"
        return [sys.executable, "-m", own, *map(str, arguments), *(TINY.get(name, "").split() if tiny else ())]

    def tests(workers: int, *names: str) -> list[list[str]]:
        spread = ["-n", workers, "--dist", "worksteal"] if importlib.util.find_spec("xdist") and not tiny else []
        return [module("pytest", "-rs", *spread, *(f"tests/{name}.py" for name in names))]

    def train(name: str, preset: str, *arguments: object) -> list[str]:
        return module("train", preset, *arguments, "--run.dir", output / name)

    def kernels(name: str, *arguments: object) -> list[list[str]]:
        return [module("profiling.benchmarks.kernels", "--output", output / name, *arguments)]

    def step(name: str, arch: str, size: int, batch: int, *arguments: object) -> list[str]:
        sizes = ["--model.arch", arch, "--data.image-size", size, "--train.batch-size", batch]
        return module("profiling.benchmarks.step", "--output", output / name, *sizes, *fused, *bank, *arguments)

    bank = ["--model.bank-size", 65536]
    resnet18, resnet50 = ("resnet18", 32, 512), ("resnet50", 224, 256)
    against = ["--against", "supervised", *(["launches"] if on_gpu else [])]
    preset, val = ("cifar10", ["--data.val-path", images / "test"]) if images else ("quickstart", [])
    data = ["--data.path", images / "train"] if images else []
    fused = ["--loss.impl", "triton" if on_gpu else "auto"]
    only = ["--only", "triton"] if on_gpu else []
    found: dict[str, Task] = {}

    accuracy = [sys.executable, "tests/accuracy.py", "--output", str(output / "accuracy.jsonl")]
    accuracy += TINY["accuracy"].split() if tiny else "--rows 256 1024 --lengths 65536".split()
    of_kernels = (*(f"kernels/test_{name}" for name in ("relation_loss", "reference", "launch")), "method/test_losses")
    of_steps = (f"method/test_{name}" for name in ("cuda_graph", "step", "step_ranks", "passes", "model"))
    found["kernel-tests"] = Task(110, tests(5, *of_kernels), "check")
    found["step-tests"] = Task(200, tests(4, *of_steps), "check")
    found["accuracy"] = Task(200, [accuracy], "check")
    loaders = ["torch", *(["dali"] if importlib.util.find_spec("nvidia.dali") else [])]
    if "dali" in loaders:
        found["loader-tests"] = Task(200, tests(4, "pipelines/test_gpu_views", "pipelines/test_loaders"), "check")
    for loader in loaders:
        short = [*data, *val, *fused, "--train.max-steps", 60, "--eval.every", 1000, "--data.loader", loader]
        commands = [
            train(f"train-{loader}", preset, *short, "--data.workers", 4),
            train(f"train-{loader}-launched", preset, *short, "--data.workers", 4, "--train.no-cuda-graph"),
        ]
        found[f"train-{loader}"] = Task(200, commands, "check")

    rounds18, rounds50 = ("--steps", 10, "--warmup", 6), ("--rounds", 3, "--steps", 3, "--warmup", 6)
    found["step-resnet18"] = Task(300, [step("step-resnet18", *resnet18, *against, "naive", *rounds18)], "benchmark")
    found["step-resnet50"] = Task(300, [step("step-resnet50", *resnet50, *against, *rounds50)], "benchmark")
    large, million, small = kernels_of((256, 1024), 65536), kernels_of(256, 1048576), kernels_of(512, 4096)
    found["kernels"] = Task(300, kernels("kernels", *large), "benchmark")
    found["kernels-million"] = Task(300, kernels("kernels-million", *million), "benchmark")
    found["kernels-small"] = Task(300, kernels("kernels-small", *small), "benchmark")  # the cifar10 preset's
    found["tiles"] = Task(300, kernels("tiles", "--tiles", *only, *large), "benchmark")

    rest = [*data, *fused, "--eval.every", 1000, "--run.log-every", 50]
    found["run"] = Task(60, [train("run", preset, *rest, "--train.max-steps", 400)])
    commands = [train("profile", preset, *rest, "--profile.enabled", "--train.max-steps", 200)]
    found["profile"] = Task(75, [*commands, module("profiling.report", output / "profile")])
    # A process of its own: in float32 it may not fit beside another.
    found["plain-resnet50"] = Task(75, [step("plain-resnet50", *resnet50, "--against", "naive", *rounds50)])
    # A class alone: it has been read once, and comes decoded, before the clock starts.
    kinds = ("loader-32", images and images / "train" / "airplane", 32, 512), ("loader-224", photographs, 224, 256)
    for name, folder, size, batch in kinds:
        if folder is not None:
            given = ["--data.path", folder, "--image-size", size, "--batch-size", batch, "--rounds", 2]
            found[name] = Task(120, [module("profiling.benchmarks.loader", *given)])
    if photographs is not None:
        given = ["--data.path", photographs, *fused, "--train.batch-size", 256, "--eval.every", 1000]
        given += ["--run.log-every", 10, "--train.max-steps"]
        found["run-224"] = Task(90, [train("run-224", "imagenet100", *given, 80)])
        commands = [train("profile-224", "imagenet100", *given, 30, "--profile.enabled")]
        found["profile-224"] = Task(120, [*commands, module("profiling.report", output / "profile-224")])
    if importlib.util.find_spec("lightly"):
        if images:
            found["lightly"] = Task(120, [step("lightly", *resnet18, *data, "--against", "lightly", *rounds18)])
        if photographs:  # one round: PyTorch's loaders need as many batches as workers before they are timed
            given = ["--data.path", photographs, "--rounds", 1, "--steps", 16, "--warmup", 6]
            found["lightly-224"] = Task(
                240, [step("lightly-224", *resnet50, *given, "--against", "lightly", "torchvision")]
            )
    sizes = ["--model.arch", "resnet18", "--train.batch-size", 512, "--model.bank-size", 65536]
    larger = ["--batches", 256, 1024, 2048, 4096, "--banks", 4096, 16384, 262144, 1048576, "--sizes", 32, "--ranks", 1]
    larger += ["--rounds", 5, "--steps", 5]
    found["growth"] = Task(200, [module("profiling.benchmarks.growth", "--output", output / "growth", *sizes, *larger)])
    for objective in ("reco", "moco") if images else ():
        name = f"quality-{objective}"
        given = [*data, *val, "--train.epochs", 100, "--loss.objective", objective]
        found[name] = Task(500, [train(name, "cifar10", *given)])
    if tiny:  # no figure of a rehearsal counts
        found = {name: part._replace(kind="check") if part.kind == "alone" else part for name, part in found.items()}
    return found


def kernels_of(rows: int | tuple[int, ...], length: int) -> tuple[object, ...]:
    return ("--rows", *((rows,) if isinstance(rows, int) else rows), "--lengths", length)
