"""A small data set is read and checked once; small images are kept as what was decoded from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import needs_dali, take, training
from small_runs import write_pictures

from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.images import decode_image, ppm_header, to_ppm
from reco_fast.pipelines.loader import ImageReader, Sample
from reco_fast.pipelines.sources import open_source


def test_a_small_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_pictures(tmp_path, 4))
    reads: list[int] = []
    read = source.read

    def counted(index: int) -> bytes:
        reads.append(index)
        return read(index)

    monkeypatch.setattr(source, "read", counted)
    cached, direct = ImageReader(source, "skip", cache_bytes=10**6), ImageReader(source, "skip")
    for _ in range(3):
        for index in range(4):
            assert cached.read(index) == direct.read(index)
    assert len(reads) == 4 + 12


def test_small_images_are_kept_as_what_was_decoded(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path, 4))
    plain = ImageReader(source, "skip").read(0)
    size = plain.height, plain.width
    ppm = plain._replace(data=to_ppm(plain.data)[0])
    pixels = np.asarray(decode_image(plain.data))
    needed = 4 * 3 * size[0] * size[1]
    for cache_bytes, expected in ((10**6, ppm), (needed, ppm), (needed - 1, plain), (0, plain)):
        reader = ImageReader(source, "skip", cache_bytes=cache_bytes)
        assert reader.keeps_decoded(*size) is (expected is ppm)
        reader.keep(reader.read(0), pixels)
        assert reader.read(0) == expected
    reader = ImageReader(source, "skip", cache_bytes=needed + 100)  # and four headers
    for index in range(4):
        reader.keep(reader.read(index), pixels)
    assert all(reader.read(index).data == ppm.data for index in range(4))
    assert not ImageReader(source, "skip", cache_bytes=10**9).keeps_decoded(64, 65)


@needs_dali
def test_what_dali_decoded_is_not_decoded_again(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the views are those of images that are decoded each time."""
    from reco_fast.pipelines.dali import DaliLoader

    source = open_source(cifar)
    given: list[set[bytes]] = []  # how the images of a batch begin
    prepare = DaliLoader._prepare

    def noted(self: DaliLoader, positions: Any, samples: list[Sample]) -> Any:
        given.append({sample.data[:2] for sample in samples})
        return prepare(self, positions, samples)

    monkeypatch.setattr(DaliLoader, "_prepare", noted)
    kept = take(training("dali", source, reco_recipe(32), 60), 20)  # four epochs
    assert given[0] == {b"\xff\xd8"}
    assert given[15:20] == 5 * [{b"P6"}]
    monkeypatch.setattr(ImageReader, "keeps_decoded", lambda *_: False)
    for ours, theirs in zip(kept, take(training("dali", source, reco_recipe(32), 60), 20), strict=True):
        assert all(map(torch.equal, ours.views, theirs.views))
    assert given[-1] == {b"\xff\xd8"}


@needs_dali
def test_pixels_from_a_gpu_are_read_when_their_copy_is_there(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Stream:
        def record_event(self) -> "Stream":
            return self

        def synchronize(self) -> None:
            events.append("wait")

    class Decoded:
        def at(self, row: int) -> Any:
            events.append(row)
            return np.full((32, 32, 3), row, np.uint8)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    with training("dali", open_source(cifar), reco_recipe(32), 4) as opened:
        loader: Any = opened
        indices = next(loader).indices.tolist()
        reader = ImageReader(open_source(cifar), "skip", cache_bytes=10**7)
        loader._reader, loader._device = reader, torch.device("cuda")
        samples = [reader.read(index) for index in indices]
        for _ in range(2):  # the second time there is nothing to keep
            loader._keep([reader.read(index) for index in indices[1:]], Decoded())
    assert events == ["wait", 0, 1, 2]
    assert reader.read(indices[3]).data == ppm_header(32, 32) + bytes([2]) * (3 * 32 * 32)
    assert reader.read(indices[0]) == samples[0]
