"""Both loaders: every image once an epoch, exact resume, a clean end."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import HAS_DALI, both_loaders, needs_dali, take, tiny, training
from torch.utils.data._utils import signal_handling

from reco_fast.data.loaders import available_cores
from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import evaluation_recipe, reco_recipe
from reco_fast.pipelines.base import Batch
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import EvaluationOrder, TrainingOrder
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.torch_loader import OneAhead

# Order, epochs, resume


@both_loaders
@pytest.mark.parametrize("world_size", [1, 2])
def test_two_epochs_hold_every_image_once(kind: str, world_size: int, cifar: Path) -> None:
    source = open_source(cifar)  # 300 images, 2 epochs = 12 global batches of 50
    ranks = [
        [
            batch.indices.tolist()
            for batch in take(training(kind, source, tiny(), 50, rank=rank, world_size=world_size), 12)
        ]
        for rank in range(world_size)
    ]
    stream = [index for step in zip(*ranks, strict=True) for part in step for index in part]
    first, second = stream[:300], stream[300:]
    assert sorted(first) == sorted(second) == list(range(300))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.25
    if world_size == 2:
        early = [{index for part in rank[:6] for index in part} for rank in ranks]
        assert early[0].isdisjoint(early[1])


@both_loaders
def test_a_later_first_step_continues_bit_for_bit(kind: str, cifar: Path) -> None:
    source, recipe = open_source(cifar), reco_recipe(32, 20)
    whole = take(training(kind, source, recipe, 64), 8)  # 300 images: across the end of an epoch
    resumed = take(training(kind, source, recipe, 64, first_step=3), 5)
    for a, b in zip(whole[3:], resumed, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@both_loaders
@pytest.mark.parametrize("weak_size", [None, 20])
def test_views_do_not_depend_on_batch_size_ranks_or_workers(kind: str, weak_size: int | None, cifar: Path) -> None:
    source, recipe = open_source(cifar), reco_recipe(32, weak_size)
    (large,) = take(training(kind, source, recipe, 32, workers=0), 1)
    small = take(training(kind, source, recipe, 8, workers=2), 4)
    ranks = [take(training(kind, source, recipe, 32, rank=r, world_size=2), 1)[0] for r in range(2)]
    for parts in (small, ranks):
        assert torch.equal(large.indices, torch.cat([part.indices for part in parts]))
        for number, view in enumerate(large.views):
            assert torch.equal(view, torch.cat([part.views[number] for part in parts]))


@both_loaders
def test_seeds_and_views_differ(kind: str, cifar: Path) -> None:
    source = open_source(cifar)
    (a,), (b,) = (take(training(kind, source, reco_recipe(32), seed=seed), 1) for seed in (1, 2))
    assert torch.equal(a.indices, b.indices)
    assert not any(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@both_loaders
@pytest.mark.parametrize(("images", "batch_size"), [(300, 128), (300, 300), (3, 8), (300, 299)])
def test_evaluation_is_one_pass_in_order(kind: str, images: int, batch_size: int, cifar: Path) -> None:
    source = open_source(cifar if images == 300 else next(p for p in cifar.iterdir()))
    order = EvaluationOrder(len(source), batch_size)
    options: dict[str, Any] = {"device": "cpu", "seed": 0, "workers": 1}
    with open_loader(kind, source, evaluation_recipe(32), order, **options) as loader:  # type: ignore[arg-type]
        seen = [batch.indices for batch in loader]
        assert next(loader, None) is None
    assert torch.cat(seen).tolist() == list(range(len(source)))


@both_loaders
def test_a_batch_without_a_good_image_has_views_of_their_sizes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("not an image")
    arguments: Any = kind, open_source(tmp_path), reco_recipe(32, 20), EvaluationOrder(1, 4)
    with open_loader(*arguments, device="cpu", seed=0, workers=1) as loader:
        (batch,) = loader
    assert [view.shape for view in batch.views] == [(0, 3, 32, 32), (0, 3, 32, 32), (0, 3, 20, 20)]


@both_loaders
def test_tar_shards_are_read(kind: str, tmp_path: Path, cifar: Path) -> None:
    files = sorted(cifar.rglob("*.jpg"))[:40]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in files[shard * 20 : shard * 20 + 20]:
                tar.add(path, f"{path.parent.name}-{path.name}")
    (batch,) = take(training(kind, open_source(tmp_path), reco_recipe(32), 40), 1)
    assert sorted(batch.indices.tolist()) == list(range(40))


# On a GPU: what can be seen without one


@needs_dali
@pytest.mark.parametrize("with_decoded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_graph_for_a_gpu_is_accepted_decodes_once_and_reserves_what_the_images_need(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_decoded: bool
) -> None:
    """DALI checks operators, arguments and their types as a graph is defined; only to build it takes a GPU."""
    from reco_fast.pipelines import dali_graph as dali

    names = ("crop_mirror_normalize", "color_space_conversion", "saturation", "resize")
    places = {"image": dali.fn.decoders, **dict.fromkeys(names, dali.fn)}
    given: dict[str, list[dict[str, Any]]] = {name: [] for name in places}

    def recorded(name: str, operator: Any) -> Any:
        return lambda *inputs, **options: given[name].append(options) or operator(*inputs, **options)

    for name, place in places.items():
        monkeypatch.setattr(place, name, recorded(name, getattr(place, name)))
    settings = {"batch_size": 2, "num_threads": 1, "device_id": 0, "exec_dynamic": True}
    graph = dali.graph(lambda: [], reco_recipe(224, 160), True, dtype, (375, 500), with_decoded, **settings)
    assert [output.device for output in graph._graph_out] == 3 * ["gpu"] + with_decoded * ["cpu"]
    (decoder,) = given["image"]
    assert decoder["device"] == "mixed"
    assert (decoder["preallocate_height_hint"], decoder["preallocate_width_hint"]) == (375, 500)
    assert 3 * 375 * 500 < decoder["device_memory_padding"] < 2**24  # DALI's default
    assert [options["size"] for options in given["resize"]] == [[224, 224], [224, 224], [160, 160]]
    expected = dali.types.FLOAT16 if dtype == torch.float16 else dali.types.FLOAT
    assert [options["dtype"] for options in given["crop_mirror_normalize"]] == 3 * [expected]
    graph = dali.graph(lambda: [], reco_recipe(32), True, dtype, None, False, **settings)
    assert [output.device for output in graph._graph_out] == 3 * ["gpu"]
    assert len(given["image"]) == 1  # no decoder in the second
    assert not given["color_space_conversion"]  # it launches a kernel for each image
    graph = dali.graph(lambda: [], reco_recipe(32), True, dtype, (32, 40), with_decoded, **settings)
    assert [output.device for output in graph._graph_out] == 3 * ["gpu"] + with_decoded * ["cpu"]
    assert given["image"][1]["device"] == "cpu"  # small images, which a GPU decodes no faster than large ones
    assert "device_memory_padding" not in given["image"][1]
    # Three graphs, each with two strong views: of all images for the mean of contrast, and of those drawn grey.
    of_all = [isinstance(options["saturation"], float) for options in given["saturation"]]
    assert (sum(of_all), len(of_all)) == (6, 12)


@needs_dali
def test_one_large_photograph_does_not_decide_what_the_decoder_reserves() -> None:
    from reco_fast.pipelines.dali_graph import _decoder_buffers

    assert _decoder_buffers(1000, 1500) == _decoder_buffers(3000, 4500)
    for height, width in ((3000, 4000), (12_000, 9000), (1, 100_000_000)):
        given = _decoder_buffers(height, width)
        pixels = given["preallocate_height_hint"] * given["preallocate_width_hint"]
        assert 1 <= pixels <= 1_500_000
        assert given["device_memory_padding"] == given["host_memory_padding"] == 6 * pixels <= 9 * 10**6


@needs_dali
def test_views_of_a_gpu_are_copied_on_the_current_stream_and_never_exported(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reco_fast.pipelines import dali

    copies: list[tuple[int, bool]] = []
    content = np.arange(4 * 32 * 32 * 3, dtype=np.float16).reshape(4, 32, 32, 3)

    class Output:
        def __len__(self) -> int:
            return len(content)

        def copy_to_external(self, pointer: Any, cuda_stream: Any, non_blocking: bool) -> None:
            copies.append((cuda_stream.value, non_blocking))
            ctypes.memmove(pointer, content.ctypes.data, content.nbytes)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=1234))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
    monkeypatch.setattr(dali, "from_dlpack", lambda exported: pytest.fail("exported"))
    with training("dali", open_source(cifar), reco_recipe(48, 32), 4) as opened:
        loader: Any = opened
        loader._device, loader._dtype = torch.device("cuda"), torch.float16
        view = loader._hand_out(Output(), 32)
        loader._device = torch.device("cpu")
    assert copies == [(1234, True)]
    assert np.array_equal(view.permute(0, 2, 3, 1), content)
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_made_one_call_early_and_handed_over_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            assert other is side
            events.append("wait")

    side, here = Stream(), Stream()
    batches = iter([0, 1, 2])

    def make() -> Batch:
        number = next(batches)
        events.append(f"make {number}")
        if number == 2:
            raise DataError("a bad image")
        return Batch((torch.full((1,), number),), torch.tensor([number]))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(events.append("aside")))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda view, stream: events.append(f"record {int(view)}"))
    ahead = OneAhead(make, side)
    for number in range(2):
        assert next(ahead).indices.tolist() == [number]
        events.append("step")
    with pytest.raises(DataError, match="a bad image"):
        next(ahead)
    assert events == [
        *["aside", "make 0", "wait", "record 0", "aside", "make 1", "step"],
        *["wait", "record 1", "aside", "make 2", "step"],
    ]


# Beginning and end


def test_the_torch_loader_leaves_the_signal_of_dead_children_alone(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's handler, set once a process, would raise wherever the main thread is."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        take(training("torch", open_source(cifar), tiny()), 1)
        assert signal_handling._SIGCHLD_handler_set  # it was asked for
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_auto_takes_dali_where_it_is_installed(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reco_fast.pipelines import loader as loader_module

    source = open_source(cifar)
    with training("auto", source, tiny()) as loader:
        assert type(loader).__name__ == ("DaliLoader" if HAS_DALI else "TorchLoader")
    monkeypatch.setattr(loader_module, "_has_dali", lambda: False)
    with training("auto", source, tiny()) as loader:
        assert type(loader).__name__ == "TorchLoader"
    with pytest.raises(DataError, match=r"not installed; pip install 'reco-fast\[dali\]'"):
        training("dali", source, tiny())


def test_an_order_of_another_length_is_refused(cifar: Path) -> None:
    with pytest.raises(ValueError, match="order: expected one of 300 images as in source, got 299"):
        open_loader("torch", open_source(cifar), tiny(), TrainingOrder(299, 8), device="cpu", seed=0, workers=0)


@both_loaders
@pytest.mark.parametrize("use", ["not at all", "one batch", "failing"])
def test_close_leaves_no_thread_or_process(kind: str, use: str, cifar: Path) -> None:
    threads, processes = _others()
    loader = training(kind, open_source(cifar), reco_recipe(32), workers=2)
    try:
        with loader:
            if use != "not at all":
                next(loader)
            if use == "failing":
                raise RuntimeError("the step failed")
    except RuntimeError:
        pass
    loader.close()  # twice is fine
    with pytest.raises(StopIteration):
        next(loader)
    for _ in range(50):
        gc.collect()
        if _others() <= (threads, processes):
            break
        time.sleep(0.1)
    now = _others()
    assert now[0] <= threads
    assert now[1] <= processes


def _others() -> tuple[set[str], set[int]]:
    ours = {thread.name for thread in threading.enumerate() if "reco_fast" in thread.name}
    return ours, {child.pid for child in multiprocessing.active_children() if child.pid}


@both_loaders
@pytest.mark.parametrize("end", ["return", "raise", "forget", "SIGINT"])
def test_a_process_ends_quietly(kind: str, end: str, cifar: Path) -> None:
    script = f"""
import os, signal, sys
from reco_fast.data.loaders import available_cores
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import TrainingOrder
from reco_fast.pipelines.sources.open import open_source
source = open_source(sys.argv[1])
order, workers = TrainingOrder(len(source), 16), {min(2, available_cores())}
loader = open_loader({kind!r}, source, reco_recipe(32), order, device="cpu", seed=0, workers=workers)
next(loader)
if {end!r} == "forget":
    sys.exit()
try:
    with loader:
        next(loader)
        if {end!r} == "raise":
            raise SystemExit
        if {end!r} == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
            next(loader)
except KeyboardInterrupt:
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script, os.fspath(cifar)], capture_output=True, text=True, timeout=60, check=False
    )
    noise = [line for line in done.stderr.splitlines() if "nvtiff" not in line.lower()]  # DALI's own, without nvTIFF
    assert (done.returncode, noise) == (0, []), done.stderr
