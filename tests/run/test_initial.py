"""Weights to start from: every source, the names that tools give, what follows from them; and what is refused."""

import argparse
import dataclasses
import json
import os
import shutil
import tarfile
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from image_sets import shared_folder
from safetensors.torch import load_file, save_file
from small_runs import SMALL, metrics, write_classes
from timm.data import ImageNetInfo
from torch import Tensor, nn

from reco_fast import embed, export, train
from reco_fast.data.images import open_images
from reco_fast.data.loaders import recipe
from reco_fast.errors import ConfigError
from reco_fast.evaluation.features import features_of
from reco_fast.method.model import build_encoder
from reco_fast.method.weights import fit, load_weights
from reco_fast.run.initial import initial_student
from reco_fast.run.run_folder import load_run
from reco_fast.settings.config import Config, DataConfig, ModelConfig, TrainConfig

ARCH = "timm/test_resnet"
Tensors = dict[str, Tensor]


def network(seed: int, arch: str = ARCH, size: int = 96) -> nn.Module:
    torch.manual_seed(seed)
    return build_encoder(ModelConfig(arch=arch, stem="standard"), size).backbone


def renamed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def numbered(backbone: nn.Module) -> Tensors:
    """As Lightly's documentation cuts a network: nn.Sequential(*list(resnet.children())[:-1])."""
    return nn.Sequential(*backbone.children()).state_dict()


STUDENT, TEACHER = network(1), network(2)
ONE, TWO = STUDENT.state_dict(), TEACHER.state_dict()
HEAD = {"fc.weight": torch.ones(10, 256), "fc.bias": torch.ones(10)}
CHECKPOINTS: dict[str, Callable[[], dict[str, Any]]] = {
    "bare": lambda: ONE | HEAD,
    "moco": lambda: {
        "epoch": 7,
        "arch": "resnet50",
        "state_dict": renamed("module.encoder_q.", ONE | HEAD) | renamed("module.encoder_k.", TWO | HEAD),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "moco v3": lambda: {"state_dict": renamed("module.base_encoder.", ONE) | renamed("module.momentum_encoder.", TWO)},
    "dino": lambda: {
        "student": renamed("module.backbone.", ONE) | {"module.head.mlp.0.weight": torch.ones(2, 2)},
        "teacher": renamed("backbone.", TWO),
        "args": argparse.Namespace(arch="resnet50", lr=0.1),
    },
    "lightly": lambda: {
        "state_dict": renamed("backbone.", numbered(STUDENT)) | renamed("backbone_momentum.", numbered(TEACHER))
    },
    "solo-learn": lambda: {"state_dict": renamed("momentum_backbone.", TWO) | renamed("backbone.", ONE)},
    "timm": lambda: {"state_dict": ONE, "state_dict_ema": TWO, "version": 2},
    "compiled": lambda: {"model": renamed("_orig_mod.", ONE), "teacher": renamed("module._orig_mod.", TWO)},
}


def config_for(source: object, size: int = 96, **model: Any) -> Config:
    model = {"arch": ARCH, "bank_size": 512} | model
    return Config(data=DataConfig(image_size=size), model=ModelConfig(init=str(source), **model))


def started(source: object, size: int = 96, **model: Any) -> tuple[Config, Any]:
    config, student = initial_student(config_for(source, size, **model))
    assert student is not None
    return config, student


def same(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, tensors[name]), name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("images") / "train", 12)


@pytest.mark.parametrize("tool", CHECKPOINTS)
def test_names_of_other_tools_are_understood(tool: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(CHECKPOINTS[tool](), path)
    config, student = started(path)
    same(student.backbone, ONE)
    line, normalised = student.notes
    assert "90 of 90 tensors, 100 % of the parameters" in line
    assert ("not used: fc.weight, fc.bias" in line) == (tool in ("bare", "moco"))
    assert line.endswith("; the projector is new")
    assert normalised == "images are normalised by mean 0.5 0.5 0.5 and standard deviation 0.5 0.5 0.5"
    assert config.model.stem == "auto"
    if tool != "bare":
        _, teacher = started(path, init_which="teacher")
        same(teacher.backbone, TWO)


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: value.half() if value.is_floating_point() else value for name, value in ONE.items()}, path)
    _, student = started(path)
    for name, value in student.backbone.state_dict().items():
        assert value.dtype == ONE[name].dtype
        torch.testing.assert_close(value, ONE[name], rtol=1e-3, atol=1e-6)


def test_a_transformer_takes_weights_of_another_image_size(tmp_path: Path) -> None:
    theirs = network(3, "timm/test_vit", 160)
    torch.save({"teacher": renamed("module.backbone.", theirs.state_dict())}, tmp_path / "vit.pth")
    _, student = started(tmp_path / "vit.pth", arch="timm/test_vit")
    line, _ = student.notes
    assert "100 % of the parameters, behind teacher.module.backbone" in line
    assert torch.equal(student.backbone.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)  # type: ignore
    assert student.backbone.pos_embed.shape != theirs.pos_embed.shape
    assert student.backbone.pos_embed.std() > 0.5 * theirs.pos_embed.std()  # type: ignore[operator]


@pytest.mark.parametrize(("stem", "size", "expected"), [("standard", 32, "standard"), ("small", 72, "small")])
def test_the_stem_is_that_of_the_weights(stem: str, size: int, expected: str, tmp_path: Path) -> None:
    theirs = build_encoder(ModelConfig(arch="resnet18", stem=stem), size).backbone  # type: ignore[arg-type]
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    config, student = started(tmp_path / "a.safetensors", size, arch="resnet18")
    assert config.model.stem == expected
    assert student.backbone.conv1.weight.shape == theirs.conv1.weight.shape  # type: ignore[union-attr]
    build_encoder(config.model, size).backbone.load_state_dict(student.backbone.state_dict())
    asked, other = started(
        tmp_path / "a.safetensors", size, arch="resnet18", stem={"small": "standard"}.get(stem, "small")
    )
    assert asked.model.stem != expected
    assert "of another shape: conv1.weight (there 64×3×" in other.notes[0]


def test_libraries_give_weights_and_normalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(ONE | HEAD, tmp_path / "model.safetensors")
    asked = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append(repo_id)
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    for source in ("timm", "timm:r160_in1k"):
        config, student = started(source, 32, stem="standard")
        same(student.backbone, ONE)
        assert config.data.mean == config.data.std == (0.5, 0.5, 0.5)
    assert asked == ["timm/test_resnet.r160_in1k"] * 2

    torch.manual_seed(4)
    theirs = torchvision.models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **options: options and theirs)
    for source in ("torchvision", "torchvision:IMAGENET1K_V1"):
        config, student = started(source, 32, arch="mobilenet_v3_small", stem="standard")
        name = "features.3.block.0.0.weight"
        assert torch.equal(student.backbone.state_dict()[name], theirs[name])
        assert config.data.mean == (0.485, 0.456, 0.406)
        assert config.data.std == (0.229, 0.224, 0.225)


def test_the_preset_adapts_a_network_of_timm(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = network(5, "timm/tf_efficientnet_lite0", 32).state_dict()
    save_file(theirs, tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model.safetensors"))
    small = "--data.image-size 32 --train.batch-size 8 --train.max-steps 2 --train.device cpu --train.precision fp32"
    command = ["adapt", "--data.path", str(images), "--run.dir", str(tmp_path / "run"), *small.split()]
    _, encoder = load_run(train.train(*train.parse(command)), "student")
    changed = {name for name, value in encoder.backbone.state_dict().items() if not torch.equal(value, theirs[name])}
    assert {name for name in theirs if "bn" not in name} == changed


def test_what_is_said_of_the_normalisation_stays(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "a.pth")
    config = config_for(tmp_path / "a.pth")
    given = Config(data=DataConfig(image_size=96, mean=(0.1, 0.2, 0.3)), model=config.model)
    settled, _ = initial_student(given)
    assert settled.data.mean == (0.1, 0.2, 0.3)
    assert settled.data.std == (0.5, 0.5, 0.5)  # timm's for this network
    views = recipe(settled)
    assert (views.mean, views.std) == (settled.data.mean, settled.data.std)
    assert initial_student(Config()) == (Config(), None)


class Runs:
    """What a pickle may hold: a call of anything."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def truncated(path: Path) -> None:
    torch.save(ONE, path)
    path.write_bytes(path.read_bytes()[:-1000])


def itself(path: Path) -> None:
    content: dict[str, Any] = {}
    content["again"] = content
    torch.save(content, path)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "code.pth": (lambda path: torch.save({"state_dict": ONE, "x": Runs()}, path), "could run code"),
    "truncated.pth": (truncated, "expected a file of weights"),
    "empty.pth": (lambda path: path.touch(), "expected a file of weights"),
    "text.safetensors": (lambda path: path.write_text("hello"), "expected a file of weights"),
    "itself.pth": (itself, "expected tensors by name"),
    "list.pth": (lambda path: torch.save([torch.ones(2)], path), "expected tensors by name"),
    "other.pth": (lambda path: torch.save(network(1, "timm/test_vit").state_dict(), path), "90% of its parameters"),
    "nan.pth": (lambda path: torch.save(ONE | {"conv1.0.weight": ONE["conv1.0.weight"] / 0}, path), "finite numbers"),
    "folder": (lambda path: path.mkdir(), "or the folder of a run"),
    "nothing.pth": (lambda path: None, "which is not there"),
    "pipe.pth": (os.mkfifo, "or the folder of a run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    write, expected = WRONG[name]
    write(tmp_path / name)
    images = write_classes(tmp_path / "images", 8)
    monkeypatch.chdir(tmp_path)
    arguments = ["quickstart", *SMALL, "--data.path", images, "--run.dir", "run", "--model.init", name]
    line = refused(train.main, *arguments)
    assert "--model.init" in line
    assert name in line
    assert expected in line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "it-ran").exists()


def test_what_libraries_do_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*given: object, **options: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    for source, arch, expected in (
        (
            "timm",
            ARCH,
            r"huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors .*Name or service.* its path$",
        ),
        ("torchvision", "resnet18", r"https://download.pytorch.org/models/resnet18-\w+.pth .*Name or service"),
        ("timm:nope", ARCH, r"expected one of timm's weights for test_resnet \(r160_in1k\), got timm:nope$"),
        ("torchvision:nope", "resnet18", r"\(IMAGENET1K_V1, DEFAULT\), got torchvision:nope$"),
        ("timm", "resnet18", r"--model.arch resnet18, got timm \(--model.arch timm/resnet18 would be timm's"),
        ("timm", "timm/resnet50t", r"weights for \w+ \(none\)"),
    ):
        with pytest.raises(ConfigError, match=f"^--model.init: .*{expected}") as refusal:
            initial_student(config_for(source, arch=arch))
        assert "\n" not in str(refusal.value)


def test_a_part_is_taken_only_where_that_is_asked_for() -> None:
    encoder = build_encoder(ModelConfig(arch=ARCH, stem="standard"), 96)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    part = {name: value for name, value in ONE.items() if not name.startswith("layer4")}
    with pytest.raises(ConfigError, match=r"got 72 of 90 tensors, 28\.1 % of the parameters; not there: layer4"):
        load_weights(encoder, part, ModelConfig(arch=ARCH, init="here"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    load_weights(encoder, part, ModelConfig(arch=ARCH, init="here", init_partial=True))
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, part.get(name, before[f"backbone.{name}"])), name
    assert fit(encoder.backbone, {}, "student").share == 0


def arguments(images: Path, folder: Path, *more: str) -> list[str]:
    paths = ["--data.path", str(images), "--data.val-path", str(images), "--run.dir", str(folder)]
    plain = "--data.loader torch --data.workers 1 --train.precision fp32 --optim.warmup-epochs 0 --train.epochs 3"
    return ["cifar10", *SMALL, *plain.split(), *paths, *more]


@pytest.fixture(scope="module")
def old(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 48 px with a normalisation of its own."""
    folder = tmp_path_factory.mktemp("old") / "run"
    own = "--data.image-size 48 --data.mean 0.3 0.4 0.5 --data.std 0.2 0.25 0.3".split()
    return train.train(*train.parse(arguments(images, folder, *own)))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_run_goes_on_from_another(
    old: Path, images: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ("--model.init", str(old), "--model.init-which", which, "--data.image-size", "32")
    train.train(*train.parse(arguments(images, tmp_path / "new", *extra)))
    said = capsys.readouterr().out.splitlines()
    config, encoder = load_run(old, which)
    started_from, student = initial_student(train.parse(arguments(images, tmp_path / "other", *extra))[0])
    assert student is not None
    for name, value in student.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name
    assert student.notes[0].endswith("; the projector too")
    assert all(note in said for note in student.notes)
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())
    assert recorded["data"]["mean"] == [0.3, 0.4, 0.5] == list(config.data.mean or ())
    assert recorded["data"]["std"] == [0.2, 0.25, 0.3]
    assert recorded["model"]["init"] == str(old)
    assert recorded["model"]["init_hash"] == started_from.model.init_hash
    assert len(started_from.model.init_hash or "") == 64


def test_real_weights_name_real_photographs(tmp_path: Path) -> None:
    """By the classifier in the file, behind our backbone, loader and normalisation."""
    weights, photographs = (
        shared_folder() / name for name in ("tf_efficientnet_lite0.safetensors", "imagenet-sample-jpeg.tar")
    )
    if not weights.exists() or not photographs.exists():
        pytest.skip("needs the shared weights and photographs")
    config, student = started(weights, 224, arch="timm/tf_efficientnet_lite0")
    assert "294 of 294 tensors, 100 %" in student.notes[0]
    with tarfile.open(photographs) as tar:
        tar.extractall(tmp_path, filter="data")
    data = dataclasses.replace(config.data, loader="torch", workers=1)
    config = dataclasses.replace(config, data=data, train=TrainConfig(batch_size=50, precision="fp32"))
    source = open_images(tmp_path, data)
    found = features_of(student.backbone, source, config, torch.device("cpu"), count=60)
    tensors = load_file(weights)
    scores = found.features @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    names = [ImageNetInfo().index_to_label_name(index) for index in scores.argmax(dim=1).tolist()]
    right = [Path(source.names[place]).name.startswith(name) for place, name in zip(found.places, names, strict=True)]
    assert sum(right) >= 48  # 263 of all 300 are


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_checkpoint_is_a_file_of_weights(old: Path, tmp_path: Path, which: str) -> None:
    """Which holds the optimizer's momentum under the same names too, here first of all."""
    tensors = load_file(*(old / "checkpoints").glob("*.safetensors"))
    torch.save({name: tensors[name] for name in sorted(tensors)}, tmp_path / "checkpoint.pth")
    _, student = started(tmp_path / "checkpoint.pth", 32, init_which=which, projection_dim=16, projector="linear")
    for name, value in load_run(old, which)[1].state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_a_run_of_another_network_is_refused(old: Path, images: Path, tmp_path: Path) -> None:
    extra = ("--model.init", str(old), "--model.arch", "resnet18")
    with pytest.raises(ConfigError, match=rf"^--model.arch: expected {ARCH}, as the run .* has, got resnet18$"):
        train.train(*train.parse(arguments(images, tmp_path / "new", *extra)))


def test_a_run_goes_on_after_a_stop_though_its_weights_are_gone(old: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(old, tmp_path / "old")
    extra = ("--model.init", str(tmp_path / "old"))
    whole = train.train(*train.parse(arguments(images, tmp_path / "whole", *extra)))
    stopped = arguments(images, tmp_path / "stopped", *extra)
    train.train(*train.parse([*stopped, "--train.max-steps", "2"]))
    shutil.rmtree(tmp_path / "old")
    train.train(*train.parse(stopped))
    weights = [load_run(run, "student")[1].state_dict() for run in (whole, tmp_path / "stopped")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert [line["kind"] for line in metrics(tmp_path / "stopped")].count("end") >= 1
    for other, expected in (
        (("--model.init", str(old)), r"--model.init is .* there and .*old.* now"),
        ((*extra, "--data.std", "1", "1", "1"), r"--data.std is \(.*\) there and \(1.0, 1.0, 1.0\) now"),
        ((*extra, "--model.init-which", "teacher"), r"--model.init-which is student there and teacher now"),
    ):
        with pytest.raises(ConfigError, match=expected):
            train.train(*train.parse(arguments(images, tmp_path / "stopped", *other)))


def test_weights_can_be_named_by_their_hash(old: Path, images: Path, tmp_path: Path) -> None:
    config, _ = initial_student(train.parse(arguments(images, tmp_path / "a", "--model.init", str(old)))[0])
    pinned = ("--model.init", str(old), "--model.init-hash", str(config.model.init_hash))
    assert initial_student(train.parse(arguments(images, tmp_path / "a", *pinned))[0])[0] == config
    with pytest.raises(ConfigError, match=r"^--model.init-hash: expected that of .*, [0-9a-f]{64}, got 12$"):
        initial_student(train.parse(arguments(images, tmp_path / "a", *pinned[:3], "12"))[0])


def test_an_export_by_timm_alone_has_the_features_and_the_normalisation(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file of an image to features, by the card and timm, and by our loader."""
    save_file(ONE, tmp_path / "begin.safetensors")
    extra = ("--model.init", str(tmp_path / "begin.safetensors"), "--train.max-steps", "2")
    run = train.train(*train.parse(arguments(images, tmp_path / "run", *extra)))
    assert embed.embed(embed.EmbedCommand(run, tmp_path / "f.npz", embed.ImagesConfig(images, loader="torch"))) == 0
    assert export.export(export.ExportCommand(run, "timm", tmp_path / "backbone.safetensors")) == 0
    card = (tmp_path / "backbone.safetensors.md").read_text()
    assert '"sha256"' in card
    assert "begin.safetensors" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "(0.5, 0.5, 0.5)" in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes((images / "dark" / "3.jpg").read_bytes())
    names: dict[str, Any] = {}
    exec(code, names)
    arrays = np.load(tmp_path / "f.npz")
    ours = arrays["features"][arrays["paths"].tolist().index("dark/3.jpg")]
    np.testing.assert_allclose(np.asarray(names["features"])[0], ours, rtol=0, atol=1e-4)
