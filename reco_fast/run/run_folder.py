"""The folder of a run: which one, and what rank 0 writes into it before step 1."""

import dataclasses
import datetime
import fcntl
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reco_fast import __version__, distributed
from reco_fast.errors import ConfigError
from reco_fast.method.model import build_encoder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.run import checkpoint
from reco_fast.run.files import parse_json, read_json, read_text, write_json
from reco_fast.run.places import located, read_environment, recorded_places, same_place
from reco_fast.settings.config import Config

PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
# What may differ between a run and its continuation: it changes where and how fast, not what is learned. Whether the
# images are the same is not asked of their path: `same_images` looks at them.
MAY_CHANGE = {"run", "profile", "eval", "data.workers", "data.manifest", "data.path", "data.val_path", "data.generated"}
MAY_CHANGE |= {"data.cache", "data.cache_gb"}
MAY_CHANGE |= {"train.max_steps", "train.device", "train.compile", "train.cuda_graph", "train.checkpoint_activations"}


def choose(config: Config, preset: str, source: ImageSource | None = None) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint from which it goes on (None: from the start). A folder that is not named in
    `config` must have begun with the images of `source`.

    Raises ConfigError where the folder holds another run, or a run although none may be continued.
    """
    if config.run.dir is not None:
        folder = config.run.dir
        if (folder / "config.json").exists():
            if config.run.resume == "never":
                raise ConfigError(f"--run.dir: expected a folder without a run (--run.resume never), got {folder}")
            difference = first_difference(config, read_config(folder))
            if difference:
                raise ConfigError(f"--run.dir: {folder} holds a run with other settings: {difference}")
        return folder, checkpoint.latest(folder / "checkpoints")
    number = 1
    while True:
        folder = Path("runs") / (preset if number == 1 else f"{preset}-{number}")
        if not (folder / "config.json").exists():
            return folder, None
        before = read_config(folder)
        if config.run.resume == "auto" and first_difference(config, before) is None and not finished(folder):
            # With other paths it may be a run beside this one, which two may have been before.
            same_paths = (config.data.path, config.data.val_path) == (before.data.path, before.data.val_path)
            if same_paths or (of_same_images(folder, config, source) and not in_use(folder)):
                return folder, checkpoint.latest(folder / "checkpoints")
        number += 1


def in_use(folder: Path) -> bool:
    """Whether a run is writing to the folder."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: all ranks ask
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it cannot be read
        pass
    return False


@contextmanager
def claimed(folder: Path, config: Config, images: str | None = None) -> Iterator[None]:
    """Make the folder, keep other runs out of it, and write config.json and environment.json; `images` is what
    `same_images` gave.

    Raises ConfigError where it cannot be written or another run is at work in it.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        check_kinds(folder)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 - held for as long as the run lasts
    except OSError as error:
        raise _unwritable(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--run.dir: expected a folder that no other run is writing to, got {folder}") from None
        # The lock lasts until the last copy of its file is closed, and after a kill -9 a loader's workers live on for
        # seconds.
        os.register_at_fork(after_in_child=lock.close)
        try:
            write_json(folder / "environment.json", environment() | recorded_places(folder) | {"images": images})
            write_json(folder / "config.json", config.to_json())
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield


def check_kinds(folder: Path) -> None:
    """Raises ConfigError where a run folder holds anything but files and folders: what is written through a symbolic
    link would land elsewhere, and a pipe would be waited for. (The folder itself may be a link.)"""
    for path in (*folder.iterdir(), *(folder / "checkpoints").glob("*"), *(folder / "tensorboard").glob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path}: expected files and folders alone in the folder of a run, got a link or a pipe")


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--run.dir: expected a folder that can be written, got {folder} ({error.strerror})")


def read_config(folder: Path) -> Config:
    """The configuration of a run. Raises ConfigError where the folder holds none or a damaged one."""
    path = folder / "config.json"
    values = read_json(path)
    try:
        return Config.from_json(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_run(folder: Path, which: str) -> tuple[Config, nn.Module]:
    """Configuration and encoder of a run's newest checkpoint. Raises ConfigError where there is none."""
    config = read_config(folder)
    path = checkpoint.latest(folder / "checkpoints")
    if path is None:
        raise ConfigError(f"{folder}: expected a run with a checkpoint, got none in {folder / 'checkpoints'}")
    encoder = build_encoder(config.model, config.data.image_size)
    try:
        checkpoint.load_encoder(path, encoder, which)
    except ConfigError:
        if config.model.stem != "auto":
            raise
        # Until 28 November 2026 that left patches as they were.
        encoder = build_encoder(dataclasses.replace(config.model, stem="standard"), config.data.image_size)
        checkpoint.load_encoder(path, encoder, which)
    return config, encoder


def same_images(folder: Path, config: Config, source: ImageSource) -> str:
    """The fingerprint of `source`, which must be of the images that the run in `folder` began with, wherever they lie:
    places in the training stream mean something only for the same files in the same order. Raises ConfigError."""
    if not of_same_images(folder, config, source):
        seen = source.passed_over.line()
        raise ConfigError(
            f"--data.path: expected the images that this run began with, {config.data.path} holds others now"
            f"{seen and f' ({seen})'}"
        )
    return source.fingerprint()


def of_same_images(folder: Path, config: Config, source: ImageSource | None) -> bool:
    """Whether a run in `folder` began with the images of `source`. Before its first checkpoint nothing depends on them,
    so what lies at the same place will do."""
    if not (folder / "config.json").exists():
        return True
    learned = checkpoint.fingerprint(folder / "checkpoints")
    if learned is not None:
        return source is not None and source.fingerprint() == learned
    before = located(read_config(folder), folder).data
    if same_place(config.data.path, before.path):
        return True
    began = read_environment(folder).get("images")
    return source is not None and source.fingerprint() == began


def same_start(step: int, device: torch.device) -> None:
    """All ranks must have found the same checkpoint, or none."""
    steps = sorted(set(distributed.all_gather(torch.tensor([step], device=device)).tolist()))
    if len(steps) > 1:
        found = " and ".join(map(str, steps))
        raise ConfigError(f"--run.dir: expected a folder that all machines share, ranks found runs at step {found}")


def finished(folder: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl if it says that the run ended."""
    path = folder / "metrics.jsonl"
    try:
        last = parse_json(read_text(path).splitlines()[-1], path)
    except (ConfigError, IndexError):  # none there, cut short by a kill, empty
        return None
    return last if isinstance(last, dict) and last.get("kind") == "end" else None


def first_difference(config: Config, other: Config) -> str | None:
    """The first setting that two runs may not differ in, as text."""
    for section in dataclasses.fields(Config):
        mine, theirs = getattr(config, section.name), getattr(other, section.name)
        for field in dataclasses.fields(mine):
            name = f"{section.name}.{field.name}"
            if section.name in MAY_CHANGE or name in MAY_CHANGE:
                continue
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if a != b:
                return f"--{name.replace('_', '-')} is {b} there and {a} now"
    return None


def environment() -> dict[str, Any]:
    """Versions, machine and command, so that a figure can be traced to what made it."""
    packages: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "reco_fast": __version__,
        "git_commit": os.environ.get("RECO_FAST_COMMIT")  # where a copy of the checkout has no history
        or _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "packages": packages,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "ranks": distributed.world_size(),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
