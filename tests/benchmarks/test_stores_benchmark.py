"""The benchmark of the loaders on a store, and how well an order in blocks mixes."""

import json
import math
import sys
import tarfile
from pathlib import Path

import pytest

from reco_fast.pipelines.order import BlockOrder, TrainingOrder
from reco_fast.profiling import mixing
from reco_fast.profiling.benchmarks import stores
from tests.pipelines.stores.servers import served_apart


def test_what_is_timed_and_what_each_host_fetches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cifar: Path, tmp_path: Path
) -> None:
    images = sorted(cifar.rglob("*.jpg"))
    for number in range(10):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for place, image in enumerate(images[number::10]):
                shard.add(image, f"{place}.jpg")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    with served_apart(tmp_path) as url:
        where = ["--url", url, "--local", str(tmp_path), "--cache-gb", f"{0.7 * size / 1e9}", "--loaders", "torch"]
        sizes = "--window 1 --lanes 2 --image-size 32 --batch-size 20 --rounds 1 --workers 1 --hosts 2".split()
        monkeypatch.setattr(sys, "argv", ["stores", *where, *sizes])
        stores.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    turns = {(each["images"], each["order"]): each["rounds"][0] for each in report["results"]}
    assert turns["disk", "blocks"]["requests"] == turns["disk", "uniform"]["bytes"] == 0
    assert turns["store", "uniform"]["requests"] >= 0.9
    assert turns["store", "blocks"]["requests"] < 0.5
    assert all(turn["images_per_second"] > 0 and turn["cpu"] > 0 for turn in turns.values())
    shares = [each["bytes"] / size for each in report["hosts"]["2"]]
    assert all(0.45 < share < 0.65 for share in shares)  # some of the first images are read alone


def test_of_a_store_that_does_not_count_all_else_is_known() -> None:
    assert all(math.isnan(value) for value in stores.counters("http://127.0.0.1:9"))


def test_a_shard_alone_mixes_as_the_whole_and_few_lanes_do_not() -> None:
    images, shards = 40, 50
    ends = [images * (number + 1) for number in range(shards)]
    uniform = mixing.mixing(TrainingOrder(ends[-1], 20), images)
    few = mixing.mixing(BlockOrder(ends, 20, window=1, lanes=2), images)
    all_at_once = mixing.mixing(BlockOrder(ends, 20, window=shards, lanes=1), images)
    expected = (images - 1) / (ends[-1] - 1)
    for order in (uniform, all_at_once):
        assert order.one_shard == pytest.approx(expected, rel=0.15)
        assert order.apart == pytest.approx(1 / 3, rel=0.05)
        assert order.spread == pytest.approx(1 / math.sqrt(12), rel=0.05)
    assert few.shards == 2
    assert few.one_shard == pytest.approx(9 / 19)  # of ten images of each lane
    assert few.again > 5 * uniform.again
    assert few.spread < 0.02
