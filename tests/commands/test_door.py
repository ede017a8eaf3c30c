"""`reco-fast COMMAND`, and its completion."""

import subprocess
import sys
from collections.abc import Callable

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
