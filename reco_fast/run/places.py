"""Where the images of a run lie now: its folder and they may have moved, and it may be asked about from elsewhere."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from reco_fast.errors import ConfigError
from reco_fast.pipelines.sources.named import DATA_SETS
from reco_fast.pipelines.stores.where import is_url
from reco_fast.run.files import read_json
from reco_fast.settings.config import Config

_PATTERN = re.compile(r"[*?\[{]")


def recorded_places(folder: Path) -> dict[str, str]:
    """What environment.json keeps so that `located` finds the run's images: the directory in which relative paths of
    config.json mean something, and where the run folder was then."""
    try:
        return {"directory": os.getcwd(), "folder": os.path.abspath(folder)}
    except OSError:  # the current directory has been removed
        return {}


def located(config: Config, folder: Path) -> Config:
    """`config` of the run in `folder`, the path of each data set as it can be opened from here: where the run had it;
    else in the same place beside the run folder, which may have moved with its images; else as it is."""
    environment = read_environment(folder)
    directory, before = environment.get("directory"), environment.get("folder")
    if not isinstance(directory, str) or not isinstance(before, str) or "\0" in directory + before:
        return config  # of an earlier version, or by somebody else
    data, paths = config.data, (config.data.path, config.data.val_path, config.data.manifest, config.eval.train_path)
    path, val_path, manifest, train_path = (_located(each, directory, before, folder) for each in paths)
    data = dataclasses.replace(data, path=path, val_path=val_path, manifest=Path(manifest) if manifest else None)
    return dataclasses.replace(config, data=data, eval=dataclasses.replace(config.eval, train_path=train_path))


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json of a run; empty where there is none that can be read."""
    try:
        values = read_json(folder / "environment.json")
    except ConfigError:
        return {}
    return values if isinstance(values, dict) else {}


def _located(path: str | Path | None, directory: str, before: str, folder: Path) -> str | None:
    if path is None:
        return None
    path = os.fspath(path)
    if is_url(path):
        return path
    text = os.path.expanduser(path)
    prefix, split = "", ""
    if text.startswith("hf:"):
        prefix, text = "hf:", os.path.expanduser(text.removeprefix("hf:"))
        if ":" in text and not _is_there(os.path.join(directory, text)):
            text, colon, name = text.rpartition(":")
            split = colon + name
    then = os.path.join(directory, text)
    now = os.path.normpath(os.path.join(os.path.abspath(folder), os.path.relpath(then, before)))
    for place in (then, now):
        if _is_there(place):
            return f"{prefix}{place}{split}"
    named = bool(prefix) or text.partition(":")[0] in DATA_SETS
    return path if named or _is_there(text) else then


def is_there(path: str) -> bool:
    """Whether there is something to open at `path`, or it is a data set by name or a URL, which only opening tells."""
    return is_url(path) or path.startswith("hf:") or path.partition(":")[0] in DATA_SETS or _is_there(path)


def _is_there(text: str) -> bool:
    """Whether something is at a path, or of a pattern in the folder before its first `*`, `?`, `[` or `{`."""
    if os.path.lexists(text):
        return True
    found = _PATTERN.search(text)
    return found is not None and os.path.isdir(os.path.dirname(text[: found.start()]) or ".")


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths, as `located` gives them, lead to one place."""
    if one is None or other is None or is_url(one) or is_url(other):
        return one == other
    return one == other or os.path.realpath(one) == os.path.realpath(other)
