"""Long checks of what a run survives; too slow for every test run. The figures are in docs/reliability.md.

python tests/reliability.py kill --loader dali     # kill -9 at 20 random moments, bit-for-bit the same end
python tests/reliability.py store --kills 10       # likewise with shards behind a URL and a small cache
python tests/reliability.py million                # opening a million images in 1,000 shards: time and memory
python tests/reliability.py worker --kills 20      # kill the torch loader's processes at random moments
python tests/reliability.py rank                   # kill one of two ranks under torchrun --max-restarts 3
python tests/reliability.py fuzz --loader torch    # 500 damaged JPEGs among good ones
python tests/reliability.py odd --loader dali      # 500 images of which 60 are odd or bad, at batch 32 and 128
python tests/reliability.py lying --loader dali    # headers that claim 30,000 × 30,000 take no memory
python tests/reliability.py full                   # a disk that fills up, as root
python tests/reliability.py soak --minutes 30      # memory and open files over time
"""

import argparse
import contextlib
import ctypes
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path

import numpy as np
import torch
from odd_images import bad_images, deceiving_images, encode, odd_images, picture
from PIL import Image
from safetensors.torch import load_file
from small_runs import without_times, write_holes, write_tar

sys.path.append(str(Path(__file__).with_name("pipelines") / "stores"))
from servers import HttpServer

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


def command(images: Path | str, folder: Path, *more: str) -> list[str]:
    data = ["--data.path", str(images), "--run.dir", str(folder)]
    return [sys.executable, "-m", "reco_fast.train", "cifar10", *data, *MODEL.split(), *RUN.split(), *more]


def start(line: list[str], log: Path, preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
        preexec_fn=preexec_fn,
    )


def give_up_rights() -> None:
    """Of root: to read and list whatever the permissions say (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, effective with the next exec


def kill(work: Path, arguments: argparse.Namespace) -> None:
    images = write_images(work / "images", 400)
    epochs = str(2 * arguments.kills)  # 25 steps for each kill
    options = ["--train.epochs", epochs, "--run.checkpoint-steps", "7", "--run.log-every", "1"]
    options += ["--data.loader", arguments.loader, "--data.val-path", str(images), "--eval.every", "7"]
    assert start(command(images, work / "calm", *options), work / "calm.log").wait() == 0
    go_on_after_kills(command(images, work / "killed", *options), work, arguments)
    say_same(work / "calm", work / "killed", arguments)


def go_on_after_kills(
    line: list[str], work: Path, arguments: argparse.Namespace, wait: Callable[[int], None] = lambda kills: None
) -> None:
    """The command of a run in `killed`, killed as often as asked and then left alone. `wait` is called before each
    kill with how many there were."""
    rng = random.Random(arguments.seed)
    log = work / "killed.log"
    kills = 0
    while True:
        before = steps_in(log)
        process = start(line, log)
        if kills == arguments.kills:
            assert process.wait() == 0, log.read_text()[-2000:]
            return
        # One in five before the first step (imports, opening, the first checkpoint's reading), the others behind it.
        steps = 0 if rng.random() < 0.2 else rng.randint(1, 24)
        while process.poll() is None and steps and steps_in(log) < before + steps:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2) if steps else rng.uniform(0, 10))
        wait(kills)
        assert process.poll() is None, log.read_text()[-2000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        newest = max((work / "killed" / "checkpoints").glob("*"), default=None)
        print(f"kill {kills}: after {steps_in(log) - before} steps; newest: {newest and newest.name}", flush=True)


def say_same(calm: Path, killed: Path, arguments: argparse.Namespace) -> None:
    """That two runs ended with the same weights and the same metrics."""
    last = sorted((calm / "checkpoints").glob("*.safetensors"))[-1].name
    mine, theirs = (load_file(folder / "checkpoints" / last) for folder in (calm, killed))
    assert set(mine) == set(theirs)
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, different
    assert without_times(calm) == without_times(killed)
    lines = len(without_times(calm))
    print(
        f"{arguments.loader}: {killed.name} after {arguments.kills} kills and {calm.name}: {len(mine)} tensors and "
        f"{lines} lines of metrics are bit for bit equal",
        flush=True,
    )


def store(work: Path, arguments: argparse.Namespace) -> None:
    """Against a run from the store that is left alone, and one on the shards on disk. Every other kill comes while
    shards are being fetched; the cache holds a quarter of them."""
    images = sorted(write_images(work / "images", 400).rglob("*.jpg"))
    for number in range(25):
        members = {}
        for path in images[number::25]:
            members |= {path.name: path.read_bytes(), f"{path.stem}.cls": path.parent.name.encode()}
        write_tar(work / "shards" / f"{number:02d}.tar", members)
    largest = max(path.stat().st_size for path in (work / "shards").iterdir())
    options = ["--train.epochs", str(2 * arguments.kills), "--run.checkpoint-steps", "7", "--run.log-every", "1"]
    options += ["--data.loader", arguments.loader, "--eval.every", "7", "--data.order", "blocks", "--data.lanes", "4"]
    options += ["--data.window", "2", "--data.cache-gb", f"{6 * largest / 1e9}"]
    parts = f"{work / 'cache' / 'shards'}/*.part"

    def shards_of(place: object, folder: str) -> list[str]:
        path = f"{place}/{{00..24}}.tar"
        return command(path, work / folder, *options, "--data.val-path", path, "--data.cache", str(work / "cache"))

    def wait(kills: int) -> None:
        until = time.monotonic() + 20
        while kills % 2 and not glob(parts) and time.monotonic() < until:
            time.sleep(0.001)
        found.append(len(glob(parts)))

    found: list[int] = []
    with HttpServer(work / "shards") as server:
        server.delay, server.rate_each = 0.01, largest / 0.1
        for folder, place in (("disk", work / "shards"), ("calm", server.url)):
            assert start(shards_of(place, folder), work / f"{folder}.log").wait() == 0
        shutil.rmtree(work / "cache")
        go_on_after_kills(shards_of(server.url, "killed"), work, arguments, wait)
    for folder in ("disk", "calm"):
        say_same(work / folder, work / "killed", arguments)
    room = sum(path.stat().st_size for path in (work / "cache" / "shards").iterdir()) / largest
    print(f"{sum(map(bool, found))} kills while shards were being fetched; the cache ends with {room:.1f} of 6 shards")
    assert sum(map(bool, found)) >= arguments.kills // 2
    assert room <= 6


MILLION = """
import re, sys, time
from reco_fast.pipelines.sources.open import open_source
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
began, before = time.monotonic(), peak()
source = open_source(sys.argv[1])
source.fingerprint()
print(len(source), time.monotonic() - began, peak() - before)
"""


def million(work: Path, arguments: argparse.Namespace) -> None:
    """Needs 4 GB of disk for the headers."""
    began = time.monotonic()
    write_holes(work / "shards", 1000, 1000)
    written, index = time.monotonic(), work / "shards" / "index.json"
    assert (
        start(
            [sys.executable, "-m", "reco_fast.index_shards", str(index.parent), "--output", str(index)], work / "log"
        ).wait()
        == 0
    ), (work / "log").read_text()
    indexed = time.monotonic()
    line = subprocess.run([sys.executable, "-c", MILLION, index], check=True, capture_output=True, text=True).stdout
    images, seconds, memory = line.split()
    print(
        f"{images} images: headers written in {written - began:.0f} s, indexed in {indexed - written:.0f} s to "
        f"{index.stat().st_size / 1e6:.0f} MB, opened in {float(seconds):.1f} s with {float(memory):.0f} MiB"
    )
    assert int(images) == 10**6
    assert float(memory) < 200


def worker(work: Path, arguments: argparse.Namespace) -> None:
    images = write_images(work / "images", 400)
    rng = random.Random(arguments.seed)
    ends: dict[str, int] = {}
    for number in range(arguments.kills):
        run, log = work / f"run{number % 2}", work / f"{number}.log"
        options = ["--data.loader", "torch", "--data.workers", "2", "--train.epochs", "400", "--run.log-every", "1"]
        options += ["--data.val-path", str(images), "--eval.every", "1"] if number % 2 else []
        process = start(command(images, run, *options, "--run.checkpoint-steps", "7"), log)
        while not (workers := children(process.pid)):  # from the first moment that there are some
            time.sleep(0.01)
        time.sleep(rng.choice([0, rng.uniform(0, 2), rng.uniform(2, 8)]))
        workers = children(process.pid) or workers
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(workers), rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
        killed = time.monotonic()
        while process.poll() is None and time.monotonic() - killed < 20:
            time.sleep(0.1)
        if process.poll() is None:  # it was a process whose work was done: the run goes on
            process.send_signal(signal.SIGTERM)
        code, shown = process.wait(timeout=60), log.read_text()
        assert "Traceback" not in shown, shown
        said = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert (code, len(said)) in ((0, 0), (2, 1)), shown
        print(
            f"kill {number + 1}: exit {code} after {time.monotonic() - killed:.1f} s {''.join(said)[:60]}", flush=True
        )
        ends[str(code)] = ends.get(str(code), 0) + 1
    print(f"{arguments.kills} processes of a loader killed; exit status of the runs → how many: {ends}")


def children(process: int) -> list[int]:
    """Those forked from it, not what it calls."""
    with contextlib.suppress(OSError):
        own = Path(f"/proc/{process}/cmdline").read_bytes()
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [int(pid) for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes() == own]
    return []


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
    end = without_times(work / "run")[-1]
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


def odd(work: Path, arguments: argparse.Namespace) -> None:
    """500 images of which 60 are odd or bad, without root's right to read everything."""
    images = write_images(work / "images", 440)
    odd_ones, bad = odd_images(), bad_images() | deceiving_images()
    expected = set()
    for index, (name, data) in enumerate([*bad.items(), *odd_ones.items()] * 2):
        if len(list(images.rglob("*.*"))) < 496:
            path = images / f"class{index % 2}" / f"{index // (len(odd_ones) + len(bad))} {name}"
            path.write_bytes(data)
            if name in bad:
                expected.add(str(path.relative_to(images)))
    huge = encode(Image.new("L", (12_000, 9_000), 127), "JPEG", optimize=True)
    (images / "class0" / "12,000 × 9,000.jpg").write_bytes(huge)
    (images / "class0" / "broken link.jpg").symlink_to("nowhere")
    (images / "class1" / "forbidden.jpg").write_bytes(encode(picture(), "JPEG"))
    (images / "class1" / "forbidden.jpg").chmod(0)
    (images / "class1" / "vanishes.jpg").write_bytes(encode(picture(), "JPEG"))
    (images / "class1" / "forbidden folder").mkdir(mode=0)
    expected |= {"class0/broken link.jpg", "class1/forbidden.jpg", "class1/vanishes.jpg", "class1/forbidden folder/"}
    listed = sum(path.is_symlink() or path.is_file() for path in images.rglob("*.*"))
    # The file goes after the folder has been listed, before it is read.
    vanish = (
        "import os; from reco_fast import train; from reco_fast.data import images; real = images.open_source\n"
        "def listed(path, *how):\n    source = real(path, *how)\n    os.unlink(f'{path}/class1/vanishes.jpg')\n"
        "    return source\n"
        "images.open_source = listed; train.main()"
    )
    for batch in ("32", "128"):
        (images / "class1" / "vanishes.jpg").write_bytes(encode(picture(), "JPEG"))
        options = ["--train.batch-size", batch, "--train.epochs", "2", "--data.loader", arguments.loader]
        line = command(images, work / batch, *options)
        line[1:3] = ["-c", vanish]
        process = start(line, work / f"{batch}.log", preexec_fn=give_up_rights)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, (work / f"{batch}.log").read_text()[-3000:]
        found = {row.split("\t")[0] for row in (work / batch / "bad_images.txt").read_text().splitlines()}
        assert found == expected, found ^ expected
        assert without_times(work / batch)[-1]["kind"] == "end"
        print(
            f"{arguments.loader}, batch {batch}: of {listed} images exactly the {len(expected) - 1} bad ones and the "
            f"forbidden folder are listed; peak {used.ru_maxrss / 1024:.0f} MiB",
            flush=True,
        )


def lying(work: Path, arguments: argparse.Namespace) -> None:
    """Peak memory with and without 20 files of 100 KB whose header claims 30,000 × 30,000."""
    images = write_images(work / "images", 200)
    peaks = []
    for step in ("without", "with"):
        if step == "with":
            data = bad_images()["lying 30000.jpg"]
            for index in range(20):
                (images / "class0" / f"lying {index}.jpg").write_bytes(data[:-2] + bytes(100_000) + data[-2:])
        process = start(
            command(images, work / step, "--train.epochs", "4", "--data.loader", arguments.loader), work / "log"
        )
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, (work / "log").read_text()[-3000:]
        peaks.append(used.ru_maxrss / 1024)
    assert len((work / "with" / "bad_images.txt").read_text().splitlines()) == 20
    print(f"{arguments.loader}: peak {peaks[0]:.0f} MiB without 20 lying headers, {peaks[1]:.0f} MiB with them")
    assert peaks[1] < peaks[0] + 200


def full(work: Path, arguments: argparse.Namespace) -> None:
    """The disk fills up while a run is at work; with room again the same command goes on. Needs root, for a tmpfs."""
    images = write_images(work / "images", 200)
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=True)
    try:
        line = command(images, disk / "run", "--train.epochs", "40", "--run.checkpoint-steps", "5")
        process = start([*line, "--data.loader", arguments.loader], work / "log")
        while not list((disk / "run" / "checkpoints").glob("*.safetensors")):
            time.sleep(0.1)
            assert process.poll() is None, (work / "log").read_text()[-3000:]
        with contextlib.suppress(OSError), open(disk / "balloon", "wb", buffering=0) as balloon:
            while True:
                balloon.write(bytes(4096))
        code = process.wait(timeout=600)
        shown = (work / "log").read_text()
        print(f"exit {code}: {[row for row in shown.splitlines() if not row.startswith('step ')][-3:]}")
        assert code == 2
        assert shown.count("\nerror: ") == 1
        assert "Traceback" not in shown
        (disk / "balloon").unlink()
        assert start([*line, "--data.loader", arguments.loader], work / "log").wait() == 0, (work / "log").read_text()
        assert without_times(disk / "run")[-1]["kind"] == "end"
        print("with room again the same command went on to the end")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


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
    slope, level = np.polyfit(seconds / 3600, memory, 1)
    blocks = [np.mean(part) for part in np.array_split(memory - slope * seconds / 3600 - level, 8)]
    noise = np.std(blocks, ddof=1) / np.sqrt(8) / (np.ptp(seconds) / 3600) * np.sqrt(12)  # neighbours are alike
    print(
        f"{arguments.loader}: {arguments.minutes} min, memory {memory[0]:.0f} → {memory[-1]:.0f} MiB "
        f"(slope {slope:.1f} ± {noise:.1f} MiB/h), open files {files.min():.0f} to {files.max():.0f}"
    )


CHECKS = {
    "kill": kill,
    "store": store,
    "million": million,
    "worker": worker,
    "rank": rank,
    "fuzz": fuzz,
    "odd": odd,
    "lying": lying,
    "full": full,
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--loader", choices=["dali", "torch"], default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        CHECKS[arguments.check](Path(work), arguments)


if __name__ == "__main__":
    main()
