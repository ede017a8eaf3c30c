"""A small data set is read and checked once; small images are kept as what was decoded from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import needs_dali, take, training
from PIL import Image
from small_runs import write_pictures

from reco_fast.pipelines.augmentations import reco_recipe, stand_ins
from reco_fast.pipelines.base import Decoded, ImageReader, Sample
from reco_fast.pipelines.images import decode_image, ppm_header, to_ppm
from reco_fast.pipelines.sources.open import open_source


def good(reader: ImageReader, index: int) -> Sample:
    sample = reader.read(0, index)
    assert sample is not None
    return sample


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
            assert cached.read(0, index) == direct.read(0, index)
    assert len(reads) == 4 + 12


def test_small_images_are_kept_as_what_was_decoded(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path, 4))
    plain = good(ImageReader(source, "skip"), 0)
    size = plain.height, plain.width
    ppm = plain._replace(data=to_ppm(plain.data)[0])
    pixels = np.asarray(decode_image(plain.data))
    needed = 4 * 3 * size[0] * size[1]
    for cache_bytes, expected in ((10**6, ppm), (needed, ppm), (needed - 1, plain), (0, plain)):
        reader = ImageReader(source, "skip", cache_bytes=cache_bytes)
        assert reader.keeps_decoded(*size) is (expected is ppm)
        reader.keep(good(reader, 0), pixels)
        assert good(reader, 0) == expected
    reader = ImageReader(source, "skip", cache_bytes=needed)
    for index in range(4):
        assert reader.decoded(np.arange(4), np.arange(4)) is None
        reader.keep(good(reader, index), pixels)
    assert all(good(reader, index).data == ppm.data for index in range(4))
    assert not ImageReader(source, "skip", cache_bytes=10**9).keeps_decoded(64, 65)


def test_a_batch_is_one_array_once_all_good_images_are_kept(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path, 4))
    source.known_bad[1] = "it ends the decoder"
    reader = ImageReader(source, "skip", seed=7, cache_bytes=10**6)
    shape = good(reader, 0).height, good(reader, 0).width, 3
    for place in (0, 3, 2):
        assert reader.decoded(np.arange(2), np.array([0, 3])) is None
        reader.keep(good(reader, place), np.full(shape, place, np.uint8))
    decoded = reader.decoded(np.array([8, 9, 10]), np.array([3, 1, 0]))
    assert decoded is not None
    stand_in = next(place for place in stand_ins(4, 7, 9) if place != 1)
    assert decoded.places.tolist() == [3, stand_in, 0]
    assert np.array_equal(
        decoded.pixels, np.array([3, stand_in, 0], np.uint8)[:, None, None, None] * np.ones(shape, np.uint8)
    )


def test_images_of_another_size_are_kept_and_never_in_the_array(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path, 2))
    reader = ImageReader(source, "skip", cache_bytes=10**6)
    first, second = (good(reader, place) for place in range(2))
    reader.keep(first, np.zeros((first.height, first.width, 3), np.uint8))
    other = second._replace(width=second.width + 1)
    reader.keep(other, np.ones((other.height, other.width, 3), np.uint8))
    assert good(reader, 0).data == ppm_header(first.height, first.width) + bytes(3 * first.height * first.width)
    assert good(reader, 1).data[:20].startswith(ppm_header(other.height, other.width))
    assert reader.decoded(np.arange(2), np.arange(2)) is None


@needs_dali
@pytest.mark.parametrize("mixed", ["same size", "one bad", "two sizes"])
def test_what_dali_decoded_is_not_decoded_again(
    mixed: str, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the views are those of images that are decoded each time. Where all are of one size, a batch is one array for
    a graph without a decoder, which is built once."""
    from reco_fast.pipelines.dali import DaliLoader

    for number, path in enumerate(sorted(cifar.rglob("*.jpg"))):
        (tmp_path / f"{number:03d}.jpg").write_bytes(path.read_bytes())
    if mixed == "two sizes":
        Image.open(tmp_path / "017.jpg").resize((33, 32)).save(tmp_path / "017.jpg")
    elif mixed == "one bad":
        (tmp_path / "017.jpg").write_bytes(b"<html>")
    source = open_source(tmp_path)
    given: list[set[str]] = []  # what the images of a batch are
    built: list[bool] = []  # whether with a decoder
    prepare, build = DaliLoader._prepare, DaliLoader._build

    def noted(self: DaliLoader, positions: Any, images: Any) -> Any:
        given.append({"array"} if isinstance(images, Decoded) else {"JPEG PPM".split()[s.decoded] for s in images})
        prepared = prepare(self, positions, images)
        kinds = {
            type(tensor).__name__ for entry in prepared.inputs for tensor in (entry if type(entry) is list else [entry])
        }
        assert kinds <= {"TensorCPU", "TensorListCPU"}  # or the thread that trains would turn them into such
        return prepared

    def counted(self: DaliLoader) -> Any:
        pipeline = build(self)
        built.append(not self._takes_decoded)
        return pipeline

    monkeypatch.setattr(DaliLoader, "_prepare", noted)
    monkeypatch.setattr(DaliLoader, "_build", counted)
    kept = take(training("dali", source, reco_recipe(32), 60), 20)  # four epochs
    assert given[0] == {"JPEG"}
    assert given[15:20] == 5 * [{"PPM"} if mixed == "two sizes" else {"array"}]
    assert built == ([True] if mixed == "two sizes" else [True, False])
    monkeypatch.setattr(ImageReader, "keeps_decoded", lambda *_: False)
    for ours, theirs in zip(kept, take(training("dali", source, reco_recipe(32), 60), 20), strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert all(map(torch.equal, ours.views, theirs.views))
    assert given[-1] == {"JPEG"}


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
        samples = [good(reader, index) for index in indices]
        for _ in range(2):  # the second time there is nothing to keep
            loader._keep([good(reader, index) for index in indices[1:]], Decoded())
    assert events == ["wait", 0, 1, 2]
    assert good(reader, indices[3]).data == ppm_header(32, 32) + bytes([2]) * (3 * 32 * 32)
    assert good(reader, indices[0]) == samples[0]
