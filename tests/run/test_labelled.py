"""What a run is evaluated with: labels that are missing, neighbours from elsewhere; and images of earlier rules."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_images import encode, picture
from small_runs import SMALL, metrics, write_classes, write_pictures

from reco_fast import embed, evaluate, train
from reco_fast.data.images import open_labelled
from reco_fast.errors import ConfigError
from reco_fast.pipelines.sources.kinds import OTHER_RULES
from reco_fast.pipelines.sources.open import open_source
from reco_fast.run import quarantine
from reco_fast.run.files import write_json

OPTIONS = [*SMALL, "--data.loader", "torch", "--data.workers", "1", "--run.log-every", "1", "--data.image-size", "32"]


def command(root: Path, *more: object) -> list[str]:
    return ["cifar10", *OPTIONS, "--run.dir", str(root / "run"), *map(str, more)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`photos` without labels, and `train` and `val` with."""
    write_pictures(tmp_path / "photos", 20)
    write_classes(tmp_path / "train", 12)
    write_classes(tmp_path / "val", 4, seed=1)
    return tmp_path


def test_neighbours_come_from_elsewhere(
    root: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.path", root / "photos", "--data.val-path", root / "val", "--eval.train-path", root / "train"]
    assert call(train.main, *command(root, *data, "--train.max-steps", "1")) == 0
    assert "on 20 images" in capsys.readouterr().out
    figures = [line["knn_top1"] for line in metrics(root / "run") if line["kind"] == "eval"]
    assert len(figures) == 2
    assert min(figures) > 60  # dark and light: colour alone tells them apart
    assert call(train.main, *command(root, *data, "--train.max-steps", "2")) == 0
    assert metrics(root / "run")[-1]["steps"] == 2
    assert call(evaluate.main, root / "run", "--device", "cpu", "--data.loader", "torch") == 0
    shown = capsys.readouterr().out
    assert "24 images, " in shown
    assert "kNN top-1" in shown


def test_neighbours_may_be_added_to_a_run_that_goes_on(
    root: Path, call: Callable[..., int], refused: Callable[..., str]
) -> None:
    data = ["--data.path", root / "photos", "--data.val-path", root / "val"]
    line = refused(train.main, *command(root, *data, "--train.max-steps", "1"))
    assert "--data.path: expected images by class to evaluate with" in line
    assert "all 20 lie in one folder; labelled ones can be given by --eval.train-path" in line
    line = refused(train.main, *command(root, *data, "--eval.train-path", root / "photos"))
    assert "all 20 lie in one folder" in line
    line = refused(train.main, *command(root, *data[:2], "--eval.train-path", root / "train"))
    assert line.startswith("error: --eval.train-path: expected held-out images beside it, --data.val-path")
    both = ["--data.path", root / "train", "--data.val-path", root / "val"]
    assert call(train.main, *command(root, *both, "--train.max-steps", "1")) == 0
    write_classes(root / "other", 3)
    assert call(train.main, *command(root, *both, "--train.max-steps", "2", "--eval.train-path", root / "other")) == 0


def test_a_bad_image_among_the_neighbours_is_quarantined(root: Path) -> None:
    source = open_source(root / "photos")
    labelled = open_labelled(open_source(root / "train"), root / "val", "--eval.train-path")
    write_json(root / quarantine.FILE, {"eval": {"light/3.jpg": "deadly"}, "val": {"light/3.jpg": "deadly too"}})
    config, _ = train.parse(command(root))
    places = list(labelled.train.names)
    quarantine.prepare(root, config.data, source, labelled)
    assert source.known_bad == {}
    assert labelled.train.known_bad == {places.index("light/3.jpg"): "deadly"}
    assert labelled.val.known_bad == {7: "deadly too"}
    assert labelled.train.journal == root / "decoding" / "eval"


def test_a_mistake_with_labels_names_what_was_seen(root: Path) -> None:
    train_source = open_source(root / "train")
    (root / "deep" / "in").mkdir(parents=True)
    shutil.copytree(root / "val", root / "deep" / "in" / "val")
    shutil.copytree(root / "train", root / "deep" / "in" / "train")
    for path, expected in (
        (root / "photos", "--data.val-path: .* all 20 lie in one folder$"),
        (root / "deep", "all lie in in, which holds the folders train, val: give in itself"),
        (root / "deep" / "in", f"another: train; train holds .* give --data.val-path {root}/deep/in/train"),
        (root / "val" / "dark", "all 4 lie in one folder"),
    ):
        with pytest.raises(ConfigError, match=expected) as caught:
            open_labelled(train_source, path)
        assert "--eval.train-path" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"got another: dark; train holds .* give --data.path {root}/deep/in/train"):
        open_labelled(open_source(root / "deep" / "in"), root / "val")


def test_a_stray_picture_is_named_by_every_command(
    root: Path, call: Callable[..., int], refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    picture().save(root / "train" / "contact.jpg")
    data = ["--data.path", root / "train", "--data.val-path", root / "val"]
    assert "contact.jpg lies beside the folders (dark, light)" in refused(train.main, *command(root, *data))
    assert call(train.main, *command(root, *data[:2], "--train.max-steps", "1")) == 0
    assert "contact.jpg lies" in refused(evaluate.main, root / "run", *data, "--device", "cpu")
    capsys.readouterr()
    out = root / "f.npz"
    assert call(embed.main, root / "run", *data[:2], "--output", out, "--device", "cpu", "--data.loader", "torch") == 0
    assert "no labels: contact.jpg lies beside the folders (dark, light)\n" in capsys.readouterr().out
    assert "labels" not in np.load(out)
    assert call(evaluate.main, root / "run", "--device", "cpu", "--data.loader", "torch") == 0
    assert "no labels: contact.jpg lies beside the folders (dark, light)\n" in capsys.readouterr().out


def test_every_command_says_what_was_passed_over(
    root: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    from reco_fast import check_images

    (root / "photos" / "a\x1b[1m.csv").touch()
    (root / "val" / "dark" / "1.zip").touch()
    line = "passed over: 1 .csv (a\\x1b[1m.csv)\n"
    data = ["--data.path", root / "photos", "--data.val-path", root / "val", "--eval.train-path", root / "train"]
    assert call(train.main, *command(root, *data, "--train.max-steps", "1")) == 0
    shown = capsys.readouterr().out
    assert f"--data.path: {line}" in shown
    assert "--data.val-path: passed over: 1 .zip (dark/1.zip)" in shown
    options = ["--device", "cpu", "--data.loader", "torch"]
    assert call(evaluate.main, root / "run", "--data.path", root / "photos", *options) == 0
    assert line in capsys.readouterr().out
    output = ["--output", root / "f.npz", "--data.path", root / "photos"]
    assert call(embed.main, root / "run", *output, *options) == 0
    assert line in capsys.readouterr().out
    assert call(check_images.main, root / "photos", "--output", root / "m", "--loader", "torch", "--workers", "1") == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("rules", OTHER_RULES)
def test_a_run_that_began_by_other_rules_goes_on_with_its_images(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rules: object
) -> None:
    """As earlier versions began it: with the thumbnails of a tool, without a file that lacks a suffix."""
    (root / "photos" / "@eaDir").mkdir()
    picture(seed=50).save(root / "photos" / "@eaDir" / "t.jpg")
    (root / "photos" / "plain").write_bytes(encode(picture(seed=51), "JPEG"))
    picture(seed=52).save(root / "photos" / "h.heic", "JPEG")
    with monkeypatch.context() as patch:
        patch.setattr("reco_fast.data.images.open_source", lambda path, *_: open_source(path, rules))  # type: ignore[arg-type]
        train.train(*train.parse(command(root, "--data.path", root / "photos", "--train.max-steps", "1")))
    monkeypatch.setattr("reco_fast.pipelines.sources.kinds.reads_heif", lambda: True)
    capsys.readouterr()
    train.train(*train.parse(command(root, "--data.path", root / "photos", "--train.max-steps", "2")))
    assert f"on {21} images" in capsys.readouterr().out
    assert metrics(root / "run")[-1]["steps"] == 2
    (root / "photos" / "01.jpg").unlink()
    with pytest.raises(ConfigError, match="holds others now"):
        train.train(*train.parse(command(root, "--data.path", root / "photos", "--train.max-steps", "3")))
