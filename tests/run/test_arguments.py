"""`--config FILE` between the preset and the flags."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reco_fast import ablation, train
from reco_fast.errors import ConfigError
from reco_fast.profiling.benchmarks import scaling
from reco_fast.run.arguments import config_and_rest
from reco_fast.settings.presets import PRESETS, preset


def write(path: Path, values: object) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", {"train": {"epochs": 7, "batch_size": 64}, "data": {"path": "photos"}})
    for words in (["--config", file, "--train.epochs", 9], ["--train.epochs", 9, f"--config={file}"]):
        config, name = train.parse(["cifar10", *map(str, words)])
        assert config == preset("cifar10", train={"epochs": 9, "batch_size": 64}, data={"path": "photos"})
        assert config.data.path == "photos"
        assert name == "cifar10"


def test_the_config_of_a_run_gives_that_run(tmp_path: Path) -> None:
    config = preset("imagenet", train={"seed": 5}, run={"dir": "here", "wandb": "w"}, loss={"mix_anchor": "query"})
    values = config.to_json()
    values["train"]["convolution"] = "auto"  # of an earlier version
    file = write(tmp_path / "config.json", values)
    assert train.parse(["--config", str(file)])[0] == config


def test_the_config_of_an_earlier_version_has_the_defaults_of_what_is_new(tmp_path: Path) -> None:
    written = preset("cifar10").to_json()
    del written["model"]["projector"]
    by_hand = {"model": {"arch": "resnet34"}}  # the rest is the preset's
    for values, expected in ((written, "mlp"), (by_hand, "linear")):
        file = write(tmp_path / "config.json", values)
        assert train.parse(["cifar10", "--config", str(file)])[0].model.projector == expected


def test_later_files_win(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{seed}.json", {"train": {"seed": seed}}) for seed in (1, 2)]
    assert train.parse([word for file in files for word in ("--config", str(file))])[0].train.seed == 2


def test_other_commands_take_what_is_theirs(tmp_path: Path, call: Callable[..., int]) -> None:
    file = write(tmp_path / "config.json", preset("quickstart", train={"seed": 4}).to_json())
    assert ablation.parse(["--config", str(file)])[1].train.seed == 4
    base, rest = config_and_rest(["--config", str(file), "--ranks", "8"], scaling.Scaling())
    assert (base.model, rest) == (PRESETS["quickstart"][0].model, ["--ranks", "8"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object of sections"),
        ('{"train": 3}', "expected an object of sections"),
        ('{"trian": {}}', "got 'trian'"),
        ('{"train": {"epoch": 3}}', "section 'train': .*unknown: epoch"),
        ('{"train": {"epochs": "3"}}', "section 'train': expected epochs as a whole number, got '3'"),
        ('{"train": {"epochs": 0}}', "--train.epochs: expected 1 or more, got 0"),
        (None, "expected a file that can be read"),
    ],
)
def test_mistakes_name_the_file(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    if content is not None:
        write(file, content)
    with pytest.raises(ConfigError, match=message) as caught:
        train.parse(["--config", str(file)])
    assert str(caught.value).startswith(f"--config {file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_must_follow() -> None:
    with pytest.raises(ConfigError, match="File name too long"):
        train.parse(["--config", 5000 * "x"])
    for words in (["--config"], ["--config="], ["--config", ""]):
        with pytest.raises(ConfigError, match="--config: expected a file, got nothing"):
            train.parse(words)
    with pytest.raises(ConfigError, match="--config /: expected a file, got something else"):
        train.parse(["--config", "/"])


def test_a_preset_from_python_refuses_what_the_command_line_does() -> None:
    for name, sections, message in (
        ("cifar", {}, "expected a preset"),
        ("cifar10", {"trian": {}}, "got 'trian'"),
        ("cifar10", {"train": {"epochs": 2.5}}, "expected epochs as a whole number"),
        ("cifar10", {"model": {"bank_size": 8}}, "--model.bank-size"),
    ):
        with pytest.raises(ConfigError, match=message):
            preset(name, **sections)
