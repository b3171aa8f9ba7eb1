"""A project from text files, parquet, csv and compressed JSON lines, to a checkpoint."""

import json
from pathlib import Path

import polars
import pyarrow
import pytest
from project import Project, documents
from servers import web_server

TARGET = "checkpoints/small/final"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished project. Of 40 documents each is a text file, the others are rows."""
    found = Project(tmp_path_factory.mktemp("formats") / "project")
    texts = [text["text"] for number in (0, 1) for text in documents(number)]
    for number, text in enumerate(texts[:40]):
        path = found.root / f"texts/{'deep/' * (number % 2)}{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    rows = [{"body": text, "key": number} for number, text in enumerate(texts[40:], 40)]
    (found.root / "rows").mkdir()
    polars.DataFrame(rows[::3]).write_parquet(found.root / "rows/a.parquet")
    polars.DataFrame(rows[1::3]).write_csv(found.root / "rows/b.csv")
    lines = "".join(json.dumps(row) + "\n" for row in rows[2::3])
    compressed = pyarrow.compress(lines.encode(), codec="zstd", asbytes=True)
    (found.root / "rows/c.jsonl.zst").write_bytes(compressed)
    found.change(
        "config/data/small.yaml",
        sources={"files": ["texts/**/*.txt", "rows/*"], "text_field": "body", "id_field": "key"},
        documents={"heldout_share": 0.1},
    )
    outcome = found.run(TARGET)
    assert outcome.ran["converted"] == 4 and outcome.ran["documents"] == 4
    yield found


def tables(project: Project) -> polars.DataFrame:
    return polars.concat(
        polars.read_parquet(path).select("file", "line", "id")
        for path in sorted((project.root / "data/small/documents").glob("*.parquet"))
    )


def test_every_row_has_its_file_and_number(project):
    found = tables(project)
    assert dict(found["file"].value_counts().iter_rows())["texts-0.txt"] == 40
    for row in found.filter(polars.col("file") != "texts-0.txt").iter_rows(named=True):
        first = {"a.parquet": 40, "b.csv": 41, "c.jsonl": 42}[row["file"]]
        assert int(row["id"]) == first + 3 * (row["line"] - 1)
    ids = set(found.filter(polars.col("file") == "texts-0.txt")["id"])
    assert ids == {f"texts/{'deep/' * (n % 2)}{n}.txt" for n in range(40)}
    said = project.olmo("seen", "--run", "small", "--id", "texts/2.txt").output
    assert said.startswith("texts/2.txt (texts-0.txt:") and "step" in said
    assert "a.parquet:" in project.olmo("inspect", "--run", "small", "--step", "1").output


def test_a_changed_text_converts_its_group_alone(project):
    path = project.root / "texts/0.txt"
    path.write_text(path.read_text() + " and more")
    outcome = project.run(TARGET)
    assert outcome.ran["converted"] == 1 and outcome.ran["documents"] == 1
    (project.root / "texts/new.txt").write_text("one more")
    assert project.run(TARGET).ran["converted"] == 1
    assert tables(project).height == 1 + len(documents(0)) + len(documents(1))


def test_files_of_a_table_are_fetched_once_and_converted(project, tmp_path: Path):
    remote = project.copy(tmp_path / "remote")
    with web_server(remote.root / "rows") as server:
        urls = [f"{server}/{name}" for name in ("a.parquet", "b.csv", "c.jsonl.zst")]
        (remote.root / "mine.tsv").write_text(
            "url\tbytes\tsha256\tlicence\n" + "".join(f"{url}\t\t\t\n" for url in urls)
        )
        remote.change("config/data/small.yaml", sources__files=[], sources__table="mine.tsv")
        outcome = remote.run(TARGET)
        assert outcome.ran["fetched"] == 3 and outcome.ran["converted"] == 3
    sizes = [
        int(line.split("\t")[1]) for line in (remote.root / "mine.tsv").read_text().splitlines()[1:]
    ]
    assert sizes == [(remote.root / "rows" / url.rpartition("/")[2]).stat().st_size for url in urls]
    assert "Nothing to be done" in remote.run(TARGET).output
    remote.change("config/data/small.yaml", documents__keep_one_in=2)
    outcome = remote.run(TARGET)  # the server is gone
    assert outcome.ran["documents"] == 3 and not outcome.ran["fetched"] + outcome.ran["converted"]


def test_a_field_that_is_not_there_is_named(project, tmp_path: Path):
    wrong = project.copy(tmp_path / "wrong")
    wrong.change("config/data/small.yaml", sources__text_field="text")
    outcome = wrong.run(TARGET, ok=False)
    said = "rows/a.parquet: expected one field text, found body, key; name the field in the recipe"
    assert outcome.status == 1 and said in outcome.output
    wrong.change("config/data/small.yaml", sources__text_field="body")
    assert wrong.run(TARGET).status == 0
