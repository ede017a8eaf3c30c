"""Object stores on this machine that answer late, wrongly or not at all when told to, and count what was asked.

    with HttpServer(folder) as server:  # server.url / path inside the folder
        server.delay, server.rate = 0.05, 100e6
        server.fail("*/3.tar", 500, times=2)

The fixture `s3` of conftest.py gives an `S3Server`, one for all tests of a process. For a benchmark, which a server in
a thread of its process would disturb, there is `served_apart`, and by hand, with the URL as the first line of output,

    python tests/pipelines/stores/servers.py FOLDER --delay 0.05 --rate 100e6

where URL/.counters answers {"requests", "bytes", "cpu_seconds"}.
"""

import argparse
import contextlib
import functools
import html
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

__all__ = ["HttpServer", "S3Server", "served_apart"]

_LISTENING: weakref.WeakSet[socket.socket] = weakref.WeakSet()
Kind = int | Literal["cut", "short", "drip", "close", "whole", "changed"]
CHUNK = 1 << 18
DRIP = 0.2  # seconds for each byte


def _listen_no_more() -> None:
    """A forked process would keep the port of a server that has stopped, and never answer."""
    for each in list(_LISTENING):
        each.close()


os.register_at_fork(after_in_child=_listen_no_more)


@dataclass
class Asked:
    """A request: `range` is its header or "", `sent` the bytes of the body that went out, `client` its header X-Client
    (a process that has FSSPEC_HTTP_CLIENT_KWARGS='{"headers": {"X-Client": "1"}}' when it starts sends one)."""

    method: str
    path: str
    range: str
    client: str
    sent: int = 0


@dataclass
class Fault:
    pattern: str
    kind: Kind
    times: float
    method: str


class Server:
    """What both have. All may change while it runs.

    Attributes:
        url: of the server, without a slash at the end.
        delay: seconds before each answer.
        rate: bytes a second of all connections together; `rate_each`: of each.
        asked: what was asked since the start or `forget`.
    """

    url: str

    def __init__(self) -> None:
        self.delay = 0.0
        self.rate = self.rate_each = float("inf")
        self.asked: list[Asked] = []
        self.running = False
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._sent_until = 0.0

    def fail(self, pattern: str, kind: Kind, times: float = float("inf"), method: str = "") -> None:
        """The next `times` requests whose path, as "/folder/name", fits `pattern` go wrong. The oldest fault is first.

        kind: the status of the answer; or "cut": half of the body, then the connection is closed; "short" (of http):
        the first byte, as if that were all; "drip": a few bytes a second; "close": the connection is closed without an
        answer; "whole": Range is ignored; "changed": another ETag.
        """
        with self._lock:
            self._faults.append(Fault(pattern, kind, times, method))

    def heal(self) -> None:
        """No faults, no delay and no rate any more."""
        with self._lock:
            self._faults.clear()
        self.delay, self.rate, self.rate_each = 0.0, float("inf"), float("inf")

    def forget(self) -> None:
        """Count from 0."""
        with self._lock:
            self.asked.clear()

    @property
    def requests(self) -> int:
        return len(self.asked)

    @property
    def bytes(self) -> int:
        return sum(each.sent for each in list(self.asked))

    def note(self, asked: Asked) -> None:
        """Before the answer, or who has it might count too early."""
        with self._lock:
            self.asked.append(asked)

    def fault(self, method: str, path: str) -> Kind | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in ("", method) and fnmatchcase(path, fault.pattern):
                    fault.times -= 1
                    return fault.kind
        return None

    def wait_turn(self, count: int) -> None:
        """Until `count` more bytes may have gone out."""
        now = time.monotonic()
        with self._lock:
            self._sent_until = max(now, self._sent_until) + count / self.rate
            until = max(self._sent_until, now + count / self.rate_each)
        if until > now:
            time.sleep(until - now)

    def pieces(self, body: bytes, kind: Kind | None) -> Iterator[bytes]:
        """The body as it is to go out."""
        if kind == "drip":
            for place in range(len(body)):
                if not self.running:
                    return
                time.sleep(DRIP)
                yield body[place : place + 1]
            return
        for place in range(0, len(body) // 2 if kind == "cut" else len(body), CHUNK):
            piece = body[place : min(place + CHUNK, len(body) // 2 if kind == "cut" else len(body))]
            self.wait_turn(len(piece))
            yield piece

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def stop(self) -> None:
        raise NotImplementedError


class HttpServer(Server):
    """Serves a folder: HEAD, GET, Range, ETag, and folders as lists of links. It starts when it is entered; `stop` and
    `start` keep its port. It cuts connections when it stops."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._port = 0
        self._http: _Http | None = None

    def __enter__(self) -> "HttpServer":
        self.start()
        return self

    def start(self) -> None:
        self._http = _Http(self, self._port)
        self._port = self._http.server_address[1]
        _LISTENING.add(self._http.socket)
        self.url = f"http://127.0.0.1:{self._port}"
        self.running = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.running = False
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.cut_all()
            self._http = None


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, owner: HttpServer, port: int) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), functools.partial(_Answer, owner))

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client went away
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or headers and body would be 40 ms apart

    def __init__(self, owner: HttpServer, *arguments: Any) -> None:
        self.owner = owner
        super().__init__(*arguments)

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path == "/.counters":
            self.asked = Asked("GET", path, "", "")
            counted = {"requests": self.owner.requests, "bytes": self.owner.bytes, "cpu_seconds": time.process_time()}
            return self.send(json.dumps(counted).encode())
        client = self.headers.get("X-Client", "")
        self.asked = Asked(self.command, path, self.headers.get("Range", ""), client)
        self.owner.note(self.asked)
        kind = self.owner.fault(self.command, path)
        if self.owner.delay:
            time.sleep(self.owner.delay)
        if kind == "close":
            self.close_connection = True
        elif isinstance(kind, int):
            self.send(b"", status=kind)
        else:
            self.send_place(path, kind)

    def send_place(self, path: str, kind: Kind | None) -> None:
        place = self.owner.folder / path.strip("/")
        if ".." in path.split("/") or not place.exists():
            return self.send(b"", status=404)
        if place.is_dir():
            names = sorted(each.name + "/" * each.is_dir() for each in place.iterdir())
            links = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a>\n' for name in names)
            return self.send(links.encode(), type="text/html")
        with open(place, "rb") as file:
            found = os.fstat(file.fileno())
            tag = f"{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ino:x}" + "-changed" * (kind == "changed")
            headers = {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
            start, end, status = 0, found.st_size, 200
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked and kind != "whole":
                first, last = asked.groups()
                start = int(first) if first else max(0, end - int(last))
                end = min(end, int(last) + 1) if first and last else end
                if start >= end:
                    return self.send(b"", status=416)
                end = start + 1 if kind == "short" else end
                headers["Content-Range"], status = f"bytes {start}-{end - 1}/{found.st_size}", 206
            self.send_head(status, end - start, headers)
            if self.command == "HEAD" or start == end:
                return
            if kind is None and self.owner.rate == self.owner.rate_each == float("inf"):
                self.asked.sent = end - start
                self.asked.sent = self.connection.sendfile(file, start, end - start)
            else:
                self.send_body(os.pread(file.fileno(), end - start, start), kind)

    def send(self, body: bytes, status: int = 200, type: str = "application/octet-stream") -> None:
        self.send_head(status, len(body), {"Content-Type": type})
        if self.command != "HEAD":
            self.send_body(body, None)

    def send_head(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/octet-stream", "Content-Length": str(size)} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, body: bytes, kind: Kind | None) -> None:
        for piece in self.owner.pieces(body, kind):
            self.asked.sent += len(piece)
            self.connection.sendall(piece)
        self.close_connection = self.close_connection or self.asked.sent < len(body)


class S3Server(Server):
    """moto's S3, in this process, with one bucket. It starts when it is entered; `stop` and `start` keep its port, and
    what is in it. A path in `fail` is "/bucket/key".

    Attributes:
        bucket: the URL of the bucket, "s3://images".
        environment: what s3fs and botocore have to find, here and in child processes.
    """

    bucket = "s3://images"

    def __init__(self) -> None:
        super().__init__()
        self._port = 0
        self._wsgi: Any = None

    def __enter__(self) -> "S3Server":
        self.start()
        self.empty()
        return self

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):
            def log(self, *arguments: object, **named: object) -> None:
                pass

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._wsgi = make_server("127.0.0.1", self._port, self._answer, threaded=True, request_handler=Quiet)
        self._wsgi.daemon_threads, self._wsgi.block_on_close = True, False
        self._port = self._wsgi.server_address[1]
        _LISTENING.add(self._wsgi.socket)
        self.url = f"http://127.0.0.1:{self._port}"
        self.running = True
        threading.Thread(target=self._wsgi.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.running = False
        if self._wsgi is not None:
            self._wsgi.shutdown()
            self._wsgi.server_close()
            self._wsgi = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIATESTS",
            "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # botocore's; those of ours are counted
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def put(self, key: str, data: bytes) -> str:
        """Its URL."""
        self._backend.put_object(self._name, key, data)
        return f"{self.bucket}/{key}"

    def get(self, key: str) -> bytes:
        """Raises KeyError where there is none."""
        found = self._backend.get_object(self._name, key)
        if found is None:
            raise KeyError(key)
        return bytes(found.value)

    def delete(self, key: str) -> None:
        self._backend.delete_object(self._name, key)

    def keys(self) -> list[str]:
        return sorted(self._backend.buckets[self._name].keys)

    def empty(self) -> None:
        """The bucket is there, with nothing in it."""
        self._backend.reset()
        self._backend.create_bucket(self._name, "us-east-1")

    @property
    def _name(self) -> str:
        return self.bucket.removeprefix("s3://")

    @property
    def _backend(self) -> Any:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
        asked = Asked(method, path, environ.get("HTTP_RANGE", ""), environ.get("HTTP_X_CLIENT", ""))
        self.note(asked)
        kind = self.fault(method, path)
        if self.delay:
            time.sleep(self.delay)
        if kind == "close":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        if isinstance(kind, int):
            name = HTTPStatus(kind).phrase.replace(" ", "")
            body = f"<Error><Code>{name}</Code><Message>made up by the test</Message></Error>".encode()
            start_response(f"{kind} {name}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if method == "HEAD" else [body]
        if kind == "whole":
            environ.pop("HTTP_RANGE", None)

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            if kind == "changed":
                headers = [(name, '"changed"' if name.lower() == "etag" else value) for name, value in headers]
            return start_response(status, headers, *rest)

        body = b"".join(self._moto(environ, begin))
        return self._counted(asked, self.pieces(body, kind))

    def _counted(self, asked: Asked, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            asked.sent += len(piece) if asked.method != "HEAD" else 0
            yield piece


@contextlib.contextmanager
def served_apart(folder: Path, delay: float = 0.0, rate: float = float("inf")) -> Iterator[str]:
    """The URL of `folder`, served by a process of its own."""
    command = [sys.executable, __file__, os.fspath(folder), "--delay", str(delay), "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=float("inf"), help="bytes a second of all connections")
    parser.add_argument("--rate-each", type=float, default=float("inf"), help="bytes a second of each connection")
    arguments = parser.parse_args()
    with HttpServer(arguments.folder) as server:
        server.delay, server.rate, server.rate_each = arguments.delay, arguments.rate, arguments.rate_each
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
