"""Where things are kept for users without a home, and with one that cannot be written."""

import os
import pwd
import stat
from pathlib import Path

import pytest

from reco_fast.pipelines.sources.caches import cache_folder, find_caches, own_temporary


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No account, no HOME; returns where temporary files go."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)

    def none(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", none)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_account_and_home_gets_both(nobody: Path) -> None:
    import getpass

    find_caches()
    own = nobody / f"reco_fast-{os.getuid()}"
    assert os.path.expanduser("~/x") == str(own / "x")
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert getpass.getuser() == f"uid{os.getuid()}"


def test_the_cache_of_a_program_that_has_no_home_is_temporary(nobody: Path) -> None:
    assert cache_folder() == nobody / f"reco_fast-{os.getuid()}"
    assert cache_folder().is_dir()


@pytest.mark.parametrize("kind", ["link", "another's"])
def test_somebody_elses_temporary_folder_is_not_taken(kind: str, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = nobody / f"reco_fast-{os.getuid()}"
    if kind == "link":
        own.symlink_to("/tmp")
    else:
        own.mkdir()
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(own, 12345, 12345)
    for found in (own_temporary(), cache_folder()):
        assert found != own
        assert found.parent == nobody


@pytest.mark.parametrize("filled", [False, True])
def test_a_home_that_cannot_be_written_is_passed_over(
    filled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, own = tmp_path / "home", tmp_path / f"reco_fast-{os.getuid()}"
    (home / ".cache" / "reco_fast" / "there" if filled else home).mkdir(parents=True)
    may = os.access
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(home)) and may(path, mode))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back
    assert cache_folder() == own
    assert cache_folder("there") == (home / ".cache" / "reco_fast" if filled else own)
    find_caches()
    assert os.environ["XDG_CACHE_HOME"] == ("" if filled else str(own))  # what is there may be read by others
    assert os.environ["TRITON_CACHE_DIR"] == str(own / "triton")
