"""Files that anybody may have written are read with limits; those that we write appear whole or not at all."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from reco_fast.errors import ConfigError, DataError
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.store import Lost
from reco_fast.pipelines.stores.where import is_url

_PIECE = 16 * 2**20  # bytes of one request


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


def write_text(place: Path | str, text: str) -> None:
    """At a path or a URL. Appears whole or not at all; a link that lies in the way is replaced, never followed."""
    url, path = os.fspath(place), Path(place)
    if is_url(url):
        with _stored(url):
            return store.write(url, text.encode("utf-8", "surrogateescape"))
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


def check_output(place: Path | str, suffixes: tuple[str, ...]) -> None:
    """Raises ConfigError for another suffix, a URL that no store has, or where a folder stands in the way."""
    if is_url(os.fspath(place)):
        try:
            store.check_url(os.fspath(place))
        except DataError as error:
            raise ConfigError(f"--output: {error}") from None
    if os.path.splitext(place)[1] not in suffixes:
        raise ConfigError(f"--output: expected a file name that ends in {' or '.join(suffixes)}, got {place}")
    if os.path.isdir(place):
        raise ConfigError(f"--output: expected a file, got the folder {place}")


@contextlib.contextmanager
def whole_file(place: Path | str) -> Iterator[Path]:
    """A temporary name for what will be at `place`, a path or a URL: it appears there whole at the end of the block, on
    disk; nothing stays of a block that fails. Makes the folder. Raises ConfigError where it cannot be written."""
    url = os.fspath(place)
    if is_url(url):
        with tempfile.TemporaryDirectory(prefix="reco_fast-") as scratch:
            local = Path(scratch) / os.path.basename(url)
            with whole_file(local) as temporary:
                yield temporary
            with _stored(url):
                store.upload(os.fspath(local), url)
        return
    path = Path(place)
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


def file_names(folder: str) -> list[str]:
    """Of the files right inside a folder, at a path or a URL, sorted; none where there is no folder."""
    if not is_url(folder):
        return sorted(path.name for path in Path(folder).glob("*") if path.is_file())
    with _stored(folder):
        return [name for name in store.listing(folder) if "/" not in name]


def open_file(place: str) -> IO[bytes]:
    """A file, at a path or a URL, to be read."""
    if not is_url(place):
        return open(place, "rb")
    with _stored(place):
        size = store.stat(place).size
        pieces = [store.read(place, start, min(start + _PIECE, size)) for start in range(0, size, _PIECE)]
    return io.BytesIO(b"".join(pieces))


def remove_file(place: Path | str) -> None:
    """At a path or a URL; nothing where there is none."""
    url = os.fspath(place)
    if not is_url(url):
        return Path(place).unlink(missing_ok=True)
    with _stored(url):
        store.remove(url)


@contextlib.contextmanager
def _stored(url: str) -> Iterator[None]:
    try:
        yield
    except Lost as error:
        raise ConfigError(f"--output: expected a store that keeps files, got {url} ({error.strerror})") from None
