"""kNN, linear probe and confusion against scikit-learn's, class matching, and the command with its pictures."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from small_runs import SMALL, write_classes
from torch import nn

from reco_fast import evaluate, train
from reco_fast.data.images import open_labelled
from reco_fast.errors import ConfigError
from reco_fast.evaluate import Extracted
from reco_fast.evaluation import classifiers, pictures
from reco_fast.evaluation.features import Features, extract_features, knn_top1, linear_top1
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.config import Config, DataConfig


@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_knn_votes_are_those_of_scikit_learn(k: int, temperature: float) -> None:
    rng = np.random.default_rng(0)
    neighbours, queries = rng.normal(size=(50, 6)), rng.normal(size=(9, 6))
    labels = rng.permutation(np.arange(50) % 4)

    def weights(distances: np.ndarray) -> np.ndarray:
        similarity = 1 - distances
        return np.exp((similarity - similarity.max(axis=1, keepdims=True)) / temperature)

    theirs = KNeighborsClassifier(min(k, 50), weights=weights, metric="cosine").fit(neighbours, labels)
    found = classifiers.nearest(torch.tensor(queries), torch.tensor(neighbours), k)
    scores = classifiers.knn_scores(found, torch.from_numpy(labels), 4, k=k, temperature=temperature)
    votes = torch.where(scores.isinf(), 0.0, scores)
    expected = theirs.predict_proba(queries)
    np.testing.assert_allclose((votes / votes.sum(dim=1, keepdim=True)).numpy(), expected, rtol=1e-9, atol=1e-25)
    assert scores.argmax(dim=1).tolist() == theirs.predict(queries).tolist()


def test_knn_never_builds_the_whole_similarity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    topk = torch.Tensor.topk

    def spy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    many = torch.randn(9000, 4)
    classifiers.nearest(many, many, 3)
    assert 0 < largest <= 2**24


def test_accuracy_counts_only_classes_that_have_a_score() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(40, 7)), rng.integers(7, size=40)
    for top in (1, 5):
        expected = 100 * top_k_accuracy_score(truth, scores, k=top, labels=range(7))
        assert classifiers.accuracy(torch.tensor(scores), torch.tensor(truth), top) == pytest.approx(expected)
    one_vote = torch.full((7, 7), -torch.inf)
    one_vote[:, 0] = 1.0
    assert classifiers.accuracy(one_vote, torch.arange(7), 5) == pytest.approx(100 / 7)


def test_confusion_and_accuracy_by_class_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(4, size=60), rng.normal(size=(60, 6))  # classes 4 and 5 have no image
    matrix = classifiers.confusion(torch.tensor(scores), torch.tensor(truth), 6).numpy()
    expected = confusion_matrix(truth, scores.argmax(axis=1), labels=range(6))
    np.testing.assert_array_equal(matrix, expected)
    by_class = evaluate.diagonal_percent(matrix)
    assert by_class[2] == pytest.approx(100 * (scores.argmax(axis=1) == 2)[truth == 2].mean())
    assert np.isnan(by_class[4:]).all()


def test_the_sweep_holds_every_pair() -> None:
    features = clusters(1.0)
    found = classifiers.nearest(features.val, features.train, 50)
    sweep = classifiers.knn_sweep(found, features.train_labels, 5, features.val_labels, [1, 50], [0.1, 1.0])
    assert [(each["k"], each["temperature"]) for each in sweep] == [(1, 0.1), (50, 0.1), (1, 1.0), (50, 1.0)]
    for each in sweep:
        assert each["top1"] == knn_top1(features, 5, k=each["k"], temperature=each["temperature"])
    assert len({each["top1"] for each in sweep}) > 1


def clusters(spread: float) -> Features:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(500) % 5
    points = centres[labels] + spread * torch.randn(500, 16, generator=generator)
    return Features(points[:400], labels[:400], points[400:], labels[400:])


def test_both_classifiers_find_clusters_and_nothing_in_noise() -> None:
    easy, noise = clusters(0.2), clusters(100.0)
    assert knn_top1(easy, 5, k=20, temperature=0.1) > 99
    assert linear_top1(easy)[0] > 99
    assert knn_top1(noise, 5, k=20, temperature=0.1) < 45
    assert linear_top1(noise)[0] < 45


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    features = clusters(1.5)
    probe = classifiers.linear_probe(features.train, features.train_labels, 5, features.val)
    assert set(probe.tried) == set(classifiers.PENALTIES)
    assert probe.tried[probe.penalty] == max(probe.tried.values())
    x = features.train.double().numpy()
    mean, std = x.mean(axis=0), x.std(axis=0)
    theirs = LogisticRegression(C=probe.penalty, tol=1e-8, max_iter=1000).fit((x - mean) / std, features.train_labels)
    expected = theirs.predict_proba((features.val.numpy() - mean) / std)
    np.testing.assert_allclose(probe.scores.softmax(dim=1).numpy(), expected, atol=2e-3)


def test_a_tenth_of_each_class_is_left_out() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 5])
    mask = classifiers._every_tenth_of_a_class(labels)
    assert [mask[labels == number].sum() for number in range(3)] == [10, 4, 0]
    assert mask[:100].nonzero()[0].tolist() != list(range(9, 100, 10))  # at random places


@pytest.mark.parametrize("images", [1, 2, 9, 12])
def test_the_probe_takes_few_images_and_classes_of_one(images: int) -> None:
    rows = torch.randn(images, 3, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 7.0  # a feature that never changes
    probe = classifiers.linear_probe(rows, torch.arange(images), images, rows)
    assert probe.scores.shape == (images, images)
    assert probe.scores.isfinite().all()
    assert bool(probe.tried) == (images >= 10)


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (40 * number, 5 * index, 0)).save(root / name / f"{index}.png")
    return root


def test_features_are_those_of_each_image_in_eval_mode(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "a", {"x": 5, "y": 4}))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    options = {"batch_size": 4, "device": torch.device("cpu"), "precision": torch.float32}
    _, features, indices, _ = extract_features(model, source, DataConfig(loader="torch", workers=1), **options)
    assert indices.tolist() == list(range(9))
    assert features.shape == (9, 3)
    assert len(features.unique(dim=0)) == 9
    assert model.training
    assert model[0].num_batches_tracked == 0


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    train = open_source(write_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2}))
    write_folder(tmp_path / "val", {"a": 1, "c": 2})
    data = open_labelled(train, tmp_path / "val")
    assert data.val_labels.tolist() == [0, 2, 2]
    write_folder(tmp_path / "other", {"a": 1, "z": 2})
    with pytest.raises(ConfigError, match="got another: z"):
        open_labelled(train, tmp_path / "other")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(ConfigError, match="without classes"):
        open_labelled(train, tmp_path / "flat")


ODD = ("$\\frac{$", "two\nlines", "漢字 кошка", "_hidden", "x" * 200, os.fsdecode(b"not utf-8 \xff"), "plain")


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of seven oddly named classes, `train` and `val`, and a `run` of one step on them."""
    root = tmp_path_factory.mktemp("odd")
    write_classes(root / "train", 12, ODD, ".png")
    write_classes(root / "val", 3, ODD, ".png", seed=1)
    data = ["--data.path", str(root / "train"), "--run.dir", str(root / "run"), "--data.loader", "torch"]
    train.train(*train.parse(["cifar10", *data, *SMALL, "--train.max-steps", "1"]))
    return root


@pytest.fixture
def measure(call: Callable[..., int]) -> Callable[..., int]:
    """The command with the arguments given; its exit status."""
    return partial(call, evaluate.main, *"--data.loader torch --data.workers 1 --device cpu".split())


def picture(path: Path) -> np.ndarray:
    """Its pixels; checks that it can be looked at and shows something."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert all(200 < side < 3500 for side in pixels.shape[:2])
    colours = pixels.astype(np.int32) @ (65536, 256, 1)  # one number each: rows would be compared as bytes, for seconds
    assert len(np.unique(colours)) > 10
    return pixels


def test_a_device_that_is_not_there_names_the_flag(
    odd_run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "error: --device: expected cpu or auto" in refused(evaluate.main, odd_run / "run", "--device", "cuda")


def test_what_the_network_learned_with_is_the_runs(odd_run: Path, refused: Callable[..., str]) -> None:
    for flag, value, before in (("image-size", "48", "32"), ("std", "1 1 1", "None"), ("background", "red", "white")):
        line = refused(evaluate.main, odd_run / "run", f"--data.{flag}", *value.split())
        assert f"--data.{flag}: expected that of the run, {before}, got " in line


def test_the_command_measures_and_draws(
    odd_run: Path, measure: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    data = ["--data.path", odd_run / "train", "--data.val-path", odd_run / "val"]
    assert measure(odd_run / "run", *data) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "top-5" in shown.out
    assert "on the training images left out" in shown.out
    result = json.loads((odd_run / "run" / "evaluation.json").read_text())
    assert result["val_images"] == 21
    assert result["knn_k"] == 84  # of 200 asked for, all there are
    assert [each["images"] for each in result["per_class"]] == [3] * 7
    assert {each["class"] for each in result["per_class"]} == {*ODD[:5], "not utf-8 \ufffd", "plain"}
    mean = np.mean([each["linear_top1"] for each in result["per_class"]])
    assert result["linear_top1"] == pytest.approx(mean)
    headline = [s for s in result["knn_sweep"] if (s["k"], s["temperature"]) == (84, 0.1)]
    assert [each["top1"] for each in headline] == [result["knn_top1"]]
    assert result["knn_top5"] >= result["knn_top1"]
    assert 1 <= result["backbone_rank"] <= 84
    for name in pictures.PICTURES:
        picture(odd_run / "run" / "evaluation" / name)
    assert not list((odd_run / "run" / "evaluation").glob("*.tmp"))


def test_labels_of_held_out_images_change_nothing_but_the_count(
    odd_run: Path,
    tmp_path: Path,
    measure: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the classes of the held-out images turned round by one, all choices and predictions stay."""
    monkeypatch.setattr(pictures, "available", lambda: False)
    for number, name in enumerate(ODD):
        (tmp_path / ODD[number - 1]).symlink_to(odd_run / "val" / name, target_is_directory=True)
    results, matrices = [], []
    for val in (odd_run / "val", tmp_path):
        assert measure(odd_run / "run", "--data.path", odd_run / "train", "--data.val-path", val) == 0
        results.append(json.loads((odd_run / "run" / "evaluation.json").read_text()))
        matrices.append(json.loads((odd_run / "run" / "evaluation" / "confusion.json").read_text()))
    assert "pip install 'reco-fast[evaluate]'" in capsys.readouterr().out
    assert results[0]["linear_top1"] > results[1]["linear_top1"] + 20
    for key in ("linear_c", "linear_tried", "knn_k", "knn_temperature"):
        assert results[0][key] == results[1][key], key
    order = [matrices[0]["classes"].index(evaluate.readable(name)) for name in ODD]
    for name in ("knn", "linear"):
        true, turned = (np.array(matrix[name])[order] for matrix in matrices)
        np.testing.assert_array_equal(turned, np.roll(true, -1, axis=0))
    assert not (odd_run / "run" / "evaluation" / "map.png").exists()  # what an earlier evaluation drew is gone


def test_without_labels_there_are_neighbours_and_a_map(
    odd_run: Path, tmp_path: Path, measure: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for index, path in enumerate(sorted((odd_run / "train").rglob("*.png"))[:30]):
        (tmp_path / f"{index}.png").write_bytes(path.read_bytes())
    assert measure(odd_run / "run", "--data.path", tmp_path) == 0
    assert "no --data.val-path" in capsys.readouterr().out
    result = json.loads((odd_run / "run" / "evaluation.json").read_text())
    assert result["knn_top1"] is None
    assert result["linear_top1"] is None
    assert result["images"] == 30
    assert result["backbone_rank"] >= 1
    left = sorted(path.name for path in (odd_run / "run" / "evaluation").iterdir())
    assert left == ["map.png", "neighbours.png"]
    for name in left:
        picture(odd_run / "run" / "evaluation" / name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("a", "b")),
        ({"path": Path("a")}, ("a", "b")),
        ({"path": Path("c")}, ("c", None)),  # the run's held-out images belong to the run's own
        ({"path": Path("c"), "val_path": Path("d")}, ("c", "d")),
        ({"val_path": Path("d")}, ("a", "d")),
    ],
)
def test_which_images_are_taken(given: dict[str, Path], expected: tuple[str, str | None]) -> None:
    run = Config(data=DataConfig(path=Path("a"), val_path=Path("b")))
    data = DataConfig(**given)
    chosen, _ = evaluate.chosen_data(data, run, own=evaluate.are_own(data, run, Path("none")))
    assert (str(chosen.path), chosen.val_path and str(chosen.val_path)) == expected


def test_no_image_is_its_own_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pictures, "draw_neighbours", lambda *given, by_class: seen.append(given))
    source = open_source(write_folder(tmp_path, {"a": 30}))
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    features[:12] = 1.0  # copies, which tie with the image itself
    images = Extracted(source, features, torch.arange(30), {})
    evaluate.picture_neighbours(tmp_path, images, images)
    ((_, (_, queries), (_, nearest), similarity),) = seen
    assert nearest.shape == similarity.shape == (10, 8)
    assert not (nearest == queries[:, None]).any()
    assert (similarity[:4] > 0.999).all()  # the copies
    units = nn.functional.normalize(features)
    np.testing.assert_allclose(similarity[5], (units @ units[queries[5]]).sort(descending=True)[0][1:9], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 8, 60])
def test_pictures_stay_readable_whatever_the_number_of_classes(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    names = [*ODD, *(f"class {number}" for number in range(count))][:count]
    counts = rng.integers(30, size=(count, count)) + 50 * np.eye(count, dtype=np.int64)
    pictures.draw_confusion(tmp_path / "a.png", {"kNN": counts, "linear probe": counts.T}, names)
    percent = evaluate.diagonal_percent(counts).astype(float)
    percent[0] = np.nan if count > 1 else 50
    pictures.draw_classes(tmp_path / "b.png", {"kNN": percent, "linear probe": percent / 2}, names)
    labels = np.arange(200) % count
    pictures.draw_map(tmp_path / "c.png", rng.normal(size=(200, 2)), labels, names)
    for name in "abc":
        picture(tmp_path / f"{name}.png")


def test_names_are_cut_to_one_short_line() -> None:
    for name in [*ODD, "bell\x07", "\u202eright to left"]:
        assert len(pictures.short(name)) <= 18
        assert pictures.short(name).isprintable()
    assert pictures.short("a tabby cat that sleeps 2") == "a tabby cat…eeps 2"
    assert pictures.short("n01440764") == "n01440764"


@pytest.mark.parametrize(("count", "width"), [(4, 1), (5, 40), (60, 3)])
def test_a_map_of_few_images_or_dimensions(count: int, width: int) -> None:
    rng = np.random.default_rng(0)
    assert np.isfinite(pictures.project(rng.normal(size=(count, width)))).all()
    assert (pictures.project(np.ones((count, width))) == 0).all()


def test_a_map_keeps_clusters_apart() -> None:
    features = clusters(0.2)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    points, labels = pictures.project(features.val[order].numpy()), features.val_labels[order]
    assert KNeighborsClassifier(3).fit(points, labels).score(points, labels) > 0.95
