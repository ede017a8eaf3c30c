"""Images a second that the loaders make, three views each, beside torchvision's own transforms.

    python -m reco_fast.profiling.benchmarks.loader --data.path DIR [--image-size 224] [--batch-size 64] [--workers 2]

The loaders take turns, `--rounds` times, each alone on the machine; a ratio is the median over the rounds of the
ratios within a round. Prints a table and one line of JSON. Nothing trains here: the caller only asks for batches.
"""

import argparse
import io
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import closing
from importlib.metadata import version

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from reco_fast.pipelines.augmentations import Recipe, ViewRecipe, reco_recipe
from reco_fast.pipelines.base import LoaderKind
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import TrainingOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.command_line import run
from reco_fast.settings.typed import place

Batches = Generator[object, None, None]


def ours(kind: LoaderKind, source: ImageSource, recipe: Recipe, arguments: argparse.Namespace) -> Batches:
    order = TrainingOrder(len(source), arguments.batch_size, seed=0)
    device = arguments.device
    with open_loader(kind, source, recipe, order, device=device, seed=0, workers=arguments.workers) as loader:
        for batch in loader:
            if batch.views[0].is_cuda:
                torch.cuda.synchronize()
            yield batch


def torchvision(source: ImageSource, recipe: Recipe, arguments: argparse.Namespace) -> Batches:
    """What one would write without this package: `Compose` for each view, a DataLoader, one image an item."""
    loader = DataLoader(
        _Composed(source, recipe),
        batch_size=arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
        pin_memory=arguments.device == "cuda",
    )
    while True:
        for views in loader:
            yield [view.to(arguments.device, memory_format=torch.channels_last) for view in views]


class _Composed(Dataset[list[Tensor]]):
    def __init__(self, source: ImageSource, recipe: Recipe) -> None:
        self._source = source
        self._views = [_compose(view, recipe) for view in recipe.views]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.open(io.BytesIO(self._source.read(index))).convert("RGB")
        return [view(image) for view in self._views]


def _compose(view: ViewRecipe, recipe: Recipe) -> Callable[[Image.Image], Tensor]:
    jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    steps = [
        transforms.RandomResizedCrop(recipe.size, view.area, view.aspect),
        transforms.RandomApply([jitter], view.jitter_probability),
        transforms.RandomGrayscale(view.grayscale_probability),
        transforms.RandomApply([_PillowBlur(view.blur_sigma)], view.blur_probability),
        transforms.RandomHorizontalFlip(view.flip_probability),
        transforms.ToTensor(),
        transforms.Normalize(recipe.mean, recipe.std),
    ]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


class _PillowBlur(torch.nn.Module):
    """As MoCo v2 has it; torchvision's own `GaussianBlur` convolves tensors and takes several times as long."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self._sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self._sigma)))


def images_per_second(batches: Batches, arguments: argparse.Namespace) -> float:
    """After a warm-up that empties what was made ahead while nobody asked."""
    with closing(batches):
        for _ in range(arguments.warmup):
            next(batches)
        start = time.perf_counter()
        for _ in range(arguments.batches):
            next(batches)
        return float(arguments.batches * arguments.batch_size / (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.path", dest="path", type=place, required=True, help="images, as for training")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, help="timed in each round; 15, or as many as workers")
    parser.add_argument("--warmup", type=int, help="batches before; two for each worker, which are made ahead, and two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    # PyTorch's workers make a batch each, and are done at about the same time.
    arguments.batches = arguments.batches or max(15, arguments.workers)
    arguments.warmup = arguments.warmup or 2 * arguments.workers + 2

    source = open_source(arguments.path)
    recipe = reco_recipe(arguments.image_size)
    loaders: dict[str, Callable[[], Batches]] = {
        "dali": lambda: ours("dali", source, recipe, arguments),
        "torch": lambda: ours("torch", source, recipe, arguments),
        "torchvision": lambda: torchvision(source, recipe, arguments),
    }
    rounds = [
        {name: images_per_second(make(), arguments) for name, make in loaders.items()} for _ in range(arguments.rounds)
    ]
    print(f"{len(source)} images of {arguments.path}, {len(recipe.views)} views of {recipe.size} px each")
    print("| loader | images/s | times torch | times torchvision |\n|---|---|---|---|")
    results = {}
    for name in loaders:
        speed = statistics.median(round_[name] for round_ in rounds)
        against = {other: statistics.median(r[name] / r[other] for r in rounds) for other in ("torch", "torchvision")}
        results[name] = {"images_per_second": speed, "times": against}
        print(f"| {name} | {speed:,.0f} | {against['torch']:.2f} | {against['torchvision']:.2f} |")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    packages = {name: version(name) for name in ("torch", "torchvision", "pillow")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), **packages}
    print(json.dumps({"results": results, "settings": settings, "machine": machine, "rounds": rounds}))


if __name__ == "__main__":
    run(main)
