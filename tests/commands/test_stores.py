"""Whole commands with a store behind them: whoever is killed, wherever the shards lie, whatever is wrong with them."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from launchers import ENVIRONMENT, torchrun
from s3fs import S3FileSystem
from safetensors.torch import load_file
from servers import HttpServer, S3Server
from small_runs import SMALL, without_times, write_classes, write_tar

from reco_fast import check_images, index_shards, train
from reco_fast.pipelines.order import BlockOrder, EvaluationOrder
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.stores import store

SHARDS, IMAGES = 16, 8
PATTERN = "{00..15}.tar"
FLAGS = [*SMALL, *"--data.lanes 2 --data.window 1 --data.workers 1 --data.loader torch --run.log-every 1".split()]
STEPS = 14  # of 16 images: nearly two epochs


class Shop(NamedTuple):
    """A server of shards, and how many gigabytes the largest has."""

    server: HttpServer
    folder: Path
    gigabytes: float

    @property
    def url(self) -> str:
        return f"{self.server.url}/train/{PATTERN}"

    @property
    def here(self) -> str:
        return f"{self.folder / 'train' / PATTERN}"

    def gets(self, below: str = "/") -> list[tuple[str, str, bool]]:
        """Client, path, and whether it was all of the shard, of each GET."""
        asked = [each for each in self.server.asked if each.method == "GET" and each.path.startswith(below)]
        size = {each.path: (self.folder / each.path.strip("/")).stat().st_size for each in asked}
        return [(each.client, each.path, each.sent == size[each.path]) for each in asked]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    images = sorted(write_classes(folder / "loose", SHARDS * IMAGES // 2).rglob("*.jpg"))
    for number in range(SHARDS):
        members = {}
        for path in images[number::SHARDS]:
            members[f"{path.parent.name}-{path.stem}.jpg"] = path.read_bytes()
            members[f"{path.parent.name}-{path.stem}.cls"] = path.parent.name.encode()
        write_tar(folder / "train" / f"{number:02d}.tar", members)
    for copy in ("hosts", "changed"):
        shutil.copytree(folder / "train", folder / copy)
    write_tar(folder / "changed" / "15.tar", {path.name: path.read_bytes() for path in images[:IMAGES]})
    (folder / "odd").mkdir()
    (folder / "odd" / "gzip.tar").write_bytes(gzip.compress((folder / "train" / "00.tar").read_bytes()))
    (folder / "odd" / "page.tar").write_text("<!doctype html><title>Sign in</title>" + "<p>…</p>" * 1000)
    largest = max(path.stat().st_size for path in folder.rglob("*.tar"))
    with HttpServer(folder) as server:
        yield Shop(server, folder, largest / 1e9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As processes have that tests start: of several, sums come out otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.server.heal()
    shop.server.forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "FIRST_PATIENCE", 0.5)


def command(path: object, folder: Path, *more: object) -> list[str]:
    return [*map(str, ("cifar10", *FLAGS, "--data.path", path, "--run.dir", folder, *more))]


def run(path: object, folder: Path, *more: object) -> Path:
    """Train in this process."""
    return train.train(*train.parse(command(path, folder, *more)))


def assert_same(one: Path, other: Path, kinds: str = "train eval end") -> None:
    """Bit for bit the newest checkpoints, and what was measured but for times, in lines of these kinds."""
    newest = [max((folder / "checkpoints").glob("*.safetensors")) for folder in (one, other)]
    assert newest[0].name == newest[1].name
    mine, theirs = map(load_file, newest)
    assert set(mine) == set(theirs)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    lines = [[line for line in without_times(folder) if line["kind"] in kinds] for folder in (one, other)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def calm(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the shards on disk, in blocks."""
    return run(shop.here, tmp_path_factory.mktemp("calm") / "run", "--data.order", "blocks", "--train.max-steps", STEPS)


def test_a_killed_run_ends_as_one_that_was_left_alone(shop: Shop, calm: Path, tmp_path: Path) -> None:
    """Once while a shard is being fetched, and the process alone, once between checkpoints, and its workers too. The
    cache holds a quarter of the shards."""
    options = ["--train.max-steps", STEPS, "--run.checkpoint-steps", 3, "--data.cache-gb", 4 * shop.gigabytes]
    undisturbed = run(shop.url, tmp_path / "undisturbed", *options, "--data.cache", tmp_path / "another cache")
    assert_same(undisturbed, calm)
    folder, cache = tmp_path / "killed", tmp_path / "cache"
    line = command(shop.url, folder, *options, "--data.cache", cache)
    shop.server.rate_each = shop.gigabytes * 1e9 / 0.3

    def last_step() -> int:
        found = re.findall(r"^step (\d+) ", (tmp_path / "log").read_text(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def saved() -> int:
        found = [int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("*.safetensors")]
        return max(found, default=0)

    def fetching() -> bool:
        return saved() >= 3 and any(path.stat().st_size for path in (cache / "shards").glob("*.part"))

    for moment in (fetching, lambda: last_step() % 3 == 2):
        with (
            open(tmp_path / "log", "wb") as log,
            subprocess.Popen(
                [sys.executable, "-m", "reco_fast.train", *line],
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            ) as running,
        ):
            while not moment():
                time.sleep(0.005)
                assert running.poll() is None, (tmp_path / "log").read_text()
            (os.kill if moment is fetching else os.killpg)(running.pid, signal.SIGKILL)
        assert running.returncode == -signal.SIGKILL
        assert saved() < STEPS
        if moment is fetching:
            assert list((cache / "shards").glob("*.part"))
    shop.server.heal()
    began = saved()
    run(shop.url, folder, *options, "--data.cache", cache)
    assert 3 <= began < STEPS
    assert_same(folder, calm)
    assert not list((cache / "shards").glob("*.part"))
    assert sum(path.stat().st_size for path in (cache / "shards").iterdir()) <= 4 * shop.gigabytes * 1e9


RANKS = """
import json, os, sys
rank = os.environ["RANK"]
os.environ["FSSPEC_HTTP_CLIENT_KWARGS"] = json.dumps({"headers": {"X-Client": rank}})
from reco_fast import train
for attempt, arguments in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # or the addresses of the group before would be taken
    if any("{rank}" in each for each in arguments):
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # a host of its own
    train.train(*train.parse([each.format(rank=rank) if "{rank}" in each else each for each in arguments]))
"""


def test_two_ranks_share_a_cache_or_have_one_each(shop: Shop, tmp_path: Path) -> None:
    """Trained alike in three ways, one after the other: two ranks of one host, of two, and on the shards on disk. None
    has an index, so rank 0 fetches all shards to look inside."""
    options = ["--train.max-steps", 3, "--train.precision", "fp32"]
    apart = ["--data.cache", tmp_path / "cache{rank}", "--data.cache-gb", 4 * shop.gigabytes]
    runs = [
        command(shop.url, tmp_path / "one host", *options, "--data.cache", tmp_path / "cache"),
        command(f"{shop.server.url}/hosts/{PATTERN}", tmp_path / "two hosts", *options, *apart),
        command(shop.here, tmp_path / "disk", *options, "--data.order", "blocks"),
    ]
    (tmp_path / "ranks.py").write_text(RANKS)
    done = torchrun(tmp_path / "ranks.py", json.dumps(runs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "one host", tmp_path / "disk")
    assert_same(tmp_path / "two hosts", tmp_path / "disk")
    assert sorted(shop.gets("/train")) == [("0", f"/train/{number:02d}.tar", True) for number in range(SHARDS)]

    ends = open_source(shop.here).ends
    assert ends is not None
    lanes = BlockOrder(ends, 16, window=1, lanes=2, rank=1, world_size=2)
    evaluated = EvaluationOrder(ends[-1], 16, rank=1, world_size=2)
    assert evaluated.steps is not None
    needed = [lanes.batch(step)[1] for step in range(8)] + [evaluated.batch(step)[1] for step in range(evaluated.steps)]
    allowed = {f"/hosts/{number:02d}.tar" for number in np.concatenate(needed) // IMAGES}
    fetched = {path for client, path, _ in shop.gets("/hosts") if client == "1"}
    assert fetched
    assert fetched <= allowed
    assert len(allowed) < SHARDS


def contents_below(*folders: Path) -> dict[str, bytes]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {f"{path}": path.read_bytes() + os.fsencode(path) for path in files}


def test_no_file_and_no_line_has_a_key(
    s3: S3Server, shop: Shop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (shop.folder / "train").iterdir():
        s3.put(f"train/{path.name}", path.read_bytes())
    folder = run(f"{s3.bucket}/train", tmp_path / "run", "--train.max-steps", 1)
    environment = s3.environment
    shown = capfd.readouterr()
    written = contents_below(tmp_path) | {"stdout": shown.out.encode(), "stderr": shown.err.encode()}
    assert any("tensorboard" in name for name in written)
    assert b"s3://images/train" in written[f"{folder / 'config.json'}"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert [place for place, data in written.items() if environment[name].encode() in data] == []


@pytest.mark.parametrize(
    "url", ["https://user:s3cret@host/x.tar", "https://host/x.tar?X-Amz-Signature=s3cret", "s3://key:s3cret@bucket/x/"]
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(
    url: str, shop: Shop, refused: Callable[..., str], tmp_path: Path
) -> None:
    here = tmp_path / "index.json"
    val = command(shop.here, tmp_path / "run", "--data.val-path", url)
    for main, arguments in (
        (train.main, command(url, tmp_path / "run")),
        (train.main, val),
        (train.main, [*val[:-1], shop.here, "--eval.train-path", url]),
        (index_shards.main, [url, "--output", here]),
        (
            index_shards.main,
            [shop.here, "--output", f"{url.partition('?')[0]}.json"] if "@" in url else [url, "--output", here],
        ),
        (check_images.main, [url, "--output", here]),
    ):
        line = refused(main, *arguments)
        assert "expected a URL without" in line
        assert "s3cret" not in line
    written = contents_below(tmp_path)
    assert [name for name, data in written.items() if b"s3cret" in data] == []
    assert not (tmp_path / "run").exists()
    assert not here.exists()


def index_text(shop: Shop, **values: object) -> str:
    names, offsets = [f"{place}.jpg" for place in range(16)], [512 + 1024 * place for place in range(16)]
    content = {"names": names, "offsets": offsets, "sizes": [9] * 16, "aside": {}, "classes": {}, "passed_over": {}}
    shard = {"url": "00.tar", "filesize": 10, "tag": "", "content": content | {"reason": ""} | values}
    return '{"__kind__": "wids-shard-index-v1", "shardlist": [\n' + json.dumps(shard) + "\n]}\n"


INDEXES: dict[str, Callable[[Shop], str]] = {
    "no index": lambda shop: json.dumps({"images": ["a.jpg"]}),
    "truncated": lambda shop: index_text(shop)[:-20],
    "a negative offset": lambda shop: index_text(shop, offsets=[-512] * 16),
    "names that are numbers": lambda shop: index_text(shop, names=[7] * 16),
    "shards that are not there": lambda shop: index_text(shop).replace("00.tar", "none.tar"),
    "shards that have changed": index_text,
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_wrong_index_is_one_line(kind: str, shop: Shop, refused: Callable[..., str], tmp_path: Path) -> None:
    (shop.folder / "train" / "wrong.json").write_text(INDEXES[kind](shop))
    try:
        for place in (shop.server.url, shop.folder):
            line = refused(train.main, *command(f"{place}/train/wrong.json", tmp_path / "run"))
            assert (
                f"expected {'the shard as it was indexed' if 'shards that' in kind else 'an index of shards'}" in line
            )
            assert not (tmp_path / "run").exists()
    finally:
        (shop.folder / "train" / "wrong.json").unlink()


MISTAKES: dict[str, tuple[str, str, str]] = {  # where, further flags, what is said
    "no such file": ("{web}/none.tar", "", "none.tar: expected a .tar file, there is no such file in the store"),
    "nothing that fits": ("{web}/train/x*.tar", "", "no file matches this pattern"),
    "nothing below": ("{web}/nowhere", "", "below this URL, there is nothing"),
    "no such bucket": ("s3://imags/a.tar", "", "expected a bucket that is there"),
    "no such key": ("s3://images/a.tar", "", "expected a .tar file, there is no such file in the store"),
    "no such prefix": ("s3://images/a", "", "below this URL, there is nothing"),
    "no right": ("{web}/forbidden/00.tar", "", "expected to be let in"),
    "no such host": ("https://nowhere.invalid/a.tar", "", "expected a store that answers, none did in 0.5 seconds"),
    "nobody listens": ("http://127.0.0.1:9/a.tar", "", "expected a store that answers, none did in 0.5 seconds"),
    "no such kind of store": ("sf://bucket/a.tar", "", "expected s3://, gs://, https://"),
    "gzip": ("{web}/odd/gzip.tar", "", "gzip.tar: expected an uncompressed .tar file"),
    "a page": ("{web}/odd/page.tar", "", "page.tar: expected an uncompressed .tar file"),
    "blocks of loose files there": ("{web}/loose", "--data.order blocks", "--data.order: expected uniform"),
    "blocks of loose files here": ("{here}/loose", "--data.order blocks", "--data.order: expected uniform"),
    "lanes": ("{shards}", "--data.lanes 7", "a divisor of --train.batch-size, 16, got 7"),
    "no cache": ("{shards}", "--data.cache-gb 0", "--data.cache-gb: expected a number of gigabytes"),
    "a cache that is a file": ("{shards}", "--data.cache {here}/odd/gzip.tar", "gzip.tar"),
    "a cache in a file": ("{shards}", "--data.cache {here}/odd/gzip.tar/cache", "Not a directory"),
    "a cache for less than a shard": ("{shards}", "--data.cache-gb 1e-6", "--data.cache-gb: expected room for"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line(
    kind: str, shop: Shop, s3: S3Server, refused: Callable[..., str], tmp_path: Path
) -> None:
    where, flags, message = MISTAKES[kind]
    shop.server.fail("/forbidden/*", 403)
    places = {"web": shop.server.url, "shards": shop.url, "here": shop.folder}
    path = where.format(**places)
    line = refused(train.main, *command(path, tmp_path / "run", *flags.format(**places).split()))
    assert message in line
    assert not (tmp_path / "run").exists()


def test_without_credentials_one_line_says_where_they_are_looked_for(
    s3: S3Server, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    S3FileSystem.clear_instance_cache()  # what is kept there has them
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    line = refused(train.main, *command(f"{s3.bucket}/a.tar", tmp_path / "run"))
    S3FileSystem.clear_instance_cache()
    assert "credentials come from the environment (for s3 AWS_PROFILE" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def half(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from the store that was stopped at step 5."""
    folder = tmp_path_factory.mktemp("half")
    return run(shop.url, folder / "run", "--train.max-steps", 5, "--data.cache", folder / "cache")


def test_what_auto_meant_is_written_down(half: Path, calm: Path) -> None:
    for folder in (half, calm):
        assert json.loads((folder / "config.json").read_text())["data"]["order"] == "blocks"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data.order uniform", "--data.order is blocks there and uniform now"),
        ("--data.lanes 4", "--data.lanes is 2 there and 4 now"),
        ("--data.window 2", "--data.window is 1 there and 2 now"),
        ("--data.path {web}/changed/{{00..15}}.tar", "expected the images that this run began with"),
        ("--data.path {here}/changed --data.order blocks", "expected the images that this run began with"),
        ("--data.path {here}/train/{{00..15}}.tar", "--data.order is blocks there and uniform now"),
    ],
)  # fmt: skip
def test_other_shards_or_another_order_do_not_go_on(
    flags: str, message: str, shop: Shop, half: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "run")
    before = contents_below(tmp_path / "run")
    given = flags.format(web=shop.server.url, here=shop.folder).split()
    assert message in refused(train.main, *command(shop.url, tmp_path / "run", "--train.max-steps", 6, *given))
    assert contents_below(tmp_path / "run") == before


@pytest.mark.parametrize("way", ["another cache", "by a prefix", "on disk", "by an index", "by an index on disk"])
def test_the_same_shards_go_on_wherever_they_are(
    way: str, shop: Shop, half: Path, calm: Path, call: Callable[..., int], tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "run")
    path, more = shop.url, ["--data.cache", tmp_path / "another"]
    if way == "by a prefix":
        path, more = f"{shop.server.url}/train", []
    if way == "on disk":
        path, more = shop.here, ["--data.order", "blocks"]
    if way.startswith("by an index"):
        path = f"{tmp_path / 'index.json'}"
        assert call(index_shards.main, shop.url if way == "by an index" else shop.here, "--output", path) == 0
        more = [] if way == "by an index" else ["--data.order", "blocks"]
    run(path, tmp_path / "run", "--train.max-steps", STEPS, *more)
    assert_same(tmp_path / "run", calm, "train")  # there was an evaluation where it was stopped


def test_check_images_looks_at_images_of_a_store(shop: Shop, call: Callable[..., int], tmp_path: Path) -> None:
    shards = shop.folder / "checked"
    for number in range(4):
        images = sorted((shop.folder / "loose").rglob("*.jpg"))[8 * number : 8 * number + 8]
        members = {f"{place}.jpg": path.read_bytes() for place, path in enumerate(images)}
        write_tar(shards / f"{number}.tar", members | {"bad.jpg": b"no image"})

    def found(path: object) -> list[tuple[str, Any]]:
        output = tmp_path / "manifest.jsonl"
        assert call(check_images.main, path, "--output", output, "--workers", 1, "--loader", "torch") == 0
        return [(row["path"], row["reason"]) for row in map(json.loads, output.read_text().splitlines())]

    expected = found(f"{shards}/{{0..3}}.tar")
    assert sum(reason is not None for _, reason in expected) == 4
    (tmp_path / "manifest.jsonl").unlink()
    url = f"{shop.server.url}/checked/{{0..3}}.tar"
    open_source(url)
    shutil.rmtree(tmp_path / "home" / "reco_fast" / "stores" / "shards")
    shop.server.forget()
    assert found(url) == expected
    assert sorted(path for _, path, whole in shop.gets("/checked") if whole) == [f"/checked/{n}.tar" for n in range(4)]
    assert len(shop.gets("/checked")) == 4
    shop.server.forget()
    assert found(url) == expected
    assert shop.gets("/checked") == [], "what has not changed is known"


def test_check_images_asks_for_many_loose_images_at_once(shop: Shop, call: Callable[..., int], tmp_path: Path) -> None:
    shop.server.delay = 0.2
    started = time.monotonic()
    output = tmp_path / "manifest.jsonl"
    assert call(check_images.main, f"{shop.server.url}/loose/dark", "--output", output, "--workers", 1) == 0
    assert len(output.read_text().splitlines()) == SHARDS * IMAGES // 2
    assert time.monotonic() - started < 0.2 * SHARDS * IMAGES / 2
