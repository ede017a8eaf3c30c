"""The built-in data set: the same bytes every time, written once, and hard for everything that does not see shape."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reco_fast.errors import DataError
from reco_fast.pipelines.sources import generated
from reco_fast.pipelines.sources.generated import MOTIFS, draw_picture, generate
from reco_fast.pipelines.sources.open import open_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate(tmp_path_factory.mktemp("cache"))


def test_the_folders_are_as_promised(folders: tuple[Path, Path]) -> None:
    train, val = (open_source(folder) for folder in folders)
    assert train.classes == val.classes == sorted(MOTIFS)
    assert len(MOTIFS) >= 10
    assert len(train) >= 5000
    assert len(val) >= 1000
    assert train.labels is not None
    assert len(set(np.bincount(train.labels).tolist())) == 1
    image = Image.open(folders[0] / train.names[0])
    assert (image.format, image.size, image.mode) == ("JPEG", (generated.SIZE, generated.SIZE), "RGB")
    contents = {hashlib.sha256(source.read(i)).digest() for source in (train, val) for i in range(len(source))}
    assert len(contents) == len(train) + len(val)


def test_a_second_writing_has_the_same_bytes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    again = generate(tmp_path)
    for first, second in zip(folders, again, strict=True):
        a, b = open_source(first), open_source(second)
        assert list(a.names) == list(b.names)
        assert all(a.read(i) == b.read(i) for i in range(len(a)))


def test_an_image_depends_on_class_index_and_seed_alone() -> None:
    whole = draw_picture(3, range(20), seed=5)
    assert np.array_equal(draw_picture(3, range(7, 12), seed=5), whole[7:12])
    assert np.array_equal(draw_picture(3, range(11, 12), seed=5), whole[11:12])
    assert not np.array_equal(draw_picture(3, range(20), seed=6), whole)
    assert not np.array_equal(draw_picture(4, range(20), seed=5), whole)


def test_it_is_written_once_and_two_may_begin_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(generated, "VAL_PER_CLASS", 1)
    found: list[tuple[Path, Path]] = []
    threads = [threading.Thread(target=lambda: found.append(generate(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    train, val = found[0]
    assert (len(open_source(train)), len(open_source(val))) == (2 * len(MOTIFS), len(MOTIFS))
    assert [path.name for path in tmp_path.iterdir()] == [train.parent.name]  # nothing temporary is left
    written = (train / "disc" / "0000.jpg").stat().st_mtime_ns
    assert generate(tmp_path) == found[0]
    assert (train / "disc" / "0000.jpg").stat().st_mtime_ns == written


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "TRAIN_PER_CLASS", 1)
    monkeypatch.setattr(generated, "VAL_PER_CLASS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert generate()[0].is_relative_to(tmp_path / "reco_fast")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="expected to write the generated images here, Not a directory"):
        generate(tmp_path / "file" / "cache")


def test_colour_and_place_do_not_tell_the_classes() -> None:
    """Mean colours, of the whole and of each quarter, are distributed alike in all classes."""
    samples = np.stack([draw_picture(number, range(200), seed=1) for number in range(len(MOTIFS))]).astype(float)
    half = generated.SIZE // 2
    quarters = samples.reshape(len(MOTIFS), 200, 2, half, 2, half, 3).mean(axis=(3, 5)).reshape(len(MOTIFS), 200, -1)
    between = quarters.mean(axis=1).std(axis=0)
    chance = quarters.std(axis=(0, 1)) / np.sqrt(200)
    assert (between < 2.5 * chance).all()


def test_raw_pixels_do_not_tell_the_classes(folders: tuple[Path, Path]) -> None:
    """Cosine kNN, k = 20, on pixels at three scales, in colour and grey: far from solved (chance is 1 in 12)."""
    (train, train_labels), (val, val_labels) = (_pixels(folder) for folder in folders)
    for name, reduce in {
        "40 px": lambda x: x,
        "40 px grey": lambda x: x.mean(axis=-1),
        "8 px": lambda x: x.reshape(-1, 8, 5, 8, 5, 3).mean(axis=(2, 4)),
    }.items():
        accuracy = _knn(reduce(train), train_labels, reduce(val), val_labels)
        print(f"raw-pixel kNN, {name}: {100 * accuracy:.1f} %")
        assert accuracy < 0.33


def _pixels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    source = open_source(folder)
    images = [np.asarray(Image.open(folder / name), np.float32) for name in source.names]
    assert source.labels is not None
    return np.stack(images), source.labels


def _knn(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    mean = train.reshape(len(train), -1).mean(axis=0)
    a, b = (x.reshape(len(x), -1) - mean for x in (train, val))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    nearest = np.argpartition(-(b @ a.T), 20, axis=1)[:, :20]
    votes = np.stack([(train_labels[nearest] == c).sum(axis=1) for c in range(len(MOTIFS))], axis=1)
    return float((votes.argmax(axis=1) == val_labels).mean())
