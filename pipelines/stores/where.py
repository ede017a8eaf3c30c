"""What is a URL, and how what comes from behind one is kept. Light: every opening of images needs it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Stores(NamedTuple):
    """`cache`: folder for whole shards, None for one in `cache_folder()`; `cache_bytes`: most that they take there;
    `processes`: of this host that share it; `say`: what is called with a line for a person."""

    cache: Path | None = None
    cache_bytes: int = 50 * 10**9
    processes: int = 1
    say: Callable[[str], object] = len


HERE = Stores()


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None
