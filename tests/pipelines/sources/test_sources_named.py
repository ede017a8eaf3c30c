"""CIFAR-10, STL-10 and Hugging Face data sets as sources: pixels, labels, both loaders, and what is said offline."""

import dataclasses
import functools
import hashlib
import http.server
import importlib.util
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import evaluation_recipe
from reco_fast.pipelines.images import decode_image
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import EvaluationOrder
from reco_fast.pipelines.sources import named
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source

COUNT = 4  # images a file


def pixels(source: ImageSource) -> NDArray[np.uint8]:
    """[n, side, side, 3]"""
    return np.stack([np.asarray(decode_image(source.read(index))) for index in range(len(source))])


def batches(source: ImageSource, kind: str, size: int) -> torch.Tensor:
    order = EvaluationOrder(len(source), 4)
    with open_loader(
        kind,  # type: ignore[arg-type]
        source,
        evaluation_recipe(size),
        order,
        device="cpu",
        seed=0,
        workers=1,
        on_bad_image="raise",
    ) as loader:
        return torch.cat([batch.views[0] for batch in loader])


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder `tmp_path/web`."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: str) -> dict[str, NDArray[np.uint8]]:
    """Small archives in the layout of the real ones, on a server of ours; what is in each file, [n, side, side, 3]."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    written: dict[str, NDArray[np.uint8]] = {}
    data_sets = {}
    for name, real in named.DATA_SETS.items():
        path = tmp_path / "web" / real.url.rpartition("/")[2]
        with tarfile.open(path, "w:gz") as tar:

            def add(file: str, content: bytes, tar: tarfile.TarFile = tar, folder: str = real.folder) -> None:
                member = tarfile.TarInfo(f"{folder}/{file}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

            add("readme.html", b"not wanted")
            for files in real.splits.values():
                for file in files:
                    images = rng.integers(0, 256, (COUNT, real.side, real.side, 3), dtype=np.uint8)
                    written[f"{name}/{file}"] = images
                    # Their documentation: planes of red, green, blue; rows one after the other, in STL-10 columns.
                    order = (0, 3, 2, 1) if name == "stl10" else (0, 3, 1, 2)
                    planes = images.transpose(order).reshape(COUNT, -1)
                    labels = np.arange(COUNT, dtype=np.uint8)[:, None]
                    add(file, (np.hstack([labels, planes]) if name == "cifar10" else planes).tobytes())
            for file in real.label_files.values():
                add(file, bytes([1, 10, 2, 9]))
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        data_sets[name] = dataclasses.replace(real, url=f"{web}/{path.name}", md5=md5)
    monkeypatch.setattr(named, "DATA_SETS", data_sets)
    monkeypatch.chdir(tmp_path)
    return written


def test_cifar10_is_fetched_once_and_read_in_place(
    archives: dict[str, NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = open_source("cifar10")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", None)
    test = open_source(Path("cifar10:test"))
    assert (len(train), len(test)) == (5 * COUNT, COUNT)
    np.testing.assert_array_equal(pixels(test), archives["cifar10/test_batch.bin"])
    expected = [archives[f"cifar10/data_batch_{number}.bin"] for number in range(1, 6)]
    np.testing.assert_array_equal(pixels(train), np.concatenate(expected))
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 3] * 5
    assert train.classes[:4] == ["airplane", "automobile", "bird", "cat"]
    assert list(train.names) == sorted(set(train.names))
    assert train.names[COUNT] == "data_batch_2/000000"
    batch_2 = tmp_path / "cache" / "reco_fast" / "cifar10" / "data_batch_2.bin"
    assert train.stamp(COUNT) == (3073, batch_2.stat().st_mtime_ns)
    assert train.fingerprint() == open_source("cifar10:train").fingerprint() != test.fingerprint()
    kept = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*")}
    files = {f"reco_fast/cifar10/{file}" for files in named.DATA_SETS["cifar10"].splits.values() for file in files}
    assert kept == {"reco_fast", "reco_fast/cifar10", "reco_fast/.cifar10.lock"} | files


def test_stl10_has_columns_first_and_labels_from_one(archives: dict[str, NDArray[np.uint8]]) -> None:
    train, unlabeled = open_source("stl10"), open_source("stl10:unlabeled")
    np.testing.assert_array_equal(pixels(train), archives["stl10/train_X.bin"])
    np.testing.assert_array_equal(pixels(unlabeled), archives["stl10/unlabeled_X.bin"])
    assert train.labels is not None
    assert [train.classes[number] for number in train.labels] == ["airplane", "truck", "bird", "ship"]
    assert unlabeled.labels is None
    assert unlabeled.classes == []


@pytest.mark.parametrize("name", ["cifar10", "stl10:test"])
def test_both_loaders_read_the_same_pixels(archives: dict[str, NDArray[np.uint8]], name: str) -> None:
    pytest.importorskip("nvidia.dali")
    side = named.DATA_SETS[name.partition(":")[0]].side
    size = 32 if side == 32 else 96
    by_torch, by_dali = (batches(open_source(name), kind, size) for kind in ("torch", "dali"))
    difference = (by_torch - by_dali).abs().mean() * 255 * 0.25  # in 0..255: the recipe's deviations are near 1/4
    assert difference < (0.01 if side == 32 else 2)  # at 32 px nothing is resized; noise is the worst of pictures


def test_a_local_folder_goes_before_the_name(archives: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cifar10" / "mine.png")
    assert list(open_source("cifar10").names) == ["mine.png"]


def test_without_a_network_one_line_says_what_goes_where(
    archives: dict[str, NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "web" / "cifar-10-binary.tar.gz"
    elsewhere = archive.rename(tmp_path / "carried.tar.gz")
    with pytest.raises(DataError, match=r"put http://.*binary\.tar\.gz \(162 MB, md5 [0-9a-f]{32}\) into") as caught:
        open_source("cifar10")
    assert "\n" not in str(caught.value)
    cache = tmp_path / "cache" / "reco_fast"
    assert f"into {cache} and repeat the command" in str(caught.value)
    (cache / archive.name).write_bytes(elsewhere.read_bytes())  # doing what it says
    assert len(open_source("cifar10")) == 5 * COUNT


def test_a_damaged_archive_and_a_wrong_split_are_refused(
    archives: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    archive = tmp_path / "web" / "stl10_binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match="corrupted"):
        open_source("stl10")
    with pytest.raises(DataError, match="expected a split of cifar10, one of train, test"):
        open_source("cifar10:validation")


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[bytes]]:
    """A data set of 12 encoded images in two classes, and their bytes; its caches are below `tmp_path`."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; pip install 'reco-fast[hf]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    encoded = []
    for index in range(12):
        stream = io.BytesIO()
        image = Image.fromarray(rng.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8))
        image.save(stream, "JPEG" if index % 2 else "PNG")
        encoded.append(stream.getvalue())
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"id": list(range(12)), "image": [{"bytes": each} for each in encoded], "label": [0, 1, 1] * 4}
    return datasets.Dataset.from_dict(rows, features=features), encoded


def test_hugging_face_from_disk_and_from_parquet(hugging_face: tuple[Any, list[bytes]], tmp_path: Path) -> None:
    dataset, encoded = hugging_face
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "part.parquet")
    prints = set()
    for path in ("hf:saved", f"hf:{tmp_path / 'parquet'}", Path("hf:parquet:train")):
        source = open_source(path)
        assert [source.read(index) for index in range(len(source))] == encoded
        assert list(source.names) == [f"{row:09d}" for row in range(12)]
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 1] * 4
        assert source.classes == ["cat", "dog"]
        assert [source.stamp(index)[0] for index in range(12)] == [len(data) for data in encoded]
        prints.add(source.fingerprint())
    dataset.select(range(11, -1, -1)).save_to_disk(tmp_path / "reversed")
    assert open_source("hf:reversed").read(0) == encoded[11]
    prints.add(open_source("hf:reversed").fingerprint())
    assert len(prints) == 2


def test_hugging_face_splits(hugging_face: tuple[Any, list[bytes]], tmp_path: Path) -> None:
    import datasets

    dataset, encoded = hugging_face
    halves = datasets.DatasetDict({"train": dataset.select(range(8)), "test": dataset.select(range(8, 12))})
    halves.save_to_disk(tmp_path / "both")
    assert [len(open_source(f"hf:both{split}")) for split in ("", ":train", ":test")] == [8, 8, 4]
    assert open_source("hf:both:test").read(0) == encoded[8]
    with pytest.raises(DataError, match="one of train, test, got valid"):
        open_source("hf:both:valid")


def test_hugging_face_through_both_loaders(hugging_face: tuple[Any, list[bytes]], tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    hugging_face[0].save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    for index, data in enumerate(hugging_face[1]):
        (tmp_path / "folder" / f"{index:02d}.{'jpg' if index % 2 else 'png'}").write_bytes(data)
    for kind in ("torch", "dali"):
        torch.testing.assert_close(
            batches(open_source("hf:saved"), kind, 32), batches(open_source("folder"), kind, 32), rtol=0, atol=0
        )


def test_hugging_face_without_all_labels(hugging_face: tuple[Any, list[bytes]], tmp_path: Path) -> None:
    dataset, encoded = hugging_face
    (tmp_path / "kept.png").write_bytes(encoded[0])
    rows = dataset.to_dict()
    rows["label"][3] = None
    rows["image"][0] = {"bytes": None, "path": str(tmp_path / "kept.png")}
    rows["image"][1] = None
    type(dataset).from_dict(rows, features=dataset.features).save_to_disk(tmp_path / "some")
    source = open_source("hf:some")
    assert source.labels is None
    assert source.read(0) == encoded[0]
    with pytest.raises(OSError, match="has no image"):
        source.read(1)
    assert len(source.fingerprint()) == 32


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": "id", "label": "label"}, "expected one image column, or one that is called image, got id, label"),
        ({"left": "image", "right": "image"}, "got left, right"),
    ],
)
def test_hugging_face_without_a_clear_image_column(
    hugging_face: tuple[Any, list[bytes]], tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    rows, features = hugging_face[0].to_dict(), hugging_face[0].features
    kinds = {new: features[old] for new, old in columns.items()}
    odd = {new: rows[old] for new, old in columns.items()}
    type(hugging_face[0]).from_dict(odd, features=type(features)(kinds)).save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match=message):
        open_source("hf:odd")


@pytest.mark.parametrize("name", ["nobody/no-such-data-set", "empty", "missing:train"])
def test_hugging_face_that_cannot_be_had_is_one_line(
    hugging_face: tuple[Any, list[bytes]], tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"hf:{name}: expected a folder written by save_to_disk") as caught:
        open_source(f"hf:{name}")
    assert "\n" not in str(caught.value)


def test_hugging_face_without_the_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    with pytest.raises(DataError, match=r"hf:mnist: .* pip install 'reco-fast\[hf\]'"):
        open_source("hf:mnist")
