"""Output to any terminal, and users without a name or a home."""

import io
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from reco_fast.pipelines.sources.image_source import cache_folder
from reco_fast.settings import terminal


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "tau = 0.1, 3 x 4 -> r\\xe9sum\\xe9 \\u732b +-|"),
        ("latin-1", "tau = 0.1, 3 × 4 -> résumé \\u732b +-|"),
        ("utf-8", "τ = 0.1, 3 × 4 → résumé 猫 ╭─│"),
    ],
)
def test_what_a_terminal_cannot_show_is_spelt(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert terminal.say("τ = 0.1, 3 × 4 → résumé 猫 ╭─│")
    assert written.getvalue().decode(encoding) == f"{shown}\n"


def test_a_name_that_is_not_utf8_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(os.fsdecode(b"a\xff"))
    assert capsys.readouterr().out == "a\\udcff\n"


LISTENER = """
import os, sys
from reco_fast.settings import command_line, terminal
def main():
    heard = [terminal.say(str(number)) for number in range(100_000)]
    open(sys.argv[1], "w").write(f"{heard[0]} {heard.count(False)}")
command_line.run(main)
"""


def test_work_goes_on_where_the_reader_has_gone(tmp_path: Path) -> None:
    line = [sys.executable, "-c", LISTENER, str(tmp_path / "out")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0
    assert (tmp_path / "out").read_text() == "True 1"


def test_a_full_disk_is_not_taken_for_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"):
            terminal.say("x")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what it still holds


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

    terminal.find_caches()
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
    for found in (terminal.own_temporary(), cache_folder()):
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
    terminal.find_caches()
    assert os.environ["XDG_CACHE_HOME"] == ("" if filled else str(own))  # what is there may be read by others
    assert os.environ["TRITON_CACHE_DIR"] == str(own / "triton")
