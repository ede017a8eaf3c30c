"""Everything that has to be seen on a GPU, unattended and within a budget of seconds.

    python -m reco_fast.profiling.benchmarks.gpu_session --output DIR --budget SECONDS [--only NAME ...]
        [--data.path IMAGES] [--photographs DIR]

What is only right or wrong runs side by side, and beside it the benchmarks get ready, which then are timed one at a
time (`machine.py`); then each of the rest has the machine to itself, in the order of what matters. A part is commands
with a limit of seconds together. Its output is in `DIR/NAME.log`, how it ended in `DIR/session.json`; one that fails or
runs out of time keeps no other from running, and one that no longer fits in the budget is left out and named. After
each part all results are packed again as one file, `DIR.tar.gz`, so that a session cut short leaves what it has seen.
Ends with 1 where a part failed or was left out. `--tiny` rehearses the parts with small models, few steps and few
images, on any machine. RECO_FAST_COMMIT says what was checked out, where git cannot.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from reco_fast.data.loaders import available_cores
from reco_fast.profiling.benchmarks.gpu_parts import Task, parts
from reco_fast.profiling.machine import Machine
from reco_fast.run.files import write_json
from reco_fast.run.run_folder import environment
from reco_fast.settings import command_line
from reco_fast.settings.typed import at_home

HERE = Path(__file__).resolve().parents[2]
GRACE = 10  # seconds for a command that is stopped to save what it has
PACK_BYTES = 15 * 2**20
KEPT = (".json", ".jsonl", ".json.gz", ".md", ".png", ".txt", ".log")  # in the pack; no weights and no pickles
LOG_BYTES = 200_000  # of a log, its end


class Session:
    """Runs parts and writes how they ended, each at once."""

    def __init__(self, output: Path, budget: float) -> None:
        self.output = output
        self.deadline = time.monotonic() + budget
        self._path = output / "session.json"
        self._machine = output / "machine.lock"
        self._cores = available_cores()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        output.mkdir(parents=True, exist_ok=True)
        try:
            self.ended: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))["parts"]
        except (OSError, ValueError, KeyError):
            self.ended = {}

    def run(self, chosen: dict[str, Task]) -> bool:
        """Whether all are done."""
        together = {name: part for name, part in chosen.items() if part.kind != "alone"}
        with self._nothing_left_running():
            with ThreadPoolExecutor(min(max(1, len(together)), max(2, self._cores))) as pool:
                list(pool.map(self._one, together, together.values()))
            for name, part in chosen.items():
                if part.kind == "alone":
                    self._one(name, part)
        return all(self.ended[name]["ended"] == "done" for name in chosen)

    def _one(self, name: str, part: Task) -> None:
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

    def _commands(self, part: Task, log: Path) -> str:
        """How it ended: "done", "exit CODE" of the first command that failed, "stopped after ...", or why it did not
        start."""
        start = time.monotonic()
        deadline = min(self.deadline, start + part.seconds)
        with open(log, "ab") as file:
            for command in part.commands:
                try:
                    code = self._command(command, part.kind, file, deadline)
                except subprocess.TimeoutExpired:
                    return f"stopped after {deadline - start:.0f} s"
                except OSError as error:
                    return f"did not start: {error}"
                if code != 0:
                    return f"exit {code}"
        return "done"

    def _command(self, command: list[str], kind: str, log: IO[bytes], deadline: float) -> int:
        with Machine(self._machine) as machine:
            # Compilers side by side would each take all cores.
            threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": str(min(2, max(1, self._cores // 4)))}
            together = threads if kind != "alone" else {}
            own, files = machine.handed_on() if kind == "benchmark" else ({}, ())
            process = subprocess.Popen(
                command,
                cwd=HERE,
                env={**os.environ, **together, **own},
                stdout=log,
                stderr=log,
                process_group=0,
                pass_fds=files,
            )
            if machine.file is not None and kind == "benchmark":  # the share is the process's now
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
    found: list[tuple[bytes, Path]] = []
    for path in output.rglob("*"):
        if path.name.endswith(KEPT):
            with contextlib.suppress(OSError):  # a part under way may take a file away
                content = path.read_bytes()
                found.append((content[-LOG_BYTES:] if path.suffix == ".log" else content, path))
    left = PACK_BYTES
    with tarfile.open(temporary, "w:gz") as tar:
        for content, path in sorted(found, key=lambda item: len(item[0])):
            left -= len(content)
            if left < 0:  # what the gzip saves is not counted on
                break
            folder, *rest = path.relative_to(output).parts
            member = tarfile.TarInfo("/".join([folder, "_".join(rest)]) if rest else folder)
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))
    temporary.rename(packed)
    return packed


def few(images: Path, folder: Path, each: int = 32) -> Path:
    """`folder` with links to the first images of each class of `images`, train/ and test/: an evaluation reads all."""
    for label in (path for split in ("train", "test") for path in sorted((images / split).iterdir()) if path.is_dir()):
        here = folder / label.parent.name / label.name
        here.mkdir(parents=True, exist_ok=True)
        for path in sorted(label.iterdir())[:each]:
            with contextlib.suppress(FileExistsError):
                (here / path.name).symlink_to(path)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=at_home, required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds for all parts together")
    parser.add_argument("--data.path", dest="images", type=at_home, help="small images: train/ and test/, by class")
    parser.add_argument("--photographs", type=at_home, help="a folder of large images, for the loader")
    parser.add_argument("--only", nargs="+", help="names of parts; all unless given")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small models")
    arguments = parser.parse_args()
    images, photographs = (path and path.resolve() for path in (arguments.images, arguments.photographs))
    output = arguments.output.resolve()
    if images is not None and not all((images / split).is_dir() for split in ("train", "test")):
        parser.error(f"--data.path: expected a folder with train/ and test/, got {images}")
    if images is not None and arguments.tiny:
        images = few(images, output / "few-images")
    known = parts(output, images, photographs, arguments.tiny)
    unknown = sorted(set(arguments.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}, got {unknown[0]}")
    if arguments.tiny and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    session = Session(output, arguments.budget)
    return 0 if session.run({name: known[name] for name in arguments.only or known}) else 1


if __name__ == "__main__":
    command_line.run(main)
