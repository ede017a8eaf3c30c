"""Where encoded images come from: `open_source` knows by its path or name what a data set is."""

import os
import re
from glob import has_magic
from pathlib import Path

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.folders import open_folder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.kinds import NOW, Rules
from reco_fast.pipelines.sources.patterns import matching
from reco_fast.pipelines.sources.shards import open_shards
from reco_fast.pipelines.stores.where import HERE, Stores, is_url


def open_source(path: str | os.PathLike[str], rules: Rules = NOW, stores: Stores = HERE) -> ImageSource:
    """Open a folder of images, a `.tar` file, a folder of `.tar` files, or a pattern of them such as
    `train-{0000..0127}.tar` or `train-*.tar`; any of these in a store, by URL; an index of shards, `.json`;
    `hf:NAME[:SPLIT]` of Hugging Face; or, where nothing has this path, `cifar10[:test]` or `stl10[:test|:unlabeled]`.
    `rules`: what of a folder or a shard is an image; `stores`: how what comes from a store is kept.

    Raises:
        DataError: there is nothing at `path`, or no image in it.
    """
    text = os.fspath(path).removeprefix("file://")
    if is_url(text):
        from reco_fast.pipelines.stores.opening import open_store

        return open_store(text, rules, stores)
    if text.startswith("hf:"):
        from reco_fast.pipelines.sources.hugging_face import open_hugging_face

        return open_hugging_face(text.removeprefix("hf:"))
    place = Path(os.path.expanduser(text))  # which takes `~x` for a name where there is no such user
    if place.is_dir():
        return open_folder(place, rules)
    if place.is_file():
        if place.suffix.lower() == ".json":
            from reco_fast.pipelines.stores.opening import open_index

            return open_index(os.fspath(place), rules, stores)
        if place.suffix.lower() != ".tar":
            raise DataError(f"{text}: expected a folder of images or uncompressed .tar shards, got a file")
        return open_shards([os.fspath(place)], [place.name], rules)
    if has_magic(text) or re.search(r"\{.*\}", text):
        shards = matching(os.path.expanduser(text))
        if not shards:
            raise DataError(f"{text}: expected .tar files, no file matches this pattern")
        for shard in shards:
            if not shard.is_file():
                raise DataError(f"{shard}: expected a .tar file, there is none")
        return open_shards([os.fspath(shard) for shard in shards], [shard.name for shard in shards], rules)
    from reco_fast.pipelines.sources.named import DATA_SETS, open_named

    name, _, split = text.partition(":")
    if name in DATA_SETS:
        return open_named(name, split)
    raise DataError(f"{text}: expected a folder of images or .tar shards, there is nothing at this path")
