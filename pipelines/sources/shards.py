"""Images in WebDataset `.tar` shards."""

import os
import re
import sys
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources import kinds
from reco_fast.pipelines.sources.image_source import ImageSource, stamp_of
from reco_fast.pipelines.sources.kinds import NOW, PassedOver, Rules
from reco_fast.pipelines.sources.labels import by_folder, by_text

LONGEST_CLASS = 256  # bytes of a `.cls` member


class TarSource(ImageSource):
    """Images inside uncompressed `.tar` shards in WebDataset layout, found once by their headers and then read in
    any order. Labels are the `.cls` members, whole numbers or names, where every image has one; where none has, the
    folders inside."""

    def __init__(self, shards: list[Path], root: Path | None = None, rules: Rules = NOW) -> None:
        self.shards = [os.fspath(shard) for shard in shards]
        unreadable: dict[str, str] = {}
        passed_over, aside = PassedOver(), PassedOver()
        images, images_aside = _Images(), _Images()
        for path in shards:
            shard = os.fspath(path.relative_to(root)) if root else path.name
            try:
                content = _index_shard(path, shard, rules, passed_over)
            except tarfile.ReadError as error:
                raise DataError(f"{path}: expected an uncompressed .tar file, got something else ({error})") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read, {error.strerror}") from None
            if content.reason:
                unreadable[shard] = content.reason
            images.add(shard, [member for member in content.members if not member.aside], content.classes)
            images_aside.add(shard, [member for member in content.members if member.aside], content.classes)
            for member in content.members:
                if member.aside:
                    aside.add(member.aside, f"{shard}/{member.name}")
        if images.names:
            passed_over.include(aside)
        elif images_aside.names:  # where there is nothing else
            images = images_aside
        else:
            seen = passed_over.line()
            raise DataError(
                f"{shards[0]}: expected images inside (.jpg, .png, .webp, …), it has none{seen and f' ({seen})'}"
            )
        super().__init__(images.names)
        self.unreadable = unreadable
        passed_over.include(images.passed_over)
        self.passed_over = passed_over
        self._places = np.array(images.places, np.int64)
        self._counts = images.counts
        if any(text is not None for text in images.texts):
            found = by_text(images.names, images.texts)
        else:
            found = by_folder(images.inside, inside=True)
            if found.numbers is None:
                found = found._replace(reason=f"no .cls members, and {found.reason}")
        self.labels, self.classes, self.unlabelled = found

    def read(self, index: int) -> bytes:
        offset, size = self._places[index].tolist()
        with open(self._shard(index), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._places[index, 1]), stamp_of(self._shard(index))[1]

    def _shard(self, index: int) -> str:
        return self.shards[bisect_right(self._counts, index) - 1]

    def sizes(self) -> NDArray[np.int64]:
        return self._places[:, 1]


class _Member(NamedTuple):
    """An image in a shard: `key` of its sample, whether it is called `key.jpg` or the like, where its bytes are, and
    as what it is set `aside` ("": it is not)."""

    name: str
    key: str
    plain: bool
    offset: int
    size: int
    aside: str


class _Content(NamedTuple):
    """Of a shard: its images, key → class, and why the listing stopped before its end ("" where it did not)."""

    members: list[_Member]
    classes: dict[str, str]
    reason: str


class _Images:
    """Of all shards: names, what `.cls` members say, places, and how many there are up to each shard's end."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.inside: list[str] = []  # their shards
        self.texts: list[str | None] = []
        self.places: list[tuple[int, int]] = []
        self.counts = [0]
        self.passed_over = PassedOver()

    def add(self, shard: str, members: Sequence[_Member], classes: dict[str, str]) -> None:
        plain = {member.key for member in members if member.plain}
        for member in members:
            name = f"{shard}/{member.name}"
            if not member.plain and member.key in plain:  # `key.mask.png` is no sample beside `key.jpg`
                self.passed_over.add(kinds.SECOND, name)
                continue
            self.names.append(name)
            self.inside.append(member.name)
            self.texts.append(classes.get(member.key))
            self.places.append((member.offset, member.size))
        self.counts.append(len(self.names))


def _index_shard(path: Path, shard: str, rules: Rules, passed_over: PassedOver) -> _Content:
    """What of it is no image goes into `passed_over`. Raises OSError, and tarfile.ReadError where it is no tar file."""
    members: list[_Member] = []
    classes: dict[str, str] = {}
    reason = ""
    expected = 0  # where the next header should be
    with tarfile.open(path, "r:") as tar, open(path, "rb", buffering=0) as file:
        tar.ignore_zeros = True  # past a damaged header, and the end mark of the first of two joined archives
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
                if member.offset > expected and os.pread(file.fileno(), 512, expected).strip(b"\0"):
                    reason = f"damaged at byte {expected:,}, some of its images may be missing"
                expected = tar.offset
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = f".{extension.lower()}"
                if member.isfile() and extension == ".cls" and stem:
                    classes[f"{folder}/{stem}"] = _class_name(_start(file, member, LONGEST_CLASS + 1))
                    continue
                kind = _kind(file, member, base, rules)
                if kind:
                    passed_over.add(kind, f"{shard}/{member.name}")
                elif kind is not None:
                    aside = "" if rules.tools else _set_aside(folder)
                    plain = rules.takes(extension)
                    place = member.offset_data, member.size
                    members.append(_Member(member.name, f"{folder}/{stem}", plain, *place, aside))
            if os.pread(file.fileno(), 512, expected).strip(b"\0"):
                reason = reason or f"ends inside the header at byte {expected:,}"
        except tarfile.ReadError as error:
            if not members:
                raise
            reason = f"ends at {members[-1].name}: {error}"
    return _Content(members, classes, reason)


def _kind(file: FileIO, member: tarfile.TarInfo, base: str, rules: Rules) -> str | None:
    """As what a member is passed over: "" for an image, which is not; None where it is not worth a word."""
    if member.isdir() or (member.isfile() and kinds.is_rubbish(base)):
        return None
    if not member.isfile():
        return kinds.LINK if member.islnk() or member.issym() else kinds.NO_FILE
    if base.startswith("."):
        return kinds.HIDDEN
    if rules.takes(f".{base.rpartition('.')[2].lower()}") and "." in base:
        return ""
    suffix = kinds.suffix_of(base)
    if suffix or not rules.first_bytes:
        return suffix or kinds.NO_SUFFIX
    return kinds.kind_by_start(_start(file, member, kinds.START), rules)


def _start(file: FileIO, member: tarfile.TarInfo, count: int) -> bytes:
    return os.pread(file.fileno(), min(member.size, count), member.offset_data)


@lru_cache(maxsize=1024)
def _set_aside(folder: str) -> str:
    """As what images in this folder of a shard are passed over where there are others; "": they are not."""
    for part in folder.split("/"):
        if kinds.is_tool_folder(part):
            return f"{part}/"
        if part.startswith(".") and part not in (".", ".."):
            return kinds.HIDDEN
    return ""


def _class_name(text: bytes) -> str:
    """What a `.cls` member says; "" where that is no class: nothing, several lines, a number below 0."""
    name = text.decode("utf-8-sig", "surrogateescape").strip("\0 \t\r\n")
    fits = len(text) <= LONGEST_CLASS and len(name.splitlines()) == 1 and not re.fullmatch(r"-\d+", name)
    return sys.intern(name) if fits else ""
