"""Draw the pictures of README.md and method.md: `python docs/figures.py` (needs matplotlib)."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from reco_fast.profiling.mixing import mixing, orders, positions

HERE = Path(__file__).parent
INK, QUIET, BANDS = "#222222", "#8a8a8a", ("#dbe9f6", "#fde3cf", "#e1f0dc")


def box(
    axes: Axes, x: float, y: float, text: str, colour: str = "white", width: float = 1.8, height: float = 0.62
) -> None:
    axes.add_patch(
        plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=INK, linewidth=0.9)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "linestyle": style, "color": INK, "linewidth": 0.9})


def method(axes: Axes) -> None:
    """Views, encoders, banks and the three terms."""
    axes.set(xlim=(0, 10), ylim=(0, 5.2), aspect="equal")
    axes.axis("off")
    rows = {"mixed view": 4.5, "strong view 1": 3.4, "strong view 2": 2.3, "weak view": 1.2}
    for name, y in rows.items():
        box(axes, 1.2, y, name)
    box(axes, 3.6, 3.95, "student", "#eeeeee", height=1.75)
    box(axes, 3.6, 1.75, "teacher\n(EMA)", "#eeeeee", height=1.75)
    for y in rows.values():
        arrow(axes, (2.05, y), (2.75, y))
    box(axes, 6.0, 2.3, "memory bank\nof strong keys", width=1.9)
    box(axes, 6.0, 1.2, "memory bank\nof weak keys", width=1.9)
    for y in (2.3, 1.2):
        arrow(axes, (4.45, y), (5.05, y), "--")
    terms = (("local relation", 4.5, BANDS[2]), ("instance", 3.4, BANDS[0]), ("global relation", 2.3, BANDS[1]))
    for name, y, colour in terms:
        box(axes, 8.7, y, name, colour)
    arrow(axes, (4.45, 4.5), (7.85, 4.5))
    arrow(axes, (4.45, 3.4), (7.85, 3.4))
    arrow(axes, (6.95, 2.45), (7.9, 4.25))
    arrow(axes, (6.95, 2.35), (7.9, 3.2))
    arrow(axes, (6.95, 1.3), (7.9, 2.1))
    arrow(axes, (4.45, 3.2), (7.85, 2.4))
    axes.text(
        5,
        0.35,
        "one streaming pass over each bank gives all three terms and their gradients",
        ha="center",
        fontsize=7,
        color=QUIET,
    )


def gain(axes: Axes) -> None:
    """kNN on all of CIFAR-10 against encoder passes an image: mean and range over the seeds."""
    found = [json.loads(line) for line in (HERE / "results" / "cheaper-steps.jsonl").read_text().splitlines()]
    for label, prefix in (("ReCo", "F-reco12-"), ("MoCo v2", "F-moco-")):
        curves = [run["knn_top1"] for run in found if run["run"].startswith(prefix)]
        passes = [4 * epoch for epoch, _ in curves[0]]
        top1 = list(zip(*([value for _, value in points] for points in curves), strict=True))
        axes.plot(
            passes, [sum(values) / len(values) for values in top1], marker="o", markersize=3, linewidth=1.2, label=label
        )
        axes.fill_between(passes, [min(values) for values in top1], [max(values) for values in top1], alpha=0.2)
    axes.set(
        xlabel="encoder passes an image", ylabel="kNN top-1, %", title=f"CIFAR-10, a small ResNet, {len(curves)} seeds"
    )
    axes.title.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    axes.tick_params(labelsize=7)


def global_relation(axes: Axes) -> None:
    """What the student's similarities to a bank are pulled to, of a small bank drawn at random."""
    rng = np.random.default_rng(1)
    bank, query = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 14, 24)))
    weak = query[0] + 0.15 * rng.normal(size=24)
    for row, temperature, shift, label in (
        (weak / np.linalg.norm(weak), 0.04, -0.2, "teacher, weak view, τ = 0.04: the target"),
        (query[0], 0.1, 0.2, "student, strong view, τ = 0.1"),
    ):
        weights = np.exp(bank @ row / temperature)
        axes.bar(np.arange(14) + shift, weights / weights.sum(), 0.4, label=label)
    axes.set(xlabel="row of the bank B", ylabel="softmax of the similarity", title="global relation", xticks=[])
    axes.legend(frameon=False, fontsize=7)


def local_relation(axes: Axes) -> None:
    """The mix target between two keys on the circle, for λ = 0.7."""
    circle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(circle), np.sin(circle), color=QUIET, linewidth=0.8)
    own, other = (np.array([np.cos(angle), np.sin(angle)]) for angle in (1.9, 0.35))
    target = 0.7 * own + 0.3 * other
    target /= np.linalg.norm(target)
    axes.plot(*zip(own, other, strict=True), color=QUIET, linestyle=":")
    for point, text in ((own, "a"), (other, "k[π]"), (target, "t, λ = 0.7")):
        axes.annotate("", point, (0, 0), arrowprops={"arrowstyle": "->", "color": INK})
        axes.text(*(1.13 * point), text, ha="center", va="center", fontsize=8)
    away = np.linspace(2.8, 5.6, 9)
    axes.scatter(np.cos(away), np.sin(away), s=12, color=QUIET)
    axes.text(0.1, -0.78, "rows of the bank A", ha="center", fontsize=7, color=QUIET)
    axes.set(title="local relation: q_mix → t", aspect="equal", ylim=(-1.1, 1.3))
    axes.axis("off")


def subset_curves() -> None:
    """kNN on a subset of CIFAR-10 against epochs: mean and range over three seeds, for quality.md."""
    found = [json.loads(line) for line in (HERE / "results" / "cifar10-subset.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for label, method, mix, epochs in (
        ("ReCo, 30 epochs", "both", "mixup", 30),
        ("MoCo v2, 30 epochs", "moco", None, 30),
        ("MoCo v2, 52 epochs: as long", "moco", None, 52),
    ):
        wanted = (10_000, method, mix, epochs)
        curves = [run["curve"] for run in found if (*map(run.get, ("images", "method", "mix", "epochs")),) == wanted]
        x = [epoch for epoch, _ in curves[0]]
        top1 = list(zip(*([value for _, value in points] for points in curves), strict=True))
        axes.plot(x, [sum(values) / len(values) for values in top1], linewidth=1.4, label=label)
        axes.fill_between(x, [min(values) for values in top1], [max(values) for values in top1], alpha=0.2)
    axes.set(xlabel="epoch", ylabel="kNN top-1, %", title="10,000 images of CIFAR-10, three seeds")
    axes.title.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(HERE / "images" / "cifar10-subset.png", dpi=130)


def gpu_curves() -> None:
    """kNN on CIFAR-10 against minutes on a GPU that two runs share, and that one has alone, for benchmarks.md."""
    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for label, name in (
        ("ReCo, 4 passes, alone", "half"),
        ("ReCo, 8 passes, alone", "preset"),
        ("ReCo, 8 passes, shared", "reco"),
        ("MoCo v2, shared", "moco"),
    ):
        found = (HERE / "results" / f"quality-{name}-H200.jsonl").read_text().splitlines()
        points = [line for line in map(json.loads, found) if line["kind"] == "eval"]
        minutes = [point["seconds"] / 60 for point in points]
        axes.plot(
            minutes, [point["knn_top1"] for point in points], marker="o", markersize=3, linewidth=1.4, label=label
        )
    axes.set(xlabel="minutes of training on one H200", ylabel="kNN top-1, %", title="CIFAR-10 (JPEG), ResNet-18")
    axes.title.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(HERE / "images" / "cifar10-H200.png", dpi=130)


def order_in_blocks() -> None:
    """Where in an epoch the images of 20 shards are, of 20 and of 1,000, uniformly and in blocks."""
    batch, shown = 256, 20
    figure, rows = plt.subplots(2, 3, figsize=(9, 4.6), sharex=True, sharey=True, layout="constrained")
    for axes, shards, images in zip(rows, (shown, 1000), (500, 1000), strict=True):
        named = orders(shards, images, batch, [(4, 8), (1, 2)])
        for panel, (name, order) in zip(axes, named.items(), strict=True):
            places = positions(order, 0).reshape(shards, images)[:: shards // shown] / order.length
            places = places[np.argsort(places.mean(axis=1))]
            height = np.broadcast_to(np.arange(shown)[:, None], places.shape)
            panel.plot(places.ravel(), height.ravel(), "|", markersize=5, color="#1f5fa8", alpha=0.3)
            pairs = mixing(order, images).one_shard
            panel.set_title(f"{shards:,} shards, {name}\npairs of a batch of one shard: {pairs:.1%}", fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=7)
            panel.set(yticks=[])
        axes[0].set_ylabel("20 of the shards", fontsize=8)
    for panel in rows[1]:
        panel.set_xlabel("place in the epoch", fontsize=8)
    figure.savefig(HERE / "images" / "order-in-blocks.png", dpi=110)


def main() -> None:
    subset_curves()
    gpu_curves()
    order_in_blocks()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(2, 1), layout="constrained")
    method(left)
    gain(right)
    figure.savefig(HERE / "images" / "overview.png", dpi=150)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=(3, 2), layout="constrained")
    global_relation(left)
    local_relation(right)
    for axes in (left, right):
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    figure.savefig(HERE / "images" / "relations.png", dpi=110)


if __name__ == "__main__":
    main()
