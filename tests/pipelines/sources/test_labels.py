"""Classes of images in folders and shards, and what is said where there are none."""

from pathlib import Path

import pytest
from small_runs import write_tar

from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source


def folder(root: Path, *names: str) -> ImageSource:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return open_source(root)


def shard(root: Path, content: dict[str, bytes]) -> ImageSource:
    return open_source(write_tar(root / "s.tar", content))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("a.jpg", "b.jpg"), "all 2 lie in one folder"),
        (("cat/1.jpg", "dog/2.jpg", "s.jpg"), "s.jpg lies beside the folders (cat, dog)"),
        (("cat/1.jpg", "dog/2.jpg", "s.jpg", "t.jpg"), "s.jpg and 1 more lie beside the folders (cat, dog)"),
        (("cat/1.jpg", "s.jpg"), "1 of 2 lie in no folder, e.g. s.jpg"),
        (("a/1.jpg", "b/2.jpg", *(f"{n}.jpg" for n in range(4))), "4 of 6 lie in no folder, e.g. 0.jpg"),
        (("cat/1.jpg", "cat/2.jpg"), "all 2 lie in the folder cat"),
        (
            ("train/cat/1.jpg", "train/dog/2.jpg"),
            "all lie in train, which holds the folders cat, dog: give train itself",
        ),
        ((*(f"{name}/1.jpg" for name in "abcdef"), "s.jpg"), "s.jpg lies beside the folders (a, b, c, d, …)"),
    ],
)
def test_a_folder_without_labels_says_why(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    source = folder(tmp_path, *names)
    assert source.labels is None
    assert source.classes == []
    assert source.unlabelled == reason


def labels(source: ImageSource) -> list[str]:
    assert source.labels is not None, source.unlabelled
    assert source.unlabelled == ""
    return [source.classes[number] for number in source.labels.tolist()]


def test_a_folder_with_labels_says_nothing(tmp_path: Path) -> None:
    assert labels(folder(tmp_path, "b/1.jpg", "a/deep/2.jpg")) == ["a", "b"]


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        ((b"10", b"9\n", b"10"), ["9", "10"]),
        ((b"cat", b" dog\n", b"cat"), ["cat", "dog"]),
        ((b"n01440764", b"7", b"7"), ["7", "n01440764"]),
        ((b"\xef\xbb\xbfcat", "köter".encode(), b"cat"), ["cat", "köter"]),
        ((b"9" * 40, b"1", b"1"), ["1", "9" * 40]),
        ((b"007", b"7", b"8"), ["7", "8"]),
    ],
)
def test_members_that_say_the_class(tmp_path: Path, texts: tuple[bytes, ...], classes: list[str]) -> None:
    content = {f"{n}.{part}": data for n, text in enumerate(texts) for part, data in (("jpg", b"x"), ("cls", text))}
    source = shard(tmp_path, content)
    assert source.classes == classes
    assert len(labels(source)) == 3


@pytest.mark.parametrize("text", [b"", b"-1", b"cat\ndog", b"x" * 300, b"\0\0"])
def test_a_member_that_says_no_class_is_named(tmp_path: Path, text: bytes) -> None:
    source = shard(tmp_path, {"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x", "b.cls": text})
    assert source.labels is None
    assert source.unlabelled == "the .cls member of s.tar/b.jpg holds neither a whole number nor a name"


def test_some_images_without_their_class_are_counted(tmp_path: Path) -> None:
    source = shard(tmp_path, {"a.jpg": b"x", "a.cls": b"1", "k/b.jpg": b"x", "c.jpg": b"x", "l/c.jpg": b"x"})
    assert source.unlabelled == "3 of 4 have no .cls member, e.g. s.tar/k/b.jpg"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cat/1.jpg", "dog/2.jpg", "cat/3.jpg"), ["cat", "dog", "cat"]),
        (("./train/dog/1.jpg", "./train/cat/x/2.jpg"), ["dog", "cat"]),
        (("a/b/cat/1.jpg", "a/b/dog/1.jpg"), ["cat", "dog"]),
    ],
)
def test_folders_inside_a_shard_are_classes(tmp_path: Path, names: tuple[str, ...], expected: list[str]) -> None:
    assert labels(shard(tmp_path, dict.fromkeys(names, b"x"))) == expected


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("1.jpg", "2.jpg"), "no .cls members, and all 2 lie in one folder"),
        (("cat/1.jpg", "cat/2.jpg"), "no .cls members, and all 2 lie in one folder"),
        (("cat/1.jpg", "dog/2.jpg", "s.jpg"), "no .cls members, and s.tar/s.jpg lies beside the folders (cat, dog)"),
    ],
)
def test_a_shard_without_labels_says_why(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    source = shard(tmp_path, dict.fromkeys(names, b"x"))
    assert source.labels is None
    assert source.unlabelled == reason
