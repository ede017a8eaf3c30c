"""Which folder a run goes to, and what it finds there."""

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from reco_fast.errors import ConfigError
from reco_fast.run import run_folder
from reco_fast.settings.config import Config, DataConfig, RunConfig, TrainConfig


def at(folder: Path | None, resume: str = "auto", **train: object) -> Config:
    return Config(run=RunConfig(dir=folder, resume=resume), train=TrainConfig(**train))  # type: ignore[arg-type]


def make(folder: Path, config: Config) -> None:
    with run_folder.claimed(folder, config):
        pass


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        run_folder.claimed(tmp_path, at(tmp_path)),
        pytest.raises(ConfigError, match="no other run is writing to"),
    ):
        make(tmp_path, at(tmp_path))
    make(tmp_path, at(tmp_path))  # free again


def test_a_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def work() -> None:
        started.set()
        time.sleep(60)

    worker = context.Process(target=work)
    with run_folder.claimed(tmp_path, at(tmp_path)):
        worker.start()
        assert started.wait(30)
        with pytest.raises(ConfigError, match="no other run is writing to"):
            make(tmp_path, at(tmp_path))
    try:
        make(tmp_path, at(tmp_path))
        assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_config_and_environment_are_written_first(tmp_path: Path) -> None:
    config = at(tmp_path / "run", seed=5)
    make(tmp_path / "run", config)
    assert run_folder.read_config(tmp_path / "run") == config
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["command"]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_default_folder_is_resumed_until_finished_and_then_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder.choose(at(None), "p") == (Path("runs/p"), None)
    make(Path("runs/p"), at(None))
    newest = Path("runs/p/checkpoints/step-000000007.safetensors")
    newest.touch()
    assert run_folder.choose(at(None), "p") == (Path("runs/p"), newest)
    assert run_folder.choose(at(None, "never"), "p") == (Path("runs/p-2"), None)
    assert run_folder.choose(at(None, seed=1), "p") == (Path("runs/p-2"), None)
    Path("runs/p/metrics.jsonl").write_text('{"kind": "train"}\n{"kind": "end"}\n')
    assert run_folder.choose(at(None), "p") == (Path("runs/p-2"), None)


def test_a_named_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path, at(tmp_path, seed=1))
    with pytest.raises(ConfigError, match=r"--train\.seed is 1 there and 2 now"):
        run_folder.choose(at(tmp_path, seed=2), "p")
    with pytest.raises(ConfigError, match="without a run"):
        run_folder.choose(at(tmp_path, "never", seed=1), "p")
    smaller = dataclasses.replace(at(tmp_path, seed=1), data=DataConfig(weak_size=24))
    with pytest.raises(ConfigError, match=r"--data\.weak-size is None there and 24 now"):
        run_folder.choose(smaller, "p")
    # How fast and how long may differ; what is learned may not.
    how = at(tmp_path, seed=1, max_steps=3, device="cpu", checkpoint_activations=True)
    assert run_folder.choose(how, "p") == (tmp_path, None)


@pytest.mark.parametrize("place", ["/proc/reco_fast", "a file"])
def test_a_folder_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run" if place == "a file" else Path(place)
    with pytest.raises(ConfigError, match=r"--run\.dir: expected a folder that can be written") as caught:
        make(folder, at(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"data": {}}', json.dumps({"data": 3})])
def test_a_damaged_config_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        run_folder.read_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("train.epochs", "3"),
        ("train.epochs", 3.5),
        ("train.epochs", True),
        ("train.epochs", None),
        ("train.epochs", 10**30),
        ("train.seed", -1),
        ("train.compile", 1),
        ("optim.lr", float("nan")),
        ("optim.lr", float("inf")),
        ("optim.lr", "0.1"),
        ("data.path", 7),
        ("data.path", "a\0b"),
        ("data.path", "\ud800"),
        ("data.loader", "fast"),
        ("data.loader", ["dali"]),
        ("model.arch", {}),
        ("model.bank_size", 2**40),
        ("run.dir", False),
    ],
)
def test_a_value_of_a_wrong_type_is_one_line_that_names_it(place: str, value: object, tmp_path: Path) -> None:
    values = Config().to_json()
    section, field = place.split(".")
    values[section][field] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        run_folder.read_config(tmp_path)
    shown = str(caught.value)
    assert str(tmp_path / "config.json") in shown
    assert field.replace("_", "-") in shown.replace("_", "-")
    assert "\n" not in shown


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 10_000, "\ufeff{}", '"\\ud800"', "null", "NaN"])
def test_json_that_is_made_to_break_a_reader_is_one_line(text: str, tmp_path: Path) -> None:
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(text)
    assert run_folder.finished(tmp_path) is None
    with pytest.raises(ConfigError) as caught:
        run_folder.read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "config.json.tmp", "metrics.jsonl", "tensorboard", "checkpoints/x"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_links_and_pipes_in_a_run_folder_are_refused_and_not_followed(name: str, kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if kind == "link":
        outside.write_text("precious")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / "run" / name)
    else:
        (tmp_path / "run" / name).symlink_to(outside)
    with pytest.raises(ConfigError, match="expected files and folders alone"):
        make(tmp_path / "run", at(tmp_path / "run"))
    assert outside.exists() == (kind == "link")
    assert kind != "link" or outside.read_text() == "precious"
