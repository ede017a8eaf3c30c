"""Sets of images that tests read: made of photographs that packages ship, and larger variety where it lies at hand."""

import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

__all__ = ["CLASSES", "SETS", "and_shared", "make_cifar", "make_photographs"]

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = ((500, 375), (375, 500), (500, 333), (480, 360), (500, 400))


def shipped_photographs() -> list[Image.Image]:
    """A temple and a flower of 640 × 427 pixels, from scikit-learn, and a portrait of 512 × 600, from Matplotlib."""
    from matplotlib.cbook import get_sample_data  # here, because conftest.py imports this file in every run of pytest
    from sklearn.datasets import load_sample_image

    portrait = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return [*(Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")), portrait]


def part(photograph: Image.Image, size: tuple[int, int], smallest: float, rng: random.Random) -> Image.Image:
    """A crop scaled to `size`, half of them mirrored; `smallest`: its side as a share of the largest that fits.

    Some colour is taken out: the three are more colourful than photographs on the web are in the mean, and by as much
    more than of these the loaders' hues differ.
    """
    scale = min(photograph.width / size[0], photograph.height / size[1]) * rng.uniform(smallest, 1)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    cut = photograph.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    cut = ImageEnhance.Color(cut).enhance(rng.uniform(0.2, 1))
    return ImageOps.mirror(cut) if rng.random() < 0.5 else cut


def make_photographs(folder: Path) -> Path:
    """64 JPEGs of about 500 × 375 pixels, no two alike, without classes; the same ones each time."""
    rng, photographs = random.Random(0), shipped_photographs()
    for number in range(64):
        made = part(photographs[number % len(photographs)], rng.choice(SIZES), 0.4, rng)
        subsampling = rng.choice(("4:4:4", "4:2:0"))  # what photographs on the web mostly have
        made.save(folder / f"{number:02d}.JPEG", quality=rng.randint(75, 96), subsampling=subsampling)
    return folder


def make_cifar(folder: Path) -> Path:
    """300 JPEGs of 32 × 32 pixels, as CIFAR-10's: 30 in a folder for each of ten classes, which are names alone."""
    rng, photographs = random.Random(1), shipped_photographs()
    for label in CLASSES:
        (folder / label).mkdir()
        for number in range(30):
            made = part(photographs[number % len(photographs)], (32, 32), 0.15, rng)
            made.save(folder / label / f"{number:04d}.jpg")
    return folder


def shared_folder() -> Path:
    """May hold more, as archives or unpacked: `photographs/*.JPEG` and `cifar10/train/CLASS/*.jpg`."""
    return Path(os.environ.get("RECO_FAST_TEST_DATA") or ROOT.parent / "shared" / "data")


def shared_places(name: str) -> tuple[Path, Path]:
    """The archive, and what it is unpacked."""
    places = {
        "photographs": ("imagenet-sample-jpeg.tar", "photographs"),
        "cifar": ("cifar10-jpeg.tar.gz", "cifar10/train"),
    }
    archive, unpacked = places[name]
    return shared_folder() / archive, shared_folder() / unpacked


def and_shared(name: str) -> list[str]:
    """The made set, and beside it the shared one where there is one: what a test is parametrised by. So where there is
    none, nothing is left out that could be run."""
    archive, unpacked = shared_places(name)
    return [name, f"shared {name}"] if archive.is_file() or unpacked.is_dir() else [name]


def copy_shared_photographs(folder: Path) -> Path:
    """The first 64."""
    archive, unpacked = shared_places("photographs")
    if archive.is_file():
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.isfile()]
            tar.extractall(folder, members[:64], filter="data")
    else:
        for path in sorted(unpacked.glob("*.JPEG"))[:64]:
            shutil.copy(path, folder)
    return folder


def copy_shared_cifar(folder: Path) -> Path:
    """The first 30 of each class."""
    archive, unpacked = shared_places("cifar")
    if archive.is_file():
        with tarfile.open(archive) as tar:
            for member in tar:
                _, split, label, name = (3 * [""] + member.name.split("/"))[-4:]
                if member.isfile() and split == "train" and int(Path(name).stem) < 30:
                    (folder / label).mkdir(exist_ok=True)
                    content = tar.extractfile(member)
                    assert content is not None
                    (folder / label / name).write_bytes(content.read())
    else:
        for path in unpacked.glob("*/*.jpg"):
            if int(path.stem) < 30:
                (folder / path.parent.name).mkdir(exist_ok=True)
                shutil.copy(path, folder / path.parent.name)
    return folder


SETS: dict[str, Callable[[Path], Path]] = {
    "photographs": make_photographs,
    "cifar": make_cifar,
    "shared photographs": copy_shared_photographs,
    "shared cifar": copy_shared_cifar,
}
