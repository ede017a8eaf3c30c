"""A dataclass from values that anybody may have written, checked field by field against its annotations."""

import dataclasses
import os
import re
import shlex
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from reco_fast.errors import ConfigError

T = TypeVar("T")
PLACES = {"path", "val_path", "train_path"}
"""Settings that say where images are: texts, for a Path would make `s3:/b` of `s3://b`."""
# What could move a cursor, end a line or turn text round: C0, C1, and Unicode's line and direction controls.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def at_home(path: Path | str) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home. Raises ConfigError where nobody has one."""
    text = os.path.expanduser(path)
    if text.partition("/")[0] == "~":
        raise ConfigError(f"{path}: expected a home in place of ~, but HOME is not set and the user has no account")
    return Path(text)


def place(value: str | os.PathLike[str]) -> str:
    """Where images are, as text: a path as `at_home` has it, a URL as it is."""
    text = os.fspath(value)
    return text if "://" in text else os.fspath(at_home(text))


class WithPaths:
    """A dataclass whose paths, and places of images, may begin with `~`, which a shell leaves as it is in
    `--run.dir=~/x`. Python may give a place as a Path."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in PLACES and value is not None:
                object.__setattr__(self, name, place(value))  # they are frozen
            elif isinstance(value, Path):
                object.__setattr__(self, name, at_home(value))


def shell_word(path: Path | str | None) -> str:
    """`path` as a word of a command that somebody copies: quoted where a shell would take it apart."""
    text = os.fspath(path or "")
    # A quoted ~ stays as it is; control characters and stray bytes are for $'…' alone.
    plain = text.isprintable()
    return shlex.quote(text) if plain else "$" + repr(os.fsencode(text))[1:]


def one_line(text: str) -> str:
    """`text` with every control character as an escape: fit for a terminal and for a file of lines."""
    return CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def first_line(error: Exception) -> str:
    """What somebody else's library says, in one line: its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def as_dataclass(kind: type[T], values: object) -> T:
    """An instance of the dataclass `kind` from a JSON object with exactly its fields, each of its declared type (a
    dataclass in it is made in the same way).

    Raises ValueError, which names the field, what was expected and what came. `kind` itself may raise too.
    """
    fields = typing.get_type_hints(kind)
    if not isinstance(values, dict) or set(values) != set(fields):
        odd = sorted(set(values) ^ set(fields)) if isinstance(values, dict) else []
        also = f"; missing or unknown: {', '.join(odd[:3])}" if odd else f", got {_shown(values)}"
        raise ValueError(one_line(f"expected an object with the fields of {kind.__name__}{also}"))
    values = {k: as_dataclass(fields[k], v) if _is_nested(fields[k]) else v for k, v in values.items()}
    expected = fields | dict.fromkeys(PLACES & set(fields), Path | None)  # a text that can name a file
    for name, value in values.items():
        if not _fits(value, expected[name]):
            raise ValueError(one_line(f"expected {name} as {_named(expected[name])}, got {_shown(value)}"))
    return kind(**{name: _made(value, fields[name]) for name, value in values.items()})


def _made(value: Any, kind: Any) -> Any:
    """What JSON writes as something else: paths and tuples."""
    if isinstance(value, list) and any(typing.get_origin(choice) is tuple for choice in (kind, *typing.get_args(kind))):
        return tuple(value)
    return Path(value) if _is_path(kind) and value is not None else value


def _fits(value: object, kind: Any) -> bool:
    """Whether a value from JSON is one of `kind`. No bool is a number, and no whole number has a fraction."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            return False
        return all(_fits(item, choice) for item, choice in zip(value, arguments, strict=True))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300
    if kind is int:
        return isinstance(value, int) and type(value) is not bool and abs(value) < 2**62
    if kind is Path:
        return isinstance(value, str) and _is_a_path(value)
    if _is_nested(kind):
        return isinstance(value, kind)
    return type(value) is (type(None) if kind is None else kind)


def _is_nested(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _is_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_path(kind: Any) -> bool:
    return kind is Path or Path in typing.get_args(kind)


def _named(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        return _named(arguments[0])
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("null" if choice is type(None) else _named(choice) for choice in arguments)
    if typing.get_origin(kind) is tuple:
        return f"a list of {', '.join(map(_named, arguments))}"
    if typing.get_origin(kind) in (list, dict):
        return f"{'a list' if typing.get_origin(kind) is list else 'an object'} of {_named(arguments[-1])}"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}.get(
        kind, str(kind)
    )


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of very many digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
