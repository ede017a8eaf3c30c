"""Images in WebDataset `.tar` shards."""

import os
import re
import sys
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from io import FileIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources import kinds
from reco_fast.pipelines.sources.image_source import ImageSource, PackedNames, stamp_of
from reco_fast.pipelines.sources.kinds import NOW, PassedOver, Rules
from reco_fast.pipelines.sources.labels import by_folder, by_text

LONGEST_CLASS = 256  # bytes of a `.cls` member


class ShardContent(NamedTuple):
    """What is inside a shard, by its headers. `names`, `offsets` and `sizes` of its images, in its order, bytes;
    `aside`: place → as what an image is passed over where there are others; `classes`: sample → what its `.cls` member
    says; `passed_over`: as `PassedOver.kinds` has it; `reason`: why the listing stopped before its end, or ""."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    aside: dict[int, str]
    classes: dict[str, str]
    passed_over: dict[str, tuple[int, str]]
    reason: str

    @property
    def samples(self) -> int:
        """How many have an image or a class: as WebDataset counts, `key.jpg` and `key.mask.png` are of one."""
        keys = {f"{folder}/{stem}" for folder, stem, _ in map(_sample, self.names)}
        return len(keys | self.classes.keys())


class TarSource(ImageSource):
    """Images inside uncompressed `.tar` shards in WebDataset layout, known by their headers and then read in any order.
    Labels are the `.cls` members, whole numbers or names, where every image has one; where none has, the folders
    inside.

    Args:
        shards: where each is, in this order.
        contents: for each the name with which those of its images begin, and what is inside; read one by one.
    """

    ends: list[int]

    def __init__(self, shards: list[str], contents: Iterable[tuple[str, ShardContent]], rules: Rules = NOW) -> None:
        self.shards = shards
        unreadable: dict[str, str] = {}
        passed_over, aside = PassedOver(), PassedOver()
        images, images_aside = _Images(), _Images()
        for shard, content in contents:
            if content.reason:
                unreadable[shard] = content.reason
            for kind, (count, name) in content.passed_over.items():
                passed_over.add(kind, f"{shard}/{name}", count)
            for place, kind in content.aside.items():
                aside.add(kind, f"{shard}/{content.names[place]}")
            images.add(shard, content, [n for n in range(len(content.names)) if n not in content.aside], rules)
            images_aside.add(shard, content, list(content.aside), rules)
        if len(images):
            passed_over.include(aside)
        elif len(images_aside):  # where there is nothing else
            images = images_aside
        else:
            seen = passed_over.line()
            raise DataError(
                f"{shards[0]}: expected images inside (.jpg, .png, .webp, …), it has none{seen and f' ({seen})'}"
            )
        super().__init__(images.names())
        self.unreadable = unreadable
        passed_over.include(images.passed_over)
        self.passed_over = passed_over
        self._offsets = np.frombuffer(images.offsets, np.int64)
        self._sizes = np.frombuffer(images.sizes, np.int64)
        self.ends = images.ends[1:]
        if any(text is not None for text in images.texts):
            found = by_text(self.names, images.texts)
        else:
            found = by_folder(self.names, folders=images.folders, inside=True)
            if found.numbers is None:
                found = found._replace(reason=f"no .cls members, and {found.reason}")
        self.labels, self.classes, self.unlabelled = found

    def read(self, index: int) -> bytes:
        with open(self.shards[self.shard_of(index)], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self._sizes[index]), int(self._offsets[index]))

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._sizes[index]), stamp_of(self.shards[self.shard_of(index)])[1]

    def shard_of(self, index: int) -> int:
        return bisect_right(self.ends, index)

    def sizes(self) -> NDArray[np.int64]:
        return self._sizes


def open_shards(paths: list[str], names: list[str], rules: Rules = NOW) -> TarSource:
    """Local `.tar` files, whose images' names begin with `names`. Raises DataError."""
    return TarSource(paths, ((name, index_shard(path, rules)) for path, name in zip(paths, names, strict=True)), rules)


class _Images:
    """Of all shards, in columns: a million images must not take a gigabyte. `ends`: how many there are up to each
    shard's end, after a 0."""

    def __init__(self) -> None:
        self.folders: list[str] = []  # inside the shard
        self.texts: list[str | None] = []  # what `.cls` members say
        self.offsets = array("q")
        self.sizes = array("q")
        self.ends = [0]
        self.passed_over = PassedOver()
        self._letters = bytearray()
        self._name_ends = array("q", [0])

    def __len__(self) -> int:
        return len(self.sizes)

    def names(self) -> PackedNames:
        return PackedNames.of(self._letters, np.frombuffer(self._name_ends, np.int64))

    def add(self, shard: str, content: ShardContent, places: list[int], rules: Rules) -> None:
        """The images at these places of a shard."""
        samples = [_sample(content.names[place]) for place in places]
        plain = {(folder, stem) for folder, stem, extension in samples if rules.takes(extension)}
        for place, (folder, stem, extension) in zip(places, samples, strict=True):
            name = f"{shard}/{content.names[place]}"
            if not rules.takes(extension) and (folder, stem) in plain:  # `key.mask.png` is no sample beside `key.jpg`
                self.passed_over.add(kinds.SECOND, name)
                continue
            self._letters += os.fsencode(name)
            self._name_ends.append(len(self._letters))
            self.folders.append(folder)
            self.texts.append(content.classes.get(f"{folder}/{stem}"))
            self.offsets.append(content.offsets[place])
            self.sizes.append(content.sizes[place])
        self.ends.append(len(self))


def _sample(name: str) -> tuple[str, str, str]:
    """Folder, key inside it, and extension from the first dot on, in lower case, as WebDataset takes a name apart."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return sys.intern(folder), stem, f".{extension.lower()}"


def index_shard(path: str, rules: Rules = NOW, called: str = "") -> ShardContent:
    """What is inside a local `.tar` file, which messages name as `called`. Raises DataError where it cannot be read or
    is no uncompressed `.tar`."""
    try:
        return _index(path, rules)
    except tarfile.ReadError as error:
        raise DataError(f"{called or path}: expected an uncompressed .tar file, got something else ({error})") from None
    except OSError as error:
        raise DataError(f"{called or path}: cannot be read, {error.strerror}") from None


def _index(path: str, rules: Rules) -> ShardContent:
    content = ShardContent([], [], [], {}, {}, {}, "")
    passed_over = PassedOver()
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
                folder, stem, extension = _sample(member.name)
                base = member.name.rpartition("/")[2]
                if member.isfile() and extension == ".cls" and stem:
                    content.classes[f"{folder}/{stem}"] = _class_name(_start(file, member, LONGEST_CLASS + 1))
                    continue
                kind = _kind(file, member, base, rules)
                if kind:
                    passed_over.add(kind, member.name)
                elif kind is not None:
                    aside = "" if rules.tools else _set_aside(folder)
                    if aside:
                        content.aside[len(content.names)] = aside
                    content.names.append(member.name)
                    content.offsets.append(member.offset_data)
                    content.sizes.append(member.size)
            if os.pread(file.fileno(), 512, expected).strip(b"\0"):
                reason = reason or f"ends inside the header at byte {expected:,}"
        except tarfile.ReadError as error:
            if not content.names:
                raise
            reason = f"ends at {content.names[-1]}: {error}"
    return content._replace(passed_over=passed_over.kinds, reason=reason)


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
