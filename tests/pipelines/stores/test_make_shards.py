"""Images as shards in a folder or a store: what is kept, the same bytes each time, and going on where it stopped."""

import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import HttpServer, S3Server
from small_runs import write_classes, write_pictures, write_tar

from reco_fast import make_shards as command
from reco_fast.errors import DataError
from reco_fast.make_shards import ShardsCommand, make_shards, plan
from reco_fast.make_shards import target as targets
from reco_fast.pipelines.sources.folders import FolderSource
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.shard_index import read_index

MB = 0.03  # of a shard here


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of about 1,300 bytes in two classes."""
    return write_classes(tmp_path_factory.mktemp("images") / "of two", 30, names=("dark.er", "light"))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(store, "PATIENCE", 2.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)


def make(path: object, url: object, shard_mb: float = MB) -> None:
    assert make_shards(ShardsCommand(str(path), str(url), shard_mb)) == 0


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.endswith(".tar")}


def content(source: ImageSource) -> list[tuple[bytes, str]]:
    """All images with their classes, sorted."""
    labels = source.labels
    classes = ["" if labels is None else source.classes[labels[place]] for place in range(len(source))]
    return sorted(zip(map(source.read, range(len(source))), classes, strict=True))


def test_what_is_read_back_are_the_images_and_their_classes(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "a" / "b")
    before, after = open_source(images), open_source(tmp_path / "a" / "b")
    assert content(after) == content(before)
    assert after.classes == ["dark.er", "light"]
    assert (after.unreadable, after.passed_over.line()) == ({}, "")
    keys = [name.rpartition("/")[2].partition(".")[0] for name in after.names]
    assert sorted(keys) == [f"{number:08d}" for number in range(60)]
    assert keys != sorted(keys)
    names = (tmp_path / "a" / "b" / "make_shards.names.txt").read_text().splitlines()
    assert names == list(before.names)
    assert all(after.read(place) == before.read(int(key)) for place, key in enumerate(keys))


def test_shards_are_alike_in_size_and_mixed(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path)
    sizes = [len(data) for _, data in sorted(shards(files(tmp_path)).items())]
    assert len(sizes) == 7
    assert max(sizes) <= MB * 1e6 + 3072  # an image with its headers
    assert max(sizes) - min(sizes) <= 2 * 3072
    for path in sorted(tmp_path.glob("*.tar")):
        labels = open_source(path).labels
        assert labels is not None
        assert len(set(labels.tolist())) == 2


def test_a_store_gets_what_a_folder_gets(
    images: Path, tmp_path: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{s3.bucket}/train/mine"
    s3.fail("*", 500, times=1, method="PUT")
    make(images, f"{url}/")
    assert "s3://images/train/mine: 60 images in 7 shards" in capsys.readouterr().out
    make(images, f"file://{tmp_path}")
    assert f"\n{tmp_path}: 60 images in 7 shards" in capsys.readouterr().out
    local = files(tmp_path)
    assert s3.keys() == sorted(f"train/mine/{name}" for name in local)
    there = {name: s3.get(f"train/mine/{name}") for name in local}
    assert there | {"index.json": b""} == local | {"index.json": b""}
    indices = [list(read_index(f"{place}/index.json")) for place in (url, os.fspath(tmp_path))]
    assert [shard.place for shard in indices[0]] == [f"{url}/{name}" for name in sorted(shards(local))]
    assert [(shard.name, shard.content) for shard in indices[0]] == [
        (shard.name, shard.content) for shard in indices[1]
    ]
    s3.delete("train/mine/000002.tar")
    s3.forget()
    make(images, url)
    sent = [asked.path for asked in s3.asked if asked.method == "PUT"]
    assert sent == ["/images/train/mine/000002.tar", "/images/train/mine/index.json"]
    assert list(read_index(f"{url}/index.json")) == indices[0]
    assert open_source(url).fingerprint() == open_source(tmp_path).fingerprint()
    assert s3.get("train/mine/000002.tar") == local["000002.tar"]


def test_headers_say_nothing_that_could_change(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "one")
    for path in images.rglob("*.jpg"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    make(images, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [os.path.splitext(member.name)[1] for member in members[:4]] == [".jpg", ".cls", ".jpg", ".cls"]
    assert all(data.endswith(bytes(1024)) for data in shards(files(tmp_path / "one")).values())  # the end of a .tar


def test_a_shard_that_is_there_is_not_written_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(images, tmp_path)
    whole = files(tmp_path)
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}
    (tmp_path / "000003.tar").write_bytes(whole["000003.tar"][:-512])
    (tmp_path / "000005.tar").unlink()
    make(images, tmp_path)
    assert "5 of 7 shards are there" in capsys.readouterr().out
    assert files(tmp_path) == whole
    after = {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}
    changed = {name for name in after if after[name] != before[name]}
    assert changed - {"000005.tar"} == {"000003.tar"}  # the inode of one that was removed may come again


def test_what_failed_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(images, tmp_path / "reference")
    sent: list[str] = []
    send = targets.Target.send

    def fails(self: targets.Target, name: str) -> None:
        sent.append(name)
        if len(sent) > 4:
            raise OSError(28, "No space left on device")
        send(self, name)

    monkeypatch.setattr(targets.Target, "send", fails)
    with pytest.raises(DataError, match="No space left on device"):
        make(images, tmp_path / "to")
    there = set(shards(files(tmp_path / "to")))
    assert there == {name for name in sent[:4] if name.endswith(".tar")} != set()
    monkeypatch.setattr(targets.Target, "send", lambda self, name: (sent.append(name), send(self, name)))
    sent.clear()
    make(images, tmp_path / "to")
    assert not there & set(sent)
    assert files(tmp_path / "to") == files(tmp_path / "reference")


def test_a_process_that_was_killed_leaves_whole_shards_and_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(images, tmp_path / "reference")
    reference = files(tmp_path / "reference")
    send, sent = targets.Target.send, []

    def killed(self: targets.Target, name: str) -> None:
        send(self, name)
        sent.append(name)
        if len(sent) == 5:  # the third shard; others are under way
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(targets.Target, "send", killed)
        make(images, tmp_path / "to")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = files(tmp_path / "to")
    assert 0 < len(shards(left)) < 7
    assert all(reference[name] == data for name, data in shards(left).items())
    (tmp_path / "to" / ".000006.tar.tmp").write_bytes(bytes(100_000))  # as it may have been left
    (tmp_path / "to" / "000006.tar").unlink(missing_ok=True)
    make(images, tmp_path / "to")
    assert files(tmp_path / "to") == reference


def test_unreadable_images_are_left_out_and_named_for_good(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.symlink_to(images)
    read = FolderSource.read
    broken = {"light/3.jpg": OSError(5, "Input/output error"), "dark.er/7.jpg": None}

    def fails(self: FolderSource, place: int) -> bytes:
        error = broken.get(self.names[place], ())
        if isinstance(error, OSError):
            raise error
        return read(self, place)[: 100 if error is None else None]

    monkeypatch.setattr(FolderSource, "read", fails)
    make(folder, tmp_path / "to")
    monkeypatch.undo()
    make(folder, tmp_path / "whole")
    reasons = [line.split("\t") for line in (tmp_path / "to" / "make_shards.bad_images.txt").read_text().splitlines()]
    assert [name for name, _ in reasons] == ["dark.er/7.jpg", "light/3.jpg"]
    assert reasons[0][1].startswith("had 1,")
    assert reasons[0][1].endswith(" bytes before and 100 when it was read")
    assert reasons[1][1] == "Input/output error"
    assert "left out as unreadable: 2, named in" in capsys.readouterr().out
    found, whole = shards(files(tmp_path / "to")), shards(files(tmp_path / "whole"))
    assert {name: len(data) for name, data in found.items()} == {name: len(data) for name, data in whole.items()}
    source = open_source(tmp_path / "to")
    assert source.unreadable == {}
    bad = [read(open_source(images), place) for place, name in enumerate(open_source(images).names) if name in broken]
    assert content(source) == [each for each in content(open_source(images)) if each[0] not in bad]
    capsys.readouterr()
    (tmp_path / "to" / "000000.tar").unlink()
    make(folder, tmp_path / "to")  # which has no reason to read the others
    assert "left out as unreadable: 2, named in" in capsys.readouterr().out


def test_an_image_without_a_size_is_left_out_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "images", 5)
    (folder / "02.jpg").unlink()
    (folder / "02.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "04.jpg").write_bytes(b"")
    make(folder, tmp_path / "to", 1)
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [
        "000000.tar",
        "index.json",
        "make_shards.bad_images.txt",
        "make_shards.json",
        "make_shards.names.txt",
    ]
    assert (tmp_path / "to" / "make_shards.bad_images.txt").read_text().splitlines() == [
        "02.jpg\tNo such file or directory",
        "04.jpg\tan empty file",
    ]
    assert "3 images in 1 shards" in capsys.readouterr().out
    assert len(open_source(tmp_path / "to")) == 3


def test_images_whose_sizes_nobody_knows_are_read_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pictures(tmp_path / "images", 5)
    make(folder, tmp_path / "known", 0.005)
    (folder / "05.jpg").touch()
    (folder / "06.jpg").symlink_to(tmp_path / "nowhere.jpg")
    monkeypatch.setattr(FolderSource, "sizes", lambda self: np.full(len(self), -1))
    make(folder, tmp_path / "to", 0.005)
    assert content(open_source(tmp_path / "to")) == content(open_source(tmp_path / "known"))
    assert (tmp_path / "to" / "make_shards.bad_images.txt").read_text().splitlines() == [
        "05.jpg\tan empty file",
        "06.jpg\tNo such file or directory",
    ]


def test_without_classes_there_are_no_cls_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pictures(tmp_path / "images", 4)
    make(folder, tmp_path / "to", 1)
    with tarfile.open(tmp_path / "to" / "000000.tar") as tar:
        assert sorted(tar.getnames()) == [f"{number:08d}.jpg" for number in range(4)]
    assert open_source(tmp_path / "to").labels is None
    assert "no classes: all 4 lie in one folder" in capsys.readouterr().out


def test_suffixes_are_those_of_images(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    folder = tmp_path / "images"
    folder.mkdir()
    for name, kind in (("a.JPEG", "JPEG"), ("b.c.png", "PNG"), ("d", "PNG"), ("e", "JPEG"), ("f", "GIF")):
        picture.save(folder / name, kind)
    make(folder, tmp_path / "to", 1)
    with tarfile.open(tmp_path / "to" / "000000.tar") as tar:
        names = sorted(tar.getnames())
    assert names == ["00000000.jpeg", "00000001.png", "00000002.png", "00000003.jpg", "00000004.gif"]


def test_shards_can_be_made_of_shards(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "images", 6)
    members = []
    for number, path in enumerate(sorted(folder.iterdir())):
        members += [(f"x/{number}.jpg", path.read_bytes()), (f"x/{number}.cls", [b"cat", "ä猫".encode()][number % 2])]
    write_tar(tmp_path / "other.tar", members)
    make(tmp_path / "other.tar", tmp_path / "to")
    assert content(open_source(tmp_path / "to")) == content(open_source(tmp_path / "other.tar"))
    assert open_source(tmp_path / "to").classes == ["cat", "ä猫"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere", "there is nothing at this path"),
        ("empty", "it is empty"),
        ("bad", "no image can be used, e.g. 0.jpg: an empty file"),
        ("odd", "'cat ': expected the name of a class in one line"),
        ("odd number", "'-5': expected the name of a class"),
    ],
)
def test_images_that_cannot_be_had_are_one_line(
    source: str, expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jpg").touch()
    write_classes(tmp_path / "odd", 1, names=("cat ", "dog"))
    write_classes(tmp_path / "odd number", 1, names=("-5", "dog"))
    assert expected in refused(command.main, tmp_path / source, tmp_path / "to")
    assert not list(tmp_path.glob("to/*"))


def test_images_that_are_all_bad_make_no_shard(
    images: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FolderSource, place: int) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(FolderSource, "read", fails)
    said = refused(command.main, images, tmp_path, "--shard-mb", "1")
    assert "no image can be used, e.g. " in said
    assert "Stale file handle" in said
    assert not list(tmp_path.glob("*.tar"))


def test_places_that_cannot_be_written_are_one_line(
    images: Path, tmp_path: Path, refused: Callable[..., str], s3: S3Server
) -> None:
    (tmp_path / "file").touch()
    assert "expected a place for shards, File exists" in refused(command.main, images, tmp_path / "file")
    assert "expected a place for shards, Not a directory" in refused(command.main, images, tmp_path / "file" / "x")
    assert "expected a place for shards" in refused(command.main, images, "/proc/nowhere")
    assert "expected a URL without a user" in refused(command.main, images, "s3://me:hush@images/x")
    assert "nope://x: expected s3://" in refused(command.main, images, "nope://x")
    assert "expected a bucket that is there" in refused(command.main, images, "s3://imags/x")
    s3.fail("*", 403)
    assert "expected to be let in" in refused(command.main, images, "s3://images/x")
    s3.heal()
    s3.fail("*", 400, method="PUT")
    assert "s3://images/x: expected a place for shards, " in refused(command.main, images, "s3://images/x")
    with HttpServer(tmp_path) as server:
        assert "expected a store that files can be written to" in refused(command.main, images, f"{server.url}/x")
    assert "--shard-mb: expected a number from" in refused(command.main, images, tmp_path / "to", "--shard-mb", "0")
    assert "--shard-mb: expected a number from" in refused(command.main, images, tmp_path / "to", "--shard-mb", "nan")


def test_what_is_somebody_elses_is_left_alone(
    images: Path, tmp_path: Path, refused: Callable[..., str], s3: S3Server
) -> None:
    write_tar(tmp_path / "theirs" / "deep" / "x.tar", {"a.jpg": b"1"})
    s3.put("theirs/deep/x.tar", b"1")
    for place in (tmp_path / "theirs", tmp_path / "theirs" / "deep", f"{s3.bucket}/theirs"):
        assert "expected a place without .tar files" in refused(command.main, images, place)
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "deep", "x.tar"]
    assert s3.keys() == ["theirs/deep/x.tar"]
    make(images, tmp_path / "mine")
    before = files(tmp_path / "mine")
    said = "expected shards of these images and this --shard-mb"
    assert said in refused(command.main, images, tmp_path / "mine", "--shard-mb", "0.04")
    assert said in refused(command.main, images / "light", tmp_path / "mine", "--shard-mb", str(MB))
    shutil.copytree(images, tmp_path / "renamed")
    (tmp_path / "renamed" / "light").rename(tmp_path / "renamed" / "lighter")
    assert said in refused(command.main, tmp_path / "renamed", tmp_path / "mine", "--shard-mb", str(MB))
    assert files(tmp_path / "mine") == before
    for damage in (b"", b"[]", b'{"fingerprint": 1}', b"\xff"):
        (tmp_path / "mine" / "make_shards.json").write_bytes(damage)
        assert said in refused(command.main, images, tmp_path / "mine", "--shard-mb", str(MB))


def test_two_processes_do_not_write_the_same_folder(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    with targets.open_target(str(tmp_path)):
        assert "another is writing shards there" in refused(command.main, images, tmp_path)
    make(images, tmp_path)


def test_a_failure_gives_up_what_is_under_way(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(images, tmp_path / "whole")
    with tarfile.open(tmp_path / "whole" / "000000.tar") as tar:
        first = {int(name.partition(".")[0]) for name in tar.getnames()}
    slow: list[int] = []
    read, send = FolderSource.read, targets.Target.send

    def slowly(self: FolderSource, place: int) -> bytes:
        if place not in first:
            slow.append(place)
            time.sleep(0.05)
        return read(self, place)

    def full(self: targets.Target, name: str) -> None:
        if name == "000000.tar":
            raise OSError(28, "No space left on device")
        send(self, name)

    monkeypatch.setattr(FolderSource, "read", slowly)
    monkeypatch.setattr(targets.Target, "send", full)
    monkeypatch.setattr(command, "_AT_ONCE", 2)
    monkeypatch.setattr(plan, "_AHEAD", 1)
    with pytest.raises(DataError, match="No space left on device"):
        make(images, tmp_path / "to")
    assert len(slow) < 6  # of at least 8 in the second shard


def test_images_of_a_shard_are_read_at_the_same_time(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(8, timeout=20)  # breaks where they come one by one
    read = FolderSource.read

    def waits(self: FolderSource, place: int) -> bytes:
        if place < 56:
            together.wait()
        return read(self, place)

    monkeypatch.setattr(FolderSource, "read", waits)
    make(images, tmp_path, 1)


def test_ctrl_c_ends_it_soon(images: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    send = targets.Target.send

    def slowly(self: targets.Target, name: str) -> None:
        sent.append(name)
        if len(sent) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        send(self, name)

    monkeypatch.setattr(targets.Target, "send", slowly)
    monkeypatch.setattr(command, "_AT_ONCE", 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        assert call(command.main, images, tmp_path, "--shard-mb", MB) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(shards(files(tmp_path))) < 4
    monkeypatch.undo()
    make(images, tmp_path)
    assert len(open_source(tmp_path)) == 60
