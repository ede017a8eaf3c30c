"""Features written to a store: those that a file would hold, whole, and gone on with on another machine."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from servers import S3Server
from small_runs import SMALL, write_classes, write_tar

from reco_fast import embed, train
from reco_fast.evaluation.embedding_files import Part, Parts
from reco_fast.pipelines.bad_images.journal import Journal
from reco_fast.pipelines.bad_images.probe import Probe
from reco_fast.pipelines.stores import store
from reco_fast.run import files, quarantine

BATCH = 8
LIST = "f.npz.bad_images.txt"
PARTS = ["f.npz.parts/fingerprint.txt", *(f"f.npz.parts/part-{n:09d}-{n + 1:09d}.npz" for n in range(2))]


class Made(NamedTuple):
    """`images`: 15 in each of two classes. `shards`: one of each class, one image of the first is bad. `here`: what
    `embed` writes of those shards into a folder."""

    run: Path
    images: Path
    shards: Path
    here: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    found = Made(folder / "run", write_classes(folder / "images", 15), folder / "shards", folder)
    for number, name in enumerate(("dark", "light")):
        members = {}
        for path in sorted((found.images / name).iterdir()):
            members[path.name] = b"text" if (name, path.stem) == ("dark", "3") else path.read_bytes()
            members[f"{path.stem}.cls"] = str(number).encode()
        write_tar(found.shards / f"{number}.tar", members)
    options = "--train.max-steps 1 --train.precision fp32 --data.loader torch --data.workers 1".split()
    arguments = ["cifar10", "--data.path", str(found.images), "--run.dir", str(found.run), *SMALL, *options]
    train.train(*train.parse(arguments))
    assert embedded(found, found.shards, folder / "f.npz") == 0
    return found


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine that has not seen these images."""
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(store, "PATIENCE", 5.0)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reco_fast"


@pytest.fixture
def shards(made: Made, s3: S3Server) -> str:
    """Their URL."""
    for path in sorted(made.shards.iterdir()):
        s3.put(f"train/{path.name}", path.read_bytes())
    return f"{s3.bucket}/train"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each batch, as it is added to a part."""
    counts: list[int] = []
    original = Part.add

    def add(self: Part, features: Any, indices: Any, bad: Any) -> None:
        counts.append(len(indices) + len(bad))
        original(self, features, indices, bad)

    monkeypatch.setattr(Part, "add", add)
    return counts


def embedded(made: Made, images: object, output: object) -> int:
    source = embed.ImagesConfig(str(images), loader="torch", workers=1)
    return embed.embed(embed.EmbedCommand(made.run, str(output), source, batch_size=BATCH, device="cpu"))


def words(made: Made, images: object, output: object) -> list[object]:
    options = f"--data.loader torch --data.workers 1 --batch-size {BATCH} --device cpu".split()
    return [made.run, "--data.path", images, "--output", output, *options]


def interrupted(made: Made, images: object, output: object, batches: int) -> None:
    """Ctrl-C after so many batches, each of which is a part."""
    count = 0

    def outputs(*arguments: Any) -> Any:
        nonlocal count
        if count == batches:
            raise KeyboardInterrupt
        count += 1
        return original(*arguments)

    original = embed.outputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "PART_SECONDS", 0.0)
        patch.setattr(embed, "outputs", outputs)
        assert embedded(made, images, output) == 130


def outside(s3: S3Server) -> list[str]:
    """What lies beside the shards."""
    keys = s3.keys()
    return [key for key in keys if not key.startswith("train/")]


def test_shards_of_a_store_to_the_store(made: Made, shards: str, s3: S3Server, machine: Path) -> None:
    assert embedded(made, shards, f"{s3.bucket}/to/f.npz") == 0
    assert outside(s3) == ["to/f.npz", f"to/{LIST}"]
    sent = [asked.path for asked in s3.asked if asked.method == "PUT"]
    assert sent[-2:] == ["/images/to/f.npz", f"/images/to/{LIST}"]
    assert sent.count("/images/to/f.npz") == 1, "never there but whole"
    for name in ("f.npz", LIST):
        assert s3.get(f"to/{name}") == (made.here / name).read_bytes()
    assert s3.get(f"to/{LIST}").startswith(b"0.tar/3.jpg\tnot an image")
    assert not list((machine / "embed").glob("*"))


def test_local_images_to_parquet_in_the_store(made: Made, s3: S3Server, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    s3.put("to/f.parquet.bad_images.txt", b"of an earlier run")
    for output in (f"{s3.bucket}/to/f.parquet", f"file://{tmp_path}/f.parquet"):
        assert embedded(made, made.images, output) == 0
    assert s3.keys() == ["to/f.parquet"]
    assert s3.get("to/f.parquet") == (tmp_path / "f.parquet").read_bytes()
    assert not (tmp_path / "f.parquet.parts").exists()


def test_another_machine_goes_on(
    made: Made,
    shards: str,
    s3: S3Server,
    computed: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = f"{s3.bucket}/f.npz"
    interrupted(made, shards, output, 2)
    assert "stopped after 16 images; the same command goes on" in capsys.readouterr().err
    assert outside(s3) == PARTS
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    computed.clear()
    s3.fail("*/part-*", 403, method="GET")
    assert "expected to be let in" in refused(embed.main, *words(made, shards, output))
    assert (outside(s3), computed) == (PARTS, [])
    s3.heal()
    assert embedded(made, shards, output) == 0
    assert computed == [8, 6]
    assert outside(s3) == ["f.npz", LIST]
    for name in ("f.npz", LIST):
        assert s3.get(name) == (made.here / name).read_bytes()


def test_parts_in_pieces_and_those_of_other_work(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE", 1000)
    parts = Parts(f"{s3.bucket}/f.npz.parts", "work")
    for step in range(2):
        part = Part(step)
        part.add(np.full((50, 20), step, np.float32), np.arange(50) + 50 * step, {f"bad {step}": "reason"})
        parts.add(part)
    s3.put("f.npz.parts/mine.txt", b"of a person")
    s3.put(PARTS[2], s3.get(PARTS[2])[:-100])
    assert (parts.steps, parts.images) == (2, 102)
    again = Parts(f"{s3.bucket}/f.npz.parts", "work")
    assert (again.steps, again.images) == (1, 51)
    s3.forget()
    found = again.join({})
    assert len([asked for asked in s3.asked if asked.method == "GET"]) > 4
    assert (found.features.tolist(), found.indices.tolist()) == ([[0.0] * 20] * 50, list(range(50)))
    assert found.bad == {"bad 0": "reason"}
    assert Parts(f"{s3.bucket}/f.npz.parts", "other work").steps == 0
    assert s3.keys() == [PARTS[0], "f.npz.parts/mine.txt"]


def test_a_store_that_goes_away_while_the_output_is_sent(
    made: Made, s3: S3Server, computed: list[int], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, comes_back = f"{s3.bucket}/f.npz", False

    def upload(local: str, url: str) -> None:
        if url == output:
            s3.stop()
            if comes_back:
                threading.Timer(0.3, s3.start).start()
        original(local, url)

    original = store.upload
    monkeypatch.setattr(store, "upload", upload)
    with monkeypatch.context() as patch:
        patch.setattr(store, "PATIENCE", 0.2)
        shown = refused(embed.main, *words(made, made.images, output))
    s3.start()
    assert "expected a store that answers" in shown
    assert "the same command goes on" in shown
    assert s3.keys() == [PARTS[0], "f.npz.parts/part-000000000-000000004.npz"]
    computed.clear()
    comes_back = True
    assert embedded(made, made.images, output) == 0
    assert (s3.keys(), computed) == (["f.npz"], [])


def test_what_ended_a_process_is_known_to_this_machine(
    made: Made, s3: S3Server, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folders = f"{s3.bucket}/f.npz", []

    def leave_out(folder: Path, *rest: Any) -> list[str]:
        folders.append(folder)
        return original(folder, *rest)

    original = quarantine.leave_out
    monkeypatch.setattr(quarantine, "leave_out", leave_out)
    interrupted(made, made.images, output, 1)
    Journal(folders[0] / quarantine.JOURNALS / "images").begin([20, 21])  # of a process that never closed it
    deadly = (made.images / "light" / "14.jpg").read_bytes()
    monkeypatch.setattr(Probe, "reason", lambda probe, data: "the decoder dies of it" if data == deadly else None)
    assert embedded(made, made.images, output) == 0
    assert s3.get(LIST) == b"light/14.jpg\tthe decoder dies of it\n"
    assert folders[0] == folders[1]
    assert folders[0].parent == machine / "embed"
    assert not folders[0].exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s3://images/f.csv", "--output: expected a file name that ends in .npz or .parquet, got s3://images/f.csv"),
        ("s3://images/f.npz/", "--output: expected a file name"),
        ("nope://a/f.npz", "--output: nope://a/f.npz: expected s3://"),
        ("s3://me:the-secret-of-the-tests@images/f.npz", "--output: s3://…@…: expected a URL without"),
        ("s3://imags/f.npz", "expected a bucket that is there"),
        ("{web}/images/f.npz", "expected a store that files can be written to"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(
    output: str,
    message: str,
    made: Made,
    s3: S3Server,
    refused: Callable[..., str],
    computed: list[int],
    tmp_path: Path,
) -> None:
    shown = refused(embed.main, *words(made, made.images, output.format(web=s3.url)))
    assert message in shown
    assert "the-secret-of-the-tests" not in shown
    assert (s3.keys(), computed, list(tmp_path.iterdir())) == ([], [], [])
    assert not Path("s3:").exists()


@pytest.mark.parametrize("method", ["", "PUT"])
def test_without_rights_nothing_is_computed_and_nothing_left(
    method: str, made: Made, s3: S3Server, refused: Callable[..., str], computed: list[int], tmp_path: Path
) -> None:
    s3.fail("*", 403, method=method)
    shown = refused(embed.main, *words(made, made.images, f"{s3.bucket}/f.npz"))
    assert "s3://images/f.npz.parts" in shown
    assert "expected to be let in" in shown
    assert "the-secret-of-the-tests" not in shown
    assert (s3.keys(), computed, list(tmp_path.iterdir())) == ([], [], [])


def test_a_part_that_is_not_taken_ends_the_work_at_once(
    made: Made, s3: S3Server, refused: Callable[..., str], computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "PART_SECONDS", 0.0)
    s3.fail("*/part-*", 403, method="PUT")
    assert "part-000000000-000000001.npz" in refused(embed.main, *words(made, made.images, f"{s3.bucket}/f.npz"))
    assert len([asked for asked in s3.asked if asked.method == "PUT" and "/part-" in asked.path]) == 1
    assert (s3.keys(), computed) == ([], [8])


def test_a_store_that_takes_no_file_is_named(made: Made, s3: S3Server, refused: Callable[..., str]) -> None:
    s3.fail("*", 409, method="PUT")
    shown = refused(embed.main, *words(made, made.images, f"{s3.bucket}/f.npz"))
    assert "--output: expected a store that keeps files, got s3://images/f.npz.parts/fingerprint.txt (" in shown


def test_a_missing_package_is_named(made: Made, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    shown = refused(embed.main, *words(made, made.images, "s3://images/f.npz"))
    assert "--output: s3://images/f.npz: " in shown
    assert "pip install 'reco-fast[cloud]'" in shown


def test_a_place_in_python_may_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [embed.EmbedCommand(Path("r"), each).output for each in ("~/f.npz", Path("~/f.npz"), "s3://a//f.npz")]
    assert found == [f"{tmp_path}/f.npz", f"{tmp_path}/f.npz", "s3://a//f.npz"]
