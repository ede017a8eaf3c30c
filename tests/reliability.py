"""Long checks of what a run survives; too slow for every test run. The figures are in docs/reliability.md.

python tests/reliability.py kill --loader dali     # kill -9 at 20 random moments, bit-for-bit the same end
python tests/reliability.py rank                   # kill one of two ranks under torchrun --max-restarts 3
python tests/reliability.py fuzz --loader torch    # 500 damaged JPEGs among good ones
python tests/reliability.py soak --minutes 30      # memory and open files over time
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

TIMES = {
    "images_per_second",
    "data_wait_fraction",
    "seconds",
    "step_ms_p50",
    "step_ms_p95",
}  # no two runs agree on these
MODEL = "--model.arch timm/test_resnet --model.stem standard --model.bank-size 128 --model.key-norm batch"
RUN = "--train.batch-size 32 --train.device cpu --run.log-every 5"


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` JPEGs of smooth random colours in two classes."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        place = folder / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(place / f"{index:05d}.jpg", quality=90)
    return folder


def command(images: Path, folder: Path, *more: str) -> list[str]:
    data = ["--data.path", str(images), "--run.dir", str(folder)]
    return [sys.executable, "-m", "reco_fast.train", "cifar10", *data, *MODEL.split(), *RUN.split(), *more]


def start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def kill(work: Path, arguments: argparse.Namespace) -> None:
    images = write_images(work / "images", 400)
    epochs = str(2 * arguments.kills)  # 25 steps for each kill
    options = ["--train.epochs", epochs, "--run.checkpoint-steps", "7", "--run.log-every", "1"]
    options += ["--data.loader", arguments.loader, "--data.val-path", str(images), "--eval.every", "7"]
    assert start(command(images, work / "calm", *options), work / "calm.log").wait() == 0
    rng = random.Random(arguments.seed)
    log = work / "killed.log"
    kills = 0
    while True:
        before = steps_in(log)
        process = start(command(images, work / "killed", *options), log)
        if kills == arguments.kills:
            assert process.wait() == 0, log.read_text()[-2000:]
            break
        # One in five before the first step (imports, opening, the first checkpoint's reading), the others behind it.
        steps = 0 if rng.random() < 0.2 else rng.randint(1, 24)
        while process.poll() is None and steps and steps_in(log) < before + steps:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2) if steps else rng.uniform(0, 10))
        assert process.poll() is None, log.read_text()[-2000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        newest = max((work / "killed" / "checkpoints").glob("*"), default=None)
        print(f"kill {kills}: after {steps_in(log) - before} steps; newest: {newest and newest.name}", flush=True)
    last = sorted((work / "calm" / "checkpoints").glob("*.safetensors"))[-1].name
    calm, killed = (load_file(work / name / "checkpoints" / last) for name in ("calm", "killed"))
    assert set(calm) == set(killed)
    different = [name for name in calm if not torch.equal(calm[name], killed[name])]
    assert not different, different
    assert metrics(work / "calm") == metrics(work / "killed")
    lines = len(metrics(work / "calm"))
    print(f"{arguments.loader}: {kills} kills; {len(calm)} tensors and {lines} lines of metrics are bit for bit equal")


def steps_in(log: Path) -> int:
    """How many steps the runs that write to `log` have finished."""
    return log.read_bytes().count(b"\nstep ") if log.exists() else 0


def rank(work: Path, arguments: argparse.Namespace) -> None:
    images = write_images(work / "images", 400)
    line = command(images, work / "run", "--train.epochs", "12", "--run.checkpoint-steps", "5")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*launcher, "--max-restarts", "3", *line[1:]], work / "log")
    while not list((work / "run" / "checkpoints").glob("*.safetensors")):
        time.sleep(0.5)
        assert process.poll() is None, (work / "log").read_text()[-2000:]
    workers = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(timeout=600) == 0, (work / "log").read_text()[-3000:]
    end = metrics(work / "run")[-1]
    assert end["kind"] == "end"
    assert end["epochs"] == 12
    print(f"killed one of two ranks; the run ended by itself: {end}")


def fuzz(work: Path, arguments: argparse.Namespace) -> None:
    images = write_images(work / "images", 300)
    rng = np.random.default_rng(arguments.seed)
    donors = sorted((images / "class0").glob("*.jpg"))
    for index in range(500):
        data = bytearray(donors[index % len(donors)].read_bytes())
        span = min(len(data), 620) if index % 2 else len(data)  # half of them in the headers alone
        for place in rng.integers(2, span, size=rng.integers(1, 12)):
            data[place] = rng.integers(256)
        (images / "class1" / f"fuzzed{index:03d}.jpg").write_bytes(data)
    line = command(images, work / "run", "--train.epochs", "4", "--data.loader", arguments.loader)
    process = start(line, work / "log")
    assert process.wait(timeout=900) == 0, (work / "log").read_text()[-3000:]
    bad = (work / "run" / "bad_images.txt").read_text().splitlines()
    assert all("fuzzed" in name for name in bad), bad
    undecodable = 0
    for path in (images / "class1").glob("fuzzed*.jpg"):
        try:
            Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        except Exception:
            undecodable += 1
    print(f"{arguments.loader}: the run ended; {len(bad)} of 500 fuzzed files listed, Pillow refuses {undecodable}")


def soak(work: Path, arguments: argparse.Namespace) -> None:
    images = write_images(work / "images", 2000)
    options = ["--train.epochs", "100000", "--run.checkpoint-steps", "20", "--data.loader", arguments.loader]
    process = start(command(images, work / "run", *options), work / "log")
    samples = []
    began = time.monotonic()
    while time.monotonic() - began < 60 * arguments.minutes:
        time.sleep(5)
        assert process.poll() is None, (work / "log").read_text()[-2000:]
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS")) / 1024
        samples.append((time.monotonic() - began, memory, len(os.listdir(f"/proc/{process.pid}/fd"))))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    seconds, memory, files = np.array(samples[len(samples) // 5 :]).T  # after the first fifth: caches have filled
    slope = np.polyfit(seconds, memory, 1)[0] * 3600
    print(
        f"{arguments.loader}: {arguments.minutes} min, memory {memory[0]:.0f} → {memory[-1]:.0f} MiB "
        f"(slope {slope:.1f} MiB/h), open files {files.min():.0f} to {files.max():.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["kill", "rank", "fuzz", "soak"])
    parser.add_argument("--loader", choices=["dali", "torch"], default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        {"kill": kill, "rank": rank, "fuzz": fuzz, "soak": soak}[arguments.check](Path(work), arguments)


if __name__ == "__main__":
    main()
