"""Wrong command lines and damaged run folders by the hundred: each must end in a run or in one line and exit 2.

python tests/mistakes.py commands --count 1000    # over train, evaluate, embed, export, report and check_images
python tests/mistakes.py folders --count 300

PyTorch is imported once and a child is forked for each case. Seeded: the same count and seed make the same cases.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before the imports: no thread may exist when a child is forked

# ruff: noqa: E402
import numpy as np
import timm  # noqa: F401 - as three more below: else each child would import them
import torch
import torch.utils.tensorboard
import torchvision  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file

import reco_fast.training.loop  # noqa: F401
from reco_fast import check_images, embed, evaluate, export, train
from reco_fast.profiling import report
from reco_fast.run import checkpoint
from reco_fast.settings.config import Config

CPU_SECONDS = 10.0  # that a case may take
NOISE = re.compile(r"nvtiff|Warning|warn", re.IGNORECASE)  # of libraries, on stderr
COMMANDS: dict[str, Callable[[], object]] = {
    "train": train.main,
    "evaluate": evaluate.main,
    "embed": embed.main,
    "export": export.main,
    "report": report.main,
    "check_images": check_images.main,
}
TINY = {
    "--model.arch": "timm/test_resnet",
    "--model.stem": "standard",
    "--model.bank-size": "32",
    "--model.projection-dim": "16",
    "--model.key-norm": "batch",
    "--train.batch-size": "16",
    "--train.device": "cpu",
    "--train.max-steps": "1",
    "--train.epochs": "2",
    "--data.image-size": "32",
    "--data.loader": "torch",
    "--data.workers": "1",
}
TEXTS = ["", " ", "x", "-1", "0", "1", "2", "17", "1.5", "1e400", "nan", "inf", "-inf", "None", "True", "null", "--"]
TEXTS += ["0x10", "1_000", "１６", "9" * 30, "9" * 5000, "a" * 5000, "{}", "%s", "$(id)", "`id`", "<script>", "ü猫"]
TEXTS += ["a\nb", "\x1b[31mred", "../..", "/", "/dev/null", "/dev/zero", "/etc/passwd", "-x", "--train.epochs", "@file"]
ARCHITECTURES = ["resnet", "timm/", "/", "torchvision/", "a/b/c", "timm/nope", "squeezenet1_0", "mobilenet_v3_small"]
ARCHITECTURES += ["timm/test_convnext", "timm/test_vit", "timm/test_resnet", "list_models", "get_model", "__init__"]


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str
    seconds: float  # of CPU


def in_a_child(main: Callable[[], object], arguments: list[str], place: Path) -> Outcome:
    """Call `main` with these arguments in a forked process whose current folder is `place`."""
    place.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(place)
            for number, name in ((1, ".stdout"), (2, ".stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", errors="strict"), os.fdopen(2, "w", errors="backslashreplace")
            sys.argv = ["command", *arguments]
            code = 1
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60 * CPU_SECONDS  # the machine may have other work
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            break
        time.sleep(0.005)
    stdout, stderr = ((place / name).read_text("utf-8", errors="backslashreplace") for name in (".stdout", ".stderr"))
    return Outcome(os.waitstatus_to_exitcode(status), stdout, stderr, used.ru_utime + used.ru_stime)


def complaint(outcome: Outcome) -> str | None:
    """What is wrong with an outcome; None where it is a run or one line and exit 2."""
    if outcome.code not in (0, 2):
        return f"exit {outcome.code}"
    if outcome.seconds > CPU_SECONDS:
        return f"{outcome.seconds:.1f} s"
    if "Traceback" in outcome.stdout + outcome.stderr:
        return "a traceback"
    lines = [line for line in outcome.stderr.split("\n") if line and not NOISE.search(line)]
    if outcome.code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return f"{len(lines)} lines on stderr"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", outcome.stdout + outcome.stderr):
        return "a control character reached the terminal"
    return None


def write_images(folder: Path) -> Path:
    """24 images in two classes, and a bad one with a name for a terminal."""
    rng = np.random.default_rng(0)
    for index in range(24):
        (folder / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(128 * (index % 2), 128 + 127 * (index % 2), size=(34, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{index % 2}" / f"{index}.jpg")
    (folder / "class0" / "bad\x1b[31m\n%s{}<script>.jpg").write_text("text")
    return folder


def make_run(work: Path) -> Path:
    """A run of one step with a profile, to evaluate, embed, export and report."""
    images = write_images(work / "images")
    options = {**TINY, "--data.path": str(images), "--data.val-path": str(images), "--run.dir": str(work / "run")}
    options |= {"--profile.wait": "0", "--profile.warmup": "0", "--profile.active": "1", "--run.log-every": "1"}
    options |= {"--train.max-steps": "2"}
    line = ["cifar10", *(part for pair in options.items() for part in pair), "--profile.enabled"]
    outcome = in_a_child(train.main, line, work / "first")
    assert outcome.code == 0, outcome
    return work / "run"


def command_line(rng: random.Random, images: Path, run: Path, place: Path) -> tuple[str, list[str]]:
    """A command that would run, with one to four mistakes or changes."""
    command = rng.choices(list(COMMANDS), weights=(6, 1, 1, 1, 1, 1))[0]
    options: dict[str, str] = {"--data.path": str(images), "--data.loader": rng.choice(("torch", "torch", "dali"))}
    words: list[str] = [str(run)]
    fields = {"--which": str, "--device": str}
    if command == "train":
        words = [rng.choice(("cifar10", "quickstart", "imagenet100"))] if rng.random() < 0.8 else []
        options = {**TINY, **options, "--run.dir": str(place / "run")}
        fields = train_fields()
    elif command == "evaluate":
        options |= {"--data.val-path": str(images)}
    elif command == "embed":
        options |= {"--output": str(place / "out.npz"), "--batch-size": "16"}
    elif command == "export":
        options = {"--output": str(place / "out.safetensors"), "--format": "safetensors"}
    elif command == "report":
        options = {}
    else:
        words, options = [str(images)], {"--output": str(place / "m"), "--loader": "torch", "--workers": "1"}
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(12)
        if kind < 8:
            flag = rng.choice([*options, *fields] or ["--run"])
            options[flag] = value(rng, flag, fields.get(flag, str))
        elif kind == 8 and options:
            options[typo(rng, rng.choice(list(options)))] = rng.choice(TEXTS)
        elif kind == 9 and options:
            del options[rng.choice(list(options))]
        elif kind == 10:
            words.insert(rng.randint(0, len(words)), rng.choice(TEXTS))
        elif kind == 11 and words:
            words[rng.randrange(len(words))] = rng.choice(TEXTS)
    if command == "train":
        options.setdefault("--data.path", str(images))  # else it makes its own, for a while
    line = words + [p for f, v in options.items() for p in ([f"{f}={v}"] if rng.random() < 0.2 else [f, v])]
    if rng.random() < 0.05 and line:
        del line[rng.randrange(len(line))]
    if rng.random() < 0.02:
        rng.shuffle(line)
    return command, [part for part in line if "\0" not in part]


def train_fields() -> dict[str, Any]:
    found = {}
    for section in dataclasses.fields(Config):
        for field, kind in typing.get_type_hints(section.type).items():
            found[f"--{section.name}.{field}".replace("_", "-")] = kind
    return found


def value(rng: random.Random, flag: str, kind: Any) -> str:
    """Of the right type three times in four."""
    if flag == "--model.arch" and rng.random() < 0.7:
        return rng.choice(ARCHITECTURES)
    if rng.random() < 0.25:
        return rng.choice(TEXTS)
    choices = [str(c) for c in typing.get_args(kind) if not isinstance(c, type)]
    return rng.choice(choices or ["0", "1", "2", "3", "15", "16", "24", "31", "32", "33", "1000000", "0.5", "1e-9"])


def typo(rng: random.Random, flag: str) -> str:
    place = rng.randrange(2, len(flag))
    return rng.choice((flag[:place] + flag[place + 1 :], flag[:place] + "é" + flag[place:], flag.upper(), flag[1:]))


JSON_VALUES = [None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\0", "/dev/zero"]
JSON_VALUES += ["\x1b[31mred\n", "<script>", [], {}, [1], {"a": 1}, "9" * 100]


def damage(rng: random.Random, run: Path) -> str:
    """Change one thing in a run folder; returns what."""
    kind = rng.choice(
        ("bytes", "bytes", "bytes", "kind", "kind", "json", "json", "json", "header", "header", "tensors")
    )
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    files = ["config.json", "metrics.jsonl", "environment.json", "bad_images.txt", str(newest.relative_to(run))]
    if kind == "bytes":
        path = run / rng.choice(files)
        data = bytearray(path.read_bytes())
        how = rng.randrange(8)
        if how == 0:
            data = data[: rng.randrange(len(data))]
        elif how == 1:
            data = bytearray()
        elif how == 2:
            data = bytearray(rng.randbytes(300))
        elif how == 3:
            data = bytearray((2**60).to_bytes(8, "little")) + data[8:]
        elif how == 4:
            data = bytearray(
                rng.choice((b"[" * 100_000, b"9" * 10_000, b'{"a":' * 50_000, b"cos\nsystem\n(S'id'\ntR."))
            )
        else:
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data) if how > 5 else min(len(data), 900))] = rng.randrange(256)
        path.write_bytes(data)
        return f"bytes of {path.name} ({how})"
    if kind == "kind":
        path = run / rng.choice([*files, "checkpoints", "tensorboard", ".lock", "quarantine.json", "decoding"])
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        how = rng.choice(("missing", "folder", "pipe", "link", "dangling", "device", "text"))
        if how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how in ("link", "dangling", "device"):
            path.symlink_to({"link": "/etc/passwd", "dangling": "/nowhere/at/all", "device": "/dev/zero"}[how])
        elif how == "text":
            path.write_text("text\n")
        return f"{path.name} is {how}"
    if kind == "json":
        path = run / rng.choice(files[:3])
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [json.loads(line) for line in lines]
        what = alter(rng, rng.choice(values))
        path.write_text("\n".join(json.dumps(value) for value in values) + "\n")
        return f"{path.name}: {what}"
    tensors = load_file(newest)
    header = checkpoint.read(newest)[1]
    if kind == "header":
        what = alter(rng, header)
    else:
        name = rng.choice(list(tensors))
        what = rng.choice(("missing", "nan", "other type", "other shape", "extra"))
        if what == "missing":
            del tensors[name]
        elif what == "nan":
            tensors[name] = torch.full_like(tensors[name].float(), float("nan")).to(tensors[name].dtype)
        elif what == "other type":
            tensors[name] = tensors[name].to(torch.float16)
        elif what == "other shape":
            tensors[name] = torch.cat([tensors[name].reshape(-1)] * 2)
        else:
            tensors["\x1b[31mextra\n"] = torch.zeros(3)
        header["crc32"] = checkpoint._crc32(tensors)
        what = f"{name} {what}"
    save_file(tensors, newest, metadata={"reco_fast": json.dumps(header)})
    return f"{kind}: {what}"


def alter(rng: random.Random, values: Any) -> str:
    """Change, drop or add something at some depth of a JSON value."""
    place, path = values, ""
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path += f".{key}"
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        how = rng.randrange(8)
        if how == 0:
            del place[key]
        elif how == 1 and isinstance(place, dict):
            place[rng.choice(TEXTS)] = rng.choice(JSON_VALUES)
        else:
            place[key] = rng.choice(JSON_VALUES)
        return f"{path} ({how}) {place.get(key) if isinstance(place, dict) else ''!r}"[:100]


def folder_case(rng: random.Random, images: Path, run: Path, place: Path) -> tuple[str, list[str], str]:
    """A copy of `run` with one thing damaged, and a command on it."""
    copy = place / "run"
    shutil.copytree(run, copy)
    what = damage(rng, copy)
    command = rng.choice(("train", "train", "train", "evaluate", "embed", "export", "report"))
    data = ["--data.path", str(images), "--data.loader", "torch", "--data.workers", "1"]
    line = [str(copy)]
    if command == "train":
        options = {**TINY, "--data.path": str(images), "--data.val-path": str(images), "--run.dir": str(copy)}
        options |= {"--train.max-steps": "3", "--run.log-every": "1"}
        line = ["cifar10", *(part for pair in options.items() for part in pair)]
    elif command == "evaluate":
        line += [*data, "--data.val-path", str(images)]
    elif command == "embed":
        line += [*data, "--output", str(place / "out.npz")]
    elif command == "export":
        line += ["--format", rng.choice(("safetensors", "timm")), "--output", str(place / "out.safetensors")]
    return command, line, what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["commands", "folders"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bad, refused, slowest = 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = make_run(work)
        for number in range(arguments.first, arguments.first + arguments.count):
            rng = random.Random(f"{arguments.check} {arguments.seed} {number}")
            place = work / "case"
            if arguments.check == "commands":
                shutil.copytree(run, place / "run of it")
                command, line = command_line(rng, work / "images", place / "run of it", place)
                what = ""
            else:
                command, line, what = folder_case(rng, work / "images", run, place)
            outcome = in_a_child(COMMANDS[command], line, place / "here")
            refused += outcome.code == 2
            slowest = max(slowest, outcome.seconds)
            if wrong := complaint(outcome):
                bad += 1
                shown = " ".join(part[:80] for part in line)
                print(f"{number}: {wrong}: {command} {shown!r} {what}\n{outcome.stderr[-1500:]}\n", flush=True)
            shutil.rmtree(place)
            if number % 50 == 49:
                print(f"up to {number}: {refused} refused, {bad} wrong", flush=True)
    count = arguments.count
    print(
        f"{arguments.check}: {count} cases, {refused} refused in one line, {count - refused - bad} ran, {bad} wrong; "
        f"slowest {slowest:.1f} s of CPU"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
