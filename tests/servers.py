"""Real servers on loopback: a folder by http, and S3."""

import base64
import functools
import http.server
import socket
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
