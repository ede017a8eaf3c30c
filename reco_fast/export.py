"""Write a run's backbone so that other libraries load it without reco_fast.

`python -m reco_fast.export RUN_DIR --format {safetensors,torchvision,timm,onnx} --output FILE`

A Markdown card with the code that loads it appears beside it, as FILE.md.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.evaluation.model_card import model_card
from reco_fast.method.model import patch_size, torchvision_options
from reco_fast.run.files import check_output, whole_file
from reco_fast.run.run_folder import load_run
from reco_fast.settings import command_line
from reco_fast.settings.config import Config
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import WithPaths, first_line

Format = Literal["safetensors", "torchvision", "timm", "onnx"]
SUFFIXES: dict[str, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "torchvision": (".pth", ".pt"),
    "timm": (".safetensors", ".pth", ".pt"),
    "onnx": (".onnx",),
}
ONNX_LIMIT = 2**31  # bytes in one protobuf message
TOLERANCE = 1e-5  # of the rebuilt model's features, relative to the largest


@dataclass(frozen=True)
class ExportCommand(WithPaths):
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run."""
    format: Format
    """safetensors: tensors by name; torchvision, timm: what that library loads; onnx: one graph, any batch size."""
    output: Path
    """File to write: .safetensors, .pth or .pt (torchvision, timm), .onnx."""
    which: Literal["student", "teacher"] = "student"
    """Whose backbone."""


class Blueprint(NamedTuple):
    """How `library` alone builds the backbone: its `name` there, options of the constructor, and modules to put in
    place of the library's own (the classifier, a stem for small images)."""

    library: Literal["torchvision", "timm"]
    name: str
    options: dict[str, Any]
    edits: dict[str, nn.Module]

    def build(self) -> nn.Module:
        """The architecture with random weights, in eval mode."""
        model = _library_model(self.library, self.name, self.options)
        for place, module in self.edits.items():
            model.set_submodule(place, module)
        return model.eval()

    def code(self, **extra: str) -> list[str]:
        """The same as Python source; `extra` are more arguments of the constructor, as source."""
        if self.library == "torchvision":
            given = "".join(f", {key}={value!r}" for key, value in self.options.items())
            lines = [f"model = torchvision.models.get_model({json.dumps(self.name)}, weights=None{given})"]
        else:
            options = {"num_classes": "0", **{k: repr(v) for k, v in self.options.items()}, **extra}
            arguments = ", ".join(f"{key}={value}" for key, value in options.items())
            lines = [f"model = timm.create_model({json.dumps(self.name)}, {arguments})"]
        return lines + [
            f"model.set_submodule({json.dumps(place)}, torch.nn.{module!r})" for place, module in self.edits.items()
        ]


def _library_model(library: str, name: str, options: dict[str, Any]) -> nn.Module:
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)
    import timm

    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def find_blueprint(
    library: Literal["torchvision", "timm"], arch: str, backbone: nn.Module, image_size: int
) -> Blueprint | None:
    """How `library` builds `backbone`; None where it cannot.

    Names and shapes of weights may agree while the networks differ, so features are compared too.
    """
    name = arch.rpartition("/")[2]
    if library == "torchvision":
        import torchvision

        known = name in torchvision.models.list_models(module=torchvision.models)
    else:
        import timm

        known = timm.is_model(name)
    if not known:
        return None
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    expected = backbone_outputs(backbone, images)
    # Transformers are built for one image size; convolutional nets do not take the argument.
    candidates: list[dict[str, Any]] = [{}, {"img_size": image_size}]
    if patch := patch_size(backbone):
        candidates += [options | {"patch_size": patch} for options in candidates]
    if library == "torchvision":
        candidates = [torchvision_options(name)]
    rebuilt: Blueprint | None = None
    for options in candidates:
        try:
            fresh = _library_model(library, name, options)
            blueprint = Blueprint(library, name, options, _edits(library, fresh, backbone))
            model = blueprint.build()
            model.load_state_dict(backbone.state_dict())
            features = backbone_outputs(model, images)
        except Exception:  # whatever a third-party constructor or forward raises, this is not how to build it
            continue
        if features.shape == expected.shape and (features - expected).abs().max() <= TOLERANCE * expected.abs().max():
            if library == "torchvision" or not blueprint.edits:
                return blueprint
            rebuilt = rebuilt or blueprint  # other options may need no module in place of another
    return rebuilt


def _edits(library: str, fresh: nn.Module, backbone: nn.Module) -> dict[str, nn.Module]:
    """Modules of `fresh` that are others in `backbone`."""
    edits: dict[str, nn.Module] = {}
    if library == "torchvision":
        classifier = [name for name, module in fresh.named_modules() if isinstance(module, nn.Linear)][-1]
        edits[classifier] = nn.Identity()
    mine = dict(backbone.named_modules())
    for name, module in fresh.named_modules():
        other = mine.get(name)
        if isinstance(module, nn.Conv2d) and type(other) is nn.Conv2d and other.weight.shape != module.weight.shape:
            edits[name] = nn.Conv2d(
                other.in_channels,
                other.out_channels,
                other.kernel_size,  # type: ignore[arg-type]
                stride=other.stride,  # type: ignore[arg-type]
                padding=other.padding,  # type: ignore[arg-type]
                bias=other.bias is not None,
            )
        elif isinstance(module, nn.MaxPool2d) and isinstance(other, nn.Identity):
            edits[name] = nn.Identity()
    return edits


@torch.no_grad()
def backbone_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """`model`'s features [n, F] float32 in eval mode, which it is left in."""
    return model.eval()(images)


def main() -> NoReturn:
    command_line.serve("export", ExportCommand, export, __doc__)


def export(command: ExportCommand) -> int:
    """Write the backbone and its card. Raises ConfigError, with nothing written, for a user's mistake."""
    check_output(command.output, SUFFIXES[command.format])
    config, encoder = load_run(command.run_dir, command.which)
    backbone = encoder.get_submodule("backbone").eval()
    blueprint = choose_blueprint(command.format, backbone, config)
    tensors = {name: value.detach().contiguous().clone() for name, value in backbone.state_dict().items()}
    card = model_card(
        command.run_dir,
        config,
        which=command.which,
        format=command.format,
        width=backbone_outputs(backbone, torch.zeros(2, 3, config.data.image_size, config.data.image_size)).shape[1],
        code=loading_code(command.format, blueprint, command.output.name),
    )
    card_path = command.output.with_name(f"{command.output.name}.md")
    check_output(card_path, (".md",))
    with whole_file(command.output) as output, whole_file(card_path) as card_output:
        if command.format == "onnx":
            write_onnx(backbone, config, output)
        elif command.output.suffix == ".safetensors":
            save_file(tensors, output, metadata={"format": "pt"})
        else:
            torch.save(tensors, output)
        card_output.write_text(card, encoding="utf-8")
    say(f"{command.output}: backbone of the {command.which}, {config.model.arch}; {card_path} says how to load it")
    return 0


def choose_blueprint(format: Format, backbone: nn.Module, config: Config) -> Blueprint:
    """How the backbone is rebuilt from a file of `format`. Raises ConfigError where the format does not fit it."""
    arch, size = config.model.arch, config.data.image_size
    own: Literal["torchvision", "timm"] = "torchvision" if _is_of(backbone, "torchvision") else "timm"
    library = format if format in ("torchvision", "timm") else own
    blueprint = find_blueprint(library, arch, backbone, size)
    if blueprint is None:
        raise ConfigError(
            f"--format: expected safetensors, onnx or {own} for {arch}, which {library} does not build, got {format}"
        )
    if format == "timm" and blueprint.edits:
        raise ConfigError(
            f"--format: expected safetensors, torchvision or onnx for {arch} with the 3×3 stem for small images, which "
            f"timm.create_model does not build, got timm; or train with --model.stem standard"
        )
    return blueprint


def _is_of(backbone: nn.Module, library: str) -> bool:
    return type(backbone).__module__.partition(".")[0] == library


def loading_code(format: Format, blueprint: Blueprint, file: str) -> list[str]:
    """Python source that makes `model`, a function of images [n, 3, S, S], from `file` without reco_fast."""
    if format == "onnx":
        return [
            "import onnxruntime",
            "import torch",
            "",
            f"session = onnxruntime.InferenceSession({file!r})",
            "model = lambda images: session.run(['features'], {'images': images.numpy()})[0]",
        ]
    if format == "timm":
        lines = ["import timm", "import torch", "", *blueprint.code(checkpoint_path=repr(file))]
    else:
        load = f"torch.load({file!r}, weights_only=True)"
        imports = [f"import {blueprint.library}", "import torch"]
        if format == "safetensors":
            load = f"load_file({file!r})"
            imports.append("from safetensors.torch import load_file")
        lines = [*imports, "", *blueprint.code(), f"model.load_state_dict({load}, strict=True)"]
    return [*lines, "model.eval().requires_grad_(False)"]


def write_onnx(backbone: nn.Module, config: Config, path: Path) -> None:
    """One .onnx file: `images` [batch, 3, S, S] float32 to `features` [batch, F]. Raises ConfigError."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx: expected {' and '.join(missing)}; pip install 'reco-fast[export]'")
    if sum(value.nbytes for value in backbone.state_dict().values()) >= ONNX_LIMIT:
        raise ConfigError("--format onnx: expected a backbone below 2 GiB, the most that one ONNX file holds")
    size = config.data.image_size
    try:
        program = torch.onnx.export(
            backbone,
            (torch.randn(2, 3, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except Exception as error:  # the exporter raises many types for an operation that it does not know
        raise ConfigError(
            f"--format onnx: {config.model.arch} cannot be written as ONNX: {first_line(error)}"
        ) from None
    assert program is not None
    program.save(path, external_data=False)


if __name__ == "__main__":
    main()
