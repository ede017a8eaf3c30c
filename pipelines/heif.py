"""HEIC, which Pillow reads where pillow-heif is installed."""

import importlib
from functools import cache
from typing import Any

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
HEIF_HINT = "pip install 'reco-fast[heif]' reads them"
_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split())


def is_heif(start: bytes) -> bool:
    """By the first 32 bytes of a file. AVIF is another format in the same box."""
    return start[4:8] == b"ftyp" and start[8:12] in _BRANDS and b"avif" not in start[8:32]


@cache
def reads_heif() -> bool:
    """Whether Pillow opens HEIC. The first call in a process imports pillow-heif and registers it."""
    try:
        plugin: Any = importlib.import_module("pillow_heif")
        plugin.register_heif_opener()
    except (ImportError, AttributeError, OSError):
        return False
    return True
