"""Features of any folder: right, with their paths, whole, and resumed where they stopped."""

import csv
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import LOADERS, needs_dali
from odd_images import bad_images
from PIL import Image
from small_runs import SMALL, write_classes

from reco_fast import embed, train
from reco_fast.errors import ConfigError
from reco_fast.evaluation import embedding_files
from reco_fast.evaluation.features import extract_features
from reco_fast.pipelines.sources.open import open_source
from reco_fast.run.run_folder import load_run

BATCH = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images in each of two classes."""
    return write_classes(tmp_path_factory.mktemp("images"), 20, suffix=".png")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = "--train.max-steps 1 --train.precision fp32 --data.loader torch --data.workers 1".split()
    arguments = ["cifar10", "--data.path", str(images), "--run.dir", str(folder), *SMALL, *options]
    train.train(*train.parse(arguments))
    return folder


def embedded(run: Path, path: Path, output: Path, loader: str = "torch", **options: object) -> dict[str, np.ndarray]:
    command = embed.EmbedCommand(
        run,
        output,
        embed.ImagesConfig(path, loader=loader, workers=1),  # type: ignore[arg-type]
        batch_size=BATCH,
        device="cpu",
        **options,  # type: ignore[arg-type]
    )
    assert embed.embed(command) == 0
    assert not list(output.parent.glob("*.tmp"))
    assert not list(output.parent.glob("*.parts"))
    with np.load(output) as arrays:
        return dict(arrays)


def by_extract_features(run: Path, path: Path, which: str = "student") -> np.ndarray:
    config, encoder = load_run(run, which)
    device = torch.device("cpu")
    extracted = extract_features(
        encoder.get_submodule("backbone"),
        open_source(path),
        config.data,
        batch_size=BATCH,
        device=device,
        precision=torch.float32,
    )
    return extracted.features.numpy()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_features_paths_and_labels(run: Path, images: Path, tmp_path: Path, which: str) -> None:
    arrays = embedded(run, images, tmp_path / "deeper" / "f.npz", which=which)
    assert arrays["features"].dtype == np.float32
    assert arrays["paths"].dtype.kind == "U"
    assert arrays["labels"].dtype == np.int64
    np.testing.assert_array_equal(arrays["features"], by_extract_features(run, images, which))
    assert arrays["paths"].tolist() == list(open_source(images).names)
    assert [arrays["classes"][n] for n in arrays["labels"]] == [name.split("/")[0] for name in arrays["paths"]]


@needs_dali
def test_both_loaders_agree(run: Path, images: Path, tmp_path: Path) -> None:
    by_torch, by_dali = (embedded(run, images, tmp_path / f"{kind}.npz", kind) for kind in ("torch", "dali"))
    assert by_torch["paths"].tolist() == by_dali["paths"].tolist()
    a, b = (torch.nn.functional.normalize(torch.from_numpy(x["features"])) for x in (by_torch, by_dali))
    assert (a * b).sum(dim=1).min() > 0.999


def test_an_array_from_python_is_what_the_command_writes(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "dark" / "broken.png").write_bytes(b"no image")
    written = embedded(run, tmp_path / "images", tmp_path / "f.npz", "auto", which="teacher")
    found = embed.embed_images(run, tmp_path / "images", which="teacher", batch_size=BATCH, device="cpu")
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, written["features"], rtol=1e-5, atol=1e-5)
    assert found.paths == written["paths"].tolist()
    assert len(found.paths) == 40
    assert list(found.bad) == ["dark/broken.png"]
    with pytest.raises(ConfigError, match=r"config\.json"):
        embed.embed_images(tmp_path, images)


def test_shards(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number, name in enumerate(("dark", "light")):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for path in sorted((images / name).iterdir()):
                tar.add(path, path.name)
    arrays = embedded(run, tmp_path / "shards", tmp_path / "f.npz")
    folder = embedded(run, images, tmp_path / "folder.npz")
    named = dict(zip(folder["paths"].tolist(), folder["features"], strict=True))
    assert len(arrays["paths"]) == 40
    assert "labels" not in arrays
    for path, row in zip(arrays["paths"].tolist(), arrays["features"], strict=True):
        shard, _, name = path.partition("/")
        np.testing.assert_allclose(row, named[f"{('dark', 'light')[int(shard[0])]}/{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loader", LOADERS)
def test_bad_images_are_left_out_and_named(
    run: Path, images: Path, tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for index, path in enumerate(sorted(images.rglob("*.png"))):
        (mixed / f"{index:02d} ünïcode.png").write_bytes(path.read_bytes())
    for name, content in bad_images().items():
        (mixed / name).write_bytes(content)
    (mixed / "99 gone.png").symlink_to("nowhere")
    arrays = embedded(run, mixed, tmp_path / "f.npz", loader)
    assert arrays["paths"].tolist() == [f"{index:02d} ünïcode.png" for index in range(40)]
    assert len(np.unique(arrays["features"], axis=0)) == 40
    lines = (tmp_path / "f.npz.bad_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted([*bad_images(), "99 gone.png"])
    assert all(line.split("\t")[1] for line in lines)
    assert f"unreadable: {len(lines)}" in capsys.readouterr().out
    for name in (*bad_images(), "99 gone.png"):
        (mixed / name).unlink()
    good = embedded(run, mixed, tmp_path / "f.npz", loader)
    np.testing.assert_allclose(good["features"], arrays["features"], rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "f.npz.bad_images.txt").exists()


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: type[BaseException] = Stopped) -> None:
    count = 0

    def add(self: embedding_files.Part, *arguments: object) -> None:
        nonlocal count
        if count == batches:
            raise error
        count += 1
        original(self, *arguments)  # type: ignore[arg-type]

    original = embedding_files.Part.add
    monkeypatch.setattr(embedding_files.Part, "add", add)


@pytest.mark.parametrize("part_seconds", [0.0, 30.0])
def test_interrupted_work_goes_on(
    run: Path, images: Path, tmp_path: Path, part_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for index, path in enumerate(sorted(images.rglob("*.png"))):
        (mixed / f"{index:02d}.png").write_bytes(path.read_bytes())
    (mixed / "07.png").write_text("bad, and its place in the batch is taken by the first image of the next")
    straight = embedded(run, mixed, tmp_path / "straight.npz")
    assert len(straight["paths"]) == 39
    monkeypatch.setattr(embed, "PART_SECONDS", part_seconds)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            embedded(run, mixed, tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()
    assert len(list((tmp_path / "f.npz.parts").glob("part-*"))) == (3 if part_seconds == 0 else 1)
    computed = []
    original = embedding_files.Part.add
    with monkeypatch.context() as patch:
        patch.setattr(embedding_files.Part, "add", lambda self, *a: (computed.append(len(a[1])), original(self, *a)))
        resumed = embedded(run, mixed, tmp_path / "f.npz")
    assert computed == [BATCH, BATCH]
    for name, values in straight.items():
        np.testing.assert_array_equal(values, resumed[name])
    assert (tmp_path / "f.npz.bad_images.txt").read_text().startswith("07.png\t")


@pytest.mark.parametrize("change", ["images", "teacher", "damaged part"])
def test_parts_of_other_work_are_not_taken(
    run: Path, images: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for index, path in enumerate(sorted(images.rglob("*.png"))):
        (copy / f"{index:02d}.png").write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(embed, "PART_SECONDS", 0.0)
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            embedded(run, copy, tmp_path / "f.npz")
    options = {}
    if change == "images":
        Image.new("RGB", (33, 33)).save(copy / "00.png")
    elif change == "teacher":
        options = {"which": "teacher"}
    else:
        _, part, _ = sorted((tmp_path / "f.npz.parts").glob("part-*"))
        part.write_bytes(part.read_bytes()[:-100])
    arrays = embedded(run, copy, tmp_path / "f.npz", **options)
    np.testing.assert_array_equal(arrays["features"], by_extract_features(run, copy, **options))


def test_ctrl_c_keeps_what_is_done(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3, KeyboardInterrupt)
    source = embed.ImagesConfig(images, loader="torch", workers=1)
    assert embed.embed(embed.EmbedCommand(run, tmp_path / "f.npz", source, batch_size=BATCH, device="cpu")) == 130
    assert [path.name for path in tmp_path.rglob("part-*")] == ["part-000000000-000000003.npz"]


def test_parquet(run: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    arrays = embedded(run, images, tmp_path / "f.npz")
    source = embed.ImagesConfig(images, loader="torch", workers=1)
    assert embed.embed(embed.EmbedCommand(run, tmp_path / "f.parquet", source, batch_size=BATCH, device="cpu")) == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == arrays["paths"].tolist()
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    assert table["class"].to_pylist() == arrays["classes"][arrays["labels"]].tolist()
    np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), arrays["features"])


def test_projector_files_are_what_tensorboard_reads(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_files, "PROJECTOR_IMAGES", 10)
    arrays = embedded(run, images, tmp_path / "f.npz", projector=tmp_path / "projector")
    folder = tmp_path / "projector" / "00000" / "default"
    assert "sprite.png" in (tmp_path / "projector" / "projector_config.pbtxt").read_text()
    tensors = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    with open(folder / "metadata.tsv", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    assert header == ["path", "class"]
    assert len(rows) == len(tensors) == 10
    places = [arrays["paths"].tolist().index(path) for path, _ in rows]
    np.testing.assert_allclose(tensors, arrays["features"][places], rtol=1e-6)
    assert {label for _, label in rows} == {"dark", "light"}
    with Image.open(folder / "sprite.png") as sprite:
        assert sprite.size == (4 * embedding_files.THUMBNAIL, 4 * embedding_files.THUMBNAIL)
        first = np.asarray(sprite)[: embedding_files.THUMBNAIL, : embedding_files.THUMBNAIL]
    with Image.open(images / rows[0][0]) as image:
        assert abs(first.mean() - np.asarray(image).mean()) < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/missing --data.path {images} --output {tmp}/f.npz", "config.json"),
        ("{run} --data.path {tmp}/missing --output {tmp}/f.npz", "missing"),
        ("{run} --data.path {tmp}/empty --output {tmp}/f.npz", "empty"),
        ("{run} --data.path {images} --output {tmp}/f.csv", ".npz or .parquet"),
        ("{run} --data.path {images} --output {tmp}/f", ".npz or .parquet"),
        ("{run} --data.path {images} --output /proc/nowhere/f.npz", "/proc/nowhere"),
        ("{run} --data.path {images} --output {tmp}/file/f.npz", "file/f.npz"),
        ("{run} --data.path {images} --output {tmp}/f.npz --projector {tmp}", "--projector"),
        ("{run} --data.path {images} --output {tmp}/f.npz --projector {tmp}/file", "--projector"),
        ("{run} --data.path {images} --output {tmp}/f.npz --batch-size 0", "--batch-size"),
        ("{run} --data.path {images} --output {tmp}/f.npz --data.loder torch", "--data.loader"),
        ("{run} --data.path {images} --output {tmp}/f.npz --device cuda", "error: --device: expected cpu or auto"),
        ("{run} --output {tmp}/f.npz", "--data.path"),
        ("{run} --data.path {images}", "output"),
        ("{run} --data.path {tmp}/texts --output {tmp}/f.npz --data.loader torch", "no image can be used"),
        ("{run} --data.path {tmp}/texts --output {tmp}/f.npz --data.on-bad-image raise", "a.jpg"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: str,
    message: str,
    run: Path,
    images: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or asking for it might be no mistake
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jpg").write_text("hello")
    (tmp_path / "file").touch()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert message in refused(embed.main, *arguments.format(tmp=tmp_path, images=images, run=run).split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_without_pyarrow_parquet_says_what_to_install(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'reco-fast\[parquet\]'"):
        embed.embed(embed.EmbedCommand(run, tmp_path / "f.parquet", embed.ImagesConfig(images)))


DIES = """
import os, signal
from reco_fast import embed
from reco_fast.evaluation import embedding_files
embed.PART_SECONDS = 0
add = embedding_files.Parts.add
def add_or_die(self, part):
    add(self, part)
    if self.steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)
embedding_files.Parts.add = add_or_die
embed.main()
"""


def test_killed_and_started_again(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch-size", str(BATCH), "--data.loader", "torch", "--data.workers", "0", "--device", "cpu"]
    arguments = [str(run), "--data.path", str(images), "--output", str(tmp_path / "f.npz"), *options]
    killed = subprocess.run([sys.executable, "-c", DIES, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "f.npz").exists()
    assert sum(1 for _ in tmp_path.rglob("part-*")) == 2
    arrays = embedded(run, images, tmp_path / "f.npz")
    shown = capsys.readouterr().out
    assert "40 of 40 images" in shown
    assert "40 × 96 features" in shown
    np.testing.assert_allclose(arrays["features"], by_extract_features(run, images), rtol=1e-4, atol=1e-4)


def test_the_neighbours_code_of_the_docs(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed; pip install 'reco-fast[examples]'")
    text = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import faiss.*?)```", text, re.DOTALL)
    assert sum(1 for line in code.splitlines() if line) == 10
    embedded(run, images, tmp_path / "features.npz")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    for path, line in zip(open_source(images).names[:3], printed, strict=True):
        assert line.startswith(f"{path} → ['{path} 1.00'")  # each is its own nearest
