"""Everything that has to be seen on a GPU, unattended, each result written as soon as it is there.

    python -m reco_fast.profiling.gpu_session --output DIR [--only tests kernels ...] [--data.path IMAGES]

Each part is a command of its own with a time limit; its output goes to `DIR/NAME.log`, what it took and how it ended
to `DIR/session.json`. One that fails or runs out of time does not keep the others from running.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from reco_fast.json_files import write_json
from reco_fast.run_folder import environment

HERE = Path(__file__).resolve().parents[1]


def parts(output: Path, images: Path | None) -> dict[str, tuple[float, list[str]]]:
    """Name → minutes at most and command, in the order of what matters first."""
    module = [sys.executable, "-m"]
    train = [*module, "reco_fast.train"]
    data = ["--data.path", str(images / "train"), "--data.val-path", str(images / "test")] if images else []
    cifar = ["cifar10", *data, "--train.max-steps", "400", "--run.dir", str(output / "cifar10")]
    step = [*module, "reco_fast.profiling.benchmark", "--against", "naive", "supervised"]
    kernels = [*module, "reco_fast.profiling.kernel_benchmark", "--output"]
    commands: dict[str, tuple[float, list[str]]] = {
        "kernel-tests": (8, [*module, "pytest", "-q", "tests/test_relation_loss.py", "tests/test_losses.py"]),
        "quickstart": (4, [*train, "--run.dir", str(output / "quickstart")]),
        "kernels": (9, [*kernels, str(output / "kernels"), "--rows", "256", "1024", "--lengths", "4096", "65536"]),
        "tiles": (9, [*kernels, str(output / "tiles"), "--tiles", "--rows", "256", "--lengths", "65536"]),
        "step-resnet18": (
            6,
            [*step, "--output", str(output / "step-resnet18"), "--model.arch", "resnet18", "--train.batch-size", "512"],
        ),
        "step-resnet50": (
            8,
            [
                *[*step, "--output", str(output / "step-resnet50"), "--model.arch", "resnet50"],
                *["--data.image-size", "224", "--train.batch-size", "256", "--model.bank-size", "65536"],
            ],
        ),
        "large-kernels": (9, [*kernels, str(output / "large"), "--rows", "1024", "4096", "--lengths", "1048576"]),
        "tests": (9, [*module, "pytest", "-q"]),
    }
    if images is not None:
        commands["cifar10"] = (9, [*cifar, "--profile.enabled"])
        loader = [*module, "reco_fast.profiling.loader_benchmark", "--data.path", str(images / "train")]
        commands["loader"] = (6, [*loader, "--image-size", "32", "--batch-size", "512"])
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data.path", dest="images", type=Path, help="a folder with train/ and test/ by class")
    parser.add_argument("--only", nargs="+", help="names of parts; all unless given")
    arguments = parser.parse_args()
    commands = parts(arguments.output.resolve(), arguments.images)
    unknown = sorted(set(arguments.only or ()) - set(commands))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(commands)}, got {unknown[0]}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    session = {"environment": environment(), "parts": {}}
    for name in arguments.only or commands:
        minutes, command = commands[name]
        start = time.monotonic()
        with open(arguments.output / f"{name}.log", "wb") as log:
            try:
                code = subprocess.run(command, cwd=HERE, stdout=log, stderr=log, timeout=60 * minutes, check=False)
                ended = f"exit {code.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {minutes} minutes"
        session["parts"][name] = {"ended": ended, "seconds": time.monotonic() - start, "command": command}
        write_json(arguments.output / "session.json", session)
        print(json.dumps({name: ended}), flush=True)


if __name__ == "__main__":
    main()
