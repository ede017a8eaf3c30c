"""Deep and transparent images from the command line to features: warned of once, and read alike by all commands."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_images import png
from PIL import Image
from small_runs import SMALL

from reco_fast import check_images, embed, evaluate, export, train
from reco_fast.pipelines.images import decode_image
from reco_fast.pipelines.pixels import Decoding

SAID = "less than a sixteenth of their range 0 to 65,535; --data.range LOW HIGH"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Noise of 12 bits, grey and in colour with alpha, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            values = rng.integers(0, 4096, (32, 32, 4))
            values[..., 3] = 65535 * (values[..., 3] % 2)
            data = png(values, 16, 6) if number % 2 else png(values[..., 0], 16, 0)
            (tmp_path / "images" / name / f"{number}.png").write_bytes(data)
    return tmp_path / "images"


def trained(images: Path, *more: str) -> Path:
    run = images.parent / "run"
    paths = ["--data.path", str(images), "--data.val-path", str(images), "--run.dir", str(run)]
    arguments = ["cifar10", *paths, *SMALL, "--data.loader", "torch", "--data.workers", "1", "--train.max-steps", "2"]
    train.train(*train.parse([*arguments, "--train.precision", "fp32", *more]))
    return run


def test_each_command_says_it_once_and_takes_the_range(
    images: Path, capsys: pytest.CaptureFixture[str], call: Callable[..., int]
) -> None:
    run = trained(images)
    assert capsys.readouterr().out.count(SAID) == 1
    evaluate.evaluate(evaluate.EvaluateCommand(run, device="cpu"))
    assert re.search(rf"warning: a/\d.png and 15 others: .*{SAID}", capsys.readouterr().out)
    output = images.parent / "f.npz"
    arguments = [run, "--data.path", images, "--output", output, "--device", "cpu", "--data.workers", "1"]
    assert call(embed.main, *arguments) == 0
    assert capsys.readouterr().out.count(SAID) == 1
    dark = np.load(output)["features"]
    assert call(embed.main, *arguments, "--data.range", "0", "4095") == 0
    assert "warning" not in capsys.readouterr().out
    assert np.abs(np.load(output)["features"] - dark).max() > 0.01


@pytest.mark.parametrize("more", [(), ("--data.range", "0", "4095", "--data.background", "#10c020")])
def test_a_card_reads_them_as_the_loader_does(
    more: tuple[str, ...], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(images, *more)
    found = embed.embed_images(run, images, device="cpu")
    export.export(export.ExportCommand(run, "timm", images.parent / "b.pth"))
    (code,) = re.findall(r"```python\n(.*?)```", (images.parent / "b.pth.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(images.parent)
    names: dict[str, Any] = {}
    (images.parent / "photo.jpg").write_bytes((images / "a" / "0.png").read_bytes())
    exec(code, names)
    decoding = Decoding((16, 192, 32), (0, 4095)) if more else Decoding()
    for path, ours in zip(found.paths, found.features, strict=True):
        square = names["prepare"](images / path)
        features = names["model"](square[None])
        np.testing.assert_allclose(np.asarray(features)[0], ours, rtol=0, atol=1e-4)
        shallow, _ = names["eight_bits"](Image.open(images / path), images / path, decoding.range)
        theirs = np.asarray(names["over"](shallow, decoding.background))
        assert np.array_equal(theirs, np.asarray(decode_image((images / path).read_bytes(), decoding)))


def test_check_images_finds_none_of_them_bad(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = check_images.CheckCommand(images, images.parent / "manifest", loader="torch", workers=1)
    assert check_images.check(command) == 0
    assert "16 images, 0 of them bad" in capsys.readouterr().out
