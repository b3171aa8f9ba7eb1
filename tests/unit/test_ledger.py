"""Lines in = documents out + drops by reason: every line that the toolkit alone would lose."""

import gzip
import json

import polars
import pytest

from olmo.corpus.documents import REASONS, DocumentsSection, documents
from olmo.corpus.fast import Fast
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import tokens

GOOD = [
    json.dumps({"id": f"good-{n}", "text": text}).encode()
    for n, text in enumerate(
        [
            "plain text, long enough to train on " * 3,
            "<|endoftext|> a boundary that somebody put into a text |||IP_ADDRESS|||",
            "ends so <|endoftext|>",
            "<|endoftext|>",
            "größer 字 😀 \u2028 \u0085 \x00 \x1b[0m",
            "  stripped \n\n",
            "windows\r\nline ends, escaped",
            "x",
        ]
    )
]
BAD = {
    "bad-row": [b'"bad-row: expected 2 fields, found 3"'],  # of a converted csv
    "not-utf8": [b'{"id": "a", "text": "\xff"}', b'{"id": "a", "text": "b", "more": "\xc3\x28"}'],
    "bad-json": [b'{"id": "a", "text": "b"', b"", b"<html>", b'{"id": "a", "text": "b"} {}'],
    "not-object": [b'["id", "text"]', b"null", b"7"],
    "no-id": [b'{"text": "as C4 has them", "url": "c"}', b'{"id": null, "text": "b"}'],
    "bad-id": [b'{"id": 7, "text": "b"}'],
    "no-text": [b'{"id": "a"}', b'{"id": "a", "text": null}'],
    "bad-text": [b'{"id": "a", "text": ["b"]}', b'{"id": "a", "text": 7}'],
    "empty-text": [b'{"id": "a", "text": ""}', b'{"id": "a", "text": " \\n\\t "}'],
    "too-long": [b'{"id": "a", "text": "' + b"b" * 2001 + b'"}'],
    "long-line": [b'{"id": "a", "text": "' + b"b" * 4000 + b'"}'],
    "surrogate": [b'{"id": "a", "text": "\\ud800 alone"}', b'{"id": "\\udfff", "text": "b"}'],
    "carriage-return": [b'{"id": "a",\r"text": "b"}'],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source in which every bad line stands between good ones, and its documents."""
    folder = tmp_path_factory.mktemp("ledger")
    lines = []
    for number, bad in enumerate(line for lines in BAD.values() for line in lines):
        good = json.loads(GOOD[number % len(GOOD)])
        lines += [json.dumps({**good, "id": f"{good['id']}/{number}"}).encode(), bad]
    (folder / "source.gz").write_bytes(gzip.compress(b"\n".join([*lines, *GOOD])))
    made = {kind: folder / kind for kind in ("documents", "heldout", "table")}
    facts = documents.build(
        source=folder / "source.gz",
        name="source.gz",
        config=DocumentsSection(
            heldout_share=0.2, max_text_bytes=2000, max_line_bytes=4000, allow=list(REASONS)
        ),
        **made,
    )
    trained_tokenizer.build(
        documents=[made["documents"]], tokenizer=folder / "tokenizer.json", vocab_size=300
    )
    return {**made, "folder": folder, "facts": facts, "lines": len(lines) + len(GOOD)}


def test_every_reason_has_its_lines_and_every_line_its_place(source):
    assert BAD.keys() == REASONS.keys()
    facts = source["facts"]
    assert facts["drops"] == {reason: len(BAD[reason]) for reason in sorted(BAD)}
    assert facts["lines"] == source["lines"]
    assert facts["lines"] == facts["documents"] + facts["heldout"] + sum(facts["drops"].values())
    table = polars.read_parquet(source["table"])
    assert table["line"].to_list() == list(range(1, source["lines"] + 1))


@pytest.mark.parametrize("special_tokens", ["as-special", "as-text"])
def test_both_engines_give_each_document_and_the_same_bytes(
    source, tmp_path, dolma, special_tokens
):
    found = []
    for engine in (dolma, Fast(dolma, audit_share=0), dolma):
        total, content = 0, b""
        for split, name in (("train", "documents"), ("heldout", "heldout")):
            paths = {"tokens": tmp_path / "tokens", "index": tmp_path / "index"}
            facts = tokens.build(
                documents=source[name],
                table=source["table"],
                tokenizer=source["folder"] / "tokenizer.json",
                eos_token_id=0,
                pad_token_id=1,
                toolkit=engine.toolkit,
                engine=engine,
                split=split,
                special_tokens=special_tokens,
                **paths,
            )
            index = polars.read_parquet(paths["index"])
            assert facts["documents"] == index.height == source["facts"][name] > 0
            ends = index["end"].to_list()
            assert index["start"].to_list() == [0, *ends[:-1]]
            assert ends[-1] * 2 == paths["tokens"].stat().st_size
            total += index.height
            content += paths["tokens"].read_bytes() + paths["index"].read_bytes()
        assert total + sum(source["facts"]["drops"].values()) == source["lines"]
        found.append(content)
    assert found[0] == found[1] == found[2]
