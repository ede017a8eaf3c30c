"""The Markdown card beside an exported backbone: how to load it, what it was trained on, what was measured."""

import inspect
import json
from pathlib import Path
from typing import Any

from PIL import ImageColor

from reco_fast import __version__
from reco_fast.errors import ConfigError
from reco_fast.pipelines.augmentations import evaluation_recipe
from reco_fast.pipelines.pixels import deep_values, eight_bits, eight_of_sixteen, over, scaling
from reco_fast.run import run_folder
from reco_fast.run.files import read_json
from reco_fast.settings.config import Config

PIXELS = (deep_values, eight_of_sixteen, scaling, eight_bits, over)


def model_card(folder: Path, config: Config, *, which: str, format: str, width: int, code: list[str]) -> str:
    """The card of a backbone with `width` features, exported from the run in `folder`.

    `code`: Python source that makes `model`. What a user or a file of the run chose (paths, class names, commands)
    stands only inside code blocks that it cannot end: it is data, never Markdown.
    """
    size = config.data.image_size
    metrics = {
        "end of training (student)": run_folder.finished(folder),
        "evaluation.json": json_or_none(folder, "evaluation"),
    }
    model = config.model
    start = "random weights" if model.init is None else {"weights": model.init, "sha256": model.init_hash}
    data = {"trained on": config.data.path, "held out": config.data.val_path, "image size": size, "started from": start}
    return "\n".join(
        [
            f"# {config.model.arch}, backbone of the {which}",
            "",
            f"Features learned without labels by reco_fast {__version__} (objective: {config.loss.objective}); "
            f"format: {format}.",
            "",
            "## How to load it",
            "",
            f"Images are {size} × {size} pixels, RGB, normalised as `prepare` does; each becomes {width} features.",
            "Compare features by cosine similarity.",
            "",
            *fenced("python", preprocessing_code(config, code)),
            "",
            "## Data",
            "",
            *fenced("json", as_json(data)),
            "",
            "## Metrics",
            "",
            "As measured in the run; null where it was not.",
            "",
            *fenced("json", as_json(metrics)),
            "",
            "## Configuration",
            "",
            *fenced("json", as_json(config.to_json())),
            "",
            "## Environment",
            "",
            *fenced("json", as_json(without_places(json_or_none(folder, "environment")))),
            "",
        ]
    )


def preprocessing_code(config: Config, code: list[str]) -> list[str]:
    """`code`, then the evaluation recipe in Pillow, and a call."""
    size = config.data.image_size
    recipe = evaluation_recipe(size, config.data.mean, config.data.std)
    imports = sorted({"import numpy as np", *(line for line in code if line.startswith(("import ", "from ")))})
    (view,) = recipe.views
    return [
        *sorted(imports, key=lambda line: line.startswith("from")),
        "from typing import Any",
        "from PIL import Image, ImageOps",
        "",
        *(line for line in code if line and line not in imports),
        "",
        f"mean, std = torch.tensor({recipe.mean}).view(3, 1, 1), torch.tensor({recipe.std}).view(3, 1, 1)",
        "",
        "# Images with transparency, or with more than 8 bits a channel, as the training read them",
        *(line for part in PIXELS for line in inspect.getsource(part).splitlines()),
        "",
        "def prepare(path):  # the central square",
        "    image = Image.open(path)",
        f"    shallow, _ = eight_bits(image, path, {config.data.range})",
        f"    rgb = over(shallow, {ImageColor.getrgb(config.data.background)})",
        "    rgb.info = image.info  # with its EXIF",
        "    image = ImageOps.exif_transpose(rgb)",
        f"    side = max(1, round({view.center_crop} * min(image.size)))",
        "    left, top = (image.width - side) // 2, (image.height - side) // 2",
        "    image = image.crop((left, top, left + side, top + side))",
        f"    image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)",
        "    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std",
        "",
        "features = model(prepare('photo.jpg')[None])",
    ]


def fenced(language: str, lines: list[str]) -> list[str]:
    """A code block. No line of ours holds a backtick but inside a string, where its escape means the same."""
    escape = "\\x60" if language == "python" else "\\u0060"
    return [f"```{language}", *(line.replace("`", escape) for line in lines), "```"]


def as_json(values: Any) -> list[str]:
    return json.dumps(values, indent=2, default=str).splitlines()


def without_places(environment: Any) -> Any:
    """Where the run was is nobody's business who gets the backbone."""
    if not isinstance(environment, dict):
        return environment
    return {name: value for name, value in environment.items() if name not in ("directory", "folder")}


def json_or_none(folder: Path, name: str) -> Any:
    """A JSON file of the run, or None."""
    try:
        return read_json(folder / f"{name}.json")
    except ConfigError:
        return None
