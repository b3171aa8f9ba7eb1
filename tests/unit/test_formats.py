"""Sources in the formats that people have: each row becomes a document's line, in order."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import polars
import pyarrow
import pyarrow.parquet
import pytest

from olmo.corpus import ingest, source_table
from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.formats import (
    DocumentUnit,
    RowsSection,
    converted,
    needs_conversion,
    read_lines,
    split_suffixes,
)
from olmo.corpus.listing import read_listing
from olmo.corpus.sources import SourcesSection
from olmo.io import gz


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def convert(folder: Path, name: str, content: bytes, **rows: object) -> list[bytes]:
    """The lines that a file with this name and content becomes."""
    (folder / "in").write_bytes(content)
    source, section = folder / "out.json.gz", RowsSection.new(**rows)
    facts = converted.build(files=[folder / "in"], source=source, names=[name], rows=section)
    lines = gzip.decompress(source.read_bytes()).splitlines()
    assert facts["rows"] == len(lines)
    return lines


def texts(lines: list[bytes]) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in lines]
    assert [row["metadata"]["row"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["id"], row["text"]) for row in rows]


JSON = b'{"text": "one", "id": 7}\n{"text": "tw\xc3\xb6", "more": [1]}\n'
JSON_TEXTS = [("7", "one"), ("{}:2", "twö")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON),
        ("a.json", JSON[:-1]),
        ("a.ndjson", b"\xef\xbb\xbf" + JSON),
        ("a.jsonl.gz", gzip.compress(JSON, mtime=0)),
        ("a.jsonl.zst", zstd(JSON)),
        ("a.zst", zstd(JSON[:25]) + zstd(JSON[25:])),
        ("a.csv", b'id,text,more\n7,one,\n,"tw\xc3\xb6",1\n'),
        ("a.csv.gz", gzip.compress(b"more,text,id\r\n,one,7\r\n1,tw\xc3\xb6,\r\n", mtime=0)),
        ("a.tsv.zst", zstd(b"text\tid\none\t7\ntw\xc3\xb6\t\n")),
    ],
)
def test_rows_of_each_format(tmp_path: Path, name: str, content: bytes):
    wanted = [(identity.format(name), text) for identity, text in JSON_TEXTS]
    assert [(i or f"{name}:2", t) for i, t in texts(convert(tmp_path, name, content))] == wanted


def test_parquet_has_columns_of_other_names_and_many_batches(tmp_path: Path):
    count = 10_000
    table = {
        "body": [f"text {n}" for n in range(count)],
        "key": list(range(count)),
        "x": [0.5] * count,
    }
    polars.DataFrame(table).write_parquet(tmp_path / "made", row_group_size=3_000)
    content = (tmp_path / "made").read_bytes()
    lines = convert(tmp_path, "a.parquet", content, text_field="body", id_field="key")
    assert texts(lines) == [(str(n), f"text {n}") for n in range(count)]
    with pytest.raises(ValueError, match=r"a.parquet: expected one field text, found body, key, x"):
        convert(tmp_path, "a.parquet", content)
    with pytest.raises(ValueError, match=r"a.parquet: damaged parquet: .*Download"):
        convert(tmp_path, "a.parquet", content[:-100] + b"PAR1", text_field="body")


def write_parquet(path: Path, **columns: pyarrow.Array) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path.read_bytes()


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "dictionary<values=string>"]
)
def test_columns_of_strings_of_every_kind(tmp_path: Path, kind: str):
    text = pyarrow.array(["one", None, "drei", "four", "five"])
    text = text.dictionary_encode() if "dictionary" in kind else text.cast(kind)
    nested = pyarrow.array([{"text": "no", "id": [n]} for n in range(5)])
    content = write_parquet(tmp_path / "made", text=text, more=nested)
    lines = texts(convert(tmp_path, "a.parquet", content))
    assert [text for _, text in lines] == ["one", None, "drei", "four", "five"]


@pytest.mark.parametrize("kind", ["list<string>", "struct<text: string>", "int64"])
def test_a_column_without_strings_is_named(tmp_path: Path, kind: str):
    rows = {"list": [["a"]], "struct": [{"text": "a"}], "int64": [1]}[kind.split("<")[0]]
    content = write_parquet(tmp_path / "made", text=pyarrow.array(rows))
    with pytest.raises(
        ValueError, match=f"a.parquet: expected strings in the field text, found {kind[:4]}"
    ):
        convert(tmp_path, "a.parquet", content)


def test_odd_rows_stay_what_they_are(tmp_path: Path):
    text = b"a\0b, words"
    assert texts(convert(tmp_path, "a.txt", b"\xef\xbb\xbf" + text)) == [("a.txt", "a\0b, words")]
    content = (
        b'\ntext,id\r\n\r\n"a ""quote"",\r\nand a line",1\r\n' + b"x" * 300_000 + b",2\r\n\r\n"
    )
    found = texts(convert(tmp_path, "a.csv", content))
    assert found == [("1", 'a "quote",\r\nand a line'), ("2", "x" * 300_000)]
    content = write_parquet(tmp_path / "made", text=pyarrow.array(["a"]), id=pyarrow.array([b"k"]))
    assert texts(convert(tmp_path, "a.parquet", content)) == [("k", "a")]
    content = (
        b'{"text": "a", "id": 123456789012345678901234567890}\r\n\n{"text": "b", "text": "c"}\n'
    )
    first, empty, last = convert(tmp_path, "a.jsonl", content)
    assert not empty and texts([first])[0][0] == "123456789012345678901234567890"
    assert json.loads(last)["metadata"] == {"file": "a.jsonl", "row": 3}


def test_a_drop_in_a_group_of_texts_is_told_by_its_file(tmp_path: Path):
    contents = {"a.txt": b"one", "b/pic.txt": b"\xff\xd8", "c.txt": b" "}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    names = list(contents)
    source = tmp_path / "source"
    converted.build(files=[tmp_path / name for name in names], source=source, names=names)
    out = {key: tmp_path / key for key in ("documents", "heldout", "table")}
    with pytest.raises(ValueError) as raised:
        documents.build(source=source, name="texts-0.txt", **out)
    assert "\n  b/pic.txt:1: not-utf8\n  c.txt:1: empty-text\n" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"}\n', r"no-id\n.*id_field: ….*one_document_per: row}\nCorrect"),
        (b'{"id": 7, "text": "a"}\n', r"bad-id\n.*id_field: ….*one_document_per: row}\nCorrect"),
        (b'{"id": "a", "body": "a"}\n', r"no-text\n.*text_field: …}\nCorrect"),
    ],
)
def test_rows_of_other_fields_are_told_the_recipes_key(tmp_path: Path, line: bytes, said: str):
    (tmp_path / "a.gz").write_bytes(gzip.compress(line))
    out = {key: tmp_path / key for key in ("documents", "heldout", "table")}
    with pytest.raises(ValueError, match=rf"a.gz:1: {said}"):
        documents.build(source=tmp_path / "a.gz", name="a.gz", **out)


def test_text_is_one_document_or_one_a_line(tmp_path: Path):
    text = b"Ein Text,\r\nzwei Zeilen\n\n"
    assert texts(convert(tmp_path, "x/a.txt", text)) == [("x/a.txt", text.decode())]
    assert texts(convert(tmp_path, "a.md.gz", gzip.compress(text))) == [("a.md.gz", text.decode())]
    found = texts(convert(tmp_path, "a.rst", text, one_document_per="line"))
    assert found == [("a.rst:1", "Ein Text,"), ("a.rst:2", "zwei Zeilen"), ("a.rst:3", "")]
    assert texts(convert(tmp_path, "a.txt", text, one_document_per="row", id_field="key"))
    found = texts(convert(tmp_path, "a.txt", text, one_document_per="line", id_field="key"))
    assert found[0] == ("a.txt:1", "Ein Text,")  # of a folder with rows too
    with pytest.raises(ValueError, match="expected one_document_per: line or row for csv, found"):
        convert(tmp_path, "a.csv", b"text\na\n", one_document_per="file")


def test_malformed_rows_are_drops_by_file_and_row(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    made = {
        "a.jsonl": b'{"text": "a"}\nno json\n{"text": null}\n\xff\xfe\n["text"]\n{"text": 5}\n',
        "b.csv": b"text,key\na,1\nb\n\xff,2\n" + b"c,3,4\n",
        "c.jsonl": b'{"text": "a", "key": 1}\n{"text": "b"}\n',
    }
    wanted = {
        "a.jsonl": {2: "bad-json", 3: "no-text", 4: "not-utf8", 5: "not-object", 6: "bad-text"},
        "b.csv": {2: "bad-row", 3: "not-utf8", 4: "bad-row"},
        "c.jsonl": {2: "no-id"},
    }
    for name, content in made.items():
        section = {"id_field": "key"} if name == "c.jsonl" else {}
        convert(tmp_path, name, content, **section)
        out = {key: tmp_path / f"{name}-{key}" for key in ("documents", "heldout", "table")}
        allowed = DocumentsSection(allow=sorted(set(wanted[name].values())))
        source = tmp_path / "out.json.gz"
        documents.build(source=source, name=name, config=allowed, **out)
        dropped = polars.read_parquet(out["table"]).filter(polars.col("split") == "dropped")
        assert dict(dropped.select("line", "reason").iter_rows()) == wanted[name]
        with pytest.raises(ValueError, match=rf"{name}:{min(wanted[name])}: "):
            documents.build(source=source, name=name, **out)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"PAR1" + bytes(600), "expected JSON lines, found parquet; convert it with"),
        ("a.parquet", JSON, "expected parquet, found JSON lines that are not compressed"),
        ("a.txt", b"%PDF-1.4", "expected text, found PDF"),
        ("a.csv", "text\na\n".encode("utf-16"), "expected csv, found UTF-16 text.*iconv"),
        ("a.csv", b"<html>no</html>", "expected csv, found a web page"),
        ("a.json", b'[{"text": "a"}]', "expected an object a line, found a JSON array.*json.load"),
        ("a.csv", b"", "expected a header, found an empty file"),
        ("a.csv", b"a;text\n1;b\n", "expected fields between commas .* found 'a;text'; convert"),
        ("a.csv", b"a,body\n1,b\n", "expected one field text, found a, body; name the field"),
        ("a.csv", b'text\n"never closed\n', "line 2: expected csv in row 1, found: unexpected end"),
        ("a.csv", b'text\n"a" b\n', "line 2: expected csv in row 1, found"),
        ("a.jsonl", b'{"body": "a"}\n', "expected one field text, found body; .*text_field: …"),
        ("a.jsonl.zst", zstd(JSON * 99)[:-3], "damaged zstd: .*Download the file again"),
        ("a.jsonl.gz", gzip.compress(JSON * 99, mtime=0)[:-3], "truncated: .*Download"),
    ],
)
def test_what_no_rows_come_from_is_named(tmp_path: Path, name: str, content: bytes, said: str):
    with pytest.raises(ValueError, match=f"(?s)^{name}(, |: ).*{said}"):
        convert(tmp_path, name, content)


def test_dolmas_own_format_is_taken_as_it_is():
    rows = RowsSection()
    for name in ("a.json.gz", "a.jsonl.gz", "wiki.2024.gz", "http://h/a.json.gz?x=1"):
        assert not needs_conversion(name, rows) and split_suffixes(name) == (".jsonl", ".gz")
        assert needs_conversion(name, RowsSection(text_field="body"))
    for name in (
        "a.jsonl",
        "a.json.zst",
        "a.csv",
        "http://h/a.parquet?x=1",
        "hf://datasets/a/b/c.csv",
    ):
        assert needs_conversion(name, rows)
    assert not needs_conversion("a.bin", rows)  # refused as what it is


def test_text_files_are_grouped_and_one_more_changes_one_group(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source_table, "GROUP_FILES", 16)
    for number in range(60):
        path = tmp_path / f"corpus/{number % 3}/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "corpus/b.jsonl").write_bytes(JSON)
    section = SourcesSection(files=["corpus/**/*.txt", "corpus/*.jsonl"])

    def find() -> dict[str, source_table.Source]:
        grouped = section.rows.takes_whole_files
        found = source_table.find_local_files(
            section.files, Path("config/data/x.yaml"), is_grouped=grouped
        )
        return {source.name: source for source in found}

    before = find()
    assert list(before) == ["b", "corpus-0", "corpus-1", "corpus-2", "corpus-3"]
    assert sorted(place for source in before.values() for place in source.parts) == sorted(
        f"corpus/{n % 3}/{n}.txt" for n in range(60)
    )
    (tmp_path / "corpus/0/new.txt").write_text("text")
    after = find()
    assert sum(before[name] != after[name] for name in before) == 1
    section.one_document_per = DocumentUnit.line
    assert len(find()) == 62


def test_groups_of_texts_have_names_of_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/b/1.txt", "a-b/2.txt", "3.csv", "a-b-0.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def find(*patterns: str) -> dict[str, tuple[str, ...]]:
        grouped = RowsSection().takes_whole_files
        recipe = Path("config/data/x.yaml")
        found = source_table.find_local_files(patterns, recipe, is_grouped=grouped)
        return {source.name: source.parts for source in found}

    groups = find("a/b/*.txt", "a-b/*.txt", "3.csv")
    assert groups == {"3": (), "a-b-0": ("a-b/2.txt", "a/b/1.txt")}
    with pytest.raises(ValueError, match=r"a-b-0.csv has the name of a group of texts; rename it"):
        find("a/b/*.txt", "*.csv")


def test_a_batch_of_all_formats(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.txt").write_text(f"text {number}")
    (tmp_path / "in/a.csv").write_text("text\none\n")
    (tmp_path / "in/b.json.gz").write_bytes(gzip.compress(b'{"id": "b", "text": "two"}\n'))
    listing = tmp_path / "data/mine/sources/000.tsv"
    words = ["a=in/a.csv", "b=in/b.json.gz", "in-0=texts:in-0"]
    ingest.sources(listing=listing, sources=words, files=["in/*.txt", "in/*.csv", "in/*.gz"])
    found = {}
    for entry in read_listing([listing], "source"):
        with gz.reading(entry.object) as lines:
            found[entry.shard] = [json.loads(line)["text"] for line in lines]
    assert found == {"a": ["one"], "b": ["two"], "in-0": ["text 0", "text 1", "text 2"]}
    with pytest.raises(ValueError, match="in-7: its text files changed meanwhile; run the same"):
        ingest.sources(listing=listing, sources=["in-7=texts:in-7"], files=["in/*.txt"])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.zst", ".csv"])
def test_a_large_file_takes_little_memory(tmp_path: Path, suffix: str):
    """A row group of 256 MiB; the file is converted in a process of its own."""
    path = tmp_path / f"large{suffix}"
    frame = polars.DataFrame({"text": ["word " * 400] * (1 << 17), "id": range(1 << 17)})
    if suffix == ".parquet":
        frame.write_parquet(
            path, row_group_size=1 << 17, compression="uncompressed", statistics=False
        )
    elif suffix == ".csv":
        frame.write_csv(path)
    else:
        path.write_bytes(zstd(frame.select("text").write_ndjson().encode()))
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from olmo.corpus.formats import converted
from olmo.store.stage import peak_memory_bytes
converted.build(
    files=[Path({str(path)!r})], source=Path({str(out)!r}), names=["large{suffix}"]
)
print(peak_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250e6
    assert sum(1 for _ in read_lines(path, path.name, RowsSection())) == 1 << 17
