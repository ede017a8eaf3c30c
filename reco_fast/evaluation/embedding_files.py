"""What `embed` writes: parts that survive an interruption, and the features as .npz, Parquet or a Projector folder."""

import hashlib
import importlib
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps

from reco_fast.errors import ConfigError
from reco_fast.pipelines.images import decode_image
from reco_fast.pipelines.sources.caches import cache_folder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.stores.where import is_url
from reco_fast.run import quarantine
from reco_fast.run.files import file_names, open_file, remove_file, whole_file, write_text
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import one_line

PROJECTOR_IMAGES = 5000  # TensorBoard's Projector becomes slow above
LABEL = "fingerprint.txt"  # of the work that parts are of
PART = re.compile(r"part-(\d+)-(\d+)\.npz")
THUMBNAIL = 48  # pixels a side; the sprite of 71 × 71 stays within the 8,192 that browsers take


class Embeddings(NamedTuple):
    """`features` [n, F] float32; `indices` [n] int64, places in the source, ascending; `bad`: name → reason."""

    features: NDArray[np.float32]
    indices: NDArray[np.int64]
    bad: dict[str, str]


class Part:
    """Results of consecutive batches, from batch `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.end = first
        self.images = 0
        self.features: list[NDArray[np.float32]] = []
        self.indices: list[NDArray[np.int64]] = []
        self.bad: dict[str, str] = {}

    def add(self, features: NDArray[np.float32], indices: NDArray[np.int64], bad: dict[str, str]) -> None:
        """One batch: `features` [m, F] of the images at `indices` [m], and those left out as name → reason."""
        self.features.append(features)
        self.indices.append(indices)
        self.bad |= bad
        self.end += 1
        self.images += len(indices) + len(bad)


class Parts:
    """Parts as files in a folder beside the output, at a path or a URL; those of other work than `fingerprint` says are
    removed.

    `steps` and `images`: how many batches and images are done. `folder`: a local one, for notes of what is decoded: the
    same one, or of a URL one in the cache. Raises ConfigError or DataError where the parts cannot be written.
    """

    def __init__(self, place: str, fingerprint: str) -> None:
        self._place = place
        key = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:40]
        self.folder = cache_folder("embed") / "embed" / key if is_url(place) else Path(place)
        self.steps = 0
        self.images = 0
        self._rows = 0
        self._names: list[str] = []
        if self._label() == fingerprint.encode():
            for name in file_names(place):
                if found := PART.fullmatch(name):
                    self._take(name, int(found[1]), int(found[2]))
        else:
            self.remove()
            with whole_file(f"{place}/{LABEL}") as label:
                label.write_text(fingerprint, encoding="utf-8")

    def _open(self, name: str) -> IO[bytes]:
        return open_file(f"{self._place}/{name}")

    def _label(self) -> bytes:
        if LABEL not in file_names(self._place):
            return b""
        with self._open(LABEL) as file:
            return file.read()

    def _take(self, name: str, first: int, end: int) -> None:
        """Go on after this part if it is whole and follows the last one."""
        if first != self.steps:
            return
        with self._open(name) as file:  # not in the block below: a store that lets nobody in has damaged nothing
            try:
                with np.load(file) as arrays:
                    rows, bad = len(arrays["indices"]), len(arrays["bad_names"])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                return
        self._note(name, end, rows, bad)

    def _note(self, name: str, end: int, rows: int, bad: int) -> None:
        self._names.append(name)
        self.steps = end
        self.images += rows + bad
        self._rows += rows

    def add(self, part: Part) -> None:
        if part.end == part.first:
            return
        name = f"part-{part.first:09d}-{part.end:09d}.npz"
        indices = np.concatenate(part.indices)
        with whole_file(f"{self._place}/{name}") as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                features=np.concatenate(part.features),
                indices=indices,
                bad_names=np.array(list(part.bad), dtype=np.str_),
                bad_reasons=np.array(list(part.bad.values()), dtype=np.str_),
            )
        self._note(name, part.end, len(indices), part.images - len(indices))

    def join(self, bad: dict[str, str]) -> Embeddings:
        """All parts as one; `bad` is what is already known to be unreadable."""
        indices, rows = np.empty(self._rows, np.int64), 0
        features: NDArray[np.float32] | None = None
        for name in self._names:  # once each: they may come from far
            with self._open(name) as file, np.load(file) as arrays:
                part = arrays["features"]
                if features is None:
                    features = np.empty((self._rows, part.shape[1]), np.float32)
                features[rows : rows + len(part)] = part
                indices[rows : rows + len(part)] = arrays["indices"]
                rows += len(part)
                bad = bad | dict(zip(arrays["bad_names"].tolist(), arrays["bad_reasons"].tolist(), strict=True))
        assert features is not None
        return Embeddings(features, indices, bad)

    def notes(self) -> list[Path]:
        """Of processes that died while they decoded."""
        return list((self.folder / quarantine.JOURNALS).glob("*/*/*"))

    def remove(self) -> None:
        """The folders and what was written into them."""
        for name in file_names(self._place):
            if name == LABEL or PART.fullmatch(name.removesuffix(".tmp")):
                remove_file(f"{self._place}/{name}")
        if self.folder.is_dir():
            (self.folder / quarantine.FILE).unlink(missing_ok=True)
            shutil.rmtree(self.folder / quarantine.JOURNALS, ignore_errors=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def write_npz(path: Path, found: Embeddings, source: ImageSource) -> None:
    arrays: dict[str, Any] = {"features": found.features, "paths": np.array(paths(found, source))}
    if source.labels is not None:
        arrays |= {"labels": source.labels[found.indices], "classes": np.array(source.classes)}
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def write_parquet(path: Path, found: Embeddings, source: ImageSource) -> None:
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    width = found.features.shape[1]
    columns = {
        "path": arrow.array([printable(name) for name in paths(found, source)]),
        "features": arrow.FixedSizeListArray.from_arrays(arrow.array(found.features.reshape(-1)), width),
    }
    if source.labels is not None:
        labels = source.labels[found.indices]
        columns |= {
            "label": arrow.array(labels),
            "class": arrow.array([printable(source.classes[n]) for n in labels.tolist()]),
        }
    parquet.write_table(arrow.table(columns), path)


def write_projector(folder: Path, found: Embeddings, source: ImageSource, *, workers: int) -> None:
    """What `tensorboard --logdir FOLDER` shows in its Projector tab, of evenly chosen images where there are many."""
    from torch.utils.tensorboard import SummaryWriter

    rows = np.linspace(0, len(found.features) - 1, min(len(found.features), PROJECTOR_IMAGES)).astype(np.int64)

    def thumbnail(index: int) -> NDArray[np.uint8]:
        return np.asarray(ImageOps.fit(decode_image(source.read(index), source.decoding), (THUMBNAIL, THUMBNAIL)))

    with ThreadPoolExecutor(workers) as pool:
        images = np.stack(list(pool.map(thumbnail, found.indices[rows].tolist())))
    names = [one_line(printable(source.names[index])) for index in found.indices[rows].tolist()]  # a TSV file
    metadata: list[Any] = names
    header = None
    if source.labels is not None:
        classes = [one_line(printable(source.classes[n])) for n in source.labels[found.indices[rows]].tolist()]
        metadata, header = [list(row) for row in zip(names, classes, strict=True)], ["path", "class"]
    try:
        with SummaryWriter(str(folder)) as writer:
            pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            writer.add_embedding(found.features[rows], metadata=metadata, metadata_header=header, label_img=pictures)
    except OSError as error:
        raise ConfigError(
            f"--projector: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from None
    say(f"tensorboard --logdir {folder} shows {len(rows):,} of them in its Projector tab")


def name_bad_images(place: Path | str, bad: dict[str, str]) -> None:
    """A line each; no file where all were good. `place`: a path or a URL."""
    if not bad:
        return remove_file(place)
    lines = [f"{one_line(printable(name))}\t{one_line(reason)}\n" for name, reason in sorted(bad.items())]
    write_text(place, "".join(lines))
    name, _, reason = lines[0].rstrip().partition("\t")
    say(f"left out as unreadable: {len(bad)}, named in {place}, such as {name}: {reason}")


def paths(found: Embeddings, source: ImageSource) -> list[str]:
    return [source.names[index] for index in found.indices.tolist()]


def printable(name: str) -> str:
    """A file name as UTF-8 can hold it."""
    return os.fsencode(name).decode("utf-8", "replace")
