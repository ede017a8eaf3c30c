"""CIFAR-10 and STL-10 by name: fetched once from their authors, checked, and read in place. No pickle is involved."""

import fcntl
import os
import shutil
import tarfile
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.caches import cache_folder
from reco_fast.pipelines.sources.image_source import ImageSource, stamp_of


@dataclass(frozen=True)
class DataSet:
    """An archive of files of raw pixels, planes of red, green and blue. CIFAR-10 has a label in front of each image,
    STL-10 has labels, from 1, in another file and its planes by column."""

    url: str
    md5: str
    megabytes: int
    folder: str
    side: int
    splits: dict[str, tuple[str, ...]]
    label_files: dict[str, str]
    classes: tuple[str, ...]
    label_in_record: bool
    by_column: bool


DATA_SETS = {
    "cifar10": DataSet(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        megabytes=162,
        folder="cifar-10-batches-bin",
        side=32,
        splits={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        label_files={},
        classes=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
        label_in_record=True,
        by_column=False,
    ),
    "stl10": DataSet(
        url="http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        md5="91f7769df0f17e558f3565bffb0c7dfb",
        megabytes=2640,
        folder="stl10_binary",
        side=96,
        splits={"train": ("train_X.bin",), "test": ("test_X.bin",), "unlabeled": ("unlabeled_X.bin",)},
        label_files={"train": "train_y.bin", "test": "test_y.bin"},
        classes=tuple("airplane bird car cat deer dog horse monkey ship truck".split()),
        label_in_record=False,
        by_column=True,
    ),
}


def open_named(name: str, split: str) -> ImageSource:
    """A split of a data set of `DATA_SETS`, `train` where `split` is empty.

    Raises:
        DataError: there is no such split, or the archive cannot be fetched.
    """
    data_set = DATA_SETS[name]
    split = split or "train"
    if split not in data_set.splits:
        raise DataError(f"{name}:{split}: expected a split of {name}, one of {', '.join(data_set.splits)}")
    return PixelSource(_fetched(name, data_set), data_set, split)


def _fetched(name: str, data_set: DataSet) -> Path:
    """The folder of the files; fetched by the first process that comes, while others wait."""
    cache = cache_folder(name)
    folder = cache / name
    if folder.is_dir():
        return folder
    from torchvision.datasets.utils import download_url  # which imports PyTorch

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f".{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                archive = cache / data_set.url.rpartition("/")[2]
                download_url(data_set.url, cache, md5=data_set.md5)
                _unpack(archive, data_set, folder)
                archive.unlink()
    except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong checksum a RuntimeError
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: expected to fetch it; without a network put {data_set.url} ({data_set.megabytes:,} MB, "
            f"md5 {data_set.md5}) into {cache} and repeat the command ({reason})"
        ) from None
    return folder


def _unpack(archive: Path, data_set: DataSet, folder: Path) -> None:
    """The files that are needed; `folder` appears whole."""
    wanted = {file for files in data_set.splits.values() for file in files} | set(data_set.label_files.values())
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        with tarfile.open(archive) as tar:
            for file in sorted(wanted):
                tar.extract(f"{data_set.folder}/{file}", temporary, filter="data")
        (temporary / data_set.folder).rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class PixelSource(ImageSource):
    """Images of one size as raw pixels in files, handed out as PPM."""

    def __init__(self, root: Path, data_set: DataSet, split: str) -> None:
        self._files = [os.fspath(root / file) for file in data_set.splits[split]]
        self._side = data_set.side
        self._by_column = data_set.by_column
        self._skip = int(data_set.label_in_record)
        self._record = self._skip + 3 * self._side**2
        counts = [os.path.getsize(file) // self._record for file in self._files]
        self._ends = np.cumsum(counts).tolist()
        super().__init__(
            [
                f"{Path(file).stem}/{index:06d}"
                for file, n in zip(self._files, counts, strict=True)
                for index in range(n)
            ]
        )
        if data_set.label_in_record:
            records = [np.memmap(file, np.uint8, "r").reshape(-1, self._record) for file in self._files]
            self.labels = np.concatenate([each[:, 0] for each in records]).astype(np.int64)
        elif split in data_set.label_files:
            self.labels = np.fromfile(root / data_set.label_files[split], np.uint8).astype(np.int64) - 1
        if self.labels is not None:
            self.classes, self.unlabelled = list(data_set.classes), ""

    def read(self, index: int) -> bytes:
        file = self._file(index)
        row = index - (self._ends[file - 1] if file else 0)
        with open(self._files[file], "rb", buffering=0) as opened:
            planes = os.pread(opened.fileno(), 3 * self._side**2, row * self._record + self._skip)
        pixels = np.frombuffer(planes, np.uint8).reshape(3, self._side, self._side)
        image = pixels.transpose(2, 1, 0) if self._by_column else pixels.transpose(1, 2, 0)
        return b"P6 %d %d 255\n" % (self._side, self._side) + image.tobytes()

    def stamp(self, index: int) -> tuple[int, int]:
        return self._record, stamp_of(self._files[self._file(index)])[1]

    def _file(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def sizes(self) -> NDArray[np.int64]:
        return np.full(len(self), self._record, np.int64)
