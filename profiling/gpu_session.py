"""Everything that has to be seen on a GPU, unattended, each result written as soon as it is there.

    python -m reco_fast.profiling.gpu_session --output DIR [--only NAME ...] [--data.path IMAGES] [--photographs DIR]

Each part is one or more commands with a time limit of under ten minutes together; their output goes to
`DIR/NAME.log`, what they took and how they ended to `DIR/session.json`. One that fails or runs out of time does not
keep the others from running. Parts of an earlier call stay in `session.json`; the quality parts go on where they were.
Ends with 1 where a part failed. `--tiny` rehearses the parts with small models and few steps, on any machine.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from reco_fast.json_files import write_json
from reco_fast.run_folder import environment

HERE = Path(__file__).resolve().parents[1]
GRACE = 40  # seconds for a run that is stopped to leave its checkpoint
TINY = {
    "train": "--model.arch timm/test_resnet --model.bank-size 64 --train.batch-size 16 --train.max-steps 12 "
    "--model.key-norm batch --run.log-every 2",
    "profiling.benchmark": "--model.arch timm/test_resnet --data.image-size 32 --model.bank-size 64 "
    "--train.batch-size 16 --rounds 1 --steps 1 --warmup 1",
    "profiling.growth": "--model.arch timm/test_resnet --model.bank-size 64 --train.batch-size 16 "
    "--batches 8 --banks 128 --sizes 48 --rounds 1 --steps 1 --warmup 1",
    "profiling.kernel_benchmark": "--rows 16 --lengths 256",
    "profiling.loader_benchmark": "--batch-size 8 --batches 2 --rounds 1",
    "pytest": "--collect-only",
}


class Part(NamedTuple):
    minutes: float
    commands: list[list[str]]


def parts(output: Path, images: Path | None, photographs: Path | None, tiny: bool) -> dict[str, Part]:
    """By name, in the order of what matters first."""

    def module(name: str, *arguments: object) -> list[str]:
        own = name if name == "pytest" else f"reco_fast.{name}"
        return [sys.executable, "-m", own, *map(str, arguments), *(TINY.get(name, "").split() if tiny else ())]

    def step(name: str, size: int, batch: int, bank: int, *arguments: object, by: str = "benchmark") -> list[str]:
        where = ["--output", output / name, "--data.image-size", size]
        sizes = ["--train.batch-size", batch, "--model.bank-size", bank]
        return module(f"profiling.{by}", *where, *sizes, *arguments)

    def kernels(name: str, *arguments: object) -> list[str]:
        return module("profiling.kernel_benchmark", "--output", output / name, *arguments)

    def pytest(*names: str) -> list[str]:
        return module("pytest", "-q", "-rs", *(f"tests/test_{name}.py" for name in names))

    data = ["--data.path", images / "train", "--data.val-path", images / "test"] if images else []
    preset = "cifar10" if images else "quickstart"
    resnet18, resnet50 = ("--model.arch", "resnet18"), ("--model.arch", "resnet50")
    rivals, captured = ["--against", "naive", "supervised"], ["--against", "supervised", "--train.cuda-graph"]
    lightly = ["lightly"] if importlib.util.find_spec("lightly") else []
    larger = ["--batches", 128, 256, 1024]

    def profiled(name: str, *arguments: object) -> Part:
        options = ["--profile.enabled", "--train.max-steps", 100, "--run.dir", output / name]
        return Part(8, [module("train", *arguments, *options), module("profiling.report", output / name)])

    found = {
        "kernel-tests": Part(8, [pytest("relation_loss", "losses", "launch")]),
        "step-tests": Part(9, [pytest("cuda_graph", "step", "memory_bank", "loaders", "bad_images")]),
        # With the card's matrix rate and bandwidth, as measured in the same run.
        "kernels": Part(9, [kernels("kernels", "--lengths", 4096, 65536)]),
        "step-resnet50": Part(9, [step("step-resnet50", 224, 256, 65536, *resnet50, *rivals)]),
        "step-resnet18": Part(9, [step("step-resnet18", 32, 512, 65536, *resnet18, *rivals, *lightly)]),
        # Its warm-up steps include the capture.
        "cuda-graph": Part(6, [step("cuda-graph", 32, 512, 65536, *resnet18, *captured, "--warmup", 6)]),
        "profile": profiled("profile", preset, *data),
        "growth": Part(9, [step("growth", 32, 512, 65536, *resnet18, *larger, "--ranks", 1, by="growth")]),
        "tiles": Part(9, [kernels("tiles", "--tiles", "--rows", 256, "--lengths", 65536)]),
        "large-kernels": Part(9, [kernels("large-kernels", "--lengths", 1048576)]),
    }
    if photographs is not None:
        options = ["--data.path", photographs, "--train.batch-size", 256, "--eval.every", 1000]
        found["profile-224"] = profiled("profile-224", "imagenet100", *options)
    for objective in ("reco", "moco") if images else ():
        name = f"quality-{objective}"
        options = ["--train.epochs", 100, "--loss.objective", objective, "--run.dir", output / name]
        found[name] = Part(9, [module("train", "cifar10", *data, *options)])
    for name, folder, size, batch in (("loader-32", images, 32, 512), ("loader-224", photographs, 224, 64)):
        if folder is not None:
            options = ["--data.path", folder, "--image-size", size, "--batch-size", batch]
            found[name] = Part(6, [module("profiling.loader_benchmark", *options)])
    found["tests"] = Part(9, [pytest()])
    return found


def run(part: Part, log: Path) -> str:
    """How it ended: "done", "exit CODE" of the first command that failed, "stopped after ...", or why it did not
    start."""
    deadline = time.monotonic() + 60 * part.minutes
    with open(log, "ab") as file:
        for command in part.commands:
            try:
                process = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=file, start_new_session=True)
            except OSError as error:
                return f"did not start: {error}"
            try:
                code = process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(process)
                return f"stopped after {part.minutes} minutes"
            if code != 0:
                return f"exit {code}"
    return "done"


def _end(process: subprocess.Popen[bytes]) -> None:
    """First so that a training run saves where it is; then with all that it has started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session(chosen: dict[str, Part], output: Path) -> bool:
    """Run the parts and write how they ended, each at once. Whether all are done."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "session.json"
    try:
        ended: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        ended = {}
    for name, part in chosen.items():
        start = time.monotonic()
        how = run(part, output / f"{name}.log")
        ended[name] = {"ended": how, "seconds": round(time.monotonic() - start, 1), "commands": part.commands}
        write_json(path, {"environment": environment(), "parts": ended})
        print(json.dumps({name: how}), flush=True)
    return all(ended[name]["ended"] == "done" for name in chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data.path", dest="images", type=Path, help="small images: train/ and test/, by class")
    parser.add_argument("--photographs", type=Path, help="a folder of large images, for the loader")
    parser.add_argument("--only", nargs="+", help="names of parts; all unless given")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small models")
    arguments = parser.parse_args()
    images, photographs = (path and path.resolve() for path in (arguments.images, arguments.photographs))
    known = parts(arguments.output.resolve(), images, photographs, arguments.tiny)
    unknown = sorted(set(arguments.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}, got {unknown[0]}")
    return 0 if session({name: known[name] for name in arguments.only or known}, arguments.output.resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())
