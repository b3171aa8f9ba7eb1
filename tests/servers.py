"""Real servers on loopback: a folder by http, and S3."""

from __future__ import annotations

import base64
import functools
import http.server
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest


@contextmanager
def serving(handler: Callable[..., Any]) -> Iterator[str]:
    """A server that answers by `handler`; yields the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def web_server(folder: Path, sent: list[int] | None = None) -> Iterator[str]:
    """A folder's files, in ranges too; yields the address. `sent` gets each answer's bytes."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            span = self.headers.get("Range", "")
            first, _, last = span.removeprefix("bytes=").partition("-")
            size = path.stat().st_size if path.is_file() else 0
            if sent is not None:
                sent.append(int(last) + 1 - int(first) if last else size)
            if not last or not path.is_file():
                super().do_GET()
                return
            with path.open("rb") as file:
                file.seek(int(first))
                body = file.read(int(last) + 1 - int(first))
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            self.wfile.write(body)

    with serving(functools.partial(Files, directory=str(folder))) as address:
        yield address


@contextmanager
def guarded_web_server(
    folder: Path, user: str, signature: str, asked: list[str] | None = None
) -> Iterator[str]:
    """A folder's files for who gives `user` ("name:password") or a URL with `signature`; 403 for
    the others. Yields host:port; `asked` gets what was asked for.
    """
    known = f"Basic {base64.b64encode(user.encode()).decode()}"

    class Guarded(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if asked is not None:
                asked.append(self.path)
            query = parse_qs(urlparse(self.path).query)
            signed = "".join(query.get("X-Amz-Signature", []) + query.get("sig", []))
            if self.headers.get("Authorization") == known or signed.startswith(signature):
                super().do_GET()
            else:
                self.send_error(403)

        do_HEAD = do_GET

    with serving(functools.partial(Guarded, directory=str(folder))) as address:
        yield address.removeprefix("http://")


@contextmanager
def slow_web_server(folder: Path, pause_s: float = 0.02) -> Iterator[str]:
    """As above, with Range and If-Range, and a pause after every few KB; yields the address."""

    class Slow(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body, start = (folder / self.path.lstrip("/")).read_bytes(), 0
            if "Range" in self.headers and self.headers.get("If-Range") == '"1"':
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            with suppress(OSError):  # a client that was killed
                for at in range(start, len(body), 4096):
                    self.wfile.write(body[at : at + 4096])
                    time.sleep(pause_s)

    with serving(Slow) as address:
        yield address


@contextmanager
def internet(folder: Path, asked: list[str]) -> Iterator[dict[str, str]]:
    """The https servers whose names are folders of `folder`, each with the files of its own, behind
    a proxy on loopback. Yields what the environment of their clients holds; `asked` gets each file
    that was asked for. Other servers are not to be reached.
    """
    import trustme

    authority = trustme.CA()
    sealed = {}
    for host in (path.name for path in folder.iterdir()):
        sealed[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(host).configure_cert(sealed[host])

    class Site(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, host: str, *arguments: Any) -> None:
            self.host = host
            super().__init__(*arguments)

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = folder / self.host / self.path.partition("?")[0].lstrip("/")
            found, start = path.is_file(), 0
            body = path.read_bytes() if found else b""
            if self.headers.get("If-Range") == '"1"':
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            asked.append(f"{self.command} https://{self.host}{self.path}")
            self.send_response((206 if start else 200) if found else 404)
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "0" * 40)  # of which the hub's client wants to know
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[start:])

        do_HEAD = do_GET

    class Proxy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_CONNECT(self) -> None:
            host = self.path.partition(":")[0]
            if host not in sealed:
                asked.append(f"CONNECT {host}")
                return self.send_error(502)
            self.send_response(200)
            self.end_headers()
            with (
                suppress(OSError),  # a client that was killed
                sealed[host].wrap_socket(self.connection, server_side=True) as connection,
            ):
                Site(host, connection, self.client_address, self.server)
            self.close_connection = True

    with serving(Proxy) as address, authority.cert_pem.tempfile() as certificate:
        trusted = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        yield {"HTTPS_PROXY": address, "NO_PROXY": ""} | dict.fromkeys(trusted, certificate)


@contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket; yields what its clients' environment holds, ours too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            for _ in range(300):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            for name, value in surroundings.items():
                patch.setenv(name, value)
            import boto3

            boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
            yield surroundings
        finally:
            server.terminate()


class ScriptedServer(http.server.ThreadingHTTPServer):
    """Serves /name by the behaviour registered for it; counts requests and body bytes.

    A behaviour gets the handler and the number of the request, from 1 on; `content` is what
    `handler.file()` sends.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.content, self.sent = content, 0
        self.behaviours: dict[str, Callable[[Any, int], object]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []

    def __call__(self, name: str, behaviour: Callable[[Any, int], object]) -> str:
        self.behaviours["/" + name] = behaviour
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up is part of the plan


@contextmanager
def scripted_server(content: bytes) -> Iterator[ScriptedServer]:
    """A ScriptedServer that answers."""
    with ScriptedServer(content) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class ScriptedHandler(http.server.BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = [headers for path, headers in self.server.requests if path == self.path]
        self.server.requests.append((self.path, dict(self.headers)))
        self.server.behaviours[self.path](self, len(asked) + 1)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(
        self, status: int, body: bytes = b"", length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.server.sent += len(body)
        if length is not None:
            self.close_connection = True

    def file(
        self, content: bytes | None = None, cut: int | None = None, etag: str | None = '"1"'
    ) -> None:
        """As a good server does, Range and If-Range too; `cut`: hangs up after so many bytes."""
        content = self.server.content if content is None else content
        start, status = 0, 200
        if "Range" in self.headers and self.headers.get("If-Range", etag) == etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status = 206
        headers = {"ETag": etag} if etag else {}
        if start >= len(content):
            return self.answer(416, Content_Range=f"bytes */{len(content)}", **headers)
        if status == 206:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if cut is None:
            return self.answer(status, body, **headers)
        return self.answer(status, body[:cut], length=len(body), **headers)
