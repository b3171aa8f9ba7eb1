"""Files that are not what their names say: each is named, and the command that is told mends it."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars
import pytest

from olmo.corpus.conversations import local_conversations
from olmo.corpus.documents import documents
from olmo.corpus.source_table import read_stashing_secrets
from olmo.corpus.sources import check_source, local_source
from olmo.corpus.tokenizer import local_tokenizer
from olmo.io import file_types, gz

ROWS = [{"id": f"ä{n}", "text": f"Text {n}, naïve.\n字"} for n in range(300)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def by(command: str) -> Callable[[], bytes]:
    """What a program, if it is here, makes of the text."""

    def pack() -> bytes:
        if shutil.which(command.split()[0]) is None:
            pytest.skip(f"there is no {command.split()[0]} here")
        return subprocess.run(command.split(), input=TEXT.encode(), stdout=subprocess.PIPE).stdout

    return pack


def zipped() -> bytes:
    if shutil.which("unzip") is None:
        pytest.skip("there is no unzip here")
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", TEXT)
    return packed.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as archive:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = len(TEXT.encode())
        archive.addfile(entry, io.BytesIO(TEXT.encode()))
    return packed.getvalue()


def frame(write: Callable[[polars.DataFrame, io.BytesIO], object]) -> Callable[[], bytes]:
    def pack() -> bytes:
        write(polars.DataFrame(ROWS), packed := io.BytesIO())
        return packed.getvalue()

    return pack


KINDS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zst": ("zstd", by("zstd -c")),
    "lz4": ("lz4", by("lz4 -c")),
    "bz2": ("bzip2", lambda: bz2.compress(TEXT.encode())),
    "xz": ("xz", lambda: lzma.compress(TEXT.encode())),
    "zip": ("a zip archive", zipped),
    "tar": ("a tar archive", tarred),
    "parquet": ("parquet", frame(polars.DataFrame.write_parquet)),
    "arrow": ("Arrow's IPC format", frame(polars.DataFrame.write_ipc)),
    "json": ("a JSON array", lambda: json.dumps(ROWS, indent=1).encode()),
    "jsonl": ("JSON lines that are not compressed", TEXT.encode),
    "bom": ("text that begins with a byte order mark", lambda: TEXT.encode("utf-8-sig")),
    "utf16": ("UTF-16 text", lambda: TEXT.encode("utf-16")),
    "utf16le": ("UTF-16 text", lambda: TEXT.encode("utf-16-le")),
    "utf16be": ("UTF-16 text", lambda: TEXT.encode("utf-16-be")),
    "utf32": ("UTF-32 text", lambda: TEXT.encode("utf-32")),
}


def run_command_of(message: str, **places: Path) -> None:
    """Run the command that a message tells, with these files in the places of its words."""
    (command,) = re.findall("`(.*?)`", message, re.DOTALL)
    command = command.replace("uv run python", sys.executable)
    for word, path in places.items():
        command = re.sub(rf"\b{word}(\.gz)?", lambda _, path=path: str(path), command)
    subprocess.run(["bash", "-c", command], check=True)


@pytest.mark.parametrize("named_gz", [False, True], ids=["own name", "named gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_in_the_message_converts_a_file_that_is_not_gz(
    tmp_path: Path, kind: str, named_gz: bool
):
    name, pack = KINDS[kind]
    file = tmp_path / ("it's a.json.gz" if named_gz else f"it's a.{kind}")
    file.write_bytes(content := pack())
    with pytest.raises(ValueError, match=f"found {name}.*Convert it with") as raised:
        local_source.build(file=file, source=tmp_path / "source")
    assert ("name that file in the recipe" in str(raised.value)) is not named_gz
    run_command_of(str(raised.value))
    (made,) = tmp_path.glob("*.gz")
    assert made == file or not named_gz
    lines = gzip.decompress(made.read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert check_source(made, str(made), None, None) > 0
    kept = Path(f"{file}.orig") if named_gz else file
    assert kept.read_bytes() == content, "nothing is lost, whether the command works or not"


@pytest.mark.parametrize("kind", ["zst", "parquet", "utf16"])
def test_a_download_that_is_not_gz_is_an_error(tmp_path: Path, kind: str):
    (tmp_path / "draft").write_bytes(KINDS[kind][1]())
    found = KINDS[kind][0]
    said = f"expected gzip, found {found}. Download it, convert it to gz with `.* part.{kind} "
    with pytest.raises(ValueError, match=said):
        check_source(tmp_path / "draft", f"https://a.org/x/part.{kind}?download=1", None, None)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><title>404</title>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer.*lfs pull",
        ),
        (b"\x93NUMPY\x01\0v\0", "a numpy file"),
        (b"\x1f", "something else"),
        (b"\xf8\x01\x02", "something else"),
    ],
)
def test_files_that_no_command_converts(tmp_path: Path, content: bytes, found: str):
    file = tmp_path / "a.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"found {found}") as raised:
        check_source(file, str(file), None, None)
    assert "Make" not in str(raised.value)


def test_plain_text_may_be_cut_within_a_character():
    assert file_types.detect_type(("字" * 200).encode()[:512])[0].startswith("plain text")
    assert file_types.detect_type("naïve".encode())[0].startswith("plain text")


@pytest.mark.parametrize("kind", ["utf16", "json"])
def test_conversations_of_another_kind(tmp_path: Path, kind: str):
    file = tmp_path / f"talks.{kind}"
    file.write_bytes(KINDS[kind][1]())
    said = f"expected conversations .* found {KINDS[kind][0]}.* Convert it to gz with"
    with pytest.raises(ValueError, match=said) as raised:
        local_conversations.build(file=file, source=tmp_path / "source")
    run_command_of(str(raised.value))
    (made,) = tmp_path.glob("*.gz")
    local_conversations.build(file=made, source=tmp_path / "source")


@pytest.mark.parametrize(
    "encoding, found",
    [("utf-8-sig", "text that begins with a byte order mark"), ("utf-16", "UTF-16 text")],
)
def test_small_files_of_text_in_another_encoding(tmp_path: Path, encoding: str, found: str):
    file = tmp_path / "it's a.tsv"
    table = "url\tbytes\tsha256\tlicence\nhttps://x/ä.gz\t12\t\t\n"
    file.write_bytes(table.encode(encoding))
    with pytest.raises(ValueError, match=f"a.tsv: expected text in UTF-8, found {found}") as raised:
        read_stashing_secrets(file)
    (command,) = re.findall("`(.*?)`", str(raised.value))
    mended = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True).stdout
    file.write_bytes(mended)
    assert [(source.place, source.bytes) for source in read_stashing_secrets(file)] == [
        ("https://x/ä.gz", 12)
    ]
    file.write_bytes("{}".encode(encoding))
    with pytest.raises(ValueError, match=f"a.tsv: expected text in UTF-8, found {found}"):
        local_tokenizer.build(source=file, tokenizer=tmp_path / "out")


WITHIN = {
    "bom": ("1: it begins with a byte order mark", lambda: TEXT.encode("utf-8-sig")),
    "later bom": (
        "300: it begins with a byte order mark",
        lambda: "\n\ufeff".join(TEXT.rstrip("\n").rsplit("\n", 1)).encode(),
    ),
    "utf16": ("1: it is UTF-16 text", lambda: TEXT.encode("utf-16")),
    "utf16be": ("1: it is UTF-16 text", lambda: TEXT.encode("utf-16-be")),
    "tar": ("1: it is a tar archive within gzip", tarred),
    "gzip": ("1: it is gzip within gzip", lambda: gzip.compress(TEXT.encode())),
}


@pytest.mark.parametrize("kind", WITHIN)
def test_wrong_contents_within_gz_are_an_error(tmp_path: Path, kind: str):
    message, pack = WITHIN[kind]
    source = tmp_path / "source.gz"
    source.write_bytes(gzip.compress(pack()))
    made = {part: tmp_path / part for part in ("documents", "heldout", "table")}
    with pytest.raises(ValueError, match=rf"(?s)part.gz:\d.*\n  part.gz:{message}") as raised:
        documents.build(source=source, name="part.gz", **made)
    run_command_of(str(raised.value), FILE=source, MENDED=tmp_path / "mended.gz")
    facts = documents.build(source=tmp_path / "mended.gz", name="part.gz", **made)
    assert facts["documents"] == len(ROWS)


GOOD = gzip.compress(TEXT.encode(), mtime=0)


@pytest.mark.parametrize("garbage", [b"x", b"\r\n", b"\0" * 512 + b"abc", b"<html>" * 9, GOOD[2:]])
@pytest.mark.parametrize("members", [1, 3])
def test_the_command_in_the_message_removes_garbage_after_the_last_member(
    tmp_path: Path, garbage: bytes, members: int
):
    file = tmp_path / "it's a.gz"
    file.write_bytes(GOOD * members + garbage)
    at = len(GOOD) * members + len(garbage) - len(garbage.lstrip(b"\0"))
    found = re.escape(repr(garbage.lstrip(b"\0")[:16]))
    with pytest.raises(ValueError, match=f"at byte {at:,}, found .*trailing garbage .{found}") as e:
        gz.verify_checksum(file)
    run_command_of(str(e.value), MENDED=tmp_path / "mended.gz")
    assert gz.verify_checksum(tmp_path / "mended.gz") == members * len(TEXT.encode())


@pytest.mark.parametrize("zeros", [1, 511, 10240, 600_000])
def test_zeros_after_the_last_member_are_padding(tmp_path: Path, zeros: int):
    file = tmp_path / "a.gz"
    file.write_bytes(GOOD + b"\0" * zeros)
    assert gz.verify_checksum(file) == len(TEXT.encode())
    file.write_bytes(GOOD + b"\0" * zeros + GOOD)
    assert gz.verify_checksum(file) == 2 * len(TEXT.encode()), "and a member after them counts"


@pytest.mark.parametrize("cut", [GOOD + GOOD[:1], GOOD + GOOD[:4], GOOD + GOOD[:-3], GOOD[:-1]])
def test_a_truncated_member_is_not_garbage(tmp_path: Path, cut: bytes):
    (tmp_path / "a.gz").write_bytes(cut)
    with pytest.raises(ValueError, match="truncated"):
        gz.verify_checksum(tmp_path / "a.gz")
