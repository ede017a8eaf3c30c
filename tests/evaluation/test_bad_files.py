"""Accuracies among files that cannot be decoded: those of the good images alone, the bad ones counted and named."""

import json
from pathlib import Path

import pytest
from loading import both_loaders
from odd_images import deceiving_images
from small_runs import SMALL, metrics, write_classes

from reco_fast import embed, evaluate, train
from reco_fast.errors import DataError
from reco_fast.evaluation import pictures
from reco_fast.pipelines.base import LoaderKind
from reco_fast.settings.config import DataConfig

BAD = [b"text", b"", *deceiving_images().values()]


def spoilt(folder: Path, seed: int) -> tuple[Path, dict[str, Path]]:
    """Noisy images in two classes, each with as many bad ones before, between and behind them."""
    write_classes(folder, 12, seed=seed)
    bad = {f"{name}/{n}-bad.jpg": folder / name / f"{n}-bad.jpg" for name in ("dark", "light") for n in range(12)}
    for number, path in enumerate(bad.values()):
        path.write_bytes(BAD[number % len(BAD)])
    return folder, bad


@both_loaders
def test_accuracies_are_those_without_the_bad_files(
    kind: LoaderKind, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "available", lambda: False)  # they take long
    (images, bad), (held_out, val_bad) = spoilt(tmp_path / "train", 0), spoilt(tmp_path / "val", 1)
    paths = ["--data.path", str(images), "--data.val-path", str(held_out), "--data.loader", kind]

    def knn_at_the_start(run: str) -> float:
        line = ["cifar10", *paths, *SMALL, "--train.max-steps", "1", "--train.seed", "1", "--run.dir"]
        return metrics(train.train(*train.parse([*line, str(tmp_path / run)])))[0]["knn_top1"]

    def evaluation() -> dict[str, object]:
        data = DataConfig(path=images, val_path=held_out, loader=kind)
        return evaluate.evaluate(evaluate.EvaluateCommand(tmp_path / "bad", data))

    with_bad = knn_at_the_start("bad")
    shown = capsys.readouterr().out
    listed = dict(line.split("\t") for line in (tmp_path / "bad" / "bad_images.txt").read_text().splitlines())
    assert set(listed) == set(bad) | {f"{held_out}/{name}" for name in val_bad}
    assert f"48 bad images, named in {tmp_path / 'bad' / 'bad_images.txt'}, e.g. " in shown
    found = evaluation()
    assert (found["images"], found["bad_images"]) == (24, 24)
    assert (found["val_images"], found["val_bad_images"]) == (24, 24)
    assert f"left out as unreadable: 48, named in {tmp_path / 'bad' / 'evaluation' / 'bad_images.txt'}" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "bad" / "evaluation.json").read_text()) == found

    for path in (*bad.values(), *val_bad.values()):
        path.unlink()
    assert with_bad == knn_at_the_start("good")
    again = evaluation()
    assert not (tmp_path / "bad" / "evaluation" / "bad_images.txt").exists()
    counts = {"bad_images": 0, "val_bad_images": 0}
    assert {name: value for name, value in (found | counts).items() if type(value) in (int, str)} == {
        name: value for name, value in again.items() if type(value) in (int, str)
    }
    for name in ("knn_top1", "linear_top1", "knn_sweep", "per_class"):
        assert again[name] == found[name]


@both_loaders
def test_where_all_are_bad_no_accuracy_is_made_up(kind: LoaderKind, tmp_path: Path) -> None:
    images, bad = spoilt(tmp_path / "train", 0)
    line = ["cifar10", "--data.path", str(images), *SMALL, "--train.max-steps", "1", "--data.loader", kind]
    run = train.train(*train.parse([*line, "--run.dir", str(tmp_path / "run")]))
    for path in set(images.rglob("*.jpg")) - set(bad.values()):
        path.unlink()
    data = DataConfig(path=images, loader=kind)
    with pytest.raises(DataError, match=r"^no image can be used, e\.g\. dark/\d+-bad\.jpg: "):
        evaluate.evaluate(evaluate.EvaluateCommand(run, data))
    with pytest.raises(DataError, match=r"^no image can be used, e\.g\. dark/\d+-bad\.jpg: "):
        embed.embed_images(run, images)
    command = embed.EmbedCommand(run, tmp_path / "f.npz", embed.ImagesConfig(path=images, loader=kind))
    with pytest.raises(DataError, match="no image can be used"):
        embed.embed(command)
    assert not list(tmp_path.glob("f.npz*"))
