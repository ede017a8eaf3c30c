"""Both loaders among images that are odd, bad or lying: decoded alike, or replaced and named."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import HAS_DALI, both_loaders, levels, needs_dali, take, tiny, training
from odd_images import bad_images, deceiving_images, encode, odd_images, picture
from small_runs import write_pictures

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import Recipe, ViewRecipe, evaluation_recipe, reco_recipe, stand_ins
from reco_fast.pipelines.base import Loader
from reco_fast.pipelines.images import to_plain
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import EvaluationOrder, TrainingOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source


@needs_dali
def test_every_decodable_file_gives_the_same_pixels(tmp_path: Path) -> None:
    for name, data in odd_images().items():
        (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path)
    recipe = Recipe((ViewRecipe(center_crop=1.0),), 40)  # as large as the pictures: hardly any resampling
    for kind in ("dali", "torch"):
        with training(kind, source, recipe, batch_size=len(source)) as loader:
            batch = next(loader)
            assert not loader.bad_images
            pixels = levels(batch.views[0], recipe)[batch.indices.argsort()]
        if kind == "dali":
            first = pixels
    worst = (first - pixels).abs().amax(dim=(1, 2, 3))
    assert worst.max() <= 1.01, dict(zip(source.names, worst.tolist(), strict=True))


def mixed_folder(folder: Path, good: int = 80) -> tuple[ImageSource, set[str]]:
    """Many plain images, every odd one and every bad one, in an order that puts bad ones side by side."""
    folder.mkdir(exist_ok=True)
    for number in range(good):
        (folder / f"plain {number:03d}.jpg").write_bytes(encode(picture(seed=number), "JPEG"))
    for name, data in (odd_images() | bad_images() | deceiving_images()).items():
        (folder / name).write_bytes(data)
    (folder / "broken link.jpg").symlink_to("nowhere")
    return open_source(folder), {*bad_images(), *deceiving_images(), "broken link.jpg"}


@both_loaders
@pytest.mark.parametrize("batch_size", [32, 128])
def test_bad_images_are_replaced_and_named(kind: str, batch_size: int, tmp_path: Path) -> None:
    source, bad = mixed_folder(tmp_path)
    bad_indices = {index for index, name in enumerate(source.names) if name in bad}
    steps = 3 * len(source) // batch_size + 1
    order = TrainingOrder(len(source), batch_size, seed=3)
    with training(kind, source, reco_recipe(32), batch_size) as loader:
        for step in range(steps):
            batch = next(loader)
            assert len(batch.indices) == batch_size == len(batch.views[0])
            positions, wanted = (each.tolist() for each in order.batch(step))
            for used, position, asked in zip(batch.indices.tolist(), positions, wanted, strict=True):
                if asked in bad_indices:
                    asked = next(i for i in stand_ins(len(source), 7, position) if i not in bad_indices)
                assert used == asked
        assert set(loader.bad_images) == bad
        assert all(reason and "\n" not in reason for reason in loader.bad_images.values())


@both_loaders
def test_a_bad_image_can_end_the_run(kind: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, 20)
    (tmp_path / "13.jpg").write_bytes(b"<html>")
    loader = training(kind, open_source(tmp_path), tiny(), 20, on_bad_image="raise")
    with loader, pytest.raises(DataError, match=r"^13\.jpg: not an image: it starts with b'<html>'$"):
        next(loader)


@both_loaders
def test_a_folder_without_any_good_image(kind: str, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.jpg").write_bytes(b"text")
    with (
        training(kind, open_source(tmp_path), tiny()) as loader,
        pytest.raises(DataError, match=r"no image can be used, e\.g\. \d\d\.jpg: not an image"),
    ):
        next(loader)


@both_loaders
def test_a_file_that_vanishes_is_named(kind: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, 20)
    source = open_source(tmp_path)
    (tmp_path / "07.jpg").unlink()
    with training(kind, source, tiny(), 20) as loader:
        batch = next(loader)
        assert loader.bad_images == {"07.jpg": "No such file or directory"}
    assert len({*batch.indices.tolist()} | {7}) == 20  # one of the others is there twice


@both_loaders
def test_stand_ins_for_neighbours_come_from_all_over(kind: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, 60)
    for number in range(20, 32):
        (tmp_path / f"{number}.jpg").write_bytes(b"text")
    batches = take(training(kind, open_source(tmp_path), tiny(), 20), 9)  # three epochs
    epochs = [Counter(torch.cat([batch.indices for batch in batches[i : i + 3]]).tolist()) for i in (0, 3, 6)]
    for epoch in epochs:
        assert len(epoch) == 48
        assert max(epoch.values()) <= 3  # 13 where the next good image stands in for all of them
    assert len({tuple(sorted(epoch.items())) for epoch in epochs}) == 3  # others each time


@pytest.mark.parametrize("length", [1, 2, 12, 97, 1000])
def test_every_place_stands_in_once(length: int) -> None:
    first = [list(stand_ins(length, 5, position)) for position in range(200)]
    assert all(sorted(places) == list(range(length)) for places in first)
    starts = Counter(places[0] for places in first)
    assert max(starts.values()) <= 200 / length + 5 * (200 / length) ** 0.5 + 3
    assert length < 12 or [places[1] for places in first] != [(places[0] + 1) % length for places in first]


@both_loaders
@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("trusting", [False, True])
def test_an_evaluation_goes_without_bad_images(
    kind: str, batch_size: int, trusting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if they were not there, also where whole batches are bad, or where only a decoder finds out."""
    from reco_fast.pipelines import base

    source, bad = mixed_folder(tmp_path / "mixed")
    for number in range(30):
        (tmp_path / "mixed" / f"plain 040 {number}.jpg").write_bytes(
            [b"text", *deceiving_images().values()][number % 5]
        )
    source = open_source(tmp_path / "mixed")
    bad |= {name for name in source.names if name.startswith("plain 040 ")}
    good = [index for index, name in enumerate(source.names) if name not in bad]
    if trusting:
        trusted = {data: (data, 300, 400) for data in deceiving_images().values()}
        monkeypatch.setattr(base, "to_plain", lambda data, *more: trusted.get(data) or to_plain(data, *more))
    order = EvaluationOrder(len(source), batch_size)
    assert order.steps is not None
    with evaluating(kind, source, order) as loader:
        batches = list(loader)
        assert set(loader.bad_images) == bad
    assert len(batches) == order.steps
    assert torch.cat([batch.indices for batch in batches]).tolist() == good
    assert any(len(batch.indices) == 0 for batch in batches) == (batch_size == 8)
    for name in bad:
        (tmp_path / "mixed" / name).unlink()
    without = open_source(tmp_path / "mixed")
    with evaluating(kind, without, EvaluationOrder(len(without), batch_size)) as loader:
        expected = torch.cat([batch.views[0] for batch in loader])
    assert torch.equal(torch.cat([batch.views[0] for batch in batches]), expected)


def evaluating(kind: Any, source: ImageSource, order: EvaluationOrder) -> Loader:
    return open_loader(kind, source, evaluation_recipe(32), order, device="cpu", seed=0, workers=1)


@both_loaders
def test_images_known_to_be_bad_are_named_from_the_start(kind: str, tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path, 4))
    source.known_bad[1] = "it ends the decoder"
    with training(kind, source, tiny(), 4) as loader:
        assert loader.bad_images == {"01.jpg": "it ends the decoder"}
        assert 1 not in next(loader).indices.tolist()


@both_loaders
def test_what_passes_the_check_and_fails_to_decode_is_replaced_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several such files in one batch; the batches under way at that moment are not lost."""
    from reco_fast.pipelines import base

    source, bad = mixed_folder(tmp_path)
    expected = take(training(kind, source, tiny(), 32), 12)

    def trusting(data: bytes, *more: Any) -> tuple[bytes, int, int]:
        return (data, 300, 400) if data in deceiving_images().values() else to_plain(data, *more)

    monkeypatch.setattr(base, "to_plain", trusting)
    with training(kind, source, tiny(), 32) as loader:
        for batch in expected:
            mended = next(loader)
            assert torch.equal(mended.indices, batch.indices)
            assert torch.equal(mended.views[0], batch.views[0])
        assert set(loader.bad_images) == bad
        assert loader.bad_images["huffman.jpg"] == "broken data stream when reading image file"


NO_MEMORY = (
    "Critical error in pipeline:\nError in GPU operator `math.mul`,\nCan't allocate 3853 bytes on device 0.",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
    "Error in GPU operator `decoders__Image`: CUDA allocation failed",
)


@needs_dali
@pytest.mark.parametrize("said", NO_MEMORY)
@pytest.mark.parametrize("when", ["_build", "_run"])
def test_a_gpu_without_memory_is_no_bad_image(
    when: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is decoded again, and nothing is tried again."""
    from reco_fast.pipelines.dali import DaliLoader

    calls = []

    def fails(loader: DaliLoader) -> None:
        calls.append(1)
        raise RuntimeError(said)

    monkeypatch.setattr(DaliLoader, when, fails)
    monkeypatch.setattr(DaliLoader, "_by_pillow", lambda *_: pytest.fail("decoded again"))
    with training("dali", open_source(write_pictures(tmp_path, 8)), tiny(), 4) as loader:
        with pytest.raises(MemoryError):  # command_line.py says what needs less
            next(loader)
        assert not loader.bad_images
    assert calls == [1]


def test_fuzzed_files_end_no_process_and_both_loaders_call_the_same_ones_bad(tmp_path: Path) -> None:
    """300 files with a few bytes changed, half of them in the header; in a process of its own, which might die."""
    chosen = random.Random(0)
    for number in range(300):
        data = bytearray(encode(picture(seed=number % 20), "JPEG", progressive=number % 5 == 0))
        for _ in range(chosen.randint(1, 8)):
            data[chosen.randrange(min(len(data), 650) if number % 2 else len(data))] = chosen.randrange(256)
        (tmp_path / f"{number}.jpg").write_bytes(data)
    script = """
import sys
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import TrainingOrder
from reco_fast.pipelines.sources.open import open_source
source = open_source(sys.argv[1])
for kind in sys.argv[2:]:
    order = TrainingOrder(len(source), 32)
    with open_loader(kind, source, reco_recipe(32), order, device="cpu", seed=0, workers=1) as loader:
        for _ in range(len(source) // 32 + 2):
            next(loader)
        print(*sorted(loader.bad_images))
"""
    kinds = ["dali", "torch"] if HAS_DALI else ["torch"]
    done = subprocess.run(
        [sys.executable, "-c", script, os.fspath(tmp_path), *kinds], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bad = done.stdout.splitlines()
    assert len(bad) == len(kinds)
    assert len(set(bad)) == 1
    assert 50 < len(bad[0].split()) < 250
