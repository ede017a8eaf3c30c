"""What the manifest and the quarantine say is found in every kind of source, in whatever order its names come."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_images import encode, picture
from small_runs import SMALL, metrics, write_pictures, write_tar

from reco_fast import check_images, train
from reco_fast.pipelines.sources.image_source import ImageSource, PackedNames
from reco_fast.pipelines.sources.open import open_source
from reco_fast.run import quarantine
from reco_fast.run.files import write_json
from reco_fast.settings.config import DataConfig

UNSORTED = ("b.jpg", "a.jpg", "z/c.jpg", "d.jpg", "ünï.jpg", "B.jpg", "10.jpg", "9.jpg")


def folder(root: Path) -> str:
    for name in (*UNSORTED, os.fsdecode(b"not \xff utf8.jpg")):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(name.encode(errors="surrogateescape"))
    return str(root / "images")


def shard(root: Path) -> str:
    return str(write_tar(root / "s.tar", [(name, name.encode()) for name in UNSORTED]))


def shard_with_a_name_twice(root: Path) -> str:
    return str(write_tar(root / "s.tar", [(name, bytes(n)) for n, name in enumerate((*UNSORTED, "a.jpg"), 3)]))


def shards_of_one_name(root: Path) -> str:
    for part in ("y", "x"):
        write_tar(root / part / "s.tar", [(name, part.encode() * 9) for name in UNSORTED[:3]])
        os.utime(root / part / "s.tar", ns=(0, ord(part)))
    return f"{root}/{{y,x}}/s.tar"


def pixel_files(root: Path) -> str:
    (root / "cache" / "reco_fast" / "cifar10").mkdir(parents=True)
    for number in range(1, 6):
        (root / "cache" / "reco_fast" / "cifar10" / f"data_batch_{number}.bin").write_bytes(bytes(4 * 3073))
    return "cifar10"


def hugging_face(root: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": bytes(3 + number)} for number in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


KINDS = (folder, shard, shard_with_a_name_twice, shards_of_one_name, pixel_files, hugging_face)


@pytest.fixture(params=KINDS, ids=[make.__name__ for make in KINDS])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSource:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    make: Callable[[Path], str] = request.param
    return open_source(make(tmp_path))


def of_that_name(source: ImageSource, index: int) -> list[int]:
    return [place for place in range(len(source)) if source.names[place] == source.names[index]]


def test_a_manifest_is_found_image_by_image(source: ImageSource, tmp_path: Path) -> None:
    """Each image in turn is the only bad one; those of another stamp are none of its business."""
    count, names = len(source), list(source.names)
    for bad in range(count):
        lines = [
            quarantine.manifest_line(names[i], source.stamp(i), "broken" if i == bad else None) for i in range(count)
        ]
        (tmp_path / "m.jsonl").write_text("".join(lines))
        assert quarantine.read_manifest(tmp_path / "m.jsonl", source) == {bad: "broken"}
        (tmp_path / "m.jsonl").write_text(lines[bad].replace('"stamp": [', '"stamp": [9'))
        assert quarantine.read_manifest(tmp_path / "m.jsonl", source) == {}


def test_the_quarantine_is_found_image_by_image(source: ImageSource, tmp_path: Path) -> None:
    data = DataConfig(path=tmp_path)
    for bad in range(len(source)):
        source.known_bad.clear()
        write_json(tmp_path / quarantine.FILE, {"train": {source.names[bad]: "deadly", "gone.jpg": "deadly"}})
        quarantine.prepare(tmp_path, data, source, None)
        assert source.known_bad == dict.fromkeys(of_that_name(source, bad), "deadly")


def test_names_from_elsewhere_are_not_found(source: ImageSource, tmp_path: Path) -> None:
    found = dict.fromkeys(("\ud800", "", "/", "zzz.jpg", "a", "0"), "deadly")
    write_json(tmp_path / quarantine.FILE, {"train": found})
    quarantine.prepare(tmp_path, DataConfig(path=tmp_path), source, None)
    assert source.known_bad == {}


def test_two_members_of_one_name_keep_their_own_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `tar -r` appends a mended image: same name, and here the same size too."""
    good = encode(picture(), "JPEG")
    members = [("a.jpg", bytes(len(good))), ("b.jpg", b"text"), ("a.jpg", good)]
    path = write_tar(tmp_path / "s.tar", members)
    command = check_images.CheckCommand(path, tmp_path / "m.jsonl", loader="torch", workers=1)
    for _ in range(2):
        assert check_images.check(command) == 0
        assert "3 images, 2 of them bad" in capsys.readouterr().out
        assert set(quarantine.read_manifest(tmp_path / "m.jsonl", open_source(path))) == {0, 1}


def test_a_run_on_an_unsorted_shard_leaves_out_what_the_manifest_names(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in np.random.default_rng(0).permutation(20)]
    pictures = write_pictures(tmp_path / "p", 20)
    members = [(f"{name}.jpg", (pictures / f"{name}.jpg").read_bytes()) for name in names]
    members[7] = (members[7][0], b"text")
    path = write_tar(tmp_path / "s.tar", members)
    manifest, run = tmp_path / "m.jsonl", tmp_path / "run"
    check_images.check(check_images.CheckCommand(path, manifest, loader="torch", workers=1))
    mark = "what only the manifest says"
    manifest.write_text(manifest.read_text().replace("not an image: it starts with b'text'", mark))
    data = ["--data.path", str(path), "--data.manifest", str(manifest), "--data.loader", "torch", "--run.dir", str(run)]
    train.train(*train.parse(["cifar10", *data, *SMALL, "--train.max-steps", "1", "--data.workers", "1"]))
    assert (run / "bad_images.txt").read_text() == f"s.tar/{members[7][0]}\t{mark}\n"
    assert metrics(run)[-1]["kind"] == "end"


def test_a_manifest_of_other_images_is_no_silence(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path / "p", 4))
    lines = [("00.jpg", source.stamp(0), "bad"), ("01.jpg", (1, 2), "bad"), ("p/02.jpg", source.stamp(2), "bad")]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(quarantine.manifest_line(*line) for line in lines))
    data = DataConfig(path=tmp_path / "p", manifest=manifest)
    expected = f"{manifest}: 2 of its 3 bad images are not in --data.path, or have changed since"
    assert quarantine.prepare(tmp_path, data, source, None) == [expected]
    assert source.known_bad == {0: "bad"}
    manifest.write_text(quarantine.manifest_line(*lines[0]))
    assert quarantine.prepare(tmp_path, data, source, None) == []


def test_a_million_names_are_searched_in_one_pass() -> None:
    names = PackedNames([f"{number * 7919 % 1_000_003:07d}" for number in range(200_000)])
    wanted = {names[index] for index in (0, 4095, 4096, 199_999)} | {"no"}
    assert sorted(names.find(wanted).values()) == [[0], [4095], [4096], [199_999]]
    assert names.find(()) == {}
    assert PackedNames([]).find({"a"}) == {}
    assert list(names)[4090:4100] == names[4090:4100]
