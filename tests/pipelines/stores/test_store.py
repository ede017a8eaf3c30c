"""Files behind URLs: what is had, what is asked for again, and what is said where nothing comes."""

import gc
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem
from servers import HttpServer, S3Server

from reco_fast.errors import DataError
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.store import Absent, Lost, Stat

LETTERS = bytes(range(256))


class Place:
    """A store with its server, in which files are put below `root`."""

    def __init__(
        self, server: Any, root: str, put: Callable[[str, bytes], object], take: Callable[[str], None]
    ) -> None:
        self.server, self.root, self._put, self.take = server, root, put, take

    def put(self, name: str, data: bytes) -> str:
        """Its URL."""
        self._put(name, data)
        return f"{self.root}/{name}"


@pytest.fixture(scope="module")
def http_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with HttpServer(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def http(http_server: HttpServer, tmp_path: Path) -> Place:
    folder = http_server.folder / tmp_path.name
    folder.mkdir()
    http_server.heal()
    http_server.forget()

    def put(name: str, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        new = folder / "new"
        new.write_bytes(data)
        new.rename(folder / name)

    return Place(http_server, f"{http_server.url}/{folder.name}", put, lambda name: (folder / name).unlink())


@pytest.fixture
def bucket(s3: S3Server) -> Place:
    return Place(s3, s3.bucket, s3.put, s3.delete)


@pytest.fixture(params=["http", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE", 5.0)
    monkeypatch.setattr(store, "FIRST_PATIENCE", 5.0)
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # its own, which nobody could tell from ours


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that goes by in pauses alone: how many there are does not depend on the machine."""
    seconds = [0.0]
    stopped = types.SimpleNamespace(
        monotonic=lambda: seconds[0], sleep=lambda pause: seconds.__setitem__(0, seconds[0] + pause)
    )
    monkeypatch.setattr(store, "time", stopped)
    monkeypatch.setattr(store, "FIRST_WAIT", 0.5)


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_a_changed_file_has_another_tag_and_listings_are_not_remembered(place: Place) -> None:
    url = place.put("a/one.tar", b"before")
    before = store.stat(url)
    assert before.size == 6
    assert before.tag
    assert store.stat(url) == before
    assert store.listing(place.root) == {"a/one.tar": before}
    assert store.match(f"{place.root}/a/*.tar") == [url]
    place.put("a/one.tar", b"behind")
    after = store.stat(url)
    assert (after.size, after.tag == before.tag) == (6, False)
    assert store.listing(place.root) == {"a/one.tar": after}
    place.put("a/two.tar", b"more")
    assert list(store.listing(place.root)) == ["a/one.tar", "a/two.tar"]
    assert store.match(f"{place.root}/a/*.tar") == [url, f"{place.root}/a/two.tar"]
    place.take("a/one.tar")
    with pytest.raises(Absent):
        store.stat(url)
    assert list(store.listing(place.root)) == ["a/two.tar"]


def test_parts_are_exact(place: Place) -> None:
    url = place.put("letters", LETTERS)
    for start, end in ((0, 1), (0, 256), (7, 19), (255, 256), (128, 256)):
        assert store.read(url, start, end) == LETTERS[start:end]
    ranges = [asked.range for asked in place.server.asked if asked.method == "GET"]
    assert ranges == ["bytes=0-0", "bytes=0-255", "bytes=7-18", "bytes=255-255", "bytes=128-255"]
    assert place.server.bytes == 1 + 256 + 12 + 1 + 128
    assert store.read(url, 9, 9) == b""
    assert store.read_whole(url) == LETTERS
    assert store.read_whole(place.put("nothing", b"")) == b""


def test_a_part_behind_the_end_is_lost_at_once(place: Place) -> None:
    url = place.put("letters", LETTERS)
    place.server.forget()
    with pytest.raises(Lost):
        store.read(url, 300, 310)
    assert place.server.requests == 1
    with pytest.raises(Lost, match="it has changed: it ends at byte 256, before 310"):  # shorter than somebody knew
        store.read(url, 250, 310)


def test_a_part_of_a_part_is_no_answer(http: Place) -> None:
    url = http.put("letters", LETTERS)
    http.server.fail("*", "short", times=2, method="GET")
    assert store.read(url, 7, 19) == LETTERS[7:19]


def test_listings_go_all_the_way_down_and_not_beside(place: Place) -> None:
    names = ["train/a.tar", "train/deep/er/b.tar", "train/z.tar"]
    urls = [place.put(name, b"1" * number) for number, name in enumerate(names, 1)]
    place.put("train2/c.tar", b"12345")
    found = store.listing(f"{place.root}/train")
    assert [each.size for each in found.values()] == [1, 2, 3]
    assert [store.stat(store.join(f"{place.root}/train", below)) for below in found] == list(found.values())
    assert store.listing(f"{place.root}/train/") == found
    assert store.stats([urls[0], f"{place.root}/none"])[0] == found["a.tar"]
    assert store.listing(f"{place.root}/nowhere") == {}


def test_patterns_match_within_and_across_folders(place: Place) -> None:
    for name in ("x/a-0.tar", "x/a-1.tar", "x/b.tar", "y/a-2.tar", "y/z/a-3.tar", "y/a-2.tar.gz"):
        place.put(name, b"1")
    found = {
        pattern: [url.removeprefix(f"{place.root}/") for url in store.match(f"{place.root}/{pattern}")]
        for pattern in ("x/*.tar", "*/a-*.tar", "*/*/*.tar", "x/a-[1-9].tar", "x/none-*.tar", "nowhere/*")
    }
    assert found == {
        "x/*.tar": ["x/a-0.tar", "x/a-1.tar", "x/b.tar"],
        "*/a-*.tar": ["x/a-0.tar", "x/a-1.tar", "y/a-2.tar"],
        "*/*/*.tar": ["y/z/a-3.tar"],
        "x/a-[1-9].tar": ["x/a-1.tar"],
        "x/none-*.tar": [],
        "nowhere/*": [],
    }


@pytest.mark.parametrize("scheme", ["s3", "file", "memory"])
def test_files_are_written_sent_and_removed(scheme: str, s3: S3Server, tmp_path: Path) -> None:
    root = {"s3": s3.bucket, "file": f"file://{tmp_path}/to", "memory": "memory://to"}[scheme]
    url = store.join(root, "deep/er/one.bin")
    store.write(url, LETTERS)
    assert store.read_whole(url) == LETTERS
    (tmp_path / "local").write_bytes(b"other")
    store.upload(str(tmp_path / "local"), url)
    assert store.read(url, 1, 5) == b"ther"
    assert list(store.listing(root)) == ["deep/er/one.bin"]
    store.remove(url)
    store.remove(url)
    assert store.listing(root) == {}


def test_what_could_not_be_sent_to_its_end_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/to/one.bin"
    store.write(url, b"before")

    def half(fs: Any, local: str, path: str, **named: Any) -> None:
        Path(path).write_bytes(b"af")
        raise OSError("the line broke")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.put_file", half)
    monkeypatch.setattr(store, "PATIENCE", 0.02)
    with pytest.raises(DataError, match="the line broke"):
        store.upload(__file__, url)
    assert store.read_whole(url) == b"before"


def test_http_is_for_reading(http: Place) -> None:
    for send in (lambda url: store.write(url, b"1"), lambda url: store.upload(__file__, url)):
        with pytest.raises(DataError, match="can be written to") as error:
            send(f"{http.root}/new.bin")
        one_line(error)
    assert http.server.requests == 0


def test_a_missing_file_and_a_folder_are_absent(place: Place) -> None:
    place.put("folder/a.tar", b"1")
    missing = f"{place.root}/b.tar"
    for ask in (store.stat, store.read_whole, lambda url: store.read(url, 0, 5)):
        with pytest.raises(Absent) as error:
            ask(missing)
        assert error.value.strerror == "there is no such file in the store"
    if place.root.startswith("s3:"):  # a web server has an answer for a folder too
        with pytest.raises(Absent):
            store.stat(f"{place.root}/folder")
    known, unknown = store.stats([f"{place.root}/folder/a.tar", missing])
    assert isinstance(known, Stat)
    assert isinstance(unknown, Absent)


@pytest.mark.parametrize("status", [401, 403])
def test_no_right_is_said_at_once_and_without_the_secret(place: Place, status: int) -> None:
    url = place.put("a.tar", b"123456")
    place.server.fail("*", status)
    asks = {"stat": lambda: store.stat(url), "read": lambda: store.read(url, 0, 5)}
    asks |= {"listing": lambda: store.listing(place.root), "match": lambda: store.match(f"{place.root}/*")}
    if place.root.startswith("s3:"):
        asks["write"] = lambda: store.write(url, b"1")
    for name, ask in asks.items():
        place.server.forget()
        with pytest.raises(DataError, match="expected to be let in, the store answers: ") as error:
            ask()
        said = one_line(error)
        assert "environment" in said
        assert "the-secret-of-the-tests" not in said
        assert place.server.requests <= (2 if name == "stat" else 1)  # HEAD, then GET


def test_without_credentials_one_line_says_where_they_are_looked_for(
    bucket: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put("a.tar", b"123456")
    S3FileSystem.clear_instance_cache()  # what is kept there has them
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="Unable to locate credentials; credentials come from the environment") as error:
        store.read(url, 0, 5)
    one_line(error)
    S3FileSystem.clear_instance_cache()


def test_a_bucket_that_is_not_there_is_said(s3: S3Server, tmp_path: Path) -> None:
    for ask in (
        lambda: store.stat("s3://imags/a.tar"),
        lambda: store.read("s3://imags/a.tar", 0, 5),
        lambda: store.listing("s3://imags/a"),
        lambda: store.write("s3://imags/a.tar", b"1"),
        lambda: store.upload(__file__, "s3://imags/a.tar"),
    ):
        with pytest.raises(DataError, match=r"s3://imags/a.*expected a bucket that is there") as error:
            ask()
        one_line(error)


@pytest.mark.parametrize("kind", [500, 503, 429, 408, "close", "cut"])
def test_what_may_pass_is_asked_for_again(place: Place, kind: Any) -> None:
    url = place.put("a.tar", b"123456")
    place.server.fail("*", kind, times=2)
    assert store.read(url, 1, 5) == b"2345"
    assert [asked.range for asked in place.server.asked] == 3 * ["bytes=1-4"]


def test_sending_is_tried_again(bucket: Place) -> None:
    bucket.server.fail("*", 500, times=1, method="PUT")
    store.upload(__file__, f"{bucket.root}/a")
    bucket.server.fail("*", 500, times=1, method="PUT")
    store.write(f"{bucket.root}/b", b"12")
    assert bucket.server.get("a") == Path(__file__).read_bytes()
    assert bucket.server.get("b") == b"12"


@pytest.mark.usefixtures("clock")
def test_a_store_that_only_fails_loses_the_file_after_some_time(place: Place) -> None:
    url = place.put("a.tar", b"123456")
    place.server.fail("*", 500)
    for ask in (lambda: store.read(url, 0, 5), lambda: store.stat(url)):
        place.server.forget()
        with pytest.raises(Lost, match="the store fails for 5 seconds: ") as error:
            ask()
        one_line(error)
        assert not isinstance(error.value, Absent)
        assert 2 < place.server.requests < 20
    # What was not answered is not taken for nothing.
    empty = [lambda: store.listing(place.root), lambda: store.match(f"{place.root}/*")]
    if place.root.startswith("s3:"):
        empty.append(lambda: store.remove(url))
    for each in empty:
        with pytest.raises(Lost):
            each()


@pytest.mark.parametrize("kind", [500, "close", "cut"])
def test_no_folder_of_a_listing_is_left_out(http: Place, kind: Any) -> None:
    for name in ("a/1.tar", "b/2.tar", "c/3.tar"):
        http.put(name, b"1")
    for ask in (lambda: store.listing(http.root), lambda: store.match(f"{http.root}/*/*.tar")):
        http.server.heal()
        http.server.fail("*/b*", kind, times=2, method="GET")
        assert len(ask()) == 3


def test_a_server_that_comes_back_is_waited_for(place: Place) -> None:
    url = place.put("a.tar", b"123456")
    assert store.read(url, 0, 5) == b"12345"
    place.server.stop()
    try:
        with ThreadPoolExecutor(3) as pool:
            waiting = [
                pool.submit(store.read, url, 1, 5),
                pool.submit(store.stat, url),
                pool.submit(store.listing, place.root),
            ]
            time.sleep(0.2)
            assert not any(each.done() for each in waiting)
            place.server.start()
            data, stat, listing = (each.result() for each in waiting)
    finally:
        if not place.server.running:
            place.server.start()
    assert data == b"2345"
    assert listing == {"a.tar": stat}


@pytest.mark.usefixtures("clock")
def test_a_server_that_stays_away_ends_in_one_line(place: Place) -> None:
    url = place.put("a.tar", b"123456")
    place.server.stop()
    try:
        for ask in (lambda: store.read(url, 1, 5), lambda: store.stat(url), lambda: store.listing(place.root)):
            with pytest.raises(DataError, match="expected a store that answers, none did in 5 seconds") as error:
                ask()
            assert "the same command goes on" in one_line(error)
    finally:
        place.server.start()


def test_an_answer_that_takes_too_long_is_asked_for_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = place.put("a.tar", LETTERS)
    store.stat(url)  # s3fs and botocore take a while to begin
    monkeypatch.setattr(store, "ANSWER", 0.4)
    place.server.fail("*", "drip", times=1)
    assert store.read(url, 0, 200) == LETTERS[:200]
    monkeypatch.setattr(store, "PATIENCE", 0.0)
    place.server.fail("*", "drip", times=1)
    with pytest.raises(DataError, match=r"no answer in 0\.4 seconds"):
        store.read(url, 0, 200)


def test_a_server_that_sends_whole_files_for_parts_is_no_store(place: Place) -> None:
    url = place.put("a.tar", LETTERS)
    place.server.fail("*", "whole")
    place.server.forget()
    with pytest.raises(Lost, match="whole files where it is asked for a part"):
        store.read(url, 3, 9)
    assert place.server.requests == 1
    assert store.read(url, 0, 256) == LETTERS


def test_a_server_without_head_tells_the_size_all_the_same(http: Place) -> None:
    url = http.put("a.tar", LETTERS)
    http.server.fail("*", 405, method="HEAD")
    assert store.stat(url).size == 256


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hush@host/a.tar",
        "https://hush@host/a.tar",
        "https://host:80@me:hush@host/a.tar",
        "s3://AKIA:hush@bucket/a.tar",
        "s3://AKIA:hu/hush@bucket/a.tar",
        "https://host/a.tar?X-Amz-Signature=hush",
        "https://host/a.tar?hush",
        "https://host/a.tar#hush",
        "abfs://images/a.tar?se=2030&sig=hush",
        "s3://images/a.tar?X-Amz-Signature=hush",
    ],
)
def test_what_may_be_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(DataError, match=r"expected a URL without .*environment") as error:
        store.check_url(url)
    assert "hush" not in one_line(error)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a?.tar", "s3://bucket/a@b:c.tar", "https://host:80/a@2x.tar", "http://[::1]:80/a", "file:///tmp/a"],
)
def test_what_is_no_secret_is_let_pass(url: str) -> None:
    store.check_url(url)


def test_a_store_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DataError, match=r"nope://a/b: expected s3://, gs://, https:// .*nope") as error:
        store.check_url("nope://a/b")
    one_line(error)


def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3://a/b: .*s3fs.*; pip install 'reco-fast\[cloud\]'") as error:
        store.check_url("s3://a/b")
    one_line(error)


def test_a_forked_child_reads_and_its_parent_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = place.put("a.tar", LETTERS)
    monkeypatch.setattr(store, "ANSWER", 3.0)
    assert store.read(url, 0, 9) == LETTERS[:9]
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=_child, args=(url,))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        place.server.forget()
        started = time.monotonic()
        assert store.read(url, 9, 20) == LETTERS[9:20]
        assert time.monotonic() - started < 2  # it still hears its answers
        assert place.server.requests == 1


def _child(url: str) -> None:
    gc.collect()  # what nobody holds any more
    started = time.monotonic()
    same = store.read(url, 3, 5) == LETTERS[3:5]
    os._exit(0 if same and time.monotonic() - started < 3 else 1)


def test_many_threads_read_at_once(place: Place) -> None:
    urls = [place.put(f"{number}.bin", bytes([number]) * 100) for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda number: store.read(urls[number % 20], 0, 100 - number % 20), range(60)))
    assert found == [bytes([number % 20]) * (100 - number % 20) for number in range(60)]
    assert [each.size for each in store.stats(urls) if isinstance(each, Stat)] == 20 * [100]


def test_pauses_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(store, "LONGEST_WAIT", 4.0)
    waits = [wait for wait, _ in zip(store._waits(), range(5), strict=False)]
    for wait, most in zip(waits, (1, 2, 4, 4, 4), strict=True):
        assert most / 2 <= wait <= most


def test_what_a_library_says_is_repeated_without_secrets() -> None:
    said = store._line(ValueError("GET https://me:hush@host/a.tar?sig=hush failed\nhush"))
    assert said == "GET https://…host/a.tar… failed"


def test_links_that_lead_elsewhere_are_no_files(http: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    http.put("a/1.tar", b"1")
    links = [("a/", "directory"), ("./", "directory"), ("../", "directory"), ("?C=N;O=D", "file"), ("b.tar#x", "file")]
    call = store._call

    def listed(fs: Any, method: str, url: str, **named: Any) -> Any:
        if method == "ls" and url == http.root:
            return [{"name": f"{url}/{link}", "size": None, "type": kind} for link, kind in links]
        return call(fs, method, url, **named)

    monkeypatch.setattr(store, "_call", listed)
    assert list(store.listing(http.root)) == ["a/1.tar"]
