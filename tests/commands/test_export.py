"""Exported backbones, loaded by the other library alone: the same features; and cards that are true and harmless."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from small_runs import write_pictures
from torch import Tensor, nn

from reco_fast import embed, export, train
from reco_fast.evaluation.model_card import fenced, model_card
from reco_fast.method.model import build_encoder
from reco_fast.run.run_folder import load_run
from reco_fast.settings.config import Config, ModelConfig

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("images"), 16, ".png")


def trained(images: Path, folder: Path, *model: str) -> Path:
    """A run of two steps in float32."""
    small = "--model.bank-size 8 --model.projection-dim 8 --train.batch-size 8 --train.epochs 1 --train.device cpu"
    plain = "--train.precision fp32 --data.loader torch --data.workers 1 --model.key-norm batch --optim.warmup-epochs 0"
    arguments = ["--data.path", str(images), "--run.dir", str(folder), *small.split(), *plain.split(), *model]
    train.train(*train.parse(["cifar10", *arguments]))
    return folder


@pytest.fixture(scope="module")
def standard(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's ResNet-18."""
    return trained(images, tmp_path_factory.mktemp("standard") / "run", "--model.stem", "standard")


@pytest.fixture(scope="module")
def small_stem(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's ResNet-18 with the 3×3 stem."""
    return trained(images, tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="module")
def timm_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ("--model.arch", "timm/test_resnet", "--model.stem", "standard")
    return trained(images, tmp_path_factory.mktemp("timm") / "run", *model)


def exported(run: Path, output: Path, format: str, which: str = "student") -> Path:
    assert export.export(export.ExportCommand(run, format, output, which)) == 0  # type: ignore[arg-type]
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.md"]
    return output


def some_images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def expected_features(run: Path, which: str, inputs: Tensor) -> Tensor:
    _, encoder = load_run(run, which)
    with torch.no_grad():
        return encoder.get_submodule("backbone").eval()(inputs)


def same_features(model: nn.Module, run: Path, which: str = "student") -> None:
    with torch.no_grad():
        features = model.eval()(some_images())
    torch.testing.assert_close(features, expected_features(run, which, some_images()), **TOLERANCE)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_torchvision_loads_a_state_dict(standard: Path, tmp_path: Path, which: str) -> None:
    path = exported(standard, tmp_path / "backbone.pth", "torchvision", which)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    same_features(model, standard, which)


def test_student_and_teacher_are_told_apart(standard: Path) -> None:
    inputs = some_images()
    difference = expected_features(standard, "student", inputs) - expected_features(standard, "teacher", inputs)
    assert difference.abs().max() > 1e-3  # so that the tests at 1e-5 would see one in place of the other


def test_torchvision_loads_a_small_stem_that_is_rebuilt(small_stem: Path, tmp_path: Path) -> None:
    path = exported(small_stem, tmp_path / "backbone.pt", "torchvision")
    model = torchvision.models.resnet18()
    model.fc = model.maxpool = nn.Identity()
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    same_features(model, small_stem)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_a_checkpoint(timm_run: Path, tmp_path: Path, suffix: str) -> None:
    path = exported(timm_run, tmp_path / f"backbone{suffix}", "timm")
    same_features(timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(path)), timm_run)


def test_timm_loads_torchvisions_resnet_too(standard: Path, tmp_path: Path) -> None:
    path = exported(standard, tmp_path / "backbone.pth", "timm", "teacher")
    same_features(timm.create_model("resnet18", num_classes=0, checkpoint_path=str(path)), standard, "teacher")


def test_safetensors(timm_run: Path, tmp_path: Path) -> None:
    path = exported(timm_run, tmp_path / "backbone.safetensors", "safetensors")
    model = timm.create_model("test_resnet", num_classes=0)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    same_features(model, timm_run)


def test_onnx_takes_any_batch(small_stem: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = exported(small_stem, tmp_path / "backbone.onnx", "onnx")
    session = onnxruntime.InferenceSession(path)
    for count in (1, 2, 7):
        inputs = some_images(count)
        (features,) = session.run(["features"], {"images": inputs.numpy()})
        np.testing.assert_allclose(features, expected_features(small_stem, "student", inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "size", "library", "fits"),
    [
        ("timm/test_vit", 48, "timm", True),  # needs img_size
        ("timm/test_vit", 48, "torchvision", False),
        ("mobilenet_v3_small", 64, "torchvision", True),  # its classifier is not called fc
        ("timm/resnet18", 96, "torchvision", True),
        ("timm/resnet18d", 96, "torchvision", False),
        ("torchvision/densenet121", 64, "timm", True),
        ("timm/resnetrs50", 64, "torchvision", False),
    ],
)
def test_a_blueprint_rebuilds_the_backbone_or_is_none(arch: str, size: int, library: str, fits: bool) -> None:
    encoder = build_encoder(ModelConfig(arch=arch, stem="standard"), size)
    found = export.find_blueprint(library, arch, encoder.backbone, size)  # type: ignore[arg-type]
    assert (found is not None) == fits


@pytest.mark.parametrize(("arch", "patch"), [("test_vit", 4), ("test_convnext", 1)])
def test_small_patches_are_rebuilt_by_timm(arch: str, patch: int) -> None:
    encoder = build_encoder(ModelConfig(arch=f"timm/{arch}", stem="small"), 32)
    found = export.find_blueprint("timm", arch, encoder.backbone, 32)
    assert found is not None
    assert found.options["patch_size"] == patch


def test_equal_names_of_weights_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_encoder(ModelConfig(arch="torchvision/resnet18", stem="standard"), 32).backbone
    assert export.find_blueprint("torchvision", "resnet18", backbone, 32) is not None
    backbone.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: 1.001 * output)
    assert export.find_blueprint("torchvision", "resnet18", backbone, 32) is None


def card_code(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return code


@pytest.mark.parametrize("name", ["torchvision.pth", "safetensors.safetensors", "timm.pth", "onnx.onnx"])
def test_the_code_of_a_card_gives_the_run_its_features(
    name: str, small_stem: Path, timm_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file of an image to features, by the card alone and by our loader."""
    format, suffix = name.split(".")
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    run = timm_run if format in ("timm", "onnx") else small_stem
    path = exported(run, tmp_path / "out" / f"it's `named` so.{suffix}", format)
    code = card_code(path.with_name(path.name + ".md"))
    assert "reco_fast" not in code
    command = embed.EmbedCommand(run, tmp_path / "f.npz", embed.ImagesConfig(images, loader="torch", workers=1))
    assert embed.embed(command) == 0
    arrays = np.load(tmp_path / "f.npz")
    monkeypatch.chdir(path.parent)
    (path.parent / "photo.jpg").write_bytes((images / "07.png").read_bytes())
    names: dict[str, object] = {}
    exec(code, names)
    ours = arrays["features"][arrays["paths"].tolist().index("07.png")]
    np.testing.assert_allclose(np.asarray(names["features"])[0], ours, rtol=0, atol=1e-4)


def test_what_a_card_quotes_cannot_leave_its_code_block(timm_run: Path, tmp_path: Path) -> None:
    evil = tmp_path / "run"
    (evil / "checkpoints").mkdir(parents=True)
    values = json.loads((timm_run / "config.json").read_text())
    values["data"]["path"] = "/data/x\n```\n<script>alert(1)</script>\n# I am a heading `and more"
    (evil / "evaluation.json").write_text(json.dumps({"knn_top1": "```\n[link](javascript:x)"}))
    card = model_card(
        evil, Config.from_json(values), which="student", format="onnx", width=9, code=["import torch", "'`'"]
    )
    outside = re.sub(r"^```\w+\n.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "script" not in outside
    assert "heading" not in outside
    assert "link" not in outside
    assert card.count("```") == 2 * 5
    blocks = re.findall(r"^```json\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    data, metrics, config, environment = map(json.loads, blocks)
    assert data["trained on"] == values["data"]["path"]
    assert metrics["evaluation.json"]["knn_top1"].startswith("```")
    assert config["model"]["arch"] == "timm/test_resnet"
    assert environment is None
    assert eval(fenced("python", [repr("a`b")])[1]) == "a`b"


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("missing", "--format onnx --output {tmp}/a.onnx", "config.json"),
        ("empty", "--format onnx --output {tmp}/a.onnx", "checkpoint"),
        ("damaged", "--format torchvision --output {tmp}/a.pth", "step-"),
        ("standard", "--format onnx --output {tmp}/a.pth", ".onnx"),
        ("standard", "--format torchvision --output {tmp}/a", ".pth or .pt"),
        ("standard", "--format torchvision --output {tmp}/folder.pth", "folder.pth"),
        ("standard", "--format torchvision --output /proc/nowhere/a.pth", "/proc/nowhere"),
        ("standard", "--format torchvision --output {tmp}/file/a.pth", "file/a.pth (File exists)"),
        ("standard", "--format onnxx --output {tmp}/a.onnx", "format"),
        ("standard", "--format torchvision", "output"),
        ("standard", "--format timm --output {tmp}/a.pth --which nobody", "which"),
        ("small_stem", "--format timm --output {tmp}/a.pth", "--model.stem standard"),
        ("timm_run", "--format torchvision --output {tmp}/a.pth", "torchvision does not build"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run: str,
    arguments: str,
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    if run in ("empty", "damaged"):
        source = request.getfixturevalue("standard")
        folder = tmp_path / run
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        if run == "damaged":
            (checkpoint,) = (source / "checkpoints").iterdir()
            content = bytearray(checkpoint.read_bytes())
            content[len(content) // 2] ^= 1
            (folder / "checkpoints" / checkpoint.name).write_bytes(content)
    else:
        folder = tmp_path / run if run == "missing" else request.getfixturevalue(run)
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").touch()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert message in refused(export.main, folder, *arguments.format(tmp=tmp_path).split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_without_the_onnx_packages_it_says_what_to_install(
    timm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(export.ConfigError, match=r"pip install 'reco-fast\[export\]'"):
        export.export(export.ExportCommand(timm_run, "onnx", tmp_path / "a.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(
    timm_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Callable[..., int]
) -> None:
    output = tmp_path / "a.onnx.safetensors"
    assert call(export.main, timm_run, "--format", "safetensors", "--output", output) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert str(output) in shown.out
    assert shown.err == ""
    assert output.exists()


def test_the_docs_rebuild_the_small_stem_as_the_card_does(small_stem: Path, tmp_path: Path) -> None:
    path = exported(small_stem, tmp_path / "backbone.pth", "torchvision")
    text = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("  model")]
    assert len(lines) == 4
    code = card_code(path.with_name(f"{path.name}.md"))
    assert "\n".join(lines) in code
