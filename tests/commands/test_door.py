"""`reco-fast COMMAND`, and its completion."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reco_fast import __main__ as door


def test_help_lists_the_commands(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        assert call(door.main, *arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in door.COMMANDS)


@pytest.mark.parametrize("name", list(door.COMMANDS))
def test_each_command_helps_under_the_name_by_which_it_was_called(
    name: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(door.main, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: reco-fast {name} ")


def test_an_unknown_command_is_one_line(refused: Callable[..., str]) -> None:
    assert refused(door.main, "trian") == "error: trian: unknown command; did you mean train?\n"
    assert "expected one of train, evaluate" in refused(door.main, "wash")


def test_a_mistake_behind_the_door_is_one_line(refused: Callable[..., str]) -> None:
    assert "--train.epochs" in refused(door.main, "train", "--train.epochs", "0")


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ("reco_fast train --help", 0, "usage: reco-fast train quickstart "),
        ("reco_fast.train cifar10 --train.epoch 1", 2, "error: --train.epoch: unknown flag; "),
        ("reco_fast.train --optim.lr 0", 2, "error: --optim.lr: expected a number above 0, got 0"),
    ],
)
def test_the_command_line_is_read_without_pytorch(words: str, code: int, shown: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", *words.split()]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).startswith(shown)


def test_it_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "reco_fast", "--help"], capture_output=True, text=True, check=True)
    assert "check-images" in done.stdout


def test_bash_completes_commands_flags_and_choices() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "reco_fast", door.COMPLETION, "bash"], capture_output=True, text=True, check=True
    ).stdout
    asked = (("reco-fast", "ev"), ("reco-fast", "train", "--loss.mix-"), ("reco-fast", "train", "--loss.mix", "cut"))
    script = [printed]
    for words in asked:
        script.append(f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()")
        script.append('$(complete -p reco-fast | sed "s/.*-F \\([^ ]*\\).*/\\1/"); echo "${COMPREPLY[*]}"')
    done = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True, text=True, check=True)
    flags = " ".join(f"--loss.mix-{name}" for name in ("alpha", "size", "share", "within", "anchor"))
    assert done.stdout.splitlines() == ["evaluate", flags, "cutmix"]
