"""Documents: the subsample is the seed's, nothing is lost silently, bad files are refused."""

import gzip
import hashlib
import json
import platform
import subprocess
import sys
import zlib

import polars
import pytest
import yaml

from olmo.corpus.documents import REASONS, DocumentsSection, documents, parse_document
from olmo.corpus.stdlib import split_definitions, stdlib
from olmo.io import gz
from olmo.pipeline.recipe import Recipe


def line(number, **fields):
    return json.dumps({"id": f"doc-{number}", "text": f"text {number} ü", **fields}).encode()


def pack(path, lines, end=b"\n"):
    path.write_bytes(gzip.compress(b"\n".join(lines) + end))
    return path


@pytest.fixture
def run(tmp_path):
    """Runs the stage's function on a source; returns its facts and its outputs' paths."""

    def run(source, name="part.json.gz", **parameters):
        out = {kind: tmp_path / f"{kind}.out" for kind in ("documents", "heldout", "table")}
        apart = {key: parameters.pop(key) for key in ("weight", "kind") if key in parameters}
        config = DocumentsSection(**parameters)
        return documents.build(source=source, name=name, config=config, **out, **apart), out

    return run


@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline at the end", "none"])
def test_keeps_what_the_seed_s_awk_keeps(run, tmp_path, end):
    source = pack(tmp_path / "a.gz", [line(n) for n in range(1, 104)], end)
    awk = subprocess.run(
        f"zcat {source} | awk 'NR%10==1'", shell=True, check=True, capture_output=True
    )
    facts, out = run(source, keep_one_in=10)
    assert gzip.decompress(out["documents"].read_bytes()) == awk.stdout
    assert facts["lines"] == 103 and facts["documents"] == facts["rows"] == 11


def test_the_subsamples_of_all_offsets_make_the_whole(run, tmp_path):
    source = pack(tmp_path / "a.gz", [line(n) for n in range(1, 30)])
    ids = []
    for offset in range(4):
        run(source, keep_one_in=4, offset=offset)
        table = polars.read_parquet(tmp_path / "table.out")
        assert table["line"].to_list() == list(range(offset + 1, 30, 4))
        ids += table["id"].to_list()
    assert sorted(ids) == sorted(f"doc-{n}" for n in range(1, 30))


def test_bad_bytes_outside_the_subsample_change_nothing(run, tmp_path):
    lines = [line(n) for n in range(1, 41)]
    _, out = run(pack(tmp_path / "a.gz", lines), keep_one_in=10, heldout_share=0.5)
    before = {kind: path.read_bytes() for kind, path in out.items()}
    lines[4] = b"\xff not even JSON"
    _, out = run(pack(tmp_path / "a.gz", lines), keep_one_in=10, heldout_share=0.5)
    assert before == {kind: path.read_bytes() for kind, path in out.items()}
    lines[10] = line(11, text="other")
    _, out = run(pack(tmp_path / "a.gz", lines), keep_one_in=10, heldout_share=0.5)
    assert before != {kind: path.read_bytes() for kind, path in out.items()}


def test_each_document_is_in_one_split_and_stays_there(run, tmp_path):
    lines = [line(n) for n in range(2000)]
    facts, out = run(pack(tmp_path / "a.gz", lines), heldout_share=0.1, name="a b.gz")
    assert facts["documents"] + facts["heldout"] == 2000 and 150 < facts["heldout"] < 250
    sides = {
        split: gzip.decompress(out[kind].read_bytes()).splitlines()
        for split, kind in (("train", "documents"), ("heldout", "heldout"))
    }
    table = polars.read_parquet(out["table"])
    assert table.columns == ["file", "line", "id", "split", "row", "bytes", "reason"]
    assert set(table["file"]) == {"a b.gz"}
    for row in table.iter_rows(named=True):
        assert sides[row["split"]][row["row"] - 1] == lines[row["line"] - 1]
        assert row["bytes"] == len(json.loads(lines[row["line"] - 1])["text"].encode())
    chosen = set(table.filter(split="heldout")["id"])
    run(pack(tmp_path / "b.gz", lines[::-2]), heldout_share=0.1)
    table = polars.read_parquet(out["table"])
    assert set(table.filter(split="heldout")["id"]) == chosen & set(table["id"])


def written(out, kind="documents"):
    return [json.loads(one)["id"] for one in gzip.decompress(out[kind].read_bytes()).splitlines()]


def test_a_weight_below_one_takes_the_same_documents_whatever_the_file_s_order(run, tmp_path):
    lines = [line(n) for n in range(3000)]
    _, out = run(pack(tmp_path / "a.gz", lines), weight=0.3)
    some = written(out)
    assert 800 < len(some) < 1000
    _, out = run(pack(tmp_path / "b.gz", lines[::-1]), weight=0.3)
    assert written(out) == some[::-1]
    _, out = run(pack(tmp_path / "a.gz", lines), weight=0.5)
    assert set(some) < set(written(out)), "more weight, and the same ones among them"


def test_a_weight_above_one_repeats_the_whole_and_then_a_part(run, tmp_path):
    source = pack(tmp_path / "a.gz", [line(n) for n in range(1000)] + [BAD["no-text"]])
    facts, out = run(source, weight=2.25, heldout_share=0.1, allow=("no-text",))
    ids, held = written(out), written(out, "heldout")
    whole = [f"doc-{n}" for n in range(1000) if f"doc-{n}" not in held]
    assert ids[: 2 * len(whole)] == whole * 2 and facts["drops"] == {"no-text": 1}
    third = ids[2 * len(whole) :]
    assert 170 < len(third) < 280 and set(third) < set(whole) and len(set(third)) == len(third)
    table = polars.read_parquet(out["table"])
    assert table.filter(split="train")["id"].to_list() == ids
    assert table.filter(split="train")["row"].to_list() == list(range(1, len(ids) + 1))


def test_many_documents_with_an_empty_id_are_a_warning(run, tmp_path, capsys):
    lines = [json.dumps({"id": "", "text": f"text {n}"}).encode() for n in range(50)]
    facts, _ = run(pack(tmp_path / "a.gz", lines), heldout_share=0.5)
    assert sorted((facts["documents"], facts["heldout"])) == [0, 50]
    assert "50 lines have an empty id" in capsys.readouterr().err
    run(pack(tmp_path / "a.gz", lines))
    run(pack(tmp_path / "a.gz", [lines[0], line(1)]), heldout_share=0.5)
    assert "empty id" not in capsys.readouterr().err


BAD = {
    "bad-row": b'"bad-row: expected 2 fields, found 3"',
    "long-line": b'{"id": "a", "more": "' + b"c" * 1000 + b'", "text": "b"}',
    "not-utf8": b'{"id": "a", "text": "\xff"}',
    "bad-json": b'{"id": "a", "text": "b"',
    "not-object": b'["id", "text"]',
    "no-id": b'{"text": "b", "url": "c"}',
    "bad-id": b'{"id": 7, "text": "b"}',
    "no-text": b'{"id": "a", "text": null}',
    "bad-text": b'{"id": "a", "text": ["b"]}',
    "empty-text": '{"id": "a", "text": "\\n \u2003"}'.encode(),
    "too-long": b'{"id": "a", "text": "' + b"b" * 101 + b'"}',
    "surrogate": b'{"id": "a", "text": "\\ud800"}',
    "carriage-return": b'{"id": "a",\r"text": "b"}',
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_bad_line_fails_the_stage_unless_its_reason_is_allowed(run, tmp_path, reason):
    source = pack(tmp_path / "a.gz", [line(1), BAD[reason], line(3)])
    with pytest.raises(ValueError, match=f"part.json.gz:2: {reason}(.|\n)*allow: .{reason}") as e:
        run(source, max_text_bytes=100, max_line_bytes=1000)
    told = yaml.safe_load(str(e.value).rpartition("in the recipe: ")[2])
    recipe = Recipe.new(sources={"stdlib": 1}, tokenizer={"train_vocab_size": 512}, **told)
    allow = tuple(recipe.documents.allow)
    facts, out = run(source, max_text_bytes=100, max_line_bytes=1000, allow=allow)
    assert facts["rows"] == facts["documents"] + sum(facts["drops"].values()) == 3
    assert facts["drops"] == {reason: 1}
    dropped = polars.read_parquet(out["table"]).filter(split="dropped")
    assert dropped.select("file", "line", "row", "reason").rows() == [
        ("part.json.gz", 2, None, reason)
    ]


@pytest.mark.parametrize(
    "other", [b"", b'{"id": "a", "text": "b", "more": NaN}', b'\xef\xbb\xbf{"id": "a"}']
)
def test_almost_json_is_not_a_document(other):
    assert parse_document(other)[2] == "bad-json"


def test_errors_in_other_fields_count():
    assert parse_document(b'{"id": "a", "text": "b", "more": "\xff"}')[2] == "not-utf8"
    assert parse_document(b'{"id": "a", "text": "b", "more": "\\ud800"}')[2] == "surrogate"


def test_windows_line_ends_and_characters_beyond_the_first_plane_are_documents():
    assert parse_document(b'{"id": "a", "text": "\\ud83d\\ude00"}\r\n') == ("a", "😀", None)


@pytest.mark.parametrize(
    "parameters, message",
    [
        (
            {"keep_one_in": 10, "offset": 10},
            "offset: expected from 0 to .* - 1, 9; found 10",
        ),
        ({"keep_one_in": 0}, "keep_one_in"),
        ({"heldout_share": 1.0}, "heldout_share"),
        ({"weight": 0.0}, "expected a weight above 0"),
        ({"allow": ("no-txt",)}, "unknown reason 'no-txt'. Known: .*no-text"),
    ],
)
def test_a_senseless_recipe_is_refused(run, tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        run(pack(tmp_path / "a.gz", [line(1)]), **parameters)


WHOLE = gzip.compress(b"\n".join(line(n) for n in range(5000)) + b"\n", mtime=0)


@pytest.mark.parametrize(
    "content, message",
    [
        (WHOLE[:-1], "truncated"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (WHOLE[:9000] + b"\0\0\0\0" + WHOLE[9004:], "corrupt"),
        (WHOLE[:-8] + b"\0\0\0\0" + WHOLE[-4:], "corrupt"),
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><title>404</title>", "a web page"),
        (b'{"id": "a", "text": "b"}\n', "JSON lines that are not compressed"),
        (gzip.compress(b"", mtime=0), "an empty source"),
    ],
    ids=["cut", "halved", "garbled", "checksum", "empty", "html", "not packed", "no lines"],
)
def test_a_broken_source_is_refused_by_name(run, tmp_path, content, message):
    source = tmp_path / "a.gz"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=f"^part.json.gz: .*{message}"):
        run(source)


def test_several_gzip_members_are_one_file(run, tmp_path):
    source = tmp_path / "a.gz"
    source.write_bytes(WHOLE + gzip.compress(line(5000) + b"\n"))
    assert run(source)[0]["documents"] == 5001


@pytest.mark.slow
def test_the_standard_library_as_a_source_is_the_same_in_every_process(run, tmp_path):
    facts = stdlib.build(folder=tmp_path / "here", shards=3)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from olmo.corpus.stdlib import stdlib;"
            "stdlib.build(folder=Path(sys.argv[1]), shards=3)",
            str(tmp_path / "there"),
        ],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
    )
    names = ["manifest.tsv", "stdlib-00.json.gz", "stdlib-01.json.gz", "stdlib-02.json.gz"]
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == names

    sizes = [(tmp_path / "here" / name).stat().st_size for name in names[1:]]
    assert max(sizes) < 2 * min(sizes)
    found = sum(run(tmp_path / "here" / name)[0]["documents"] for name in names[1:])
    assert found == facts["documents"] > 3000
    text = b"".join(gzip.decompress((tmp_path / "here" / name).read_bytes()) for name in names[1:])
    assert len(text) > 5_000_000 and sys.prefix.encode() not in text
    ids = [json.loads(one)["id"] for one in text.splitlines()]
    assert len(set(ids)) == len(ids)
    assert {"stdlib/json/decoder.py#JSONDecoder", "stdlib/pydoc_data/topics.py#with"} < set(ids)


def test_definitions_and_the_rest_of_a_module_are_its_lines():
    source = "import a\n\n@a.b\n@a.c\ndef f():\n    pass\n\x0cclass C:\n    x = 1\nd = 2"
    assert list(split_definitions(source)) == [
        ("f", "@a.b\n@a.c\ndef f():\n    pass\n"),
        ("C", "\x0cclass C:\n    x = 1\n"),
        ("", "import a\n\nd = 2"),
    ]


def test_a_gz_file_has_no_time_and_no_name(run, tmp_path):
    _, out = run(pack(tmp_path / "a.gz", [line(1)]))
    content = out["documents"].read_bytes()
    assert content[3:8] == bytes(5), "flags (a name would set one) and mtime"
    assert zlib.decompress(content, 31) == line(1) + b"\n"


def test_equal_lines_are_equal_bytes_on_one_kind_of_machine(tmp_path, monkeypatch):
    """Digests from bench/gz_bytes.py's processors; another isal that compresses otherwise is a new
    version of each stage that writes gz."""
    with gz.writing(tmp_path / "lines.gz") as file:
        for n in range(50_000):
            file.write(b'{"id": "%d", "text": "%d words, and %d more"}\n' % (n, n * n, n % 97))
    digest = hashlib.sha256((tmp_path / "lines.gz").read_bytes()).hexdigest()[:16]
    known = {"x86_64": "c2fe6337310daf0a", "aarch64": "fafa639ea4bb5324"}
    assert digest == known[platform.machine()]

    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    out = {kind: tmp_path / kind for kind in ("documents", "heldout", "table")}
    source = pack(tmp_path / "a.gz", [line(1)])
    record = documents(source=source, name="a.gz", **out)
    assert record["conditions"] == {"machine": platform.machine()}
