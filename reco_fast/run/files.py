"""Files that anybody may have written are read with limits; those that we write appear whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reco_fast.errors import ConfigError


def read_json(path: Path) -> Any:
    """The value in a file. Raises ConfigError where it is missing, no ordinary file, or not JSON."""
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    """The text of an ordinary file. Raises ConfigError."""
    with _reading(path):
        return path.read_text(encoding="utf-8")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of an ordinary file, one at a time. Raises ConfigError."""
    with _reading(path), open(path, encoding="utf-8") as file:
        yield from file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{path}: expected a file, got something else")
        yield
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be read, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected text, got bytes that are not UTF-8") from None


def parse_json(text: str, path: Path, expected: str = "expected JSON") -> Any:
    """The value of `text`, which came from `path`. Raises ConfigError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits; nested without end
        raise ConfigError(f"{path}: {expected}, got: {error}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Appears whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Appears whole or not at all; a link that lies in the way is replaced, never followed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ConfigError for another suffix, or where a folder stands in the way."""
    if path.suffix not in suffixes:
        raise ConfigError(f"--output: expected a file name that ends in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise ConfigError(f"--output: expected a file, got the folder {path}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place at the end of the block, on disk; nothing stays of a
    block that fails. Makes the folder. Raises ConfigError where it cannot be written."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise ConfigError(
            f"--output: expected a file that can be written, got {path} ({error.strerror or error})"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
