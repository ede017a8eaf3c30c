"""Runs that take seconds: the flags of a small model on a CPU, and folders of images to train on."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from odd_images import picture
from PIL import Image

__all__ = [
    "PROFILED_STEPS",
    "SMALL",
    "metrics",
    "without_times",
    "write_classes",
    "write_holes",
    "write_pictures",
    "write_tar",
]

SMALL = (
    "--model.arch timm/test_resnet --model.stem standard --model.bank-size 32 --model.projection-dim 16 "
    "--model.key-norm batch --loss.ramp 0 --loss.keys strong --loss.no-mix-within --loss.mix-share 1 "
    "--loss.global-weight 1 "
    "--train.batch-size 16 --train.device cpu"
).split()
TIMES = {"images_per_second", "data_wait_fraction", "seconds", "step_ms_p50", "step_ms_p95"}
PROFILED_STEPS = 3  # of the run that the fixture `profiled` makes


def write_classes(
    folder: Path, count: int, names: tuple[str, ...] = ("dark", "light"), suffix: str = ".jpg", seed: int = 0
) -> Path:
    """Makes `folder` with `count` noisy images of 40 × 36 pixels in a sub-folder for each of `names`, ever lighter."""
    rng, width = np.random.default_rng(seed), 256 // len(names)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(width * number, width * (number + 1), size=(36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}{suffix}")
    return folder


def write_pictures(folder: Path, count: int, suffix: str = ".jpg") -> Path:
    """Makes `folder` with `count` smooth pictures of 60 × 40 pixels, no two alike, named 00.jpg and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(seed=number).save(folder / f"{number:02d}{suffix}")
    return folder


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """Makes a shard, and its folder, of these members in this order; as pairs, there may be several of one name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_holes(folder: Path, shards: int, images: int, size: int = 100_000) -> Path:
    """Makes `folder` with `shards` shards of so many images each, all headers and no pixels: what takes room on disk
    are the headers."""
    folder.mkdir(parents=True, exist_ok=True)
    member = tarfile.TarInfo()
    member.size = size
    for shard in range(shards):
        with open(folder / f"train-{shard:06d}.tar", "wb", buffering=0) as file:
            for place in range(images):
                member.name = f"{shard * images + place:09d}.jpg"
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                file.seek(-(-size // 512) * 512, os.SEEK_CUR)
            file.truncate(file.tell() + 1024)
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, Any]]:
    """Likewise, without what no two runs agree on."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(run)]
