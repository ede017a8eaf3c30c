"""Images that are left out from the start: those a manifest calls bad, and those that ended an earlier process."""

import contextlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reco_fast import distributed
from reco_fast.data.images import LabelledData
from reco_fast.errors import ConfigError
from reco_fast.pipelines.bad_images.journal import left_behind
from reco_fast.pipelines.bad_images.probe import DEADLY, Decoder, Probe
from reco_fast.pipelines.base import LoaderKind
from reco_fast.pipelines.loader import resolve
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.run.files import parse_json, read_json, read_lines, write_json
from reco_fast.settings.config import DataConfig

FILE = "quarantine.json"
JOURNALS = "decoding"


def prepare(folder: Path, data: DataConfig, source: ImageSource, labelled: LabelledData | None) -> list[str]:
    """`leave_out` for the sources of a run, and what a manifest calls bad. On all ranks together, before any loader is
    opened. Returns lines to show.

    Raises ConfigError for a manifest or a quarantine.json that cannot be read.
    """
    sources = {"train": source} if labelled is None else {"train": source, "val": labelled.val}
    if labelled is not None and labelled.train is not source:
        sources["eval"] = labelled.train
    lines = leave_out(folder, data.loader, sources)
    if data.manifest is not None:
        bad = read_manifest(data.manifest, source)
        source.known_bad |= bad
        lines += _without_effect(data.manifest, len(bad)) if distributed.rank() == 0 else []
    return lines


def leave_out(folder: Path, loader: LoaderKind, sources: Mapping[str, ImageSource]) -> list[str]:
    """Let loaders leave out what ended an earlier process that worked in `folder`, and note there what they decode.

    What a dead process left in its journals is decoded here, one image at a time in a process of its own; an image that
    ends that one too goes into `quarantine.json`. Returns lines to show. Raises ConfigError.
    """
    lines = []
    if distributed.rank() == 0:
        for name, images in sources.items():
            lines += _settle(folder, name, images, loader)
    distributed.barrier()
    known = read_quarantine(folder)
    for name, images in sources.items():
        images.journal = folder / JOURNALS / name
        images.known_bad |= _by_index(images, known.get(name, {}))
    return lines


def tidy(folder: Path) -> None:
    """Remove the places for notes, where no process has left any."""
    for place in sorted((folder / JOURNALS).glob("**/"), reverse=True):
        with contextlib.suppress(OSError):
            place.rmdir()


def _without_effect(manifest: Path, left_out: int) -> list[str]:
    named = sum(line["reason"] is not None for line in manifest_lines(manifest))
    if named == left_out:
        return []
    return [f"{manifest}: {named - left_out} of its {named} bad images are not in --data.path, or have changed since"]


def read_quarantine(folder: Path) -> dict[str, dict[str, str]]:
    """Of each source of the run: name → reason."""
    path = folder / FILE
    values = read_json(path) if path.exists() else {}
    if not (isinstance(values, dict) and all(isinstance(v, dict) for v in values.values())):
        raise ConfigError(f"{path}: expected an object of objects, got another JSON value")
    return {name: {k: str(reason) for k, reason in found.items()} for name, found in values.items()}


def _settle(folder: Path, name: str, source: ImageSource, loader: LoaderKind) -> list[str]:
    journals = folder / JOURNALS / name
    suspects = [index for index in left_behind(journals) if 0 <= index < len(source)]
    found = _deadly(source, suspects, resolve(loader)) if suspects else {}
    if found:
        known = read_quarantine(folder)
        write_json(folder / FILE, known | {name: known.get(name, {}) | found})
    shutil.rmtree(journals, ignore_errors=True)
    return [f"{image} ended a process and is left out: {reason}" for image, reason in found.items()]


def _deadly(source: ImageSource, suspects: list[int], decoder: Decoder) -> dict[str, str]:
    """Name → reason of those that end a decoder."""
    found: dict[str, str] = {}
    with Probe(decoder) as probe:
        for index in suspects:
            with contextlib.suppress(OSError):
                reason = probe.reason(source.read(index))
                if reason is not None and reason.startswith(DEADLY):  # others are met and listed as in any run
                    found[source.names[index]] = reason
    return found


def _by_index(source: ImageSource, reasons: dict[str, str]) -> dict[int, str]:
    """Index → reason of the images that the source still has under these names."""
    return {i: reasons[name] for name, places in source.names.find(reasons).items() for i in places}


def read_manifest(path: Path, source: ImageSource) -> dict[int, str]:
    """Index → reason of what `check_images` found bad in `source` and has not changed since. Raises ConfigError."""
    bad = {line["path"] for line in manifest_lines(path) if line["reason"] is not None}
    indices = sorted(i for places in source.names.find(bad).values() for i in places)
    known = known_reasons(path, source, {i: source.stamp(i) for i in indices})
    return {i: reason for i, reason in known.items() if reason is not None}


def known_reasons(path: Path, source: ImageSource, stamps: Mapping[int, tuple[int, int]]) -> dict[int, str | None]:
    """Index → reason (None: good) of the images in `stamps`, by ascending index, of which the manifest has a line with
    this stamp. Of several with one name and stamp the first line is about the first, and so on. Raises ConfigError."""
    names = {source.names[i] for i in stamps}
    lines: defaultdict[tuple[str, str], list[str | None]] = defaultdict(list)
    for line in manifest_lines(path):
        if line["path"] in names:
            lines[line["path"], str(line["stamp"])].append(line["reason"])
    known = {}
    for i, stamp in stamps.items():
        if alike := lines.get((source.names[i], str(list(stamp)))):
            known[i] = alike.pop(0)
    return known


def manifest_lines(path: Path) -> Iterator[dict[str, Any]]:
    """`path`, `stamp` (size and time of change) and `reason` (null: good) of each image. Raises ConfigError."""
    for text in read_lines(path):
        line = parse_json(text, path)
        ok = isinstance(line, dict) and set(line) == {"path", "stamp", "reason"} and isinstance(line["path"], str)
        if not ok or not (line["reason"] is None or isinstance(line["reason"], str)):
            raise ConfigError(f"{path}: expected lines with path, stamp and reason, got {text[:60]!r}")
        yield line


def manifest_line(name: str, stamp: tuple[int, int], reason: str | None) -> str:
    return json.dumps({"path": name, "stamp": list(stamp), "reason": reason}) + "\n"
