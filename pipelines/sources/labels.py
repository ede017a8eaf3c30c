"""Classes of images, by their folders or by what is written beside them; or why there are none."""

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHOWN = 4  # names
BESIDE = "beside the folders"  # in the reason where labels are lost because of a few images


class Labels(NamedTuple):
    """`numbers` [n] int64 and the `classes` by number; or None, no classes, and the `reason`."""

    numbers: NDArray[np.int64] | None
    classes: list[str]
    reason: str


def unlabelled(reason: str) -> Labels:
    return Labels(None, [], reason)


def first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def by_folder(names: Sequence[str], *, folders: Sequence[str] | None = None, inside: bool = False) -> Labels:
    """The folders of the first level are the classes, where every image is in one and there are two or more. With
    `inside`, of the first level at which they differ: all may lie inside other folders. `folders`: of each image,
    unless those of its name are meant."""
    where = [sys.intern(name.rpartition("/")[0]) for name in names] if folders is None else folders
    parts = {folder: [part for part in folder.split("/") if part not in ("", ".")] for folder in set(where)}
    level = _shared_level(min(parts.values()), max(parts.values())) if inside else 0
    class_of = {folder: each[level] if len(each) > level else None for folder, each in parts.items()}
    found = sorted({name for name in class_of.values() if name is not None})
    if not found:
        return unlabelled(f"all {len(names):,} lie in one folder")
    stray = [place for place, folder in enumerate(where) if class_of[folder] is None]
    first = names[stray[0]] if stray else ""
    if len(stray) > max(3, len(names) // 100) or (stray and len(found) == 1):
        return unlabelled(f"{len(stray):,} of {len(names):,} lie in no folder, e.g. {first}")
    if stray:
        those = f"{first} lies" if len(stray) == 1 else f"{first} and {len(stray) - 1:,} more lie"
        return unlabelled(f"{those} {BESIDE} ({first_few(found)})")
    if len(found) == 1:
        deeper = sorted({each[1] for each in parts.values() if len(each) > 1})
        if len(deeper) < 2:
            return unlabelled(f"all {len(names):,} lie in the folder {found[0]}")
        return unlabelled(f"all lie in {found[0]}, which holds the folders {first_few(deeper)}: give {found[0]} itself")
    numbers = {name: number for number, name in enumerate(found)}
    found_numbers = np.fromiter((numbers[class_of[folder] or ""] for folder in where), np.int64, len(where))
    return Labels(found_numbers, found, "")


def _shared_level(first: list[str], last: list[str]) -> int:
    """How many folders all of them begin with, by the first and the last in order."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def by_text(names: Sequence[str], texts: Sequence[str | None]) -> Labels:
    """What is written beside each image: whole numbers, or else names; None: nothing is; "": it is neither."""
    nothing = [name for name, text in zip(names, texts, strict=True) if text is None]
    if nothing:
        return unlabelled(f"{len(nothing):,} of {len(names):,} have no .cls member, e.g. {nothing[0]}")
    neither = [name for name, text in zip(names, texts, strict=True) if not text]
    if neither:
        return unlabelled(f"the .cls member of {neither[0]} holds neither a whole number nor a name")
    found = {text for text in texts if text}
    if all(text.isascii() and text.isdigit() for text in found):
        value_of = {text: int(text) for text in found}
        values = sorted(set(value_of.values()))
        numbers = {text: values.index(value) for text, value in value_of.items()}
        classes = [str(value) for value in values]
    else:
        classes = sorted(found)
        numbers = {text: number for number, text in enumerate(classes)}
    return Labels(np.fromiter((numbers[text or ""] for text in texts), np.int64, len(texts)), classes, "")
