"""What lies among images: what is taken, what is passed over, and that it is said in one line."""

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from launchers import environment_with
from odd_images import encode, picture
from small_runs import SMALL, write_tar

from reco_fast.errors import DataError
from reco_fast.pipelines import images
from reco_fast.pipelines.sources import kinds
from reco_fast.pipelines.sources.kinds import OTHER_RULES, PassedOver, Rules
from reco_fast.pipelines.sources.open import open_source

JPEG = encode(picture(), "JPEG")
HEIC = b"\0\0\0\x18ftypheic" + b"\0" * 12
# Opens what begins like a HEIC and holds a PNG; the real package is tried where it is installed.
STUB = """
import io
from PIL import Image, ImageFile, PngImagePlugin

class Stub(PngImagePlugin.PngImageFile):
    format = "HEIF"
    def __init__(self, fp, filename=None):
        super().__init__(io.BytesIO(fp.read()[24:]), filename)

def register_heif_opener():
    Image.register_open("HEIF", Stub, lambda start: start[4:12] == b"ftypheic")
"""


@pytest.fixture(autouse=True)
def no_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; `stub` is for others."""
    monkeypatch.setattr(kinds, "reads_heif", lambda: False)
    monkeypatch.setattr(images, "reads_heif", lambda: False)


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    return environment_with(tmp_path / "site", "pillow_heif", STUB)


def write(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_what_a_folder_holds_beside_images_is_said_in_one_line(tmp_path: Path) -> None:
    files = {f"{n}.jpg": JPEG for n in range(3)} | {f"b/{n}.HEIC": HEIC for n in range(20)}
    files |= {
        "labels.csv": b"",
        "Thumbs.db": b"",
        ".DS_Store": b"",
        "b/._1.jpg": b"",
        ".old/a.jpg": JPEG,
        "README": b"a",
    }
    files |= {"s.tar": b"", "s.tar.gz": b"", "a.zip": b"", "1.jpg_original": JPEG, "@eaDir/1.jpg/T.jpg": JPEG}
    source = open_source(write(tmp_path, files))
    assert list(source.names) == ["0.jpg", "1.jpg", "2.jpg"]
    assert {kind: count for kind, (count, _) in source.passed_over.kinds.items()} == {
        **{".heic": 20, ".csv": 1, "hidden": 1, "without a suffix": 1, ".tar": 1, ".tar.gz": 1, ".zip": 1},
        **{".jpg_original": 1, "@eaDir/": 1},
    }
    line = source.passed_over.line()
    assert line.startswith("passed over: 20 .heic (e.g. b/")
    assert ".HEIC; pip install 'reco-fast[heif]' reads them), 1 .tar (s.tar), " in line
    assert line.endswith(", 3 of other kinds")
    assert "\n" not in line


def test_nothing_is_said_of_images_alone(tmp_path: Path) -> None:
    assert open_source(write(tmp_path, {"a/1.jpg": JPEG, "Thumbs.db": b""})).passed_over.line() == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_files_without_a_suffix_are_known_by_their_first_bytes(tmp_path: Path, kind: str) -> None:
    names = ("1f3a9", "frame.0012", "Mr. Smith", "a.jpg?w=100", "plain.jpg")
    source = open_source(write(tmp_path, {name: encode(picture(), kind) for name in names}))
    assert set(source.names) == set(names)
    assert source.read(0) == encode(picture(), kind)
    shard = open_source(write_tar(tmp_path / "s.tar", {name: encode(picture(), kind) for name in names}))
    assert {name.partition("/")[2] for name in shard.names} == set(names)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"BM is not a bitmap, but a text of some length", b"P6 is a class", b"text", HEIC, bytes(99)]
)
def test_other_files_without_a_suffix_are_not_taken(tmp_path: Path, data: bytes) -> None:
    source = open_source(write(tmp_path / "f", {"a": data, "b.jpg": JPEG}))
    assert list(source.names) == ["b.jpg"]
    assert source.passed_over.kinds == {".heic" if data == HEIC else "without a suffix": (1, "a")}
    shard = open_source(write_tar(tmp_path / "s.tar", {"a": data, "b.jpg": JPEG}))
    assert list(shard.names) == ["s.tar/b.jpg"]
    assert list(shard.passed_over.kinds) == list(source.passed_over.kinds)


def test_a_pipe_without_a_suffix_is_not_waited_for_and_a_store_behind_links_is_not_taken_twice(tmp_path: Path) -> None:
    write(tmp_path, {"blobs/1f": JPEG, "blobs/2f": JPEG})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jpg").symlink_to("blobs/1f")
    source = open_source(tmp_path)
    assert list(source.names) == ["a.jpg", "blobs/2f"]
    assert source.passed_over.kinds == {"pipes or sockets": (1, "pipe")}


TOOLS = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@pytest.mark.parametrize("tool", [*TOOLS, ".ipynb_checkpoints", ".thumbnails"])
def test_folders_of_tools_are_passed_over_and_named(tmp_path: Path, tool: str) -> None:
    content = {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG, f"{tool}/1.jpg": JPEG, f"dog/{tool}/2.jpg": JPEG}
    folder = open_source(write(tmp_path / "f", content))
    shard = open_source(write_tar(tmp_path / "s.tar", content))
    for source in (folder, shard):
        assert [name.removeprefix("s.tar/") for name in source.names] == ["cat/1.jpg", "dog/1.jpg"]
        assert source.classes == ["cat", "dog"]
        assert {kind: n for kind, (n, _) in source.passed_over.kinds.items()} == {
            "hidden" if tool.startswith(".") else f"{tool}/": 2
        }
    if not tool.startswith("."):  # in a folder hidden ones never were
        assert len(open_source(write(tmp_path / "only", {f"a/{tool}/1.jpg": JPEG}))) == 1
    assert len(open_source(write_tar(tmp_path / "only.tar", {f"{tool}/1.jpg": JPEG, f"{tool}/1.txt": b""}))) == 1
    assert len(open_source(tmp_path / "f" / tool)) == 1


def test_a_shard_keeps_the_images_of_its_samples_and_names_the_others(tmp_path: Path) -> None:
    content = {"photo.jpg": JPEG, "photo.1.jpg": JPEG, "photo.json": b"{}", "photo.cls": b"1", "x.1.jpg": JPEG}
    path = write_tar(tmp_path / "s.tar", content | {"._photo.jpg": b"", "a.heic": HEIC})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("copy.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "photo.jpg"
        tar.addfile(link)
    source = open_source(path)
    assert list(source.names) == ["s.tar/photo.jpg", "s.tar/x.1.jpg"]
    assert source.passed_over.kinds == {
        ".json": (1, "s.tar/photo.json"),
        ".heic": (1, "s.tar/a.heic"),
        "links": (1, "s.tar/copy.jpg"),
        "second images of a sample": (1, "s.tar/photo.1.jpg"),
    }


def test_where_there_is_no_image_it_is_said_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "f", {"1.heic": HEIC, "2.heic": HEIC})
    with pytest.raises(DataError, match=r"it has none of them \(passed over: 2 \.heic .*reco-fast\[heif\]"):
        open_source(tmp_path / "f")
    with pytest.raises(DataError, match=r"it has none \(passed over: 1 \.heic"):
        open_source(write_tar(tmp_path / "s.tar", {"1.heic": HEIC}))


def test_the_line_stays_short() -> None:
    passed_over = PassedOver()
    for number in range(1000):
        passed_over.add(f".k{number}", "x" * 4000)
    assert len(passed_over.line()) < 800
    assert passed_over.line().endswith("994 of other kinds")


def test_earlier_rules_give_what_earlier_versions_gave(tmp_path: Path) -> None:
    content = {"cat/1.jpg": JPEG, "cat/2": JPEG, "cat/@eaDir/3.jpg": JPEG, "dog/4.heic": HEIC}
    assert list(open_source(write(tmp_path / "f", content), OTHER_RULES[1]).names) == ["cat/1.jpg", "cat/@eaDir/3.jpg"]
    shard = write_tar(tmp_path / "s.tar", content | {".x/5.jpg": JPEG})
    expected = ["s.tar/cat/1.jpg", "s.tar/cat/@eaDir/3.jpg", "s.tar/.x/5.jpg"]
    assert list(open_source(shard, OTHER_RULES[1]).names) == expected
    assert Rules() == Rules(heif=True, first_bytes=True, tools=False)


def test_heic_is_read_where_pillow_heif_is(tmp_path: Path, stub: dict[str, str]) -> None:
    """Listed, probed in another process, decoded in the torch loader's: all know it."""
    loader = "torch"
    content = {f"{n}.heic": HEIC + encode(picture(seed=n), "PNG") for n in range(16)} | {
        "x": HEIC + JPEG,
        "y.jpg": JPEG,
    }
    write(tmp_path / "f", content)
    manifest = tmp_path / "m.jsonl"
    check = ["check_images", str(tmp_path / "f"), "--output", str(manifest), "--loader", loader, "--workers", "1"]
    run = ["train", "cifar10", *SMALL, "--data.path", str(tmp_path / "f"), "--run.dir", str(tmp_path / "run")]
    run += ["--train.max-steps", "2", "--data.loader", loader, "--data.workers", "1"]
    shown = ""
    for command, *arguments in (check, run):
        line = [sys.executable, "-m", f"reco_fast.{command}", *arguments]
        done = subprocess.run(line, env=stub, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert "18 images, 1 of them bad" in shown
    assert "on 18 images" in shown
    assert "passed over" not in shown
    bad = (tmp_path / "run" / "bad_images.txt").read_text() if (tmp_path / "run" / "bad_images.txt").exists() else ""
    assert ".heic" not in bad


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="pillow-heif is not installed")
def test_heic_by_pillow_heif_itself(tmp_path: Path) -> None:
    script = (
        "import sys; from PIL import Image; import pillow_heif\n"
        "image = Image.linear_gradient('L').convert('RGB').resize((60, 40))\n"
        "pillow_heif.from_pillow(image).save(sys.argv[1] + '/a.HEIC', quality=95)\n"
        "from reco_fast.pipelines.sources.open import open_source\n"
        "from reco_fast.pipelines.images import decode_image\n"
        "source = open_source(sys.argv[1]); print(len(source), decode_image(source.read(0)).size)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "1 (60, 40)", done.stderr


def test_a_heic_under_another_name_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(images.BadImage, match=r"HEIC, which is not read here; pip install 'reco-fast\[heif\]'"):
        images.decode_image(HEIC)


def test_what_only_its_first_bytes_make_an_image_costs_no_labels(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG, "stray": JPEG}))
    assert source.classes == ["cat", "dog"]
    assert source.passed_over.kinds == {"without a suffix": (1, "stray")}
