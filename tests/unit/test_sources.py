"""Sources over a network that fails: each file arrives whole, or one line says why not."""

import gzip
import hashlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from servers import scripted_server

from olmo.corpus import ingest
from olmo.corpus import listing as listings
from olmo.corpus.formats import split_suffixes
from olmo.corpus.sources import (
    Transfer,
    check_source,
    download,
    download_tokens,
    local_source,
    source_list,
)
from olmo.io import downloads, http_client, progress
from olmo.io.progress import DownloadProgress, Totals

TEXT = b"".join(
    json.dumps({"id": str(n), "text": random.Random(n).randbytes(60).hex()}).encode() + b"\n"
    for n in range(4000)
)
FILE = gzip.compress(TEXT, mtime=0)
OTHER = gzip.compress(TEXT[::-1], mtime=0)


@pytest.fixture
def server():
    with scripted_server(FILE) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No long waits between attempts, and a store of our own."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: naps.append(seconds))
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    naps = []
    return naps


def get(url, folder, sha256=None, **transfer):
    folder.mkdir(exist_ok=True)
    places = {"source": folder / "source", "part": folder / "part"}
    facts = download.build(url=url, **places, sha256=sha256, transfer=Transfer(**transfer))
    assert (folder / "source").read_bytes() == FILE
    assert facts["sha256"] == hashlib.sha256(FILE).hexdigest()
    assert facts["text_bytes"] == len(TEXT) and not (folder / "part").exists()
    return facts


def test_a_file_is_downloaded(server, tmp_path):
    url = server("a.gz", lambda h, n: h.file())
    facts = get(url, tmp_path / "a", bytes=len(FILE), sha256=hashlib.sha256(FILE).hexdigest())
    assert facts["received"] == len(FILE) and facts["validator"] == '"1"'


def test_a_file_in_the_store_is_not_downloaded(server, tmp_path):
    url = server("a.gz", lambda h, n: h.file())
    record = download(url=url, source=tmp_path / "a.gz", part=tmp_path / "part")
    digest = record["outputs"]["source"]["sha256"]
    again = download(url=url, source=tmp_path / "b.gz", part=tmp_path / "part", sha256=digest)
    assert again["facts"]["received"] == 0
    assert (tmp_path / "b.gz").read_bytes() == FILE and len(server.requests) == 1


def test_a_cut_connection_resumes(server, tmp_path):
    url = server("a.gz", lambda h, n: h.file(cut=50_000 if n < 4 else None))
    assert get(url, tmp_path / "a")["resumed"] == 3
    assert server.sent == len(FILE), "no byte came twice"
    assert server.requests[1][1]["Range"] == "bytes=50000-"
    assert server.requests[1][1]["If-Range"] == '"1"'


def test_a_server_without_ranges_restarts_from_the_start(server, tmp_path):
    def whole(handler, n):
        handler.answer(200, FILE[: 50_000 * n], length=len(FILE)) if n < 4 else handler.answer(
            200, FILE
        )

    assert get(server("a.gz", whole), tmp_path / "a")["resumed"] == 0


def test_a_file_that_changes_between_attempts_restarts(server, tmp_path):
    def changing(handler, n):
        handler.file(OTHER, cut=50_000, etag='"0"') if n == 1 else handler.file(FILE, etag='"1"')

    get(server("a.gz", changing), tmp_path / "a")


def test_a_changed_file_with_the_same_etag_is_downloaded_once_more(server, tmp_path):
    other = OTHER[: len(FILE)].ljust(len(FILE), b"\0")

    def sly(handler, n):
        handler.file(other, cut=50_000, etag="") if n == 1 else handler.file(etag="")

    get(server("a.gz", sly), tmp_path / "a")
    assert len(server.requests) == 3, "cut, taken up, and once more"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_s_retry_after_is_honoured(server, tmp_path, quick, status):
    def busy(handler, n):
        handler.answer(status, b"", Retry_After=str(7 * n)) if n < 3 else handler.file()

    get(server("a.gz", busy), tmp_path / "a")
    assert quick == [7, 14]


def test_retry_after_may_be_a_date_and_is_limited(server, tmp_path, quick):
    def busy(handler, n):
        when = "Wed, 21 Oct 2099 07:28:00 GMT" if n == 1 else "soon"
        handler.answer(503, b"", Retry_After=when) if n < 3 else handler.file()

    get(server("a.gz", busy), tmp_path / "a")
    assert quick[0] == downloads.MAX_WAIT_S and quick[1] < 5


def test_a_stalled_server_is_retried(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http_client, "READ_TIMEOUT_S", 0.2)
    woken = threading.Event()

    def stalls(handler, n):
        if n > 1:
            return handler.file()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(FILE)))
        handler.end_headers()
        handler.wfile.write(FILE[:1000])
        handler.wfile.flush()
        woken.wait(30)

    get(server("a.gz", stalls), tmp_path / "a")
    woken.set()


def reset(handler):
    """Hang up at once, unread bytes and all: the other side sees a reset, not an end."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.wfile.flush()
    handler.connection.close()
    handler.close_connection = True


def test_a_reset_connection_resumes(server, tmp_path):
    def resets(handler, n):
        if n == 2:
            return reset(handler)
        handler.file(cut=50_000 if n < 4 else None)
        if n < 4:
            reset(handler)

    get(server("a.gz", resets), tmp_path / "a")


def test_a_body_without_a_length_that_is_cut_is_found_by_its_content(server, tmp_path):
    def chunked(handler, n):
        if n > 1:
            return handler.file()
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"C350\r\n" + FILE[:50_000] + b"\r\n")
        handler.close_connection = True  # without the last, empty chunk

    get(server("a.gz", chunked), tmp_path / "a")


def test_a_content_length_beyond_the_end_is_an_error_at_the_end(server, tmp_path):
    def promises(handler, n):
        handler.answer(200, FILE, length=len(FILE) + 9, ETag='"1"') if n == 1 else handler.file()

    get(server("a.gz", promises), tmp_path / "a")
    assert server.sent == len(FILE)


@pytest.mark.parametrize(
    "behaviour, message, requests",
    [
        (lambda h, n: h.answer(404), "answered 404.*check the address", 1),
        (lambda h, n: h.answer(403), "answered 403.*access is refused", 1),
        (lambda h, n: h.answer(500), "answered 500.*gave up after 6 attempts", 6),
        (lambda h, n: h.file(cut=0), "expected .* bytes, found 0|IncompleteRead", 6),
        (lambda h, n: h.answer(200, b"<html>Sorry</html>"), "found a web page", 1),
        (lambda h, n: h.answer(200, b""), "found an empty file", 1),
        (lambda h, n: h.answer(200, FILE[:-9]), "truncated", 1),
        (lambda h, n: h.answer(200, gzip.compress(b"")), "an empty source", 1),
        (lambda h, n: h.answer(302, Location=h.path), "redirects in a circle", 31),
        (lambda h, n: reset(h), "the connection failed: .*gave up after 6 attempts", 6),
        (lambda h, n: h.answer(302, Location="gopher://a/b"), "not a valid address", 1),
    ],
    ids=[
        *["404", "403", "500", "cut", "html", "empty", "short length", "no lines", "loop"],
        *["reset", "other scheme"],
    ],
)
def test_a_failed_download_is_one_line(server, tmp_path, behaviour, message, requests):
    url = server("a.gz", behaviour)
    with pytest.raises(ValueError, match=f"^{url}: (?s:.*)({message})") as error:
        get(url, tmp_path / "a")
    assert "\n" not in str(error.value)
    assert len(server.requests) == requests


def test_a_host_that_does_not_answer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^http://127.0.0.1:9/a.gz: the connection failed: .*"):
        get("http://127.0.0.1:9/a.gz", tmp_path / "a")


@pytest.mark.parametrize(
    "known, message",
    [
        ({"bytes": 17}, "expected 17 bytes by the source table, found"),
        ({"sha256": "0" * 64}, "expected sha256 0000.* by the source table, found"),
    ],
)
def test_a_file_that_differs_from_the_table_is_refused(server, tmp_path, known, message):
    with pytest.raises(ValueError, match=message):
        get(server("a.gz", lambda h, n: h.file()), tmp_path / "a", **known)


def test_a_killed_download_resumes_in_the_next_process(server, tmp_path):
    held = threading.Event()

    def slow(handler, n):
        if n > 1:
            return handler.file()
        handler.send_response(200)
        handler.send_header("ETag", '"1"')
        handler.send_header("Content-Length", str(len(FILE)))
        handler.end_headers()
        handler.wfile.write(FILE[:100_000])
        handler.wfile.flush()
        held.wait(60)

    url, part = server("a.gz", slow), tmp_path / "a" / "part" / "0"
    part.parent.mkdir(parents=True)
    program = (
        "import sys; from pathlib import Path; from olmo.io import downloads; "
        "downloads.BLOCK_BYTES = 1000; "
        "downloads.fetch(sys.argv[1], Path('never'), Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, url, str(part)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while not (part / "body").exists() or (part / "body").stat().st_size < 50_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    held.set()
    assert get(url, tmp_path / "a")["resumed"] == 1
    assert int(server.requests[1][1]["Range"].removeprefix("bytes=")[:-1]) >= 50_000


@pytest.mark.slow
def test_two_hundred_files_from_a_bad_server_cost_little_more_than_their_bytes(server, tmp_path):
    chance = random.Random(0)

    def bad(handler, n):
        dice = chance.random()
        if dice < 0.2:
            return handler.file(cut=chance.randrange(len(FILE)))
        if dice < 0.3:
            return handler.answer(503)
        return handler.file()

    for n in range(200):
        downloads.fetch(server(f"{n}.gz", bad), tmp_path / f"{n}.gz", tmp_path / "part")
        assert (tmp_path / f"{n}.gz").read_bytes() == FILE
    assert server.sent <= 1.05 * 200 * len(FILE)


def test_mirrors_are_tried_in_their_order(server, tmp_path):
    a, b, c = (
        server(name, behaviour)
        for name, behaviour in {
            "a.gz": lambda h, n: h.answer(404),
            "b.gz": lambda h, n: h.answer(200, FILE[:-9]),
            "c.gz": lambda h, n: h.file(),
        }.items()
    )
    assert get(a, tmp_path / "a", mirrors=(b, c))["from"] == c
    assert [path for path, _ in server.requests] == ["/a.gz", "/b.gz", "/c.gz"]
    with pytest.raises(ValueError, match=r"/a.gz: .*404.*; then .*/b.gz: truncated"):
        get(a, tmp_path / "b", mirrors=(b,))


def test_one_failure_does_not_stop_the_other_downloads(server, tmp_path):
    gone = server("gone.gz", lambda h, n: h.answer(404))
    page = server("page.gz", lambda h, n: h.answer(200, b"<html>"))
    good = [server(f"{n}.gz", lambda h, n: h.file()) for n in range(5)]
    places = [f"{n}={place}" for n, place in enumerate([gone, *good, page])]
    listing = tmp_path / "data" / "sources" / "000.tsv"
    with pytest.raises(ValueError, match=r"^2 of 7 sources:\n  .*gone.*404.*\n  .*page.*a web p"):
        ingest.sources(listing=listing, sources=places)
    assert not listing.exists()
    with pytest.raises(ValueError, match=r"^1 of 6 sources: .*gone.*404"):  # in one line
        ingest.sources(listing=listing, sources=places[:-1])
    asked = len(server.requests)
    ingest.sources(listing=listing, sources=places, allow_missing=True)
    assert len(server.requests) == asked + 2, "the five are in the store"
    found = listings.read_listing([listing], "source")
    assert [entry.shard for entry in found] == ["1", "2", "3", "4", "5"]
    assert all(entry.object.read_bytes() == FILE for entry in found)


def test_a_whole_data_set_has_one_progress_display(tmp_path, capsys, monkeypatch):
    def job():
        return DownloadProgress(tmp_path, Totals(9, 4_000_000), lambda: Totals(2, 500_000))

    def told():
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 100)
    with job() as first, job() as second:
        first.add_bytes(1_000_000)
        assert told()[0].startswith("2 of 9 files, 1.5MB of 4MB, ")
        second.add_file()
        second.add_bytes(2_000_000)
        assert not told(), "the other job has told it a moment ago"
        monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0)
        first.add_bytes(250_000)
        (line,) = told()
        assert line.startswith("3 of 9 files, 3.75MB of 4MB, ") and line.endswith("0:00 left")
        os.utime(second.status, (0, 0))  # killed long ago
        first.add_bytes(250_000)
        assert told()[0].startswith("2 of 9 files, 2MB of 4MB, ")
    assert [path.name for path in tmp_path.iterdir()] == ["reported"]


def test_a_list_becomes_a_table_with_sizes(server, tmp_path, capsys):
    a, b = server("a.gz", lambda h, n: h.file()), server("b.gz", lambda h, n: h.answer(404))
    url = server("list.txt", lambda h, n: h.answer(200, f"{a}\n\n{b}\n".encode()))
    facts = source_list.build(url=url, table=tmp_path / "table.tsv", licence="ODC-BY")
    assert (tmp_path / "table.tsv").read_text() == (
        f"url\tbytes\tsha256\tlicence\n{a}\t{len(FILE)}\t\tODC-BY\n{b}\t\t\tODC-BY\n"
    )
    assert facts == {"url": url, "files": 2, "bytes": len(FILE), "unknown": 1}
    assert "2 files" in (said := capsys.readouterr().out) and "1 file of unknown size" in said
    assert [path.name for path in tmp_path.iterdir()] == ["table.tsv"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>\n<p>no</p>",
        b"ok://a/b.gz\n../../etc/passwd\n",
        b"ok://a/b.gz\nFile:///etc/passwd\n",
        b"ok://a/b.gz\n-rf\n",
        b"ok://a/b c.gz\n",
    ],
)
def test_a_bad_url_list_is_refused(server, tmp_path, content):
    url = server("list.txt", lambda h, n: h.answer(200, content))
    with pytest.raises(ValueError, match=r"expected a (list of URLs|URL a line), found"):
        source_list.build(url=url, table=tmp_path / "table.tsv")


def test_given_tokens_are_downloaded_and_counted(server, tmp_path):
    raw = bytes(range(256)) * 512
    url = server("part.npy", lambda h, n: h.file(raw, cut=70_000 if n == 1 else None))
    facts = download_tokens.build(url=url, tokens=tmp_path / "out", part=tmp_path / "part")
    assert (tmp_path / "out").read_bytes() == raw
    assert facts["tokens"] == len(raw) // 2 and facts["resumed"] == 1
    assert facts["dtype"] == "uint16" and facts["sha256"] == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x93NUMPY\x01\x00", "a numpy file with a header"),
        (FILE, "found gzip"),
        (b" <!DOCTYPE html>", "found a web page"),
        (b"abc", "tokens of 2 bytes each, found 3 bytes"),
        (b"", "found 0 bytes"),
    ],
)
def test_files_that_are_not_raw_tokens_are_refused(server, tmp_path, content, message):
    url = server("part.npy", lambda h, n: h.answer(200, content))
    with pytest.raises(ValueError, match=message):
        download_tokens.build(url=url, tokens=tmp_path / "out", part=tmp_path / "part")


def test_public_r2_buckets_are_read_by_https():
    assert http_client.to_public_url("r2://olmo-data/a/b.npy") == "https://olmo-data.org/a/b.npy"
    assert http_client.to_public_url("r2://mine/a/b.npy") == "r2://mine/a/b.npy"


def test_a_local_file_is_checked_as_a_download_is(tmp_path):
    file = tmp_path / "-a b\n.gz"
    file.write_bytes(FILE)
    local_source.build(file=file, source=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == FILE
    file.write_bytes(FILE[:-4])
    with pytest.raises(ValueError, match="truncated"):
        local_source.build(file=file, source=tmp_path / "out")


def test_a_local_file_that_is_not_gz_says_what_to_call_it(tmp_path):
    """By a command that works, whatever the file is called: a recipe takes text as it is."""
    text = tmp_path / "it's a text.gz"
    text.write_text('Some "plain" text,\nof two lines: naïve.\n')
    with pytest.raises(ValueError, match=r'a gz file of JSON lines with "id" and "text"') as raised:
        check_source(text, str(text), None, None)
    (made,) = re.findall("`(.*?)`", str(raised.value), re.DOTALL)
    subprocess.run(["bash", "-c", made], check=True)
    assert split_suffixes(str(tmp_path / "it's a text.txt")) == (".txt", "")
    assert (tmp_path / "it's a text.txt").read_text().startswith('Some "plain"')
    (tmp_path / "draft").write_text("x")
    with pytest.raises(ValueError, match=r"expected gzip, found .* Check its URL"):
        check_source(tmp_path / "draft", "https://a.org/x.gz", None, None)
