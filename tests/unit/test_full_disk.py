"""A disk that fills up at any point of a stage: one clear error, nothing half-written, and on."""

import gzip
import http.server
import json
import os
import random
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from servers import serving, web_server

from olmo.checkpoint.layout import atomic_checkpoint
from olmo.checkpoint.mirror import find_newest_or_download, mirror_checkpoints
from olmo.corpus.documents import documents
from olmo.corpus.fast import Fast
from olmo.corpus.ingest import sources
from olmo.corpus.sources import download
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import tokens
from olmo.store.commands import quarantine_damaged
from olmo.store.store import Store

DISK = 24 << 20
LINES = [
    json.dumps({"id": f"doc-{n}", "text": random.Random(n).randbytes(400).hex()}).encode()
    for n in range(4000)
]


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A small disk of its own, and the store on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    monkeypatch.setenv("OLMO_STORE", str(disk / "store"))
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A source on a web server, its documents, a tokenizer: none of them on the small disk."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "source.gz").write_bytes(gzip.compress(b"\n".join(LINES), 1))
    made = {kind: folder / kind for kind in ("documents", "heldout", "table")}
    documents.build(source=folder / "source.gz", name="source.gz", **made)
    trained_tokenizer.build(
        documents=[made["documents"]], tokenizer=folder / "tokenizer.json", vocab_size=400
    )
    with web_server(folder) as url:
        yield {"url": f"{url}/source.gz", "source": folder / "source.gz", "folder": folder, **made}


def calls(given, out, dolma):
    """Each stage of the data half, as it is called; its outputs in `out`."""
    folder = given["folder"]
    paths = {name: out / name for name in ("documents", "heldout", "table")}
    inputs = {name: given[name] for name in ("documents", "table")}
    fixed = {"tokenizer": folder / "tokenizer.json", "eos_token_id": 0, "pad_token_id": 1}
    made = {"tokens": out / "tokens", "index": out / "index"}

    def tokenize(engine):
        return lambda: tokens(
            **inputs, **fixed, **made, toolkit=engine.toolkit, engine=engine, split="train"
        )

    return {
        "download": lambda: download(url=given["url"], source=out / "source"),
        "documents": lambda: documents(source=given["source"], name="source.gz", **paths),
        "dolma": tokenize(dolma),
        "fast": tokenize(Fast(dolma, 0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["download", "documents", "dolma", "fast"])
def test_a_full_disk_and_then_room(given, disk, dolma, name, tmp_path):
    call = calls(given, tmp_path / "out", dolma)[name]
    ballast, store = disk / "ballast", Store(disk / "store")
    failed = 0
    for room in (4_000, 60_000, 400_000, 1_200_000, 2_500_000, 5_000_000):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(bytes(max(0, free - room)))
        try:
            call()
            break
        except OSError as error:
            assert "the disk is full" in str(error) and "make room" in str(error)
            failed += 1
        finally:
            ballast.unlink()
        assert not list(quarantine_damaged(store))
        assert not list((tmp_path / "out").glob("*")), "no name before its content"
    assert failed >= 3
    record = call()
    for output in record["outputs"].values():
        assert Path(store.object_path(output["sha256"])).exists()


@pytest.mark.parametrize("allow_missing", [False, True])
def test_a_full_disk_stops_a_batch_and_leaves_out_no_source(disk, tmp_path, allow_missing):
    """The disk is no fault of a source: one sentence, where files may be missing too."""
    for number in range(3):
        noise = random.Random(number).randbytes(9 << 20)
        (tmp_path / f"{number}.gz").write_bytes(gzip.compress(noise))
    places = [f"{number}={tmp_path / str(number)}.gz" for number in range(3)]
    listing = tmp_path / "data" / "sources" / "000.tsv"
    with pytest.raises(OSError, match=r"^the disk is full .*make room.*") as error:
        sources(listing=listing, sources=places, allow_missing=allow_missing)
    assert "\n" not in str(error.value) and not listing.exists()


def test_a_full_disk_skips_no_newer_checkpoint(disk, tmp_path, capsys):
    """A run goes on from the newest mirrored checkpoint, or says that it does not fit."""
    run, remote = tmp_path / "run", tmp_path / "remote"
    for step, size in (("step1-unsharded", 1 << 10), ("step2-unsharded", DISK + 1)):
        with atomic_checkpoint(run / step) as folder:
            (folder / "model.pt").write_bytes(bytes(size))
    mirror_checkpoints(run, str(remote))
    with pytest.raises(OSError, match=r"the disk is full: .* do not fit"):
        find_newest_or_download(None, disk / "run", str(remote))
    assert "skipping" not in capsys.readouterr().err


def test_a_download_without_a_length_and_an_end_leaves_room(disk):
    class Endless(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"10000\r\n%b\r\n" % bytes(1 << 16))

    said = "is almost full, and the server does not send the file"
    with serving(Endless) as url, pytest.raises(OSError, match=said):
        download(url=f"{url}/a.gz", source=disk / "source")
    usage = shutil.disk_usage(disk)
    assert usage.used < 1 << 20 and not (disk / "source").exists()
