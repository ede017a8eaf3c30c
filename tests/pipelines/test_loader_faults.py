"""What happens around a loader: processes that die, memory that is short, files that never come."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import both_loaders, needs_dali, take, tiny, training
from small_runs import write_pictures

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.bad_images.journal import left_behind
from reco_fast.pipelines.sources.open import open_source

SCRIPT = """
import sys, time
from reco_fast.errors import DataError
from reco_fast.pipelines import base
base.LONGEST_WAIT, base.POLL = 3.0, 1.0
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import TrainingOrder
from reco_fast.pipelines.sources.open import open_source
kind, images, size, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
source = open_source(images)
{before}
try:
    order = TrainingOrder(len(source), batch_size)
    with open_loader(kind, source, reco_recipe(size), order, device="cpu", seed=0, workers=2) as loader:
        for _ in range(6):
            batch = next(loader)
    print("done", len(batch.indices))
except DataError as error:
    print(error)
"""


def run_script(before: str, *arguments: object, prefix: tuple[str, ...] = ()) -> tuple[str, str]:
    """stdout and stderr, without what DALI says where it finds no nvTIFF. The process ends by itself."""
    line = [*prefix, sys.executable, "-c", SCRIPT.format(before=before), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip(), "\n".join(line for line in done.stderr.splitlines() if "nvtiff" not in line.lower())


@both_loaders
def test_a_file_that_never_comes_is_not_waited_for_without_end(kind: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, 8)
    before = "from reco_fast.pipelines import read_ahead; read_ahead._LAST_WAIT = 1.0; " if kind == "dali" else ""
    before += "read = source.read; source.read = lambda index: time.sleep(10**6) if index == 5 else read(index)"
    started = time.monotonic()
    shown, errors = run_script(before, kind, tmp_path, 32, 4)
    assert shown.startswith("no batch came within 0.05 minutes: the file system does not answer")
    assert errors == ""
    assert time.monotonic() - started < 60


def mounting(options: str) -> tuple[str, ...] | None:
    """A command before others that gives them a /dev/shm of their own; None where that is not allowed."""
    script = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", script, "sh")
    allowed = (
        shutil.which("unshare") and not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    )
    return prefix if allowed else None


@both_loaders
def test_a_small_dev_shm_is_enough(kind: str, tmp_path: Path) -> None:
    """Docker gives a container 64 MB. One batch here has 8 × 3 × 128 × 128 × 3 bytes."""
    if (prefix := mounting("size=200k")) is None:
        pytest.skip("needs the right to mount")
    write_pictures(tmp_path, 16)
    assert run_script("", kind, tmp_path, 128, 8, prefix=prefix) == ("done 8", "")


@needs_dali
def test_dali_needs_no_dev_shm(tmp_path: Path) -> None:
    if (prefix := mounting("ro")) is None:
        pytest.skip("needs the right to mount")
    write_pictures(tmp_path, 16)
    assert run_script("", "dali", tmp_path, 32, 8, prefix=prefix) == ("done 8", "")


def test_no_room_for_queues_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def Queue(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: Full())
    expected = "^--data.loader torch: expected room for .* 2 processes, got No space left on device; .*--shm-size"
    with pytest.raises(DataError, match=expected):
        training("torch", open_source(write_pictures(tmp_path, 8)), tiny(), workers=2)


def test_what_a_worker_sends_is_small(tmp_path: Path) -> None:
    """Less than a pipe takes at once: nothing in /dev/shm, and never half a message of a worker that is killed."""
    loader: Any = training("torch", open_source(write_pictures(tmp_path, 16)), reco_recipe(224), 16, workers=0)
    with loader:
        made = loader._batches._dataset[0]
        assert len(pickle.dumps(made)) < 512
        assert made.images == 16


def test_batches_stay_as_they_are_while_later_ones_are_made(tmp_path: Path) -> None:
    """Workers fill the same memory again and again."""
    source = open_source(write_pictures(tmp_path, 23))
    recipe = reco_recipe(32, 20)
    expected = take(training("torch", source, recipe, 5, workers=0), 20)
    with training("torch", source, recipe, 5, workers=2) as loader:
        for number, batch in enumerate(expected):
            if number % 7 == 0:
                time.sleep(0.2)  # as many are made ahead as may be
            found = next(loader)
            assert torch.equal(found.indices, batch.indices)
            assert all(map(torch.equal, found.views, batch.views))


@pytest.mark.parametrize("noticed", [True, False])
def test_a_dead_worker_leaves_its_notes(noticed: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where the run ends in peace before anybody misses it; those of the living are removed."""
    source = open_source(write_pictures(tmp_path / "images", 64))
    source.journal = tmp_path / "journal"
    before = set(multiprocessing.active_children())
    with training("torch", source, tiny(), 4, workers=2) as loader:
        next(loader), next(loader)  # one of each process: both have begun
        (first, second) = sorted(set(multiprocessing.active_children()) - before, key=lambda child: child.name)
        assert first.pid is not None
        assert second.pid is not None
        os.kill(first.pid, signal.SIGSEGV)
        if noticed:
            with pytest.raises(DataError, match="a process of the loader was ended"):
                take(loader, 20)
        else:
            first.join()
    names = [path.name for path in (tmp_path / "journal").glob("*/*")]
    assert names == [str(first.pid)]
    assert capfd.readouterr() == ("", "")
    assert left_behind(tmp_path / "journal")


@both_loaders
def test_stand_ins_are_noted_before_they_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be what kills."""
    write_pictures(tmp_path / "images", 12)
    (tmp_path / "images" / "05.jpg").write_bytes(b"text")
    source = open_source(tmp_path / "images")
    source.journal = tmp_path / "journal"
    read, unnoted = source.read, []

    def watched(index: int) -> bytes:
        if index not in left_behind(tmp_path / "journal"):
            unnoted.append(index)
        return read(index)

    monkeypatch.setattr(source, "read", watched)
    take(training(kind, source, tiny(), 4, workers=0), 6)
    assert unnoted == []
    assert not list((tmp_path / "journal").iterdir())
