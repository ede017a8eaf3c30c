"""Everything that has to be seen on a GPU, unattended and within a budget of seconds.

    python -m reco_fast.profiling.gpu_session --output DIR --budget SECONDS [--only NAME ...]
        [--data.path IMAGES] [--photographs DIR]

What is only right or wrong runs side by side, and beside it the benchmarks get ready, which then are timed one at a
time (`machine.py`); then each of the rest has the machine to itself, in the order of what matters. A part is commands
with a limit of seconds together. Its output is in `DIR/NAME.log`, how it ended in `DIR/session.json`; one that fails or
runs out of time keeps no other from running, and one that no longer fits in the budget is left out and named. After
each part all results are packed again as one file, `DIR.tar.gz`, so that a session cut short leaves what it has seen.
Ends with 1 where a part failed or was left out. `--tiny` rehearses the parts with small models and few steps, on any
machine. RECO_FAST_COMMIT says what was checked out, where git cannot.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch

from reco_fast.json_files import write_json
from reco_fast.profiling.machine import LOCK, Machine
from reco_fast.run_folder import environment

HERE = Path(__file__).resolve().parents[1]
GRACE = 10  # seconds for a command that is stopped to save what it has
PACK_BYTES = 15 * 2**20
KEPT = (".json", ".jsonl", ".json.gz", ".md", ".png", ".txt", ".log")  # in the pack; no weights and no pickles
LOG_BYTES = 200_000  # of a log, its end
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
    "accuracy": "--kinds random --rows 1 --lengths 65",
}


class Part(NamedTuple):
    seconds: int
    commands: list[list[str]]
    kind: Literal["check", "benchmark", "alone"] = "alone"
    """A check has no figures that depend on what runs beside it, a benchmark sees to that itself."""


def parts(output: Path, images: Path | None, photographs: Path | None, tiny: bool) -> dict[str, Part]:
    """By name, in the order of what matters first."""
    on_gpu = torch.cuda.is_available()

    def module(name: str, *arguments: object) -> list[str]:
        own = name if name == "pytest" else f"reco_fast.{name}"
        return [sys.executable, "-m", own, *map(str, arguments), *(TINY.get(name, "").split() if tiny else ())]

    def tests(workers: int, *names: str) -> list[list[str]]:
        spread = ["-n", workers, "--dist", "worksteal"] if importlib.util.find_spec("xdist") and not tiny else []
        return [module("pytest", "-rs", *spread, *(f"tests/test_{name}.py" for name in names))]

    def train(name: str, preset: str, *arguments: object) -> list[str]:
        return module("train", preset, *arguments, "--run.dir", output / name)

    def kernels(name: str, *arguments: object) -> list[list[str]]:
        return [module("profiling.kernel_benchmark", "--output", output / name, *arguments)]

    def step(name: str, arch: str, size: int, batch: int, *arguments: object) -> list[str]:
        sizes = ["--model.arch", arch, "--data.image-size", size, "--train.batch-size", batch]
        return module("profiling.benchmark", "--output", output / name, *sizes, *fused, *bank, *arguments)

    bank = ["--model.bank-size", 65536]
    resnet18, resnet50 = ("resnet18", 32, 512), ("resnet50", 224, 256)
    against = ["--against", "supervised", *(["launches"] if on_gpu else [])]
    preset, val = ("cifar10", ["--data.val-path", images / "test"]) if images else ("quickstart", [])
    data = ["--data.path", images / "train"] if images else []
    fused = ["--loss.impl", "triton" if on_gpu else "auto"]
    captured, only = (["--train.cuda-graph"], ["--only", "triton"]) if on_gpu else ([], [])
    found: dict[str, Part] = {}

    accuracy = [sys.executable, "tests/accuracy.py", "--output", str(output / "accuracy.jsonl")]
    accuracy += TINY["accuracy"].split() if tiny else "--rows 256 1024 --lengths 65536".split()
    found["kernel-tests"] = Part(110, tests(5, "relation_loss", "reference", "losses", "launch"), "check")
    found["step-tests"] = Part(200, tests(2, "cuda_graph", "step", "model", "memory_bank"), "check")
    found["accuracy"] = Part(200, [accuracy], "check")
    loaders = ["torch", *(["dali"] if importlib.util.find_spec("nvidia.dali") else [])]
    if "dali" in loaders:
        found["loader-tests"] = Part(200, tests(2, "gpu_views", "loaders"), "check")
    for loader in loaders:
        short = [*data, *val, *fused, "--train.max-steps", 60, "--eval.every", 1000, "--data.loader", loader]
        commands = [
            train(f"train-{loader}", preset, *short, "--data.workers", 4),
            train(f"train-{loader}-captured", preset, *short, "--data.workers", 4, *captured),
        ]
        found[f"train-{loader}"] = Part(200, commands, "check")

    rounds18, rounds50 = ("--steps", 10, "--warmup", 6), ("--rounds", 3, "--steps", 3, "--warmup", 6)
    found["step-resnet18"] = Part(300, [step("step-resnet18", *resnet18, *against, "naive", *rounds18)], "benchmark")
    found["step-resnet50"] = Part(300, [step("step-resnet50", *resnet50, *against, *rounds50)], "benchmark")
    large, million, small = kernels_of((256, 1024), 65536), kernels_of(256, 1048576), kernels_of(512, 4096)
    found["kernels"] = Part(300, kernels("kernels", *large), "benchmark")
    found["kernels-million"] = Part(300, kernels("kernels-million", *million), "benchmark")
    found["kernels-small"] = Part(300, kernels("kernels-small", *small), "benchmark")  # the cifar10 preset's
    found["tiles"] = Part(300, kernels("tiles", "--tiles", *only, *large), "benchmark")

    rest = [*data, *fused, "--eval.every", 1000, "--run.log-every", 50]
    found["run-captured"] = Part(40, [train("run-captured", preset, *rest, "--train.max-steps", 400, *captured)])
    commands = [train("profile", preset, *rest, "--profile.enabled", "--train.max-steps", 200)]
    found["profile"] = Part(45, [*commands, module("profiling.report", output / "profile")])
    # A process of its own: in float32 it may not fit beside another.
    found["plain-resnet50"] = Part(40, [step("plain-resnet50", *resnet50, "--against", "naive", *rounds50)])
    # So many batches before the clock starts that a small source has been read once and comes decoded.
    kinds = ("loader-32", images and images / "train" / "airplane", 32, 512), ("loader-224", photographs, 224, 256)
    for name, folder, size, batch in kinds:
        if folder is not None:
            given = ["--data.path", folder, "--image-size", size, "--batch-size", batch, "--rounds", 2]
            given += ["--warmup", 30 if size == 32 else 8, "--batches", 30 if size == 32 else 12]
            found[name] = Part(60, [module("profiling.loader_benchmark", *given)])
    if photographs is not None:
        given = ["--data.path", photographs, *fused, "--train.batch-size", 256, "--train.max-steps", 60]
        commands = [train("profile-224", "imagenet100", *given, "--profile.enabled", "--eval.every", 1000)]
        found["profile-224"] = Part(120, [*commands, module("profiling.report", output / "profile-224")])
    if importlib.util.find_spec("lightly") and images:
        found["lightly"] = Part(120, [step("lightly", *resnet18, *data, "--against", "lightly", *rounds18)])
    sizes = ["--model.arch", "resnet18", "--train.batch-size", 512, "--model.bank-size", 65536]
    larger = ["--output", output / "growth", *sizes, "--batches", 128, 256, 1024, "--ranks", 1]
    found["growth"] = Part(500, [module("profiling.growth", *larger)])
    for objective in ("reco", "moco") if images else ():
        name = f"quality-{objective}"
        given = [*data, *val, "--train.epochs", 100, "--loss.objective", objective]
        found[name] = Part(500, [train(name, "cifar10", *given)])
    return found


def kernels_of(rows: int | tuple[int, ...], length: int) -> tuple[object, ...]:
    return ("--rows", *((rows,) if isinstance(rows, int) else rows), "--lengths", length)


class Session:
    """Runs parts and writes how they ended, each at once."""

    def __init__(self, output: Path, budget: float) -> None:
        self.output = output
        self.deadline = time.monotonic() + budget
        self._path = output / "session.json"
        self._machine = output / "machine.lock"
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        output.mkdir(parents=True, exist_ok=True)
        try:
            self.ended: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))["parts"]
        except (OSError, ValueError, KeyError):
            self.ended = {}

    def run(self, chosen: dict[str, Part]) -> bool:
        """Whether all are done."""
        together = {name: part for name, part in chosen.items() if part.kind != "alone"}
        with self._nothing_left_running():
            with ThreadPoolExecutor(max(1, len(together))) as pool:
                list(pool.map(self._one, together, together.values()))
            for name, part in chosen.items():
                if part.kind == "alone":
                    self._one(name, part)
        return all(self.ended[name]["ended"] == "done" for name in chosen)

    def _one(self, name: str, part: Part) -> None:
        start = time.monotonic()
        left = self.deadline - start
        if part.kind == "alone" and left < part.seconds:
            how = f"left out: {left:.0f} s of the budget are left, {part.seconds} are needed"
        else:
            how = self._commands(part, self.output / f"{name}.log")
        with self._lock:
            self.ended[name] = {
                "ended": how,
                "seconds": round(time.monotonic() - start, 1),
                "commands": part.commands,
            }
            write_json(self._path, {"environment": environment(), "parts": self.ended})
            pack(self.output)
            print(json.dumps({name: how, "seconds": self.ended[name]["seconds"]}), flush=True)

    def _commands(self, part: Part, log: Path) -> str:
        """How it ended: "done", "exit CODE" of the first command that failed, "stopped after ...", or why it did not
        start."""
        deadline = min(self.deadline, time.monotonic() + part.seconds)
        with open(log, "ab") as file:
            for command in part.commands:
                try:
                    code = self._command(command, part.kind, file, deadline)
                except subprocess.TimeoutExpired:
                    return f"stopped after {part.seconds} s"
                except OSError as error:
                    return f"did not start: {error}"
                if code != 0:
                    return f"exit {code}"
        return "done"

    def _command(self, command: list[str], kind: str, log: IO[bytes], deadline: float) -> int:
        with Machine(self._machine) as machine:
            assert machine.file is not None
            shared = machine.file.fileno()
            # Compilers side by side would each take all cores.
            together = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"} if kind != "alone" else {}
            own = {LOCK: str(shared)} if kind == "benchmark" else {}
            process = subprocess.Popen(
                command,
                cwd=HERE,
                env={**os.environ, **together, **own},
                stdout=log,
                stderr=log,
                process_group=0,
                pass_fds=[shared] if kind == "benchmark" else [],
            )
            if kind == "benchmark":  # the share is the process's now, and ends with it at the latest
                machine.file.close()
            self._running.add(process)
            try:
                return process.wait(max(0, deadline - time.monotonic()))
            finally:
                _end(process)
                self._running.discard(process)

    @contextlib.contextmanager
    def _nothing_left_running(self) -> Iterator[None]:
        """SIGTERM ends what the parts have started, too."""
        before = signal.signal(signal.SIGTERM, lambda *_: self._kill_all())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _kill_all(self) -> None:
        for process in tuple(self._running):
            _kill(process)
        os._exit(128 + signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """First so that a training run saves where it is; then with all that it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _kill(process)
    process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def pack(output: Path) -> Path:
    """All results in `output` as one gzipped archive beside it, the smallest first and none deeper than one folder."""
    packed = output.with_name(f"{output.name}.tar.gz")
    temporary = packed.with_suffix(".tmp")
    files = [path for path in output.rglob("*") if path.is_file() and path.name.endswith(KEPT)]
    left = PACK_BYTES
    with tarfile.open(temporary, "w:gz") as tar:
        for path in sorted(files, key=lambda path: path.stat().st_size):
            content = path.read_bytes()
            content = content[-LOG_BYTES:] if path.suffix == ".log" else content
            left -= len(content)
            if left < 0:  # what the gzip saves is not counted on
                break
            folder, *rest = path.relative_to(output).parts
            member = tarfile.TarInfo("/".join([folder, "_".join(rest)]) if rest else folder)
            member.size, member.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(member, io.BytesIO(content))
    temporary.rename(packed)
    return packed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds for all parts together")
    parser.add_argument("--data.path", dest="images", type=Path, help="small images: train/ and test/, by class")
    parser.add_argument("--photographs", type=Path, help="a folder of large images, for the loader")
    parser.add_argument("--only", nargs="+", help="names of parts; all unless given")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small models")
    arguments = parser.parse_args()
    images, photographs = (path and path.resolve() for path in (arguments.images, arguments.photographs))
    output = arguments.output.resolve()
    known = parts(output, images, photographs, arguments.tiny)
    unknown = sorted(set(arguments.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}, got {unknown[0]}")
    if arguments.tiny and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    session = Session(output, arguments.budget)
    return 0 if session.run({name: known[name] for name in arguments.only or known}) else 1


if __name__ == "__main__":
    sys.exit(main())
