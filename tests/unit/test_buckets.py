"""Sources by s3://, gs:// and hf://, by the pipeline's own command: a file, or one line."""

import base64
import gzip
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
from servers import s3_server, serving

from olmo.corpus import listing as listings

pytestmark = pytest.mark.slow  # a server, and a process for every command

FILE = gzip.compress(b'{"id": "a", "text": "b"}\n' * 2000, mtime=0)


@pytest.fixture(scope="module")
def s3():
    """The environment of a client of a server with one bucket and one file in it."""
    import boto3

    with s3_server("lab") as surroundings:
        client = boto3.session.Session().client("s3")
        client.put_object(Bucket="lab", Key="a b/good.json.gz", Body=FILE)
        client.put_object(Bucket="lab", Key="page.json.gz", Body=b"<html>Sorry</html>")
        yield surroundings


def sources(folder, surroundings, *places):
    """Runs the command; its exit status, what it said, and the listing that it is to write."""
    listing = folder / "data" / "sources" / "000.tsv"
    words = [f"{number}={place}" for number, place in enumerate(places)]
    done = subprocess.run(
        [sys.executable, "-m", "olmo.cli", "sources", "--listing", listing, "--sources", *words],
        env={**os.environ, **surroundings, "OLMO_STORE": str(folder / "store")},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, listing


def line_about(place, said):
    """The one line of an error that tells of a place."""
    (line,) = [line for line in said.splitlines() if re.match(rf"(.* sources:)? *{place}", line)]
    return line


def test_a_file_comes_from_a_bucket(s3, tmp_path, monkeypatch):
    status, said, listing = sources(tmp_path, s3, "s3://lab/a b/good.json.gz")
    assert status == 0, said
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    (entry,) = listings.read_listing([listing], "source")
    assert entry.object.read_bytes() == FILE


def test_a_file_comes_from_an_r2_bucket_with_credentials_or_a_line_asks_for_them(s3, tmp_path):
    keys = {
        "R2_ENDPOINT_URL": s3["AWS_ENDPOINT_URL"],
        "R2_ACCESS_KEY_ID": "key",
        "R2_SECRET_ACCESS_KEY": "secret",
    }
    place = "r2://lab/a b/good.json.gz"
    status, said, _ = sources(tmp_path, s3, place)
    assert status == 1 and "R2_ENDPOINT_URL" in line_about(place, said)
    status, said, listing = sources(tmp_path, s3 | keys, place)
    assert status == 0 and listing.exists(), said


def test_what_a_bucket_does_not_give_is_a_line_each(s3, tmp_path):
    places = ["s3://lab/none.json.gz", "s3://nowhere/a.json.gz", "s3://lab/page.json.gz"]
    status, said, listing = sources(tmp_path, s3, *places, "s3://lab/a b/good.json.gz")
    assert status == 1 and not listing.exists()
    assert "3 of 4 sources" in said and "Traceback" not in said
    assert "not found" in line_about(places[0], said)
    assert "not found" in line_about(places[1], said)
    assert "found a web page" in line_about(places[2], said)


def test_credentials_that_the_server_does_not_know(s3, tmp_path):
    import requests

    requests.post(f"{s3['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"0").raise_for_status()
    try:
        status, said, _ = sources(tmp_path, s3, "s3://lab/a b/good.json.gz")
    finally:
        requests.post(f"{s3['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"inf")
    assert status == 1 and "Traceback" not in said
    assert "403" in line_about("s3://lab/a b/good.json.gz", said)


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks for: a file's facts, then the file."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        found = self.path.split("?")[0] == "/datasets/lab/texts/resolve/main/good.json.gz"
        body = FILE if found else json.dumps({"error": "Entry not found"}).encode()
        self.send_response(200 if found else 404)
        if found:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub():
    with serving(Hub) as address:
        yield {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}


def test_a_file_comes_from_the_hub_or_a_line_says_why_not(hub, tmp_path):
    hub = {**hub, "HF_HOME": str(tmp_path / "hf")}
    good, none = (f"hf://datasets/lab/texts/{name}.json.gz" for name in ("good", "none"))
    status, said, _ = sources(tmp_path, hub, good, none)
    assert status == 1 and "1 of 2 sources" in said and "Traceback" not in said
    assert "404" in line_about(none, said) or "not found" in line_about(none, said).lower()


class GoogleStorage(http.server.BaseHTTPRequestHandler):
    """What Google's client asks for: an object's facts, then its bytes; as the real service and
    gcp-storage-emulator answer it (docs/lab.md)."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        objects = {"a b/good.json.gz": FILE, "torn.json.gz": FILE}
        bucket, _, name = unquote(path).rpartition("storage/v1/b/")[2].partition("/o/")
        body, status = objects.get(name) if bucket == "lab" else None, 200
        if body is None and (name or bucket != "lab"):
            status, body = (
                404,
                json.dumps({"error": {"code": 404, "message": "Not Found"}}).encode(),
            )
        elif "alt=media" in query:
            body = body[:-9] + bytes(9) if name == "torn.json.gz" else body
        else:
            checksum = base64.b64encode(hashlib.md5(body or b"").digest()).decode()
            facts = {"name": name, "bucket": bucket, "generation": "1", "etag": "1"}
            body = json.dumps(
                {**facts, "size": str(len(body or b"")), "md5Hash": checksum}
            ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def google():
    with serving(GoogleStorage) as address:
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "NO_GCE_CHECK": "true",  # whose credentials it would otherwise look for
        }


def test_a_file_comes_from_google_or_a_line_says_why_not(google, tmp_path, monkeypatch):
    good, torn, none, nowhere = (
        f"gs://{name}.json.gz" for name in ("lab/a b/good", "lab/torn", "lab/none", "nowhere/a")
    )
    status, said, _ = sources(tmp_path, google, good, torn, none, nowhere)
    assert status == 1 and "3 of 4 sources" in said and "Traceback" not in said
    assert "not found" in line_about(none, said).lower()
    assert "not found" in line_about(nowhere, said).lower()
    assert "checksum" in line_about(torn, said).lower()
    status, said, listing = sources(tmp_path, google, good)
    assert status == 0, said
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    (entry,) = listings.read_listing([listing], "source")
    assert entry.object.read_bytes() == FILE
