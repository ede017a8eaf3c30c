"""Files behind URLs, by fsspec: asked for again where an answer fails, and one line where none comes.

Credentials come from the environment alone, as each of fsspec's libraries looks for them; what could hold one in a URL
is refused and never repeated.
"""

import asyncio
import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn

from reco_fast.errors import DataError
from reco_fast.pipelines.stores.where import is_url

T = TypeVar("T")
PATIENCE = 300.0  # seconds in which a store may come back
FIRST_PATIENCE = 20.0  # seconds for one that has never answered: its name may be a mistake
ANSWER = 60.0  # seconds for one answer: of 16 MB, below 0.3 MB/s
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0  # seconds between two tries
_AT_ONCE = 32  # questions

_NO_RIGHT = frozenset({401, 403})
_LATER = frozenset({408, 425, 429})  # of 400 to 499, what may succeed when it is asked again
_NEVER = 501  # of 500 to 599, what will not
_NO_CREDENTIALS = frozenset(
    "NoCredentialsError PartialCredentialsError NoAuthTokenError DefaultCredentialsError RefreshError".split()
)
# Held for good: a forked child would close what it lets go, and with it take its parent's connections out of the
# epoll that both have; the parent's next answer would never come.
_held: dict[int, Any] = {}
_answered: set[str] = set()  # stores
_jitter = random.Random()  # not Python's own generator, whose state is the user's


class Stat(NamedTuple):
    """Of a file: `size` in bytes, and a `tag` that changes with its content ("": the store gives none)."""

    size: int
    tag: str


class Lost(OSError):
    """A file that cannot be had, and asking again will not help. `strerror` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)


class Absent(Lost):
    """There is no such file."""

    def __init__(self) -> None:
        super().__init__("there is no such file in the store")


def check_url(url: str) -> None:
    """Raises DataError for what could hold a secret, or where fsspec knows no such store."""
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    # Of user:pass/word@host, what stands before the first slash has no @, and what looks like a port is none.
    cut_short = not at and not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", rest.partition("/")[0])
    if (at and (":" in user or scheme in ("http", "https"))) or cut_short:
        raise DataError(f"{scheme}://…@…: expected a URL without a user and a password; {_WHERE}")
    if re.search("[?#]" if scheme in ("http", "https") else r"[?&](sig|signature|token|x-amz-[a-z-]+)=", rest.lower()):
        raise DataError(f"{url.partition('?')[0].partition('#')[0]}: expected a URL without ? and #, which may {_HOLD}")
    try:
        fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise DataError(f"{url}: {_line(error)}; pip install 'reco-fast[cloud]'") from None
    except ValueError as error:
        raise DataError(
            f"{url}: expected s3://, gs://, https:// or another store of fsspec's, got {_line(error)}"
        ) from None


_WHERE = "credentials come from the environment (for s3 AWS_PROFILE, or what fsspec reads: FSSPEC_HTTPS_CLIENT_KWARGS)"
_HOLD = f"hold a signature; {_WHERE}"


def stat(url: str) -> Stat:
    """Raises Absent where there is no such file, a folder alone included, or Lost."""

    def once(fs: Any, path: str) -> dict[str, Any]:
        info: dict[str, Any] = _call(fs, "info", path)
        if info.get("type") == "directory":
            raise Absent
        return info

    return _stat_of(_patiently(url, once))


def stats(urls: list[str]) -> list[Stat | Lost]:
    """Of many files, asked at the same time."""

    def ask(url: str) -> Stat | Lost:
        try:
            return stat(url)
        except Lost as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, urls))


def read(url: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file. Raises Lost."""

    def once(fs: Any, path: str) -> bytes:
        data: bytes = _call(fs, "cat_file", path, start=start, end=end) if end > start else b""
        if len(data) > end - start:
            raise Lost("the server sends whole files where it is asked for a part")
        if len(data) < end - start:
            size = _stat_of(_call(fs, "info", path)).size
            if 0 <= size < end:
                raise Lost(f"it has changed: it ends at byte {size:,}, before {end:,}")
            raise ConnectionError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    return _patiently(url, once)


def read_whole(url: str) -> bytes:
    """Raises Lost."""
    return _patiently(url, lambda fs, path: bytes(_call(fs, "cat_file", path)))


def write(url: str, data: bytes) -> None:
    """Appears whole or not at all. Raises Lost."""
    _patiently(url, lambda fs, path: _whole(fs, path, lambda place: _call(fs, "pipe_file", place, data)))


def upload(local: str, url: str) -> None:
    """Appears whole or not at all. Raises Lost."""
    # Of any size: it has as long as it needs.
    _patiently(url, lambda fs, path: _whole(fs, path, lambda place: fs.put_file(local, place)))


def remove(url: str) -> None:
    """Nothing where there is none."""
    with contextlib.suppress(Absent):
        _patiently(url, lambda fs, path: _call(fs, "rm_file", path))


def listing(url: str) -> dict[str, Stat]:
    """Path below `url`, as a URL has it, → what is known, of all files at any depth, by name; empty where there is
    nothing. Raises Lost."""

    def once(fs: Any, path: str) -> dict[str, Any]:
        found: dict[str, Any] = fs.find(path, detail=True)
        return found

    try:
        found = _links_below(url) if _is_http(url) else _patiently(url, once)
    except Absent:
        return {}
    fs, root = _filesystem(url)
    names = {name: _below(name, root, fs) for name in found if found[name].get("type") != "directory"}
    known = {below: _stat_of(found[name]) for name, below in sorted(names.items(), key=lambda item: item[1]) if below}
    unknown = [below for below, each in known.items() if each.size < 0]
    for below, each in zip(unknown, stats([join(url, below) for below in unknown]), strict=True):
        known[below] = each if isinstance(each, Stat) else Stat(-1, "")
    return known


def match(pattern: str) -> list[str]:
    """The URLs of files that fit `*`, `?` and `[…]`, by name; none of them goes across a `/`. Raises Lost."""
    scheme = pattern.partition("://")[0]
    if _is_http(pattern):
        root = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
        fits = re.compile(fsspec.utils.glob_translate(pattern))
        try:
            return sorted(filter(fits.match, _links_below(root, pattern.count("/") - root.count("/"))))
        except Absent:
            return []

    def once(fs: Any, path: str) -> list[str]:
        return sorted(name if is_url(name) else f"{scheme}://{name.lstrip('/')}" for name in fs.glob(path))

    try:
        return _patiently(pattern, once)
    except Absent:
        return []


def join(url: str, below: str) -> str:
    return f"{url.rstrip('/')}/{below}"


def _below(name: str, root: str, fs: Any) -> str:
    """A path that a listing gave, without what was listed."""
    return str(fs._strip_protocol(name)).removeprefix(str(fs._strip_protocol(root)).rstrip("/")).lstrip("/")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _links_below(url: str, levels: int = 1000) -> dict[str, Any]:
    """Files by URL, as `find` of fsspec gives them; which leaves out folders whose list does not come."""
    found: dict[str, Any] = {}
    folders = [url]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in range(levels):
            answers = pool.map(lambda each: _patiently(each, lambda fs, path: _call(fs, "ls", path)), folders)
            infos = [info for answer in answers for info in answer if not re.search(r"[?#]|/\.\.?/", info["name"])]
            found |= {info["name"]: info for info in infos if info["type"] == "file"}
            folders = [info["name"] for info in infos if info["type"] == "directory"]
    return found


def _stat_of(info: dict[str, Any]) -> Stat:
    names = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Last-Modified", "LastModified", "last_modified")
    tag = next((str(info[name]) for name in (*names, "mtime", "created") if info.get(name)), "")
    size = info.get("size")
    return Stat(-1 if size is None else int(size), tag.strip('"'))


def _filesystem(url: str) -> tuple[Any, str]:
    # Listings are not remembered: a file may have changed since. Instances are, by fsspec, one a process.
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    _held.setdefault(id(fs), fs)
    return fs, path


def _whole(fs: Any, path: str, put: Callable[[str], None]) -> None:
    """`put` at `path`, which appears whole or not at all. Asynchronous file systems are those of object stores, where
    it does."""
    if _is_http(path):
        raise NotImplementedError  # fsspec would POST
    if fs.async_impl:
        return put(path)
    fs.makedirs(fs._parent(path), exist_ok=True)
    put(f"{path}.tmp")
    fs.mv(f"{path}.tmp", path)


def _call(fs: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """A method of a file system, which ends within `ANSWER` where that is one of the asynchronous ones."""
    if not fs.async_impl:
        return getattr(fs, method)(*arguments, **named)

    async def limited() -> Any:
        return await asyncio.wait_for(getattr(fs, f"_{method}")(*arguments, **named), ANSWER)

    try:
        return fsspec.asyn.sync(fs.loop, limited)
    except TimeoutError:
        raise TimeoutError(f"no answer in {ANSWER:g} seconds") from None


def _patiently(url: str, ask: Callable[[Any, str], T]) -> T:
    """What `ask` gives, called again while the store does not answer or fails, with growing pauses.

    Raises:
        Lost: there is no such file (Absent), or the store fails whenever it is asked for it.
        DataError: we have no right to it, there is no such bucket, the store does not answer, or is for reading alone.
    """
    name = "/".join(url.split("/", 3)[:3])
    patience = PATIENCE if name in _answered else min(PATIENCE, FIRST_PATIENCE)
    give_up = time.monotonic() + patience
    for wait in _waits():
        try:
            answer = ask(*_filesystem(url))
            _answered.add(name)
            return answer
        except (Lost, DataError):
            raise
        except NotImplementedError:
            raise DataError(f"{url}: expected a store that files can be written to, this kind is read alone") from None
        except (TypeError, AttributeError, ImportError):  # a fault
            raise
        except Exception as error:  # whatever botocore, aiohttp and the others raise
            status = _status(error)
            if status in _NO_RIGHT or isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
                raise DataError(f"{url}: expected to be let in, the store answers: {_line(error)}; {_WHERE}") from None
            if _code(error) == "NoSuchBucket":
                raise DataError(f"{url}: expected a bucket that is there, the store answers: {_line(error)}") from None
            # fsspec's of http says that there is no file whatever its request failed of.
            missing = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, LookupError | None)
            if status == 404 or (status is None and missing):
                raise Absent from None
            if status is not None and (400 <= status < 500 or status == _NEVER) and status not in _LATER:
                raise Lost(_line(error)) from None
            if time.monotonic() + wait > give_up:
                if status is not None:
                    raise Lost(f"the store fails for {patience:g} seconds: {_line(error)}") from None
                raise DataError(
                    f"{url}: expected a store that answers, none did in {patience:g} seconds ({_line(error)}); the "
                    "same command goes on"
                ) from None
        time.sleep(wait)
    raise AssertionError


def _waits() -> Iterator[float]:
    wait = FIRST_WAIT
    while True:
        yield wait * _jitter.uniform(0.5, 1)  # many hosts were cut off at the same time
        wait = min(2 * wait, LONGEST_WAIT)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error is about, as each library keeps it."""
    for _ in range(5):  # of the error, or of what it came from
        if error is None:
            break
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        # aiohttp has it as `status`; its errors with a `code`, 400, are of a body that was cut off.
        names = ("status",) if type(error).__module__.startswith("aiohttp") else ("status", "code")  # gcsfs
        for value in (getattr(error, name, None) for name in names):
            if isinstance(value, int) and 100 <= value < 600:
                return value
        value = getattr(response, "status_code", None)  # requests, huggingface_hub
        if isinstance(value, int):
            return value
        error = error.__cause__
    return None


def _code(error: BaseException) -> str:
    """S3's name for what is wrong, or ""."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _line(error: Exception) -> str:
    """What a library says, in one line, without what may be a secret."""
    text = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return re.sub(r"(?<=://)[^/\s@]*@|\?[^\s'\"]*", "…", text)[:300]
