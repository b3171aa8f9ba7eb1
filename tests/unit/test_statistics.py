"""Statistics: every document and every drop is counted, once."""

import polars
import pytest

from olmo.corpus.statistics import statistics


@pytest.fixture
def shards(tmp_path):
    """The tables of two sources: documents' tables, and the token shards'."""
    made = {"tables": [], "tokens": [], "heldout": []}
    for file, lengths, held, reasons in (
        ("a.gz", [5, 1, 9, 3], [7], ["no-text", "no-text", "bad-json"]),
        ("b.gz", [2], [], []),
    ):
        rows = [("train", None, 10)] * len(lengths) + [("heldout", None, 20)] * len(held)
        rows += [("dropped", reason, None) for reason in reasons]
        table = polars.DataFrame(
            {
                "file": [file] * len(rows),
                "split": [row[0] for row in rows],
                "reason": [row[1] for row in rows],
            },
            schema=dict(file=polars.String, split=polars.String, reason=polars.String),
        )
        made["tables"].append(tmp_path / f"{file}.table")
        table.write_parquet(made["tables"][-1])
        for kind, tokens, size in (("tokens", lengths, 10), ("heldout", held, 20)):
            ends = polars.Series(tokens, dtype=polars.UInt64).cum_sum()
            index = polars.DataFrame(
                {
                    "file": polars.Series([file] * len(tokens), dtype=polars.String),
                    "start": ends - polars.Series(tokens, dtype=polars.UInt64),
                    "end": ends,
                    "bytes": polars.Series([size] * len(tokens), dtype=polars.UInt64),
                }
            )
            made[kind].append(tmp_path / f"{file}.{kind}")
            index.write_parquet(made[kind][-1])
    return made


def test_documents_bytes_tokens_lengths_and_drops_are_counted(shards, tmp_path):
    out = {"summary": tmp_path / "summary", "text": tmp_path / "text"}
    facts = statistics.build(**shards, **out)
    assert facts == {
        "files": len(shards["tables"]),
        "train": {"documents": 5, "bytes": 50, "tokens": 20},
        "heldout": {"documents": 1, "bytes": 20, "tokens": 7},
    }
    frame = polars.read_parquet(out["summary"])
    assert frame.columns[:6] == ["file", "split", "reason", "documents", "bytes", "tokens"]
    assert frame.rows() == [
        ("a.gz", "train", None, 4, 40, 18, 40 / 18, 1, 3, 5, 9),
        ("a.gz", "heldout", None, 1, 20, 7, 20 / 7, 7, 7, 7, 7),
        ("a.gz", "dropped", "bad-json", 1, None, None, None, None, None, None, None),
        ("a.gz", "dropped", "no-text", 2, None, None, None, None, None, None, None),
        ("b.gz", "train", None, 1, 10, 2, 5.0, 2, 2, 2, 2),
        ("in all", "train", None, 5, 50, 20, 2.5, 1, 3, 5, 9),
        ("in all", "heldout", None, 1, 20, 7, 20 / 7, 7, 7, 7, 7),
        ("in all", "dropped", "bad-json", 1, None, None, None, None, None, None, None),
        ("in all", "dropped", "no-text", 2, None, None, None, None, None, None, None),
    ]
    text = out["text"].read_text().splitlines()
    names = "file split reason documents bytes tokens bytes per token shortest median p99 longest"
    assert " ".join(text[0].split()) == names
    assert text[1].split() == ["a.gz", "train", "4", "40", "18", "2.22", "1", "3", "5", "9"]
    again = {"summary": tmp_path / "summary2", "text": tmp_path / "text2"}
    statistics.build(**shards, **again)
    assert again["summary"].read_bytes() == out["summary"].read_bytes()


def test_shards_of_other_documents_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"expected 6 documents in the token shards.*found 5"):
        statistics.build(
            **{**shards, "tokens": shards["tokens"][:1]},
            summary=tmp_path / "summary",
            text=tmp_path / "text",
        )


def test_removed_lines_are_counted(shards, tmp_path):
    for path in shards["tables"]:
        table = polars.read_parquet(path)
        spans = ([2, 1] if table.height > 1 else []) + [0] * table.height
        removed = polars.Series("removed_paragraphs", spans[: table.height], polars.UInt64)
        table.with_columns(removed, (removed * 10).alias("removed_bytes")).write_parquet(path)
    facts = statistics.build(**shards, summary=tmp_path / "summary", text=tmp_path / "text")
    assert facts["train"] == {"documents": 5, "bytes": 50, "tokens": 20}
    cut = polars.read_parquet(tmp_path / "summary").filter(split="cut")
    columns = cut.select("file", "reason", "documents", "bytes").rows()
    assert columns == [(f, "duplicate-paragraph", 2, 30) for f in ("a.gz", "in all")]
