"""Shared fixtures, and `pytest --benchmark`: plain `pytest` runs every check without timing."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import PROFILED_STEPS, SMALL

ROOT = Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    """Where the test images are, as archives or unpacked: `photographs/*.JPEG` and `cifar10/train/CLASS/*.jpg`."""
    return Path(os.environ.get("RECO_FAST_TEST_DATA") or ROOT.parent / "shared" / "data")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="time what is marked as a benchmark, and report")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = not config.getoption("--benchmark")
    import_this_checkout()


def import_this_checkout() -> None:
    """Makes the processes that tests start import this checkout where it, or another, is not what is installed."""
    spec = "import importlib.util as u; spec = u.find_spec('reco_fast'); print(spec and spec.origin)"
    found = subprocess.run([sys.executable, "-c", spec], cwd="/", capture_output=True, text=True, check=True).stdout
    if Path(found.strip()) != ROOT / "reco_fast" / "__init__.py":
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def put_photographs(folder: Path) -> Path:
    archive, unpacked = data_folder() / "imagenet-sample-jpeg.tar", data_folder() / "photographs"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.isfile()]
            tar.extractall(folder, members[:64], filter="data")
    elif unpacked.is_dir():
        for path in sorted(unpacked.glob("*.JPEG"))[:64]:
            shutil.copy(path, folder)
    else:
        pytest.skip(f"the test photographs are neither {archive} nor in {unpacked}")
    return folder


def put_cifar(folder: Path) -> Path:
    archive, unpacked = data_folder() / "cifar10-jpeg.tar.gz", data_folder() / "cifar10" / "train"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            for member in tar:
                _, split, label, name = (3 * [""] + member.name.split("/"))[-4:]
                if member.isfile() and split == "train" and int(Path(name).stem) < 30:
                    (folder / label).mkdir(exist_ok=True)
                    content = tar.extractfile(member)
                    assert content is not None
                    (folder / label / name).write_bytes(content.read())
    elif unpacked.is_dir():
        for path in unpacked.glob("*/*.jpg"):
            if int(path.stem) < 30:
                (folder / path.parent.name).mkdir(exist_ok=True)
                shutil.copy(path, folder / path.parent.name)
    else:
        pytest.skip(f"the CIFAR-10 images are neither {archive} nor in {unpacked}")
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 photographs of about 500 × 375 pixels in one folder, without classes."""
    return put_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 CIFAR-10 images of 32 × 32 pixels as JPEG, in a folder for each of the ten classes."""
    return put_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def profiled(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was profiled. To write into it, copy it."""
    from reco_fast import train  # which tests of the kernels alone do not wait for

    run = tmp_path_factory.mktemp("profiled") / "run"
    options = ["--data.path", str(photographs), "--run.dir", str(run), "--train.epochs", "2", "--run.log-every", "2"]
    profile = f"--profile.enabled --profile.wait 1 --profile.warmup 1 --profile.active {PROFILED_STEPS}".split()
    train.train(*train.parse(["cifar10", *SMALL, *options, *profile]))
    return run


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
