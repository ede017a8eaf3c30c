"""The test images and the checkout are found wherever the suite runs."""

import subprocess
import sys
from pathlib import Path

import conftest
import pytest


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["photographs", "cifar"])
def test_unpacked_images_are_taken_as_those_of_the_archive(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived: Path = request.getfixturevalue(name)
    place = tmp_path / {"photographs": "photographs", "cifar": "cifar10/train"}[name]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(archived)
    monkeypatch.setenv("RECO_FAST_TEST_DATA", str(tmp_path))
    (tmp_path / "made").mkdir()
    made = files(getattr(conftest, f"put_{name}")(tmp_path / "made"))
    assert made == files(archived)
    assert len(made) == {"photographs": 64, "cifar": 300}[name]


@pytest.mark.parametrize("name", ["photographs", "cifar"])
def test_a_folder_without_images_skips_and_says_where_it_looked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECO_FAST_TEST_DATA", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=str(tmp_path)):
        getattr(conftest, f"put_{name}")(tmp_path)


def test_processes_that_tests_start_import_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("", str(tmp_path)):
        monkeypatch.setenv("PYTHONPATH", before)
        conftest.import_this_checkout()
        code = "import reco_fast; print(reco_fast.__file__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).parents[1] == conftest.ROOT
