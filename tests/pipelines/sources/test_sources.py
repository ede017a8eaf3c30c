"""Folders and tar shards: what is found, in which order, with which labels, and what is said when there is nothing."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import write_tar

from reco_fast.errors import DataError
from reco_fast.pipelines.order import EvaluationOrder, TrainingOrder
from reco_fast.pipelines.sources.folders import FolderSource
from reco_fast.pipelines.sources.image_source import PackedNames
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.sources.shards import TarSource


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"bytes of " + os.fsencode(name))
    return folder


def test_a_folder_with_classes(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, "dog/b.JPG", "dog/deep/er/a.png", "cat/x.webp", "cat/notes.txt"))
    assert list(source.names) == ["cat/x.webp", "dog/b.JPG", "dog/deep/er/a.png"]
    assert source.classes == ["cat", "dog"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1]
    assert [source.read(i) for i in range(3)] == [b"bytes of " + os.fsencode(n) for n in source.names]


@pytest.mark.parametrize(
    "names",
    [("a.jpg", "b.jpg"), ("one/a.jpg", "one/b.jpg"), ("one/a.jpg", "two/b.jpg", "c.jpg")],
    ids=["flat", "one folder", "one image beside the folders"],
)
def test_a_folder_without_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = open_source(write(tmp_path, *names))
    assert source.labels is None
    assert source.classes == []
    assert len(source) == len(names)


def test_odd_names_links_and_hidden_files(tmp_path: Path) -> None:
    write(tmp_path, "a/with space.jpg", "a/ünïcode 猫.png", ".hidden/x.jpg", "a/._mac.jpg", "a/.trash/y.jpg")
    other = write(tmp_path.parent / f"{tmp_path.name}-elsewhere", "z.jpg")
    (tmp_path / "linked").symlink_to(other)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / os.fsdecode(b"not \xff utf8.jpg")).write_bytes(b"ok")
    source = open_source(tmp_path)
    found = {"a/gone.jpg", "a/not \udcff utf8.jpg", "a/with space.jpg", "a/ünïcode 猫.png", "linked/z.jpg"}
    assert set(source.names) == found
    assert source.read(list(source.names).index("a/not \udcff utf8.jpg")) == b"ok"
    with pytest.raises(FileNotFoundError):
        source.read(list(source.names).index("a/gone.jpg"))
    assert len(source.fingerprint()) == 32


def test_the_fingerprint_tells_names_sizes_and_order_apart(tmp_path: Path) -> None:
    prints = {open_source(write(tmp_path, "a.jpg", "b.jpg")).fingerprint()}
    assert open_source(tmp_path).fingerprint() in prints
    (tmp_path / "b.jpg").write_bytes(b"another size")
    prints.add(open_source(tmp_path).fingerprint())
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    prints.add(open_source(tmp_path).fingerprint())
    write(tmp_path, "d.jpg")
    prints.add(open_source(tmp_path).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "there is nothing at this path"),
        (lambda p: p, "it is empty"),
        (lambda p: write(p, "a.txt", "b/c.csv"), "it has none of them"),
        (lambda p: write(p, "a.jpg") / "a.jpg", "got a file"),
        (lambda p: write(p, "a.tar") / "a.tar", "expected an uncompressed .tar file"),
        (lambda p: write_tar(p / "a.tar", {"readme.txt": b"x"}), "it has none"),
        (lambda p: p / "shard-{000..003}.tar", "there is none"),
        (lambda p: p / "*.tar", "no file matches"),
    ],
)
def test_a_mistake_is_one_line_with_the_path(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=message) as caught:
        open_source(make(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "good/a.jpg", "closed/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:  # the tests may run as root, to whom nothing is closed
        if "closed" in path:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(tmp_path)
    assert list(source.names) == ["good/a.jpg"]
    assert source.unreadable == {"closed/": "Permission denied"}
    (tmp_path / "good" / "a.jpg").unlink()
    with pytest.raises(DataError, match="closed: expected a folder that can be listed, Permission denied"):
        open_source(tmp_path)


def test_tar_shards_in_webdataset_layout(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "s-000.tar", {"a.jpg": b"A", "a.cls": b"7", "a.json": b"{}", "d/b.PNG": b"BB", "d/b.cls": b"3"}
    )
    write_tar(tmp_path / "s-001.tar", {"c.mask.png": b"mask", "c.jpg": b"CCC", "c.cls": b"7\n"})
    for place in (tmp_path, tmp_path / "s-{000..001}.tar", tmp_path / "s-*.tar", tmp_path / "s-00{0,1}.tar"):
        source = open_source(place)
        assert isinstance(source, TarSource)
        assert list(source.names) == ["s-000.tar/a.jpg", "s-000.tar/d/b.PNG", "s-001.tar/c.jpg"]
        assert [source.read(i) for i in (2, 0, 1)] == [b"CCC", b"A", b"BB"]
        assert source.labels is not None
        assert source.labels.tolist() == [1, 0, 1]
        assert source.classes == ["3", "7"]
    assert len(open_source(tmp_path / "s-001.tar")) == 1


def test_tar_members_with_dots_and_long_names_and_without_classes(tmp_path: Path) -> None:
    long = "x" * 150 + ".jpg"
    source = open_source(write_tar(tmp_path / "a.tar", {"n01.1.jpg": b"1", "n01.2.jpg": b"2", long: b"3"}))
    assert list(source.names) == ["a.tar/n01.1.jpg", "a.tar/n01.2.jpg", f"a.tar/{long}"]
    assert source.labels is None
    assert source.read(2) == b"3"


def test_a_truncated_shard_keeps_what_can_be_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(5)})
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * 2560 + 300])
    cut = open_source(path)
    assert [cut.read(i) for i in range(len(cut))] == [bytes([i]) * 2000 for i in range(2)]
    assert "ends inside the header" in cut.unreadable["a.tar"]
    path.write_bytes(whole[: 2 * 2560 + 512 + 300])
    cut = open_source(path)
    assert [len(cut.read(i)) for i in range(len(cut))] == [2000, 2000, 300]
    assert "a.tar" in cut.unreadable
    path.write_bytes(whole[: 2 * 2560] + b"\xff" * 512 + whole[2 * 2560 + 512 :])
    damaged = open_source(path)
    assert list(damaged.names) == ["a.tar/0.jpg", "a.tar/1.jpg", "a.tar/3.jpg", "a.tar/4.jpg"]
    assert damaged.read(2) == bytes([3]) * 2000
    assert "damaged at byte 5,120" in damaged.unreadable["a.tar"]
    path.write_bytes(whole + whole)
    assert len(open_source(path)) == 10
    assert not open_source(path).unreadable


def test_reads_from_many_threads(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"%d" % i * 100 for i in range(50)}))
    wrong: list[int] = []

    def check() -> None:
        wrong.extend(i for i in range(50) for _ in range(20) if source.read(i) != b"%d" % i * 100)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_packed_names() -> None:
    names = ["a", "", "é/ß.jpg", "z" * 1000]
    packed = PackedNames(names)
    assert list(packed) == names
    assert packed[-1] == names[-1]
    assert packed[1:3] == names[1:3]
    with pytest.raises(IndexError):
        packed[4]


def test_a_large_folder_is_listed_quickly(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder:02d}").mkdir()
        for image in range(500):
            os.close(os.open(tmp_path / f"{folder:02d}" / f"{image}.jpg", os.O_CREAT))
    start = time.perf_counter()
    source = open_source(tmp_path)
    assert len(source) == 10_000
    assert time.perf_counter() - start < 2  # 1.3 million in a few minutes on a machine ten times slower than ours
    assert isinstance(source, FolderSource)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 20, 52])
def test_training_order_neither_skips_nor_repeats(world_size: int, batch_size: int) -> None:
    """The ranks' parts make up the global batch, whatever their number; epochs are permutations, straddled."""
    length, steps = 23, 20
    orders = [TrainingOrder(length, batch_size, rank=r, world_size=world_size, seed=4) for r in range(world_size)]
    stream, alone = [], TrainingOrder(length, batch_size, seed=4)
    for step in range(steps):
        parts = [order.batch(step) for order in orders]
        positions, indices = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        assert (indices == alone.batch(step)[1]).all()
        assert (positions == np.arange(step * batch_size, (step + 1) * batch_size)).all()
        stream += indices.tolist()
    epochs = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_training_order_can_be_entered_anywhere() -> None:
    order = TrainingOrder(100, 8, seed=1)
    forward = [order.batch(step)[1].tolist() for step in range(60)]
    assert [TrainingOrder(100, 8, seed=1).batch(step)[1].tolist() for step in reversed(range(60))] == forward[::-1]
    assert TrainingOrder(100, 8, seed=2).batch(0)[1].tolist() != forward[0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_order_is_one_pass(world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        order = EvaluationOrder(50, 8, rank=rank, world_size=world_size)
        assert order.steps is not None
        batches = [order.batch(step)[1] for step in range(order.steps)]
        assert all(len(batch) == 8 for batch in batches[:-1])
        seen += np.concatenate(batches).tolist()
    assert seen == list(range(50))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_link_to_no_ordinary_file_is_not_read(kind: str, tmp_path: Path) -> None:
    """A pipe would be waited for; a device may have no end."""
    (tmp_path / "images").mkdir()
    place = Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(place := tmp_path / "pipe")
    (tmp_path / "images" / "a.jpg").symlink_to(place)
    source = open_source(tmp_path / "images")
    with pytest.raises(OSError, match="no ordinary file"):
        source.read(0)


@pytest.mark.parametrize("count", [1, 7, 50, 90])
def test_evaluation_order_of_a_part_is_evenly_chosen(count: int) -> None:
    chosen = np.concatenate([EvaluationOrder(50, 8, count=count, rank=r, world_size=2).batch(0)[1] for r in (0, 1)])
    if count <= 14:
        assert len(chosen) == count
        assert chosen.tolist() == [50 * place // count for place in range(count)]
    else:
        assert chosen.tolist() == [*range(8), *range(25, 33)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainingOrder(0, 8),
        lambda: TrainingOrder(8, 7, world_size=2),
        lambda: TrainingOrder(8, 0),
        lambda: TrainingOrder(8, 8, rank=2, world_size=2),
        lambda: EvaluationOrder(0, 8),
        lambda: EvaluationOrder(8, 0),
    ],
)
def test_an_impossible_order_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="expected"):
        make()
