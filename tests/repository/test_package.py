"""The four code folders are one import package, installed or not; and nothing loads a pickle."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_EACH = (  # room; without those that take seconds, which one test below imports
    "import reco_fast.run.files, reco_fast.settings.config, reco_fast.method.losses, reco_fast.kernels.reference, "
    "reco_fast.pipelines.sources.open, reco_fast.pipelines.bad_images.journal, reco_fast.profiling.trace, "
    "reco_fast.profiling.machine; import cProfile, profile; print(reco_fast.kernels.reference.__name__)"
)
IMPORT_ALL = f"import reco_fast.train, reco_fast.training.loop, reco_fast.evaluate; {IMPORT_EACH}"


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "profiling"])
def test_code_folders_have_no_init(folder: str) -> None:
    # One there breaks a plain install that is run from the root of a checkout.
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("place", ["checkout root", "elsewhere"])
def test_imports_from_the_root_and_from_elsewhere(place: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH],
        cwd=ROOT if place == "checkout root" else tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["reco_fast.kernels.reference"]


def test_a_bare_checkout_imports_without_an_install(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {IMPORT_EACH}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_built_package_holds_every_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL + "; print(reco_fast.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


def test_no_pickle_is_loaded_anywhere() -> None:
    loads = re.compile(
        r"\bimport (pickle|shelve|marshal|dill|joblib|yaml)\b|\b(pickle|joblib|yaml)\.(load|unsafe)|_object_list|"
        r"\btorch\.(jit\.)?load\((?!.*weights_only=True)|allow_pickle=True|read_pickle|hub\.load"
    )
    for folder in ("reco_fast", "kernels", "pipelines", "profiling"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not loads.search(path.read_text(encoding="utf-8")), path
