"""Image columns of Hugging Face data sets: a folder on disk or a name on the Hub, with the bytes as they are stored."""

import importlib
import importlib.util
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.image_source import ImageSource


class HuggingFaceSource(ImageSource):
    """The one image column of a `datasets.Dataset`, undecoded. Names are the row numbers; labels are the first
    `ClassLabel` column, unless a row has none.

    Raises:
        DataError: no image column, or several and none is called `image`.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        datasets: Any = importlib.import_module("datasets")
        images = [key for key, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        if len(images) != 1 and "image" not in images:
            raise DataError(
                f"{name}: expected one image column, or one that is called image, got "
                f"{', '.join(images) or ', '.join(dataset.features)}"
            )
        self._column = images[0] if len(images) == 1 else "image"
        if len(dataset) == 0:
            raise DataError(f"{name}: expected images, it has no rows")
        super().__init__([f"{row:09d}" for row in range(len(dataset))])
        self.unlabelled = f"no ClassLabel among its columns {', '.join(dataset.features)}"
        for key, kind in dataset.features.items():
            if isinstance(kind, datasets.ClassLabel):
                numbers = np.array([-1 if number is None else number for number in dataset[key][:]], np.int64)
                if (numbers >= 0).all():
                    self.labels, self.classes, self.unlabelled = numbers, list(kind.names), ""
                else:
                    self.unlabelled = f"{(numbers < 0).sum():,} of {len(numbers):,} rows have none in the column {key}"
                break
        encoded = dataset.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self._dataset = encoded.with_format(None)

    def read(self, index: int) -> bytes:
        image = self._dataset[index][self._column]
        if image is None:
            raise OSError("the row has no image")
        if image["bytes"] is None:
            return Path(image["path"]).read_bytes()
        return image["bytes"]

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._sizes[index]), 0

    def sizes(self) -> NDArray[np.int64]:
        return self._sizes

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Reads no image."""
        compute: Any = importlib.import_module("pyarrow.compute")
        sizes = []
        for rows in self._dataset.with_format("arrow").iter(10_000):
            for chunk in rows[self._column].chunks:
                lengths = compute.fill_null(compute.binary_length(chunk.field("bytes")), -1)
                sizes.append(lengths.to_numpy(zero_copy_only=False).astype(np.int64))
        return np.concatenate(sizes)


def open_hugging_face(text: str) -> HuggingFaceSource:
    """`NAME[:SPLIT]`, where NAME is a folder that `save_to_disk` wrote, a folder of parquet or other files that
    `datasets.load_dataset` takes, or a name on the Hub. SPLIT is `train`, or the only one, unless said.

    Raises:
        DataError: `datasets` is not installed, there is no such data set or split, or it cannot be fetched.
    """
    label = f"hf:{text}"
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{label}: expected the datasets package, it is not installed; pip install 'reco-fast[hf]'")
    datasets: Any = importlib.import_module("datasets")
    name, split = text, ""
    if ":" in text and not os.path.exists(os.path.expanduser(text)):
        name, _, split = text.rpartition(":")
    place = Path(os.path.expanduser(name))
    try:
        if (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file():
            found = datasets.load_from_disk(os.fspath(place))
        else:
            # Absolute, because `parquet`, `csv` and others alone are names of its builders.
            found = datasets.load_dataset(os.fspath(place.absolute()) if place.exists() else name)
    except Exception as error:  # whatever its builders, the Hub's client and the network raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{label}: expected a folder written by save_to_disk, one of parquet files, or a data set that can be "
            f"fetched from the Hub, got {type(error).__name__}: {reason}"
        ) from None
    if not isinstance(found, dict):
        found = {"train": found} if not split else {str(found.split): found}
    split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if split not in found:
        raise DataError(f"{label}: expected a split, NAME:SPLIT with one of {', '.join(found)}, got {split}")
    return HuggingFaceSource(label, found[split])
