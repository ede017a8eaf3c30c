"""Output to any terminal, and users without a name or a home."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
