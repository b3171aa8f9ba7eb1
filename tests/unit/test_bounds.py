"""Input without an end: a server that never stops sending, a line that fills the memory."""

import gzip
import http.server
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars
import pytest
from servers import serving

from olmo.config.strict import hashed_fields
from olmo.corpus import overlaps, sources
from olmo.corpus.documents import REASONS, DocumentsSection, documents
from olmo.corpus.sources import Transfer, download, source_list
from olmo.data.files import ArrayFile
from olmo.io import bucket, downloads, gz, http_client
from olmo.store.remote import Remote

BLOCK = bytes(1 << 16)


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers whatever is asked for without an end; /told tells a length of a thousand TB."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/liar" and "Range" not in self.headers:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(BLOCK)  # and hangs up
            self.close_connection = True
            return
        self.send_response(206 if "Range" in self.headers else 200)
        if self.path == "/liar":
            self.send_header("Content-Range", f"bytes {len(BLOCK)}-99999/100000")
        if self.path == "/told":
            self.send_header("Content-Length", str(10**15))
        elif self.path == "/nonsense":
            self.send_header("Content-Length", "many")
            self.close_connection = True
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        piece = BLOCK if self.path == "/told" else b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK)
        try:
            for _ in range(2000):  # 130 MB: a test that fails fills no disk
                self.wfile.write(piece)
                Endless.sent += len(BLOCK)
        except OSError:
            self.close_connection = True


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(downloads, "MAX_FRUITLESS_ATTEMPTS", 1)
    Endless.sent = 0
    with serving(Endless) as address:
        yield address


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_download_ends_at_the_size_of_the_table(endless: str, tmp_path: Path) -> None:
    expected = r"/a: expected 5,000,000 bytes by the source table, found [5-7],.*correct the table"
    with pytest.raises(ValueError, match=expected):
        download(url=f"{endless}/a", source=Path("a.gz"), transfer=Transfer(bytes=5_000_000))
    assert Endless.sent < 100e6 and kept(tmp_path) < 10_000


def test_a_download_that_does_not_fit_does_not_start(endless: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="1,000,000,000,000,000 bytes do not fit on the disk"):
        download(url=f"{endless}/told", source=Path("a.gz"))
    with pytest.raises(ValueError, match=r"expected 7 bytes by the source table, found 1,000,000,"):
        download(url=f"{endless}/told", source=Path("a.gz"), transfer=Transfer(bytes=7))
    assert kept(tmp_path) < 10_000


def test_a_download_without_a_length_leaves_free_space(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that fills up; a real one is in test_full_disk."""
    whole = shutil.disk_usage(tmp_path)
    before = kept(tmp_path)

    def almost_full(path: Path) -> Any:
        used = kept(tmp_path) - before
        return whole._replace(
            free=min(downloads.MIN_FREE_BYTES, whole.total // 100) + 4_000_000 - used
        )

    monkeypatch.setattr(downloads.shutil, "disk_usage", almost_full)
    with pytest.raises(
        OSError, match="is almost full, and the server does not send the file's size"
    ):
        download(url=f"{endless}/a", source=Path("a.gz"))
    assert kept(tmp_path) < 10_000 and Endless.sent < 100e6


def test_an_object_of_a_second_store_has_its_records_size(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(downloads.TooLarge, match="expected 1,000 bytes at most"):
        Remote(endless).get("objects/ab/abc", tmp_path / "x", 1000)
    monkeypatch.setattr(sources, "MAX_URL_LIST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="expected 1,048,576 bytes at most"):
        source_list(url=f"{endless}/list", table=Path("sources.tsv"))
    assert kept(tmp_path) < 10_000


def test_a_resumed_part_is_not_longer_than_the_first_length(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_FRUITLESS_ATTEMPTS", 2)
    with pytest.raises(ValueError, match="gave up after 2 attempts"):
        download(url=f"{endless}/liar", source=Path("a.gz"))
    assert kept(tmp_path) < 200_000 and Endless.sent < 100e6


def test_a_range_is_not_longer_than_requested(endless: str) -> None:
    with pytest.raises(ValueError, match="expected 8 bytes at most, found more"):
        ArrayFile(f"{endless}/a", "uint16").read(0, 4)


def test_a_bad_content_length(endless: str) -> None:
    class Answer:
        headers: dict[str, str] = {}  # noqa: RUF012

    for length in ("many", "-1", "²", "9" * 5000, ""):
        Answer.headers = {"Content-Length": length}
        assert http_client.content_length(Answer()) is None  # type: ignore[arg-type]


def test_a_bucket_sends_no_more_than_its_content_length(tmp_path: Path) -> None:
    watch = bucket._size_limit("s3://b/a", 10)
    watch.set_size(10)
    watch.relative_update(10)
    with pytest.raises(downloads.TooLarge, match="s3://b/a: expected 10 bytes at most, found 11"):
        watch.relative_update(1)
    with pytest.raises(downloads.TooLarge):
        bucket._size_limit("s3://b/a", 10).set_size(11)
    (tmp_path / "a").write_bytes(bytes(100))
    for fetch in (lambda b: b.get("a", tmp_path / "x", 99), lambda b: b.read("a", 99)):
        with pytest.raises(downloads.TooLarge, match="expected 99 bytes at most, found 100"):
            fetch(bucket.Bucket(str(tmp_path)))
    assert not (tmp_path / "x").exists()


# --- lines --------------------------------------------------------------------------------------


def line(text: str) -> bytes:
    return json.dumps({"id": text[:9], "text": text}).encode() + b"\n"


def made(tmp_path: Path, source: bytes, **options: Any) -> tuple[Any, polars.DataFrame, bytes]:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(source))
    out = {name: tmp_path / name for name in ("documents", "heldout", "table")}
    apart = {name: options.pop(name) for name in ("weight", "kind") if name in options}
    config = DocumentsSection(**options)
    facts = documents.build(source=path, name="a.json.gz", config=config, **out, **apart)
    return facts, polars.read_parquet(out["table"]), gzip.decompress(out["documents"].read_bytes())


@pytest.mark.parametrize(
    "length", [999, 1000, 1001, gz.BLOCK_BYTES - 1, gz.BLOCK_BYTES + 1, 3 * gz.BLOCK_BYTES + 7]
)
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_is_long_from_one_byte_on(tmp_path: Path, length: int, end: bytes) -> None:
    """Wherever it lies in what is read at a time, the lines around it are what they were."""
    short = line("short " * 20)
    around = len(line("x" * 9)) - 1 - 9
    long = line("x" * (length - len(end) - around))[:-1] + end
    assert len(long) == length
    source = short * 5 + long + (short * 5 if end else b"")
    facts, table, text = made(tmp_path, source, max_line_bytes=1000, allow=("long-line",))
    is_long = len(long) > 1000
    assert facts["drops"] == ({"long-line": 1} if is_long else {})
    assert facts["lines"] == source.count(b"\n") + (not end)
    assert text == source.replace(long, b"" if is_long else long.rstrip(b"\n") + b"\n")
    if is_long:
        assert table.filter(polars.col("reason") == "long-line")["line"].to_list() == [6]


def test_lines_of_every_length_come_through(tmp_path: Path) -> None:
    lengths = [
        1,
        2,
        900,
        5000,
        gz.TAIL_BYTES,
        gz.BLOCK_BYTES - 3,
        gz.BLOCK_BYTES,
        gz.BLOCK_BYTES * 2 + 5,
        100,
        10,
        1,
    ] * 3
    source = b"".join(bytes([65 + n % 26]) * n + b"\n" for n in lengths)
    (tmp_path / "a.gz").write_bytes(gzip.compress(source))
    for longest in (10, 1000, gz.BLOCK_BYTES, 10 * gz.BLOCK_BYTES):
        with gz.reading(tmp_path / "a.gz", longest=longest) as lines:
            found = list(lines)
        wanted = source.splitlines(keepends=True)
        assert len(found) == len(wanted)
        for mine, whole in zip(found, wanted, strict=True):
            assert mine == whole or (
                len(whole) > longest < len(mine) <= longest + gz.BLOCK_BYTES + 1
            )
            assert mine.endswith(b"\n")
    assert gz.verify_checksum(tmp_path / "a.gz") == len(source), (
        "who counts the text counts all of it"
    )


def test_a_long_line_is_a_drop_that_the_recipe_allows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 x long-line: a line of more bytes than the recipe's"):
        made(tmp_path, line("a") + line("b" * 2000), max_line_bytes=1000)
    source = b'{"messages": [{"role": "user", "content": "%b"}]}\n' % (b"x" * 2000)
    with pytest.raises(ValueError, match=r"1 x long-line"):
        made(tmp_path, source, max_line_bytes=1000, kind="messages")
    facts, *_ = made(tmp_path, source, kind="messages")
    assert facts["documents"] == 1


def test_the_limit_of_a_recipe_changes_no_key() -> None:
    assert hashed_fields(DocumentsSection()) == {} and "long-line" in REASONS
    assert hashed_fields(DocumentsSection(max_line_bytes=9)) == {"max_line_bytes": 9}
    with pytest.raises(
        ValueError, match=r"documents.max_line_bytes: expected from 1 to 1073741824"
    ):
        DocumentsSection(max_line_bytes=1 << 31)


BOMB = """
import sys
from pathlib import Path
from olmo.corpus.documents import DocumentsSection, documents
out = {name: Path(sys.argv[2], name) for name in ("documents", "heldout", "table")}
facts = documents.build(source=Path(sys.argv[1]), name="bomb",
                        config=DocumentsSection(allow=["long-line"]), **out)
print(facts["lines"], facts["documents"], facts["drops"]["long-line"])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)  # ru_maxrss starts at the parent's
"""


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A line of 3 GB in 3 MB of gz, between two that are documents."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.json.gz"
    many = gzip.compress(b"x" * (1 << 20)) * 3000
    path.write_bytes(gzip.compress(line("one")) + many + gzip.compress(b"\n" + line("two")))
    return path


@pytest.mark.slow
def test_three_gigabytes_in_a_line_take_constant_memory(tmp_path: Path, bomb: Path) -> None:
    assert bomb.stat().st_size < 5e6
    done = subprocess.run(
        [sys.executable, "-c", BOMB, bomb, tmp_path], capture_output=True, text=True, check=True
    )
    counts, peak = done.stdout.splitlines()
    assert counts == "3 2 1" and int(peak) < 1 << 30


@pytest.mark.slow
def test_long_lines_of_files_to_decontaminate_against_too(bomb: Path, monkeypatch) -> None:
    monkeypatch.setattr(overlaps, "MAX_LINE_BYTES", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bomb.json.gz:2: .*a line of more than 1,048,576 bytes"):
        overlaps.count_text_bytes([bomb])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
