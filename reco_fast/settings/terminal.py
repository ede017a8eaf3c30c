"""Where a command was started: what its terminal can show, and how it is interrupted."""

import codecs
import errno
import os
import re
import signal
import sys
import unicodedata
from pathlib import Path
from types import FrameType

from reco_fast.settings.typed import one_line

INTERRUPTED = 128 + signal.SIGINT
SPELT = {
    "τ": "tau",
    "λ": "lambda",
    "α": "alpha",
    "×": "x",
    "·": "*",
    "−": "-",
    "–": "-",
    "→": "->",
    "≤": "<=",
    "…": "...",
}
SPELT |= {"²": "^2", "³": "^3", "¹": "1", "⁸": "8"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Of characters that an encoding lacks: what they are called, a line's part, or an escape."""
    assert isinstance(error, UnicodeEncodeError)
    text = ""
    for letter in error.object[error.start : error.end]:
        name = unicodedata.name(letter, "")
        if name.startswith("BOX DRAWINGS"):
            text += {"HORIZONTAL": "-", "VERTICAL": "|"}.get(name.split()[-1], "+")
        else:
            text += SPELT.get(letter) or letter.encode("ascii", "backslashreplace").decode()
    return text, error.end


codecs.register_error("reco_fast.spelt", _spell)


def say(line: str) -> bool:
    """`show` a line, unless it is empty; what file names bring along does not reach the terminal."""
    return show(one_line(line)) if line else True


def show(text: str) -> bool:
    """Print `text` as far as stdout can show it. Where its reader has gone this returns False, once, and all that
    follows is dropped, so that the work goes on."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "reco_fast.spelt").decode(encoding), flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        drop_output()
        return False
    return True


def drop_output() -> None:
    """Send what is still printed nowhere, also what waits in a buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def prepare_command() -> None:
    """What every command needs first: output in any encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's may have none
            stream.reconfigure(errors="reco_fast.spelt")


def is_command() -> bool:
    """Whether this process was started as `python -m reco_fast…` or `reco-fast`, and does not merely import it."""
    if sys.argv[:1] == ["-m"]:  # so it is while the package of the module is imported
        return any(re.match(r"(-m)?reco_fast(\.|$)", word) for word in sys.orig_argv)
    return bool(sys.argv) and Path(sys.argv[0]).name == "reco-fast" and sys.argv[0] in sys.orig_argv


def leave_at_interrupt() -> None:
    """Until `interrupt_as_usual`, Ctrl-C ends the process on the spot with one line: while modules are imported nothing
    is under way, and libraries turn a KeyboardInterrupt into other errors."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interrupt_as_usual() -> None:
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def say_interrupted() -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")


def _leave(number: int, frame: FrameType | None) -> None:
    say_interrupted()
    os._exit(INTERRUPTED)
