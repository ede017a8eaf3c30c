"""The test images are there in any checkout, what lies beside it only adds, and the checkout itself is found."""

import subprocess
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import image_sets
import numpy as np
import pytest
from PIL import Image

COUNTS = {"photographs": 64, "cifar": 300}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def thumbnails(folder: Path) -> np.ndarray:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((8, 8)), np.float32) for path in paths])


@pytest.mark.parametrize("name", COUNTS)
def test_the_made_images_are_the_same_each_time_and_no_two_alike(
    name: str, images_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = images_of(name)
    assert files(image_sets.SETS[name](tmp_path)) == files(made)
    small = thumbnails(made)
    assert len(small) == COUNTS[name]
    apart = np.abs(small[:, None] - small[None]).mean((2, 3, 4))
    assert apart[~np.eye(len(small), dtype=bool)].min() > 1


def test_the_made_images_are_of_the_sizes_that_tests_count_on(photographs: Path, cifar: Path) -> None:
    sizes = [Image.open(path).size for path in photographs.iterdir()]
    assert len(set(sizes)) > 3
    assert all(375 <= max(size) <= 500 and min(size) >= 333 for size in sizes)
    assert {path.suffix for path in photographs.iterdir()} == {".JPEG"}
    assert sorted(path.name for path in cifar.iterdir()) == sorted(image_sets.CLASSES)
    for label in cifar.iterdir():
        assert [Image.open(path).size for path in label.iterdir()] == 30 * [(32, 32)]


@pytest.fixture
def beside(tmp_path: Path, photographs: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images as there may be one, unpacked: more of them than are taken."""
    (tmp_path / "photographs").mkdir()
    for path in [*photographs.iterdir(), photographs / "00.JPEG"]:
        name = "later.JPEG" if (tmp_path / "photographs" / path.name).exists() else path.name
        (tmp_path / "photographs" / name).symlink_to(path)
    for label in image_sets.CLASSES:
        (tmp_path / "cifar10" / "train" / label).mkdir(parents=True)
        for number, path in enumerate(2 * sorted((cifar / label).iterdir())):
            (tmp_path / "cifar10" / "train" / label / f"{number:04d}.jpg").symlink_to(path)
    monkeypatch.setenv("RECO_FAST_TEST_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("archived", [False, True])
def test_images_beside_the_checkout_are_added(
    name: str, archived: bool, images_of: Callable[[str], Path], beside: Path
) -> None:
    assert image_sets.and_shared(name) == [name, f"shared {name}"]
    if archived:
        archive, unpacked = image_sets.shared_places(name)
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w", dereference=True) as tar:
            if name == "photographs":  # flat there
                for path in sorted(unpacked.iterdir()):
                    tar.add(path, path.name)
            else:
                tar.add(unpacked, "train")
                tar.add(unpacked / "bird", "test/another")
        unpacked.rename(beside / "elsewhere")
        assert image_sets.and_shared(name) == [name, f"shared {name}"]
    (beside / "copied").mkdir()
    assert files(image_sets.SETS[f"shared {name}"](beside / "copied")) == files(images_of(name))


@pytest.mark.parametrize("name", COUNTS)
def test_a_checkout_without_images_beside_it_lacks_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECO_FAST_TEST_DATA", str(tmp_path / "nowhere"))
    assert image_sets.and_shared(name) == [name]


@pytest.mark.parametrize(
    ("interpreted", "gpu", "named", "passed_over"),
    [("", False, False, True), ("1", False, False, None), ("", True, False, None), ("", False, True, None)],
)
def test_the_tests_of_the_kernels_are_passed_over_only_where_another_process_runs_them(
    interpreted: str, gpu: bool, named: bool, passed_over: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = conftest.ROOT / "tests" / "kernels"
    (path,) = kernels.glob("test_relation_loss.py")
    config: Any = types.SimpleNamespace(args=[f"{path}::test_one" if named else str(kernels)])
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert conftest.pytest_ignore_collect(path, config) is passed_over
    for other in set(kernels.glob("test_*.py")) - {path}:
        assert conftest.pytest_ignore_collect(other, config) is None


def test_processes_that_tests_start_import_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("", str(tmp_path)):
        monkeypatch.setenv("PYTHONPATH", before)
        conftest.import_this_checkout()
        code = "import reco_fast; print(reco_fast.__file__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).parents[1] == conftest.ROOT
