"""An image that ends the decoder's process: named, left out, and the run goes on. And the manifest."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from launchers import environment_with
from loading import LOADERS
from odd_images import bad_images, encode, picture
from small_runs import SMALL, metrics, write_classes, write_pictures

from reco_fast import check_images, evaluate, train
from reco_fast.errors import ConfigError
from reco_fast.evaluation import pictures
from reco_fast.pipelines.bad_images.journal import Journal, left_behind
from reco_fast.pipelines.bad_images.probe import Probe
from reco_fast.pipelines.sources.open import open_source
from reco_fast.run import quarantine
from reco_fast.settings.config import DataConfig

# No file is known that kills DALI 2.4 or Pillow past the checks, so this makes both die of a mark in a comment: what
# DALI's pipelines are fed, and what Pillow's JPEG decoder opens.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, signal, sys
MARK = b"this kills"

def die(data):
    if MARK in bytes(data):
        os.kill(os.getpid(), signal.SIGSEGV)

class Hook(importlib.abc.MetaPathFinder):
    busy = False
    def find_spec(self, name, path, target=None):
        if name not in ("nvidia.dali.fn", "PIL.JpegImagePlugin") or Hook.busy:
            return None
        Hook.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            Hook.busy = False
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            (patch_dali if name == "nvidia.dali.fn" else patch_pillow)(module)
        spec.loader.exec_module = exec_module
        return spec

def patch_dali(fn):
    real = fn.external_source
    def external_source(source, **options):
        def watched():
            fed = source()
            for data in (fed[0] if options.get("num_outputs") else fed):
                die(data)
            return fed
        return real(source=watched, **options)
    fn.external_source = external_source

def patch_pillow(module):
    real = module.JpegImageFile.load_prepare
    def load_prepare(self):
        position = self.fp.tell()
        self.fp.seek(0)
        die(self.fp.read())
        self.fp.seek(position)
        return real(self)
    module.JpegImageFile.load_prepare = load_prepare

sys.meta_path.insert(0, Hook())
"""
OPTIONS = "--run.log-every 1 --train.epochs 3 --run.checkpoint-steps 1 --data.workers 1".split()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 images, of which number 13 is deadly and number 12 is bad."""
    folder = write_pictures(tmp_path / "images", 40)
    make_deadly(folder / "13.jpg")
    (folder / "12.jpg").write_bytes(b"text")
    return folder


def make_deadly(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xfe\x00\x0cthis kills" + data[2:])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return environment_with(tmp_path / "site", "sitecustomize", SITECUSTOMIZE)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_killed_a_process_is_named_and_left_out(loader: str, environment: dict[str, str], tmp_path: Path) -> None:
    """By the torch loader a training image; by DALI, in the first evaluation, a held-out one in a shard in no order."""
    for name, seed in (("images", 0), ("held out", 1)):
        write_classes(tmp_path / name, 12, seed=seed)
    make_deadly(tmp_path / ("images" if loader == "torch" else "held out") / "light" / "7.jpg")
    (tmp_path / "images" / "light" / "6.jpg").write_bytes(b"text")
    members = sorted((tmp_path / "held out").rglob("*.jpg"), key=lambda path: path.stem[::-1], reverse=True)
    with tarfile.open(tmp_path / "held out.tar", "w") as tar:
        for path in members:
            tar.add(path, str(path.relative_to(tmp_path / "held out")))
    data = ["--data.path", str(tmp_path / "images"), "--data.loader", loader, "--run.dir", str(tmp_path / "run")]
    data += ["--data.val-path", str(tmp_path / "held out.tar")] if loader == "dali" else []
    again_until_it_ends(["train", "cifar10", *data, *SMALL, *OPTIONS], environment, loader)
    listed = dict(line.split("\t") for line in (tmp_path / "run" / "bad_images.txt").read_text().splitlines())
    deadly = "light/7.jpg" if loader == "torch" else f"{tmp_path / 'held out.tar'}/held out.tar/light/7.jpg"
    assert listed == {
        "light/6.jpg": "not an image: it starts with b'text'",
        deadly: "the decoder dies of it (SIGSEGV)",
    }
    assert not list((tmp_path / "run" / "decoding").rglob("*/*/*"))
    assert metrics(tmp_path / "run")[-1]["kind"] == "end"


def again_until_it_ends(command: list[str], environment: dict[str, str], loader: str) -> None:
    """As `torchrun --max-restarts` does. It dies once and then ends."""
    codes, shown = [], ""
    while not codes or (codes[-1] != 0 and len(codes) < 5):
        line = [sys.executable, "-m", f"reco_fast.{command[0]}", *command[1:]]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        shown += done.stdout + done.stderr
    assert codes == [-11 if loader == "dali" else 2, 0], shown
    assert "Traceback" not in shown


def test_so_is_what_kills_embed(images: Path, environment: dict[str, str], tmp_path: Path) -> None:
    run = trained(tmp_path)
    options = ["--data.path", str(images), "--data.loader", "torch", "--output", str(tmp_path / "f.npz")]
    again_until_it_ends(["embed", str(run), *options], environment, "torch")
    assert (tmp_path / "f.npz.bad_images.txt").read_text() == (
        "12.jpg\tnot an image: it starts with b'text'\n13.jpg\tthe decoder dies of it (SIGSEGV)\n"
    )
    with np.load(tmp_path / "f.npz") as arrays:
        assert len(arrays["features"]) == 38
    assert not (tmp_path / "f.npz.parts").exists()


def trained(folder: Path) -> Path:
    good = write_pictures(folder / "good", 20)
    line = ["cifar10", "--data.path", str(good), *SMALL, "--train.max-steps", "1", "--run.dir", str(folder / "run")]
    return train.train(*train.parse(line))


def test_evaluate_leaves_out_what_an_earlier_one_died_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "available", lambda: False)  # they take long
    run, source = trained(tmp_path), open_source(tmp_path / "good")
    notes = run / "evaluation" / "decoding" / f"train-{source.names.digest().hex()[:16]}"
    Journal(notes).begin([3, 5])  # of a process that never closed it
    deadly = source.read(5)
    reasons = {deadly: "the decoder dies of it"}
    monkeypatch.setattr(Probe, "reason", lambda probe, data: reasons.get(data))
    found = evaluate.evaluate(evaluate.EvaluateCommand(run, DataConfig(path=tmp_path / "good")))
    assert (found["images"], found["bad_images"]) == (19, 1)
    assert "05.jpg ended a process and is left out: the decoder dies of it" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["bad_images.txt", "quarantine.json"]


def test_the_journal_outlives_its_process_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert left_behind(tmp_path / "j") == []
    journal.begin([5, 3])
    journal.begin([9])
    assert left_behind(tmp_path / "j") == [3, 5, 9]
    journal.add(8)
    assert left_behind(tmp_path / "j") == [3, 5, 8, 9]
    journal.end()
    journal.begin([3])
    assert left_behind(tmp_path / "j") == [3, 8, 9]
    if (child := os.fork()) == 0:  # as a worker of the torch loader, killed while it decodes
        journal.begin([77])
        os._exit(9)
    os.waitpid(child, 0)
    assert left_behind(tmp_path / "j") == [3, 8, 9, 77]
    journal.close()
    assert left_behind(tmp_path / "j") == [77]
    journal.close([child])
    assert left_behind(tmp_path / "j") == []
    (tmp_path / "j" / "x").mkdir()
    (tmp_path / "j" / "x" / "1").write_bytes(b"\xff" * 50)  # not ours
    assert left_behind(tmp_path / "j") == []


@pytest.mark.parametrize("decoder", LOADERS)
def test_the_probe_finds_bad_images_and_goes_on(decoder: str) -> None:
    with Probe(decoder) as probe:  # type: ignore[arg-type]
        for name, data in bad_images().items():
            assert probe.reason(data), name
        assert probe.reason(encode(picture(), "JPEG")) is None
        process = probe._process
        assert probe.reason(encode(picture(), "PNG")) is None
        assert probe._process is process is not None


def test_a_manifest_is_made_once_and_believed_while_files_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "d" / "deep", 6)
    (tmp_path / "d" / "a\x1b[31m.jpg").write_bytes(b"text")
    (tmp_path / "d" / "deep" / "03.jpg").write_bytes(b"")
    command = check_images.CheckCommand(tmp_path / "d", tmp_path / "m.jsonl", loader="torch", workers=1)
    assert check_images.check(command) == 0
    shown = capsys.readouterr().out
    assert "a\\x1b[31m.jpg: not an image" in shown
    assert "7 images, 2 of them bad" in shown
    source = open_source(tmp_path / "d")
    bad = quarantine.read_manifest(tmp_path / "m.jsonl", source)
    assert {source.names[i]: reason for i, reason in bad.items()} == {
        "a\x1b[31m.jpg": "not an image: it starts with b'text'",
        "deep/03.jpg": "the file is empty",
    }
    (tmp_path / "d" / "deep" / "03.jpg").write_bytes(encode(picture(), "JPEG"))
    assert [source.names[i] for i in quarantine.read_manifest(tmp_path / "m.jsonl", source)] == ["a\x1b[31m.jpg"]
    check_images.check(command)
    shown = capsys.readouterr().out
    assert "1 of 1 images" in shown  # the others have not changed
    assert "7 images, 1 of them bad" in shown


@pytest.mark.parametrize("text", ["[1]\n", '{"path": 3, "stamp": 0, "reason": null}\n', "{", "[" * 100_000])
def test_a_damaged_manifest_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    (tmp_path / "m").write_text(text)
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'm'}: expected") as caught:
        quarantine.read_manifest(tmp_path / "m", open_source(tmp_path))
    assert "\n" not in str(caught.value)
