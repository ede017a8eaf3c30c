"""A run goes on, and is evaluated, wherever it and its images lie: the images decide, not the text of their path."""

import json
import os
import shutil
from pathlib import Path

import pytest
from small_runs import SMALL, metrics, write_classes

from reco_fast import train
from reco_fast.errors import ConfigError
from reco_fast.evaluate import EvaluateCommand, evaluate
from reco_fast.evaluation import pictures
from reco_fast.run import run_folder
from reco_fast.run.places import is_there, located, same_place
from reco_fast.settings.config import Config, DataConfig, EvalConfig

OPTIONS = [*SMALL, "--data.loader", "torch", "--data.workers", "1", "--run.log-every", "1", "--train.epochs", "3"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the images and, after `run`, a run; the current one."""
    folder = tmp_path / "project"
    write_classes(folder / "train", 16)
    write_classes(folder / "val", 4, seed=1)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pictures, "available", lambda: False)  # they take long
    return folder


def run(*arguments: object, steps: int = 1) -> Path:
    words = ["cifar10", *OPTIONS, "--train.max-steps", steps, *arguments]
    return train.train(*train.parse([str(word) for word in words]))


RUN = ("--data.path", "train", "--run.dir", "run")


@pytest.mark.parametrize("how", ["absolute", "through a link", "copied", "from elsewhere", "moved run"])
def test_a_run_goes_on_with_the_same_images_whatever_their_path(how: str, project: Path) -> None:
    run(*RUN)
    path, folder = Path("train"), Path("run")
    if how == "absolute":
        path = path.resolve()
    elif how == "through a link":
        Path("link").symlink_to("train")
        path = Path("link")
    elif how == "copied":
        path = shutil.move("train", "other")
    elif how == "from elsewhere":
        os.chdir("val")
        path, folder = Path("../train"), Path("../run")
    else:
        folder = shutil.move("run", "../moved")
    run("--data.path", path, "--run.dir", folder, steps=2)
    assert metrics(Path(folder))[-1]["steps"] == 2
    assert [line["step"] for line in metrics(Path(folder)) if line["kind"] == "train"] == [1, 2]


@pytest.mark.parametrize("steps", [1, 2])  # of a finished run too
def test_other_images_are_refused_under_any_path(steps: int, project: Path) -> None:
    run(*RUN)
    write_classes(project / "others", 17)
    before = Path("run/metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="expected the images that this run began with, others holds others now"):
        run("--data.path", "others", "--run.dir", "run", steps=steps)
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_a_validation_set_may_come_change_and_go(project: Path) -> None:
    write_classes(project / "val 2", 5, seed=2)
    run(*RUN)
    ends = []
    for steps, val in ((2, ["val"]), (3, ["val 2"]), (4, [])):
        run(*RUN, *(word for path in val for word in ("--data.val-path", path)), steps=steps)
        ends.append(metrics(Path("run"))[-1])
    assert [end["knn_top1"] is None for end in ends] == [False, False, True]


def test_figures_of_two_validation_sets_are_not_compared(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(project / "val 2", 5, seed=2)
    run(*RUN, "--data.val-path", "val")
    assert metrics(Path("run"))[-1]["knn_top1_initial"] is not None
    run(*RUN, "--data.val-path", project / "val", steps=2)  # the same
    assert metrics(Path("run"))[-1]["knn_top1_initial"] is not None
    assert "other validation images" not in capsys.readouterr().out
    run(*RUN, "--data.val-path", "val 2", steps=3)
    assert "other validation images than before" in capsys.readouterr().out
    assert metrics(Path("run"))[-1]["knn_top1_initial"] is None
    assert metrics(Path("run"))[-1]["knn_top1"] is not None


def test_a_run_without_a_checkpoint_knows_its_images_too(project: Path) -> None:
    run(*RUN)
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.jsonl").unlink()
    shutil.copytree("train", "copy")
    write_classes(project / "others", 17)
    with pytest.raises(ConfigError, match="others holds others now"):
        run("--data.path", "others", "--run.dir", "run")
    run("--data.path", "copy", "--run.dir", "run")
    assert metrics(Path("run"))[-1]["steps"] == 1


def test_what_lies_at_the_same_place_will_do_before_the_first_checkpoint(project: Path) -> None:
    run(*RUN)
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.jsonl").unlink()
    Path("train/dark/3.jpg").unlink()
    run(*RUN)
    assert metrics(Path("run"))[-1]["steps"] == 1


def test_the_folder_that_is_chosen_by_itself_is_that_of_the_images(project: Path) -> None:
    write_classes(project / "others", 17)
    shutil.copytree("train", "copy")
    assert run("--data.path", "train") == Path("runs/cifar10")
    Path("runs/cifar10/metrics.jsonl").write_text("")  # so that it is not finished
    assert run("--data.path", "others") == Path("runs/cifar10-2")
    Path("runs/cifar10-2/metrics.jsonl").write_text("")
    assert run("--data.path", "copy", steps=2) == Path("runs/cifar10")
    assert run("--data.path", project / "others", steps=2) == Path("runs/cifar10-2")


def test_a_folder_in_use_is_not_chosen_for_other_paths(project: Path) -> None:
    shutil.copytree("train", "copy")
    run("--data.path", "train")
    Path("runs/cifar10/metrics.jsonl").write_text("")
    with run_folder.claimed(Path("runs/cifar10"), run_folder.read_config(Path("runs/cifar10"))):
        assert run("--data.path", "copy") == Path("runs/cifar10-2")


@pytest.mark.parametrize("how", ["from elsewhere", "moved run", "moved project", "moved both"])
def test_a_run_is_evaluated_with_its_own_images(how: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*RUN, "--data.val-path", "val")
    folder, expected = project / "run", project
    monkeypatch.chdir("/")
    if how == "moved run":
        folder = Path(shutil.move(folder, project.parent / "moved"))
    elif how == "moved project":
        expected = Path(shutil.move(project, project.parent / "elsewhere"))
        folder = expected / "run"
    elif how == "moved both":
        monkeypatch.chdir(project)
        (project / "new").mkdir()
        for name in ("run", "train", "val"):
            shutil.move(name, f"new/{name}")
        folder, expected = Path("new/run"), project / "new"
    result = evaluate(EvaluateCommand(folder, device="cpu"))
    assert (result["path"], result["val_path"]) == (str(expected / "train"), str(expected / "val"))
    assert result["knn_top1"] is not None


def test_the_runs_images_under_another_path_bring_its_validation_set(project: Path) -> None:
    run(*RUN, "--data.val-path", "val")
    shutil.copytree("train", "copy")
    write_classes(project / "others", 17)
    for path, own in (("copy", True), ("others", False)):
        result = evaluate(EvaluateCommand(Path("run"), DataConfig(path=Path(path), loader="torch"), device="cpu"))
        assert (result["knn_top1"] is not None) == own
    shutil.rmtree("val")
    result = evaluate(EvaluateCommand(Path("run"), DataConfig(path=Path("copy"), loader="torch"), device="cpu"))
    assert result["val_path"] is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data", "{old}/data"),
        ("shards/a-{0..9}.tar", "{old}/shards/a-{0..9}.tar"),
        ("shards/*.tar", "{old}/shards/*.tar"),
        ("cifar10", "cifar10"),
        ("cifar10:test", "cifar10:test"),
        ("stl10:unlabeled", "stl10:unlabeled"),
        ("hf:name/of-it", "hf:name/of-it"),
        ("hf:data", "hf:{old}/data"),
        ("hf:data:test", "hf:{old}/data:test"),
        ("missing", "{old}/missing"),
        ("here", "here"),
        ("/absolute", "/absolute"),
        ("s3://data//here/train-{000..127}.tar", "s3://data//here/train-{000..127}.tar"),
    ],
)
def test_where_a_path_of_a_run_leads(path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old/data", "old/shards", "now/here", "run"):
        (tmp_path / name).mkdir(parents=True)
    places = {"directory": str(tmp_path / "old"), "folder": str(tmp_path / "run")}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(places))
    monkeypatch.chdir(tmp_path / "now")
    given = Config(data=DataConfig(path=path), eval=EvalConfig(train_path=path))
    found = located(given, tmp_path / "run")
    assert str(found.data.path) == str(found.eval.train_path) == expected.replace("{old}", str(tmp_path / "old"))


def test_urls_are_one_place_where_their_texts_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "b" / "k").mkdir(parents=True)
    assert is_there("s3://nowhere/train-{0..9}.tar")
    assert same_place("s3://b/k", "s3://b/k")
    assert not same_place("s3://b/k", "s3://b//k")
    assert not same_place("s3://b/k", str(tmp_path / "s3:" / "b" / "k"))
    assert not same_place("s3://b/k", None)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"directory": 3, "folder": 4}', '{"directory": "a\\u0000", "folder": "b"}']
)
def test_without_a_record_a_path_is_what_it_says(text: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(text)
    config = Config(data=DataConfig(path=Path("data"), val_path=Path("val")))
    assert located(config, tmp_path) == config


def test_a_card_does_not_tell_where_the_run_was(project: Path) -> None:
    from reco_fast.export import ExportCommand, export

    run(*RUN)
    export(ExportCommand(Path("run"), "safetensors", Path("out.safetensors")))
    assert str(project) not in Path("out.safetensors.md").read_text().replace(json.dumps(str(project / "run")), "")
