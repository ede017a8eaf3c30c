"""Which files of a folder or a shard are images, and what is said of the others."""

import os
import re
from typing import NamedTuple

from reco_fast.pipelines.heif import HEIF_HINT, HEIF_SUFFIXES, is_heif, reads_heif

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp dib tif tiff gif ppm pgm pbm pnm jp2 j2k avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
START = 32  # bytes that `kind_by_start` looks at

# Of Synology, QNAP, macOS, Windows, Linux and Jupyter: thumbnails, copies and what was thrown away.
_TOOL_FOLDERS = frozenset(
    "@eadir @recycle @recently-snapshot #recycle #snapshot __macosx $recycle.bin lost+found".split()
) | {"system volume information", "network trash folder", "temporary items"}
_RUBBISH = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".ds_store", ".directory", ".nomedia"})
_SUFFIX = re.compile(r"\.[a-z][a-z0-9~_+-]*")
_PACKED = frozenset({".gz", ".bz2", ".xz", ".zst"})
HIDDEN, NO_SUFFIX, NO_FILE, LINK = "hidden", "without a suffix", "pipes or sockets", "links"
SECOND = "second images of a sample"
# What may hold pictures that somebody misses is named before the rest.
_MISSED = HEIF_SUFFIXES | {SECOND, NO_FILE, LINK}
_MISSED |= frozenset(".tar .tar.gz .tgz .tar.bz2 .tar.xz .tar.zst .zip .rar .dng .cr2 .cr3 .nef .arw .orf .rw2".split())
_MISSED |= frozenset(".7z .parquet .tfrecord .lmdb .svg .psd .jxl .exr .tga .npy .npz .dcm .pdf .mp4 .mov .avi".split())


class Rules(NamedTuple):
    """How images are told from other files: is HEIC read where it can be, are files without a suffix known by their
    first bytes, are folders of tools looked into."""

    heif: bool = True
    first_bytes: bool = True
    tools: bool = False

    def takes(self, suffix: str) -> bool:
        """Whether a suffix, in lower case, is that of an image."""
        return suffix in IMAGE_SUFFIXES or (self.heif and suffix in HEIF_SUFFIXES and reads_heif())


NOW = Rules()
OTHER_RULES = (Rules(heif=False), Rules(heif=False, first_bytes=False, tools=True))
"""By which runs began that go on: before pillow-heif was installed, and in earlier versions."""


def suffix_of(name: str) -> str:
    """In lower case; "" where there is none, as in `frame.0012`, `Mr. Smith` and `a.jpg?w=100`."""
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if suffix in _PACKED and stem.lower().endswith(".tar"):
        return f".tar{suffix}"
    return suffix if _SUFFIX.fullmatch(suffix) else ""


def is_tool_folder(name: str) -> bool:
    return name.lower() in _TOOL_FOLDERS


def is_rubbish(name: str) -> bool:
    """Whether a system, a file manager or `make_shards` wrote it for itself: not even worth a word."""
    return name.startswith(("._", "make_shards.")) or name.lower() in _RUBBISH or name == "index.json"


def kind_by_start(start: bytes, rules: Rules) -> str:
    """As what a file without a suffix that begins with these `START` bytes is passed over; "" for an image."""
    if is_heif(start):
        return "" if rules.takes(".heic") else ".heic"
    return "" if any(pattern.match(start) for pattern in _STARTS) else NO_SUFFIX


_STARTS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rb"\xff\xd8\xff",
        rb"\x89PNG\r\n\x1a\n",
        rb"GIF8[79]a",
        rb"RIFF....WEBP",
        rb"BM.{4}\0{4}.{4}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",  # the size of its second header
        rb"II[*+]\0|MM\0[*+]",
        rb"P[1-6]\s+(#|\d+\s+\d+\s)",
        rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        rb"....ftyp(avi[fs]|mif1.*avif)",
    )
]


class PassedOver:
    """What a source has seen and does not take: by kind the number, and one name."""

    SHOWN = 6  # kinds
    LONGEST = 80  # characters of a name

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """`kind`: a suffix, a folder's name with a slash, or words; `name`: of one, a path below the opened one."""
        before, example = self.kinds.get(kind, (0, name))
        self.kinds[kind] = before + count, example

    def include(self, other: "PassedOver") -> None:
        for kind, (count, example) in other.kinds.items():
            self.add(kind, example, count)

    def line(self) -> str:
        """All in one line for a person, what might be missed first; "" where there is nothing."""
        order = sorted(self.kinds.items(), key=lambda item: (item[0] not in _MISSED, -item[1][0], item[0]))
        parts = [self._part(kind, *found) for kind, found in order[: self.SHOWN]]
        rest = [count for _, (count, _) in order[self.SHOWN :]]
        if rest:
            parts.append(f"{sum(rest):,} of other kinds")
        return f"passed over: {', '.join(parts)}" if parts else ""

    def _part(self, kind: str, count: int, example: str) -> str:
        name = example if len(example) <= self.LONGEST else f"...{example[3 - self.LONGEST :]}"
        hint = f"; {HEIF_HINT}" if kind in HEIF_SUFFIXES and not reads_heif() else ""
        return f"{count:,} {kind} ({'e.g. ' if count > 1 else ''}{name}{hint})"
