"""Shared fixtures, and `pytest --benchmark`: plain `pytest` runs every check without timing."""

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER"):  # one of several on these cores; before anything imports PyTorch or NumPy
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from image_sets import SETS
from servers import S3Server
from small_runs import PROFILED_STEPS, SMALL

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="time what is marked as a benchmark, and report")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = not config.getoption("--benchmark")
    # pytest-xdist would begin with the files of most tests, and end with the longest, alone.
    config.option.loadscopereorder = False
    import_this_checkout()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Passes over the tests of the kernels where `test_interpreter.py` runs them in a process of its own: without a GPU
    they need Triton's interpreter from the start. Whoever names that file is told so by it."""
    if collection_path != ROOT / "tests" / "kernels" / "test_relation_loss.py":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1" or any("test_relation_loss" in argument for argument in config.args):
        return None
    import torch  # which most tests import anyway

    return None if torch.cuda.is_available() else True


def import_this_checkout() -> None:
    """Makes the processes that tests start import this checkout where it, or another, is not what is installed."""
    spec = "import importlib.util as u; spec = u.find_spec('reco_fast'); print(spec and spec.origin)"
    found = subprocess.run([sys.executable, "-c", spec], cwd="/", capture_output=True, text=True, check=True).stdout
    if Path(found.strip()) != ROOT / "reco_fast" / "__init__.py":
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """No collection of garbage goes through what earlier files have imported, close to a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def images_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a set of `image_sets.SETS`, written when it is first asked for."""
    return functools.cache(lambda name: SETS[name](tmp_path_factory.mktemp(name.replace(" ", "-"))))


@pytest.fixture(scope="session")
def photographs(images_of: Callable[[str], Path]) -> Path:
    """64 photographs of about 500 × 375 pixels in one folder, without classes."""
    return images_of("photographs")


@pytest.fixture(scope="session")
def cifar(images_of: Callable[[str], Path]) -> Path:
    """300 images of 32 × 32 pixels as JPEG, in a folder for each of ten classes, as CIFAR-10's would be."""
    return images_of("cifar")


@pytest.fixture(scope="session")
def profiled(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was profiled. To write into it, copy it."""
    from reco_fast import train  # which tests of the kernels alone do not wait for

    run = tmp_path_factory.mktemp("profiled") / "run"
    options = ["--data.path", str(photographs), "--run.dir", str(run), "--train.epochs", "2", "--run.log-every", "2"]
    profile = f"--profile.enabled --profile.wait 1 --profile.warmup 1 --profile.active {PROFILED_STEPS}".split()
    train.train(*train.parse(["cifar10", *SMALL, *options, *profile]))
    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A store with an empty bucket and without faults, which this process and its children find."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.heal()
    s3_server.empty()
    s3_server.forget()
    return s3_server


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls a command's `main` with the arguments that follow; its exit status."""

    def called(main: Callable[[], object], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return called


@pytest.fixture
def refused(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Likewise, of what is a mistake: exit status 2 and one line on stderr, which it returns."""

    def refusal(main: Callable[[], object], *arguments: object) -> str:
        capsys.readouterr()
        assert call(main, *arguments) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        return shown

    return refusal
