"""A source that the table knows since its download is found in the store."""

import json
from pathlib import Path

import pytest
from project import documents, write_source
from servers import web_server

from olmo.corpus.ingest import sources
from olmo.store.stage import current_store


def count_downloads() -> int:
    records = Path(current_store().root).glob("actions/*/*.json")
    stages = [json.loads(record.read_text())["action"]["stage"] for record in records]
    assert set(stages) == {"download"}
    return len(stages)


def test_a_table_that_a_download_completed_asks_for_the_same_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    table, listing = Path("table.tsv"), Path("data/mine/sources/000.tsv")
    write_source(tmp_path / "served/a.json.gz", documents(0, 3))
    sent: list[int] = []
    with web_server(tmp_path / "served", sent) as address:
        table.write_text(f"url\tbytes\tsha256\tlicence\n{address}/a.json.gz\t\t\t\n")
        asked = [f"a={address}/a.json.gz"]
        sources(listing, asked, table)
        listed, known = listing.read_text(), table.read_text()
        digest = known.split("\t")[-2]
        assert len(digest) == 64 and digest in listed
        sources(listing, asked, table)
        assert (count_downloads(), len(sent)) == (1, 1) and listing.read_text() == listed

        # If the object is lost, a download must have the sha256 of the table.
        write_source(tmp_path / "served/a.json.gz", documents(1, 3))
        current_store().object_path(digest).unlink()
        with pytest.raises(ValueError, match="by the source table, found"):
            sources(listing, asked, table)
