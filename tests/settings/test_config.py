"""Presets, flags and what they refuse."""

import json
import re
from pathlib import Path

import pytest

from reco_fast import ablation, check_images, embed, evaluate, export, train
from reco_fast.data.loaders import recipe
from reco_fast.errors import ConfigError
from reco_fast.profiling.benchmarks.growth import Growth
from reco_fast.profiling.benchmarks.step import Benchmark
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from reco_fast.settings.presets import PRESETS, preset
from reco_fast.train import parse


@pytest.mark.parametrize("name", ["quickstart", "cifar10", "adapt", "vit-small", "imagenet100", "paper", "imagenet"])
def test_presets_exist_and_survive_json(name: str) -> None:
    config, expectation = PRESETS[name]
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    command = "reco_fast.train" if name == "quickstart" else f"reco_fast.train {name}"
    assert command in expectation


def test_the_paper_is_a_preset() -> None:
    """The first author's code, the setting of the paper (arXiv 2211.01796), in all that decides what is learnt."""
    config = preset("paper")
    assert config.loss == LossConfig(
        objective="reco",
        mix="cutmix",
        mix_alpha=1.0,
        mix_size=None,
        mix_share=1.0,
        mix_anchor="query",
        keys="strong",
        temperature=0.2,
        student_temperature=0.1,
        teacher_temperature=0.04,
        global_weight=1.0,
        local_weight=2.0,
        ramp=0.0,
    )
    model, optim = config.model, config.optim
    assert (model.arch, model.projector, model.projection_dim, model.bank_size) == ("resnet50", "mlp", 128, 65536)
    assert (model.key_norm, model.teacher_momentum, model.teacher_momentum_end) == ("shuffle", 0.999, None)
    rate = optim.lr * config.train.batch_size / 256
    assert (optim.name, rate, optim.momentum, optim.weight_decay) == ("sgd", pytest.approx(0.03), 0.9, 1e-4)
    assert (optim.decay_all, optim.warmup_epochs) == (True, 0)
    assert (config.train.epochs, config.train.batch_size, config.data.image_size) == (100, 128, 224)


def test_quickstart_is_the_default_preset() -> None:
    assert parse([])[1] == "quickstart"
    assert parse(["--train.epochs", "3"]) == (preset("quickstart", train={"epochs": 3}), "quickstart")


@pytest.mark.parametrize("name", ["compile", "cuda-graph"])
@pytest.mark.parametrize(("prefix", "value"), [(None, None), ("--train.", True), ("--train.no-", False)])
def test_what_depends_on_the_device_is_on_off_or_not_said(name: str, prefix: str | None, value: bool | None) -> None:
    config = parse(["cifar10", *([] if prefix is None else [prefix + name, "--train.epochs", "3"])])[0]
    assert getattr(config.train, name.replace("-", "_")) is value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.pth", "x"], r"--data\.pth: unknown flag; did you mean --data\.path\?"),
        (["--train.epoch=3"], r"--train\.epoch: unknown flag; did you mean --train\.epochs\?"),
        (["--train.epochs", "0"], r"--train\.epochs: expected 1 or more, got 0"),
        (["--train.epochs", "many"], r"--train\.epochs.*'many'"),
        (["--data.loader", "fast"], r"'fast'.*--data\.loader.*'dali'"),
        (["--data.range", "9", "4"], r"--data\.range: expected two numbers, the lower one first, got 9 4"),
        (["--data.min-scale", "0"], r"--data\.min-scale: expected a share above 0, at most 1, got 0"),
        (["--data.min-scale", "1.5"], r"--data\.min-scale: expected a share above 0, at most 1, got 1.5"),
        (["--data.weak-size", "15"], r"--data\.weak-size: expected a size from 16 to --data\.image-size, 32, got 15"),
        (["--data.image-size", "64", "--data.weak-size", "65"], r"--data\.weak-size: expected a size .*, 64, got 65"),
        (["--data.background", "whitish"], r"--data\.background: expected a colour such as white.*, got whitish"),
        (
            ["cifar10", "--data.grow-from", "33"],
            r"--data\.grow-from: expected a size from 16 to --data\.image-size, 32",
        ),
        (["--data.grow-from", "15"], r"--data\.grow-from: expected a size from 16 to .*, got 15"),
        (["--loss.start", "1"], r"--loss\.start: expected a share from 0 to below 1, got 1"),
        (["--loss.temperature", "-1"], r"--loss\.temperature: expected a number above 0, got -1"),
        (["--model.bank-size", "100", "--train.batch-size", "128"], r"--model\.bank-size: .*--train\.batch-size"),
        (["--loss.mix-share", "0"], r"--loss\.mix-share: expected a share above 0, at most 1, got 0"),
        (["--loss.mix-share", "1"], r"--loss\.mix-share: expected less than 1 with --loss\.mix-within, got 1"),
        (["--loss.mix-size", "24"], r"--loss\.mix-size: expected nothing with --loss\.mix-within, got 24"),
        (["--loss.mix-anchor", "query"], r"--loss\.mix-anchor: expected key with --loss\.mix-within, got query"),
        (["--model.teacher-momentum-end", "2"], r"--model\.teacher-momentum-end: expected 0 ≤ m ≤ 1, got 2"),
        (["--model.freeze", "0"], r"--model\.freeze: expected nothing, norms or a number .* 99, got 0"),
        (["--model.freeze", "9" * 5000], r"--model\.freeze: expected nothing, norms or a number of stages"),
        (["--model.init", ""], r"--model\.init: expected timm, torchvision, a file or the folder of a run, got ''"),
        (["--optim.clip", "0"], r"--optim\.clip: expected a number above 0, got 0"),
        (["--data.std", "1", "1", "0"], r"--data\.std: expected three from 0\.001 to 2, got 1 1 0"),
        (["--data.mean", "0", "0", "3"], r"--data\.mean: expected three numbers from -1 to 2, got 0 0 3"),
        (["--data.mean", "0.5"], r"--data\.mean"),
        (["cifar100"], r"cifar100: expected a preset, one of quickstart"),
        (["quickstart", "extra"], r"extra"),
        (["--data.path"], r"--data\.path"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_json_with_unknown_or_missing_fields_is_refused() -> None:
    values = Config().to_json()
    del values["train"]["epochs"]
    with pytest.raises(ConfigError, match="section 'train'"):
        Config.from_json(values)


def test_a_run_of_an_earlier_version_is_read_without_what_is_gone() -> None:
    values = Config().to_json()
    values["train"]["convolution"] = "winograd"
    assert Config.from_json(values) == Config()


def test_a_run_of_an_earlier_version_has_the_default_of_what_is_new() -> None:
    values = Config().to_json()
    for new in ("background", "range", "weak_size", "grow_from", "min_scale"):
        del values["data"][new]
    for new in ("keys", "mix_size", "mix_share", "start"):
        del values["loss"][new]
    for new in ("teacher_momentum_end", "query_norm", "init", "init_hash", "freeze", "freeze_patch_embed"):
        del values["model"][new]
    del values["data"]["mean"], values["optim"]["clip"], values["train"]["checkpoint_activations"]
    assert Config.from_json(values) == Config()


def test_the_weak_view_is_as_large_as_the_others_unless_said() -> None:
    for said, expected in (([], 96), (["--data.weak-size", "16"], 16), (["--data.weak-size", "96"], 96)):
        config = parse(["cifar10", "--data.image-size", "96", "--loss.keys", "strong", *said])[0]
        assert config.data.weak_side == recipe(config).sizes[2] == expected
        assert recipe(config).sizes[:2] == (96, 96)
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_moco_has_strong_keys_whatever_is_said() -> None:
    for objective, sizes, weak in (("reco", (32,), True), ("moco", (32,), False)):
        config = parse(["cifar10", "--loss.keys", "weak", "--loss.objective", objective])[0]
        assert (config.loss.weak_keys, config.teacher_sizes) == (weak, sizes)
        assert (recipe(config).views[1].jitter_probability == 0) == weak


def test_the_smallest_crop_is_that_of_all_views() -> None:
    for said, smallest in (([], 0.2), (["--data.min-scale", "0.08"], 0.08)):
        config = parse(["cifar10", "--loss.keys", "strong", *said])[0]
        assert [view.area for view in recipe(config).views] == 3 * [(smallest, 1.0)]


def test_a_range_survives_json() -> None:
    config = parse(["cifar10", "--data.range", "-1000", "3000.5", "--data.background", "#102030"])[0]
    assert config.data.range == (-1000, 3000.5)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    for wrong in ([1], [1, "2"], "1 2", [2, 1]):
        with pytest.raises(ConfigError, match="range"):
            Config.from_json(config.to_json() | {"data": config.to_json()["data"] | {"range": wrong}})


def test_help_shows_what_to_expect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["quickstart", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--data.path" in shown
    assert "--train.no-compile" in shown
    assert "--train.no-cuda-graph" in shown


def test_sections_check_themselves() -> None:
    with pytest.raises(ConfigError, match="teacher-momentum"):
        ModelConfig(teacher_momentum=1.0)
    with pytest.raises(ConfigError, match="accumulate"):
        TrainConfig(accumulate=0)


def test_a_tilde_is_the_home_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text('{"run": {"dir": "~/a"}, "data": {"manifest": "~/b"}}')
    config = train.parse(["cifar10", "--config=~/mine.json", "--data.path=~/s-{0..9}.tar", "--data.val-path", "~"])[0]
    assert (config.run.dir, config.data.manifest) == (tmp_path / "a", tmp_path / "b")
    assert (config.data.path, config.data.val_path) == (str(tmp_path / "s-{0..9}.tar"), str(tmp_path))
    assert preset("cifar10", run={"dir": "~/x"}).run.dir == RunConfig(dir=Path("~/x")).dir == tmp_path / "x"
    assert EvalConfig(train_path=Path("~/t")).train_path == str(tmp_path / "t")
    assert embed.EmbedCommand(Path("~/r"), Path("~/f.npz"), projector=Path("~/p")).projector == tmp_path / "p"
    assert evaluate.EvaluateCommand(Path("~/r")).run_dir == export.ExportCommand(Path("~/r"), "timm", Path("o")).run_dir
    assert check_images.CheckCommand(Path("~/d"), Path("m")).path == str(tmp_path / "d")
    assert ablation.AblationOptions(dir=Path("~/a")).dir == tmp_path / "a"
    assert Benchmark(output=Path("~/o")).output == Growth(output=Path("~/o")).output == tmp_path / "o"
    assert DataConfig(path=Path("hf:~/x")).path == "hf:~/x"  # for whoever opens it
    assert DataConfig(path=Path("~nobody-here/x")).path == "~nobody-here/x"


@pytest.mark.parametrize("url", ["s3://bucket//odd//train-{000..127}.tar", "https://host/a/../b/?x=~/./y", "~/s3://b/"])
def test_a_url_of_images_stays_as_it_is(url: str, tmp_path: Path) -> None:
    config = Config(data=DataConfig(path=url, val_path=url), eval=EvalConfig(train_path=url))
    assert (config.data.path, config.data.val_path, config.eval.train_path) == (url, url, url)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    flags = ["--data.path", url, f"--data.val-path={url}", "--eval.train-path", url]
    for words in (flags, ["--config", str(tmp_path / "config.json")]):
        parsed = train.parse(["cifar10", *words])[0]
        assert (parsed.data.path, parsed.data.val_path, parsed.eval.train_path) == (url, url, url)
    words = ["run", "--output", "f.npz", "--data.path", url]
    assert command_line.parse(embed.EmbedCommand, words, prog="", description="").data.path == url
    words = [url, "--output", "m"]
    assert command_line.parse(check_images.CheckCommand, words, prog="", description="").path == url


def test_python_may_give_a_place_of_images_as_a_path(tmp_path: Path) -> None:
    text = str(tmp_path / "a")
    for given in (tmp_path / "a", f"{tmp_path}/./a//"):  # with the text that a Path has
        config = preset("cifar10", data={"path": given, "val_path": given}, eval={"train_path": given})
        assert (config.data.path, config.data.val_path, config.eval.train_path) == (text, text, text)
        assert config.to_json()["data"]["path"] == text
        assert DataConfig(path=given).path == embed.ImagesConfig(path=given).path == text
        assert check_images.CheckCommand(given, Path("m")).path == text


def test_a_tilde_without_a_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: str(path))
    with pytest.raises(ConfigError, match="~/x: expected a home in place of ~"):
        RunConfig(dir=Path("~/x"))
