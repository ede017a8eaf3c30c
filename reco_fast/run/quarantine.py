"""Images that are left out from the start: those a manifest calls bad, and those that ended an earlier process."""

import bisect
import json
import shutil
from pathlib import Path
from typing import Any

from reco_fast import distributed
from reco_fast.data import LabelledData
from reco_fast.errors import ConfigError
from reco_fast.pipelines.bad_images.journal import left_behind
from reco_fast.pipelines.bad_images.probe import DEADLY, Decoder, Probe
from reco_fast.pipelines.loader import resolve
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.run.files import parse_json, read_json, read_text, write_json
from reco_fast.settings.config import DataConfig

FILE = "quarantine.json"
JOURNALS = "decoding"


def prepare(folder: Path, data: DataConfig, source: ImageSource, labelled: LabelledData | None) -> list[str]:
    """Let the loaders of a run leave out what is known to be bad and note what they decode. On all ranks together,
    before any loader is opened. Returns lines to show.

    What a dead process left in its journals is decoded here, one image at a time in a process of its own; an image that
    ends that one too goes into `quarantine.json`.

    Raises ConfigError for a manifest or a quarantine.json that cannot be read.
    """
    sources = {"train": source} if labelled is None else {"train": source, "val": labelled.val}
    lines = []
    if distributed.rank() == 0:
        for name, images in sources.items():
            lines += _settle(folder, name, images, data)
    distributed.barrier()
    known = read_quarantine(folder)
    for name, images in sources.items():
        images.journal = folder / JOURNALS / name
        images.known_bad |= _by_index(images, known.get(name, {}))
    if data.manifest is not None:
        source.known_bad |= read_manifest(data.manifest, source)
    return lines


def read_quarantine(folder: Path) -> dict[str, dict[str, str]]:
    """Of each source of the run: name → reason."""
    path = folder / FILE
    values = read_json(path) if path.exists() else {}
    if not (isinstance(values, dict) and all(isinstance(v, dict) for v in values.values())):
        raise ConfigError(f"{path}: expected an object of objects, got another JSON value")
    return {name: {k: str(reason) for k, reason in found.items()} for name, found in values.items()}


def _settle(folder: Path, name: str, source: ImageSource, data: DataConfig) -> list[str]:
    journals = folder / JOURNALS / name
    suspects = [index for index in left_behind(journals) if 0 <= index < len(source)]
    found = _deadly(source, suspects, resolve(data.loader)) if suspects else {}
    if found:
        known = read_quarantine(folder)
        write_json(folder / FILE, known | {name: known.get(name, {}) | found})
    shutil.rmtree(journals, ignore_errors=True)
    return [f"{image} ended a process and is left out: {reason}" for image, reason in found.items()]


def _deadly(source: ImageSource, suspects: list[int], decoder: Decoder) -> dict[str, str]:
    """Name → reason of those that end a decoder, of `suspects` and of what stands in for them where they are bad."""
    found: dict[str, str] = {}
    seen: set[int] = set()
    with Probe(decoder) as probe:
        for suspect in suspects:
            for step in range(len(source)):
                index = (suspect + step) % len(source)
                if index in seen:
                    break
                seen.add(index)
                try:
                    reason = probe.reason(source.read(index))
                except OSError:
                    continue
                if reason is None:
                    break
                if reason.startswith(DEADLY):  # others are met, replaced and listed as in any run
                    found[source.names[index]] = reason
    return found


def _by_index(source: ImageSource, reasons: dict[str, str]) -> dict[int, str]:
    """Index → reason of the names that the source still has."""
    places = {name: bisect.bisect_left(source.names, name) for name in reasons}
    return {i: reasons[name] for name, i in places.items() if i < len(source) and source.names[i] == name}


def read_manifest(path: Path, source: ImageSource) -> dict[int, str]:
    """Index → reason of what `check_images` found bad in `source` and has not changed since. Raises ConfigError."""
    entries = {line["path"]: line for line in manifest_lines(path) if line["reason"] is not None}
    bad = _by_index(source, {name: line["reason"] for name, line in entries.items()})
    return {i: reason for i, reason in bad.items() if list(source.stamp(i)) == entries[source.names[i]]["stamp"]}


def manifest_lines(path: Path) -> list[dict[str, Any]]:
    """`path`, `stamp` (size and time of change) and `reason` (null: good) of each image. Raises ConfigError."""
    lines = []
    for text in read_text(path).splitlines():
        line = parse_json(text, path)
        ok = isinstance(line, dict) and set(line) == {"path", "stamp", "reason"} and isinstance(line["path"], str)
        if not ok or not (line["reason"] is None or isinstance(line["reason"], str)):
            raise ConfigError(f"{path}: expected lines with path, stamp and reason, got {text[:60]!r}")
        lines.append(line)
    return lines


def manifest_line(name: str, stamp: tuple[int, int], reason: str | None) -> str:
    return json.dumps({"path": name, "stamp": list(stamp), "reason": reason}) + "\n"
