"""An index of shards: opening by it is opening the shards, without reading them; what is none is one line."""

import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import HttpServer, S3Server
from small_runs import write_holes, write_tar

from reco_fast import index_shards
from reco_fast.errors import DataError
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.sources.shards import TarSource
from reco_fast.pipelines.stores import shard_index
from reco_fast.pipelines.stores.where import Stores

SHARDS = 4
NAMES = ("a-b/x.tar", "a/x.tar", "a/y.tar", "b.tar")  # sorted as text; as paths the first two change places


def members(number: int) -> dict[str, bytes]:
    """Of a shard: two classes, an image beside another in a sample, one set aside, and what is passed over."""
    found = {}
    for index in range(3):
        found[f"{index}.jpg"] = b"image %d of shard %d" % (index, number)
        found[f"{index}.cls"] = b"%d" % (index % 2)
    return found | {
        "0.mask.png": b"mask",
        ".hidden/x.jpg": b"aside",
        "readme.txt": b"text",
        "ü.jpg": b"1",
        "ü.cls": b"0",
    }


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("web")
    for number in range(SHARDS):
        write_tar(folder / f"{number}.tar", members(number))
        write_tar(folder / "deep" / NAMES[number], members(number))
    for rubbish in (".trash", "@eaDir"):  # as every source passes them over
        write_tar(folder / "deep" / rubbish / "old.tar", members(9))
    with HttpServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(web: HttpServer) -> None:
    web.heal()
    web.forget()


@pytest.fixture
def bucket(s3: S3Server, web: HttpServer) -> S3Server:
    for path in web.folder.rglob("*.tar"):
        s3.put(path.relative_to(web.folder).as_posix(), path.read_bytes())
    return s3


@pytest.fixture
def index(call: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
    """The command, with a cache of its own."""
    return lambda *arguments: call(index_shards.main, *arguments, "--cache", tmp_path / "cache of the index")


def content(source: ImageSource) -> tuple[object, ...]:
    assert isinstance(source, TarSource)
    assert source.labels is not None
    read = [source.read(number) for number in range(len(source))]
    return source.fingerprint(), list(source.names), source.labels.tolist(), source.classes, source.ends, read


def gets(server: HttpServer | S3Server) -> list[str]:
    return sorted(asked.path for asked in server.asked if asked.method == "GET" and asked.path.endswith(".tar"))


@pytest.mark.parametrize(
    ("what", "place"),
    [
        *((f"{where}/{{0..3}}.tar", place) for where in ("http", "s3") for place in ("here", "store")),
        ("http/[0-3].tar", "here"),
        ("http/2.tar", "store"),
        *(("s3/deep", place) for place in ("here", "store")),
        ("here/{0..3}.tar", "here"),
        ("here/deep", "here"),
    ],
)
def test_opening_by_it_is_opening_the_shards(
    what: str, place: str, bucket: S3Server, web: HttpServer, index: Callable[..., int], tmp_path: Path
) -> None:
    where, _, rest = what.partition("/")
    url = f"{ {'http': web.url, 's3': bucket.bucket, 'here': str(web.folder)}[where] }/{rest}"
    output = tmp_path / "my index" / "all.json" if place == "here" else f"{bucket.bucket}/indexes/all.json"
    assert index(url, "--output", output) == 0
    web.forget()
    bucket.forget()
    mine = open_source(str(output), stores=Stores(tmp_path / "cache"))
    assert gets(web) + gets(bucket) == []
    assert content(mine) == content(open_source(url, stores=Stores(tmp_path / "cache")))
    local = web.folder / rest
    assert content(mine) == content(open_source(str(local))), "and the same files on disk"


def test_an_index_in_a_store_names_no_paths(
    bucket: S3Server, web: HttpServer, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """They would be of the machine that wrote it, or of whoever reads an index that somebody sent."""
    said = refused(index_shards.main, f"{web.folder}/0.tar", "--output", f"{bucket.bucket}/indexes/all.json")
    assert "--output: expected a file for local shards, got s3://" in said
    index_shards.index(index_shards.IndexCommand(f"{web.folder}/0.tar", str(tmp_path / "all.json")))
    url = bucket.put("indexes/sent.json", (tmp_path / "all.json").read_bytes())
    with pytest.raises(DataError, match="a url amiss"):
        open_source(url, stores=Stores(tmp_path / "cache"))


def test_an_index_beside_shards_is_found(bucket: S3Server, index: Callable[..., int], tmp_path: Path) -> None:
    url = f"{bucket.bucket}/deep"
    assert index(url, "--output", f"{url}/index.json") == 0
    bucket.forget()
    source = open_source(url, stores=Stores(tmp_path / "cache"))
    assert gets(bucket) == []
    expected = content(source)
    bucket.put("deep/a/y.tar", bucket.get("deep/a/x.tar"))
    bucket.put("deep/new.tar", bucket.get("deep/a/x.tar"))
    bucket.forget()
    changed = open_source(url, stores=Stores(tmp_path / "cache"))
    assert gets(bucket) == ["/images/deep/a/y.tar", "/images/deep/new.tar"], "others than the index knows, alone"
    assert len(changed) == len(source) + 4
    assert content(changed) != expected


def test_an_index_beside_local_shards_may_move_with_them(index: Callable[..., int], tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "one" / "deep" / f"{number}.tar", members(number))
    assert index(tmp_path / "one", "--output", tmp_path / "one" / "index.json") == 0
    expected = content(open_source(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "other")
    assert content(open_source(tmp_path / "other" / "index.json")) == expected
    write_tar(tmp_path / "other" / "deep" / "1.tar", {"a.jpg": b"1"})
    with pytest.raises(DataError, match=r"1\.tar: expected the shard as it was indexed, [0-9,]+ bytes, got"):
        open_source(tmp_path / "other" / "index.json")


@pytest.mark.parametrize("place", ["here", "store"])
def test_an_index_of_webdataset_is_read(place: str, web: HttpServer, tmp_path: Path) -> None:
    """Which lacks what is inside, and may have fewer fields than this."""
    urls = [f"{number}.tar" for number in range(SHARDS)]
    shards = [{"url": url, "nsamples": 4, "filesize": (web.folder / url).stat().st_size} for url in urls]
    text = json.dumps(
        {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "name": "x"}, indent=2
    )
    (web.folder / "wids.json").write_text(text)
    there = f"{web.url}/wids.json" if place == "store" else str(web.folder / "wids.json")
    mine = open_source(there, stores=Stores(tmp_path / "cache"))
    assert content(mine) == content(open_source(web.folder / "{0..3}.tar"))


def test_webdataset_reads_ours(web: HttpServer, index: Callable[..., int], tmp_path: Path) -> None:
    wids = pytest.importorskip("wids")
    for number in range(2):
        write_tar(
            tmp_path / f"{number}.tar", {name: data for name, data in members(number).items() if name[0] in "012"}
        )
    assert index(tmp_path, "--output", tmp_path / "index.json") == 0
    theirs = wids.ShardListDataset(
        str(tmp_path / "index.json"), base=str(tmp_path), cache_dir=str(tmp_path / "wids"), transformations=[]
    )
    assert len(theirs) == 6, "samples, of which an image beside another is none"
    assert [theirs[number][".jpg"].read() for number in (0, 5)] == [b"image 0 of shard 0", b"image 2 of shard 1"]


def test_interrupted_it_goes_on_and_looks_at_what_has_changed_alone(
    web: HttpServer, index: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(SHARDS):
        write_tar(web.folder / "again" / f"{number}.tar", members(number))
    size = (web.folder / "again" / "0.tar").stat().st_size
    room = ("--cache-gb", 1.5 * size / 1e9)  # so that shards do not stay
    command = (f"{web.url}/again/{{0..3}}.tar", "--output", tmp_path / "index.json", *room)
    web.fail("/again/2.tar", 404, method="GET")
    assert index(*command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "index.json").exists()
    looked_at = {path for path in gets(web) if path != "/again/2.tar"}
    assert looked_at
    web.heal()
    web.forget()
    assert index(*command) == 0
    assert set(gets(web)) == {f"/again/{number}.tar" for number in range(SHARDS)} - looked_at
    web.forget()
    assert index(*command) == 0
    assert gets(web) == []
    write_tar(web.folder / "again" / "3.tar", members(7))
    web.forget()
    assert index(*command) == 0
    assert set(gets(web)) == {"/again/3.tar"}
    assert b"image 0 of shard 7" in content(open_source(tmp_path / "index.json", stores=Stores(tmp_path / "cache")))[-1]


GOOD: dict[str, Any] = {
    "url": "0.tar",
    "nsamples": 1,
    "filesize": 10240,
    "tag": "",
    "name": "0.tar",
    "content": {
        "names": ["a.jpg"],
        "offsets": [512],
        "sizes": [100],
        "aside": {},
        "classes": {"/a": "1"},
        "passed_over": {".txt": [1, "b.txt"]},
        "reason": "",
    },
}


def text_of(*shards: object) -> str:
    """As `index_lines` writes them."""
    head = '{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [\n'
    return head + ",\n".join(map(json.dumps, shards)) + "\n]}\n"


def with_inside(**values: object) -> str:
    return text_of(GOOD | {"content": GOOD["content"] | values})


BAD = {
    "nothing": "",
    "no JSON": "hello",
    "a list": "[1]",
    "a number": "1",
    "another file": '{"names": []}',
    "no shards": text_of(),
    "no shards of wids": '{"shardlist": []}',
    "shards that are texts": '{"shardlist": ["a.tar"]}',
    "a shard that is a text": text_of("a.tar"),
    "nested without end": "[" * 100_000,
    "cut in a line": text_of(GOOD, GOOD)[:-30],
    "cut between lines": text_of(GOOD, GOOD).rpartition("\n]}")[0],
    "cut behind the first line": text_of(GOOD).partition("\n")[0] + "\n",
    "no url": text_of({name: value for name, value in GOOD.items() if name != "url"}),
    "a url that is a number": text_of(GOOD | {"url": 1}),
    "a url with a zero byte": text_of(GOOD | {"url": "a\0.tar"}),
    "a size below zero": text_of(GOOD | {"filesize": -5}),
    "a size that is a text": text_of(GOOD | {"filesize": "5"}),
    "a tag that is a number": text_of(GOOD | {"tag": 5}),
    "a name that is a list": text_of(GOOD | {"name": []}),
    "a name that no file can have": text_of(GOOD | {"name": "\ud800.tar"}),
    "a negative offset": with_inside(offsets=[-1]),
    "an offset without end": with_inside(offsets=[10**30]),
    "a fraction of an offset": with_inside(offsets=[1.5]),
    "true as an offset": with_inside(offsets=[True]),
    "a negative size": with_inside(sizes=[-1]),
    "more offsets than names": with_inside(offsets=[512, 1024]),
    "a name that is a number": with_inside(names=[1]),
    "names that are a text": with_inside(names="a", offsets=[512], sizes=[1]),
    "a name of an image that no file can have": with_inside(names=["\ud800.jpg"]),
    "a class that is a number": with_inside(classes={"/a": 1}),
    "classes that are a list": with_inside(classes=["/a"]),
    "a class that no file can have": with_inside(classes={"/a": "\udfff"}),
    "aside of nothing": with_inside(aside={"7": "hidden"}),
    "aside that is a list": with_inside(aside=[0]),
    "passed over without a count": with_inside(passed_over={".txt": "b.txt"}),
    "a reason that is none": with_inside(reason=None),
    "content that is a list": text_of(GOOD | {"content": []}),
    "content that is nothing": text_of(GOOD | {"content": None}),
    "no text": "\x80\x81\x82",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_index_is_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    (tmp_path / "index.json").write_text(BAD[kind], encoding="latin-1" if kind == "no text" else "utf-8")
    with pytest.raises(DataError, match=r"index\.json: expected an index of shards") as error:
        open_source(tmp_path / "index.json")
    assert "\n" not in str(error.value)


def test_a_good_one_is_one(tmp_path: Path) -> None:
    """From which the bad ones differ in one thing."""
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    (tmp_path / "index.json").write_text(text_of(GOOD))
    assert list(open_source(tmp_path / "index.json").names) == ["0.tar/a.jpg"]


def test_an_image_takes_200_bytes(index: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 in 20 shards, while they are opened and after that. `tests/reliability.py million` has the million."""
    monkeypatch.setattr(shard_index, "_PIECE", 2**16)  # of a file that is as much smaller
    write_holes(tmp_path / "holes", 20, 1000)
    assert index(tmp_path / "holes", "--output", tmp_path / "index.json") == 0
    open_source(tmp_path / "index.json").fingerprint()
    gc.collect()
    tracemalloc.start()
    try:
        source = open_source(tmp_path / "index.json")
        source.fingerprint()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 20_000
    assert source.names[19_999].endswith("000019999.jpg")
    assert kept / 20_000 < 80
    assert peak / 20_000 < 200
