"""Command lines: one clear line on stderr and exit 2 for a user's mistake, never a traceback."""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from reco_fast.errors import ConfigError, DataError
from reco_fast.settings import terminal
from reco_fast.settings.typed import one_line

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """`argv` as an instance of the dataclass `kind`. Prints help and exits 0 for `--help` and `--help-verbose`.

    Raises ConfigError in one line: an unknown flag with the nearest right one, a bad value with what is allowed.
    """
    arguments = _without_tristate(argv)
    if sys.argv[0].startswith("reco-fast "):
        prog = " ".join([sys.argv[0], *prog.split()[3:]])  # as it was called, and the preset
    known = sorted(_flags(kind))
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known and name not in ("--help", "--help-verbose"):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "--help lists them"
            raise ConfigError(f"{argument.split('=')[0]}: unknown flag; {hint}")
    printed = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=arguments, prog=prog, description=description, compact_help=True, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(printed.getvalue())) from None


def serve(name: str, kind: type[T], command: Callable[[T], object], description: str | None) -> NoReturn:
    """Call `command` with the command line as a `kind`, and exit as `run` does. `name`: of its module."""
    prog = f"python -m reco_fast.{name}"
    run(lambda: command(parse(kind, sys.argv[1:], prog=prog, description=description or "")))


def run(main: Callable[[], object]) -> NoReturn:
    """Call `main` and exit with its status, 0 where it returns none; 2 with one line on stderr (of rank 0) for a user's
    mistake, and for what the machine refuses: a full disk, a missing right, memory; 130 with one for Ctrl-C."""
    terminal.prepare_command()
    terminal.interrupt_as_usual()
    try:
        result = main()
        code = result if isinstance(result, int) else 0
    except (ConfigError, DataError) as error:
        code = _refuse(str(error))
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        terminal.drop_output()
        code = 0
    except KeyboardInterrupt:
        terminal.leave_at_interrupt()  # threads may have to be waited for
        terminal.say_interrupted()
        code = terminal.INTERRUPTED
    except OSError as error:
        if error.strerror is None:
            raise
        code = _refuse(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except (MemoryError, RuntimeError) as error:  # PyTorch has a type of its own for the memory of a GPU alone
        if isinstance(error, RuntimeError) and not re.search("out of memory|t allocate memory", str(error)):
            raise
        code = _refuse("out of memory; a smaller --train.batch-size, --model.bank-size or --data.image-size needs less")
    sys.exit(code)


def _refuse(reason: str) -> int:
    line = one_line(f"error: {reason}").encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    elif error_file:
        time.sleep(10)  # torchrun ends all ranks with the first that ends: let rank 0 speak
    if error_file:  # torchrun ends with what stands there
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    return 2


def _flags(kind: Any, prefix: str = "") -> set[str]:
    names = set()
    for field in dataclasses.fields(kind):
        inner = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        dashed = field.name.replace("_", "-")
        if inner is not None:
            names |= _flags(inner, f"{prefix}{dashed}.")
        else:
            names.add(f"--{prefix}{dashed}")
            if field.type in (bool, "bool"):
                names.add(f"--{prefix}no-{dashed}")
    return names


def _without_tristate(argv: Sequence[str]) -> list[str]:
    """`--train.compile` and `--train.no-compile` as flags, though the field has a third state, "not said"."""
    on = {f"--train.{name}": f"--train.no-{name}" for name in ("compile", "cuda-graph")}
    off = {no: flag for flag, no in on.items()}
    arguments = []
    for index, argument in enumerate(argv):
        following = argv[index + 1] if index + 1 < len(argv) else ""
        if argument in on and following not in ("True", "False", "None"):
            arguments += [argument, "True"]
        elif argument in off:
            arguments += [off[argument], "False"]
        else:
            arguments.append(argument)
    return arguments


def _one_line(box: str) -> str:
    """The first paragraph of tyro's framed message."""
    lines = [re.sub(r"^│\s?|\s*│$", "", line).strip() for line in box.splitlines()]
    text = []
    for line in lines:
        if line.startswith(("╭", "╰")):
            continue
        if line.startswith("──"):
            break
        text.append(line)
    return " ".join(text).removeprefix("Error parsing ") or "the command line could not be read; see --help"
