"""Which folder a run goes to, and what it finds there."""

import json
from pathlib import Path

import pytest

from reco_fast import run_folder
from reco_fast.config import Config, ConfigError, RunConfig, TrainConfig


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
    # How fast and how long may differ; what is learned may not.
    assert run_folder.choose(at(tmp_path, seed=1, max_steps=3, device="cpu"), "p") == (tmp_path, None)


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
