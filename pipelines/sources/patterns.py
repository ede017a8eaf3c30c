"""Patterns of file names with braces, as shells and WebDataset have them."""

import re
from itertools import product


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
