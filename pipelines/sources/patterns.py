"""Patterns of file names with braces, as shells and WebDataset have them."""

import re
from glob import glob, has_magic
from itertools import product
from pathlib import Path


def matching(pattern: str) -> list[Path]:
    """The files of a pattern, by name: braces first, as a shell does, then `*`, `?` and `[…]`."""
    found = [glob(name) if has_magic(name) else [name] for name in spread_braces(pattern)]
    return sorted(Path(name) for names in found for name in names)


def spread_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{000..127}` as all the names that they stand for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if place % 2 == 0 else _alternatives(part) for place, part in enumerate(parts)]
    return ["".join(words) for words in product(*choices)]


def _alternatives(braces: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if not numbers:
        return braces.split(",")
    first, last = numbers.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
