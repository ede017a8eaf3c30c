"""The built-in data set: pictures of one motif, scattered, whose shape is the class. Nothing needs to be downloaded.

Crops show at least one motif, flips and small rotations leave it what it is, and colours and background are drawn the
same way for every class, so that only shape tells the classes apart.
"""

import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.caches import cache_folder

VERSION = 1  # of the drawing code: change it and every cache is written anew
SIZE = 40  # pixels a side
TRAIN_PER_CLASS, VAL_PER_CLASS = 420, 84
SEED = 2211
JPEG_QUALITY = 92

Plane = NDArray[np.floating[Any]]  # all of them float32


@dataclass(frozen=True)
class Difficulty:
    """What makes the classes hard to tell apart. Lengths in pixels, angles in radians, colours in 0..1."""

    grid: int = 3  # motifs a row, and rows
    radius: tuple[float, float] = (4.5, 6.5)
    stray: float = 2.5  # of a motif from its place in the grid
    shift: float = 6.6  # of the whole grid
    rotation: float = 0.3
    hues: int = 6  # few colours, so that colour alone does not identify a picture
    contrast: float = 0.3  # least difference in brightness between motif and ground
    blobs: int = 5  # soft blots of other colours behind the motifs
    blob_strength: float = 0.35
    strokes: int = 3  # thin straight lines across the picture
    shading: float = 0.25  # brightness from one side to the other
    noise: float = 0.05  # standard deviation


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _norm(u: Plane, v: Plane) -> Plane:
    return np.sqrt(u * u + v * v)


# Signed distances to the outline, roughly, negative inside; the motif fills -1 … 1 in both directions, v points down.
MOTIFS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "bars": lambda u, v: _box(u, np.abs(v) - 0.55, 0.95, 0.25),
    "checker": lambda u, v: np.minimum(_box(u - 0.46, v - 0.46, 0.44, 0.44), _box(u + 0.46, v + 0.46, 0.44, 0.44)),
    "chevron": lambda u, v: np.maximum(np.abs(np.abs(u) + v - 0.45) * 0.7 - 0.28, np.abs(u) - 0.9),
    "crescent": lambda u, v: np.maximum(_norm(u, v) - 0.95, 0.75 - _norm(u - 0.5, v)),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.27, 0.95), _box(u, v, 0.95, 0.27)),
    "disc": lambda u, v: _norm(u, v) - 0.85,
    "dots": lambda u, v: _norm(np.abs(u) - 0.58, np.abs(v) - 0.58) - 0.36,
    "frame": lambda u, v: np.abs(_box(u, v, 0.66, 0.66)) - 0.2,
    "ring": lambda u, v: np.abs(_norm(u, v) - 0.7) - 0.22,
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "star": lambda u, v: (np.sqrt(np.abs(u)) + np.sqrt(np.abs(v)) - 1.1) * 0.7,
    "triangle": lambda u, v: np.maximum(np.abs(u) * 0.87 - v * 0.5, v) - 0.5,
}


def generate(cache_dir: Path | None = None) -> tuple[Path, Path]:
    """The folders of training and validation images, by class; written on the first call, which takes seconds.

    Args:
        cache_dir: where to keep them; None for `cache_folder()`.

    Raises:
        DataError: the cache folder cannot be written.
    """
    difficulty = Difficulty()
    name = f"generated-v{VERSION}-{zlib.crc32(repr(difficulty).encode()):08x}"
    folder = (cache_dir or cache_folder(name)) / name
    if not folder.is_dir():
        try:
            _write_once(folder, difficulty)
        except OSError as error:
            raise DataError(f"{folder}: expected to write the generated images here, {error.strerror}") from None
    return folder / "train", folder / "val"


def _write_once(folder: Path, difficulty: Difficulty) -> None:
    """Write to a folder beside it and rename: whoever sees `folder` sees all of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # NumPy and Pillow let go of the interpreter
            list(pool.map(lambda name: _write_class(temporary, name, difficulty), MOTIFS))
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_class(folder: Path, name: str, difficulty: Difficulty) -> None:
    for split, first, count in (("train", 0, TRAIN_PER_CLASS), ("val", TRAIN_PER_CLASS, VAL_PER_CLASS)):
        target = folder / split / name
        target.mkdir(parents=True)
        for start in range(first, first + count, 60):  # few enough to stay in the processor's cache
            indices = range(start, min(start + 60, first + count))
            images = draw_picture(list(MOTIFS).index(name), indices, SEED, difficulty)
            for index, image in zip(indices, images, strict=True):
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "JPEG", quality=JPEG_QUALITY)
                (target / f"{index - first:04d}.jpg").write_bytes(encoded.getbuffer())


def draw_picture(
    class_number: int, indices: range, seed: int, difficulty: Difficulty | None = None
) -> NDArray[np.uint8]:
    """Pictures [n, SIZE, SIZE, 3] of a class. Each depends on (class_number, index, seed) and the difficulty alone."""
    d = difficulty or Difficulty()
    generators = [np.random.default_rng([seed, class_number, index]) for index in indices]

    def uniform(low: float, high: float, *shape: int) -> Plane:
        """[n, *shape, 1, 1], ready to be broadcast over pixels."""
        drawn = np.stack([generator.random(shape, np.float32) for generator in generators])
        return np.asarray(low + (high - low) * drawn, np.float32)[..., None, None]

    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    ground, ink, other = _colours(uniform(0, 1, 12)[..., 0, 0], d)
    picture = np.broadcast_to(ground[:, None, None], (len(indices), SIZE, SIZE, 3)).copy()

    def paint(coverage: Plane, colour: Plane) -> None:
        """`coverage` [n, SIZE, SIZE] of `colour` [n, 3]."""
        picture[:] += coverage[..., None] * (colour[:, None, None] - picture)

    for blob in range(d.blobs):
        centre, radius = uniform(0, SIZE, 2), uniform(3, 10)
        distance = _norm(x - centre[:, 0], y - centre[:, 1]) / radius
        paint(d.blob_strength * np.clip(1.5 - distance, 0, 1), other[:, blob % other.shape[1]])
    for stroke in range(d.strokes):
        angle, through = uniform(0, np.pi), uniform(0, SIZE, 2)
        distance = np.abs((x - through[:, 0]) * np.sin(angle) - (y - through[:, 1]) * np.cos(angle))
        paint(0.7 * np.clip(1.2 - distance, 0, 1), other[:, stroke % other.shape[1]])

    paint(_scattered(list(MOTIFS.values())[class_number], uniform, len(indices), d), ink)

    tilt = uniform(-d.shading, d.shading, 2)
    picture *= (1 + tilt[:, 0] * (x / SIZE - 0.5) + tilt[:, 1] * (y / SIZE - 0.5))[..., None]
    noise = np.stack([generator.standard_normal((SIZE, SIZE, 3), np.float32) for generator in generators])
    return np.rint(255 * np.clip(picture + d.noise * noise, 0, 1)).astype(np.uint8)


def _scattered(motif: Callable[[Plane, Plane], Plane], uniform: Callable[..., Plane], n: int, d: Difficulty) -> Plane:
    """How much of each pixel the motifs cover, [n, SIZE, SIZE]: a grid that was shifted, and each motif from its
    place, turned and scaled. Every motif is drawn in a small patch of a canvas with a margin."""
    reach = int(1.5 * d.radius[1]) + 2
    margin = 2 * reach + SIZE // d.grid
    canvas = np.zeros((n, SIZE + 2 * margin, SIZE + 2 * margin), np.float32)
    picture = np.arange(n)[:, None, None]
    steps = np.arange(-reach, reach + 1)
    pitch = SIZE / d.grid
    shift = uniform(-d.shift, d.shift, 2)
    for place in np.ndindex(d.grid + 2, d.grid + 2):  # one more on each side, for the shift to bring in
        stray, angle, radius = uniform(-d.stray, d.stray, 2), uniform(-d.rotation, d.rotation), uniform(*d.radius)
        centre = (np.array(place, np.float32)[:, None, None] - 0.5) * pitch + shift + stray
        nearest = np.rint(centre).astype(np.int64)
        dy, dx = steps[:, None] - (centre - nearest)[:, 0], steps - (centre - nearest)[:, 1]
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        covered = np.clip(0.5 - radius * motif(cos * dx + sin * dy, cos * dy - sin * dx), 0, 1)
        patch = picture, nearest[:, 0] + steps[:, None] + margin, nearest[:, 1] + steps + margin
        canvas[patch] = np.maximum(canvas[patch], covered)
    return canvas[:, margin : margin + SIZE, margin : margin + SIZE]


def _colours(uniform: Plane, d: Difficulty) -> tuple[Plane, Plane, Plane]:
    """Ground [n, 3], motif [n, 3] and clutter [n, 2, 3] colours from [n, 12] numbers in [0, 1). Motif and ground
    differ in brightness, either way round; the clutter's brightness is around the ground's."""
    hue = np.floor(uniform[:, :4] * d.hues) / d.hues
    saturation = 0.3 + 0.5 * uniform[:, 4:8]
    low = 0.15 + (0.85 - 0.15 - d.contrast) * uniform[:, 8]
    high = low + d.contrast + (0.85 - low - d.contrast) * uniform[:, 9]
    dark_ground = uniform[:, 10] < 0.5
    ground, ink = np.where(dark_ground, low, high), np.where(dark_ground, high, low)
    brightness = np.stack([ground, ink, ground, 0.6 * ground + 0.4 * ink], axis=1)
    phase = hue[..., None] + np.array([0, 1 / 3, 2 / 3], np.float32)
    wheel = np.clip(np.abs((phase % 1) * 6 - 3) - 1, 0, 1)  # pure hues, [n, 4, 3]
    tint = saturation[..., None] * (wheel - wheel.mean(axis=-1, keepdims=True))
    colours = np.clip(brightness[..., None] * (1 + tint), 0, 1).astype(np.float32)
    return colours[:, 0], colours[:, 1], colours[:, 2:]
