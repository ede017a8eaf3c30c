"""Pictures of an evaluation: confusion, accuracy by class, kNN over k and τ, nearest neighbours, a map of the features.

matplotlib and scikit-learn are imported by the functions only. Nothing of matplotlib's global state is used, so no
display is needed.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from reco_fast.errors import ConfigError
from reco_fast.pipelines.images import decode_image
from reco_fast.pipelines.sources.image_source import ImageSource

PICTURES = ("confusion.png", "classes.png", "knn.png", "neighbours.png", "map.png")
NAMED_CLASSES = 50  # more names than these cannot be read on one page
NUMBERED_CELLS = 12
LABELLED_COLOURS = 20
SHEET_QUERIES, SHEET_NEIGHBOURS = 10, 8
DPI = 120
THUMBNAIL = 80  # pixels a side
MAP_POINTS = 2000  # t-SNE's time grows with n log n; more points hide each other
RIGHT, WRONG = "#1b6ca8", "#d95f02"  # told apart by the colour-blind too

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def short(name: str, length: int = 18) -> str:
    """A class name that fits beside a picture: one line, no half characters, the middle cut out of a long one."""
    text = " ".join(os.fsencode(name).decode("utf-8", "replace").split())
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= length else f"{text[: length - length // 3 - 1]}…{text[-(length // 3) :]}"


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of `width` × `height` inches that appears at `path` whole or not at all."""
    import matplotlib
    from matplotlib.figure import Figure

    temporary = path.with_name(f".{path.name}.tmp")
    # A $ in a class name is a dollar, and a script that the font lacks is drawn as boxes, without a word about it.
    with matplotlib.rc_context({"text.parse_math": False, "axes.grid": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        try:
            drawn.savefig(temporary, format="png", dpi=DPI)
            temporary.rename(path)
        except OSError as error:
            raise ConfigError(f"{path}: expected a place to write a picture, got {error.strerror}") from None


def draw_confusion(path: Path, matrices: dict[str, Ints], classes: Sequence[str]) -> None:
    """A panel for each classifier: percent of each class's images (rows) that are taken for which class (columns).

    `matrices`: counts [C, C]. Up to `NAMED_CLASSES` classes have their names on the axes, few have numbers in cells.
    """
    count = len(classes)
    side = min(11.0, max(4.5, 0.36 * count + 2))
    with figure(path, side * len(matrices) + 0.5, side) as drawn:
        panels = drawn.subplots(1, len(matrices), squeeze=False)[0]
        for axes, (title, counts) in zip(panels, matrices.items(), strict=True):
            percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
            axes.set(title=title, xlabel="taken for", ylabel="class")
            _name_ticks(axes, classes)
            if count <= NUMBERED_CELLS:
                for row, column in np.ndindex(count, count):
                    colour = "white" if percent[row, column] > 60 else "black"
                    text = f"{percent[row, column]:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        drawn.colorbar(image, ax=list(panels), shrink=0.7, label="% of the class")


def _name_ticks(axes: Any, classes: Sequence[str]) -> None:
    if len(classes) > NAMED_CLASSES:
        axes.set(xlabel="taken for (number of the class)", ylabel="number of the class, in order of the names")
        return
    places = range(len(classes))
    size = 9 if len(classes) <= 20 else 7
    axes.set_xticks(places, [short(name) for name in classes], rotation=90, fontsize=size)
    axes.set_yticks(places, [short(name) for name in classes], fontsize=size)


def draw_classes(path: Path, accuracies: dict[str, Floats], classes: Sequence[str]) -> None:
    """Top-1 in percent of each class as bars, highest first; of more than `NAMED_CLASSES`, the two ends.

    `accuracies`: [C] for each classifier, NaN where a class has no held-out image.
    """
    last = list(accuracies.values())[-1]
    order = [place for place in np.argsort(-last, kind="stable").tolist() if not np.isnan(last[place])]
    left_out = max(0, len(order) - NAMED_CLASSES)
    half = NAMED_CLASSES // 2
    shown = order[:half] + order[-half:] if left_out else order
    with figure(path, 7, 2 + 0.26 * len(shown)) as drawn:
        axes = drawn.subplots()
        height = 0.8 / len(accuracies)
        for number, (title, values) in enumerate(accuracies.items()):
            places = np.arange(len(shown)) + (number - (len(accuracies) - 1) / 2) * height
            mean = np.nanmean(values)
            axes.barh(places, values[shown], height, color=(WRONG, RIGHT)[number % 2], label=title)
            axes.axvline(mean, color=(WRONG, RIGHT)[number % 2], linewidth=1, linestyle=":")
        axes.set_yticks(range(len(shown)), [short(classes[place], 24) for place in shown], fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="top-1 of the class in % (dotted: mean over classes)", xlim=(0, 100))
        if left_out:
            axes.axhline(half - 0.5, color="black", linewidth=1)
            axes.set_title(f"the {half} best and the {half} worst of {len(order)} classes", fontsize=10)
        drawn.legend(loc="outside upper center", ncols=len(accuracies), fontsize=8)


def draw_knn(path: Path, sweep: Sequence[dict[str, float]], headline: tuple[int, float, float]) -> None:
    """kNN top-1 over k, a line for each temperature; `headline`: k, τ and top-1 of the figure that is reported."""
    temperatures = sorted({entry["temperature"] for entry in sweep})
    with figure(path, 6.4, 4) as drawn:
        axes = drawn.subplots()
        for number, temperature in enumerate(temperatures):
            points = sorted((entry["k"], entry["top1"]) for entry in sweep if entry["temperature"] == temperature)
            colour = _colours(len(temperatures), "viridis")[number]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=f"τ = {temperature:g}")
        k, temperature, top1 = headline
        label = f"reported: k = {k}, τ = {temperature:g}"
        axes.plot(
            [k], [top1], marker="o", markersize=10, markerfacecolor="none", color="black", linewidth=0, label=label
        )
        axes.set(xscale="log", xlabel="neighbours k", ylabel="kNN top-1 in %")
        ks = sorted({entry["k"] for entry in sweep})
        axes.set_xticks(ks, [f"{each:g}" for each in ks], fontsize=8)
        axes.minorticks_off()
        axes.legend(fontsize=8)


def draw_neighbours(
    path: Path,
    queries: tuple[ImageSource, Ints],
    candidates: tuple[ImageSource, Ints],
    similarity: Floats,
    *,
    by_class: bool,
) -> None:
    """A row for each query: the image, then its nearest with their cosine similarity, the most similar first.

    Args:
        queries: their source, and places in it [n].
        candidates: their source, and places in it of the nearest [n, k]; `similarity` [n, k].
        by_class: name the classes, and frame a neighbour of the query's class in blue, another in orange.
    """
    rows, width = similarity.shape
    cell, head = THUMBNAIL + 16, 26  # pixels: a picture with its frame, and the line above it
    page = np.full((rows * (cell + head), (width + 1) * cell, 3), 255, dtype=np.uint8)
    frames, titles = [], []
    for row in range(rows):
        own = _class(*queries, row) if by_class else None
        shown = [(queries[0], int(queries[1][row]), short(own, 15) if own else "query", "black")]
        for column in range(width):
            source, places = candidates
            title, colour = f"{similarity[row, column]:.2f}", "#666666"
            if by_class:
                label = _class(source, places[row], column)
                colour = RIGHT if label == own else WRONG
                title = f"{title} {short(label, 10)}"
            shown.append((source, int(places[row, column]), title, colour))
        for column, (source, place, title, colour) in enumerate(shown):
            x, y = column * cell + 8, row * (cell + head) + head
            thumbnail = ImageOps.fit(decode_image(source.read(place), source.decoding), (THUMBNAIL, THUMBNAIL))
            page[y : y + THUMBNAIL, x : x + THUMBNAIL] = np.asarray(thumbnail)
            frames.append((x - 1.5, y - 1.5, colour))
            titles.append((x + THUMBNAIL / 2, y - 5, title, colour))
    with figure(path, page.shape[1] / DPI, page.shape[0] / DPI) as drawn:
        from matplotlib.patches import Rectangle

        axes = drawn.add_subplot()
        axes.imshow(page)
        axes.set_axis_off()
        for left, top, colour in frames:
            axes.add_patch(
                Rectangle((left, top), THUMBNAIL + 2, THUMBNAIL + 2, fill=False, edgecolor=colour, linewidth=2.5)
            )
        for middle, bottom, title, colour in titles:
            axes.text(middle, bottom, title, fontsize=7, color=colour, ha="center", va="bottom")


def _class(source: ImageSource, places: Ints, which: int) -> str:
    assert source.labels is not None
    return source.classes[int(source.labels[int(places[which])])]


def project(features: Floats) -> Floats:
    """Two dimensions [n, 2] by t-SNE, from the rows of `features` [n, F] at length 1. At least 4 rows."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if np.ptp(units, axis=0).max() < 1e-6:  # all alike
        return np.zeros((len(units), 2))
    units = PCA(min(50, *units.shape), random_state=0).fit_transform(units)  # as t-SNE's authors do: less noise, faster
    perplexity = min(30.0, (len(units) - 1) / 3)
    start: Any = "pca" if units.shape[1] >= 2 else "random"
    return TSNE(2, perplexity=perplexity, init=start, random_state=0).fit_transform(units)


def draw_map(path: Path, points: Floats, labels: Ints | None, classes: Sequence[str]) -> None:
    """`points` [n, 2], coloured by class where there are `labels` [n]; the names of few classes beside them."""
    with figure(path, 8, 6.4) as drawn:
        axes = drawn.subplots()
        title = f"t-SNE of the features of {len(points):,} images"
        if labels is None:
            axes.scatter(*points.T, s=6, color=RIGHT, linewidths=0)
        elif len(classes) <= LABELLED_COLOURS:
            colours = _colours(len(classes), "tab10" if len(classes) <= 10 else "tab20")
            handles = [
                axes.scatter(*points[labels == number].T, s=6, color=colour, linewidths=0)
                for number, colour in enumerate(colours)
            ]
            numbers = [str(number) for number in range(len(classes))]  # a legend leaves out a name that starts with _
            legend = drawn.legend(handles, numbers, loc="outside right upper", fontsize=8, markerscale=3)
            for text, name in zip(legend.get_texts(), classes, strict=True):
                text.set_text(short(name))
        else:
            axes.scatter(*points.T, s=6, c=labels, cmap="nipy_spectral", linewidths=0)
            title += f", coloured by {len(classes)} classes"
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])


def _colours(count: int, name: str) -> list[Any]:
    import matplotlib

    colours = matplotlib.colormaps[name]
    if hasattr(colours, "colors") and colours.N <= LABELLED_COLOURS:
        return [colours(number) for number in range(count)]
    return [colours(number / max(1, count - 1)) for number in range(count)]
