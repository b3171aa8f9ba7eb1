"""Data that comes over the net: a table that learns what arrived, and tokens that are given."""

import json
import re
from pathlib import Path

import pytest
import yaml
from project import TRAIN, Project
from servers import web_server

pytestmark = pytest.mark.slow


def test_a_table_learns_and_given_tokens_train_the_same_model(tmp_path: Path, tokenizer: Path):
    project = Project(tmp_path / "project")
    project.use_given_tokenizer(tokenizer)
    (project.root / "sources").rename(tmp_path / "elsewhere")
    table = project.root / "table.tsv"
    sent: list[int] = []
    with web_server(tmp_path, sent) as web:
        rows = [f"{web}/gone/{name}.json.gz" for name in ("none", "part-0", "part-1", "part-2")]
        table.write_text("\n".join(["url\tbytes\tsha256\tlicence", *rows, ""]))
        project.change(
            "config/data/small.yaml",
            sources={"table": "table.tsv", "mirrors": [f"{web}/gone/={web}/elsewhere/"]},
        )
        # One file that is nowhere keeps no other from coming, also in the batches after it.
        failed = project.run(ok=False, cores=1)
        assert failed.status and failed.ran["download"] == 4
        *_, last = failed.output.split("What failed (1):")
        assert "logs/sources/small/000.log:" in last and "none.json.gz: the server ans" in last
        table.write_text(re.sub(".*/none.*\n", "", table.read_text()))
        came = sum(sent)
        project.run()
        assert sum(sent) == came > 0, "what came is in the store"
        known = [row.split("\t") for row in table.read_text().splitlines()[1:]]
        for url, size, digest, _ in known:
            file = tmp_path / "elsewhere" / url.rpartition("/")[2]
            assert int(size) == file.stat().st_size and len(digest) == 64
        assert "Nothing to be done" in project.run().output

        # What the table says later is held against the file that is here.
        text = table.read_text()
        table.write_text(text.replace(known[1][2], "0" * 64))
        refused = project.run(ok=False)
        assert refused.status and "by the source table, found" in refused.output
        table.write_text(text)

        # A training config that names token files by URL, as OLMo's do, is a run as it is.
        shards = sorted((project.root / "data/small/tokens").glob("*.npy"))
        urls = [f"{web}/project/{shard.relative_to(project.root)}" for shard in shards]
        named = TRAIN | {"tokenizer": {"identifier": "tokenizer.json"}, "data": {"paths": urls}}
        project.write("config/train/given.yaml", named)
        config = yaml.safe_load((project.root / "config/config.yaml").read_text())
        config["runs"]["given"] = {"train": "config/train/given.yaml"}
        project.write("config/config.yaml", config)
        given = project.run("checkpoints/given/final")
        assert given.ran["download_tokens"] == 3 and not given.ran["documents"]
        assert "Nothing to be done" in project.run("checkpoints/given/final").output

    # Nobody held out documents of such data: it is asked its tasks, or told what to give it.
    refused = project.run("eval/given", ok=False)
    assert refused.status and "found no held-out documents in the run's data" in refused.output
    project.write("config/eval/own.yaml", {"choices": ["stdlib_docstrings"], "limit": 4})
    project.change("config/config.yaml", runs__given__evaluation="config/eval/own.yaml")
    assert not project.run("eval/given").ran["heldout_perplexity"]
    rows = json.loads((project.root / "eval/given/results.json").read_text())
    assert {(row["task"], row["documents"]) for row in rows} == {("stdlib_docstrings", 4)}

    def made(run: str) -> dict:
        record = json.loads((project.root / "checkpoints" / run / "final/record.json").read_text())
        return record["action"]["inputs"]

    assert made("given") == made("small"), "the same tokens in the same order"

    # A finished run gets other sources: their files are known after their list has come.
    with web_server(tmp_path, []) as web:
        files = [f"{web}/elsewhere/part-{n}.json.gz" for n in (0, 1)]
        (tmp_path / "list.txt").write_text("\n".join(files))
        project.change("config/data/small.yaml", sources={"url_list": f"{web}/list.txt"})
        assert "source_list" in project.run("-n", "checkpoints/small/final").output
        changed = project.run()
        assert changed.ran["source_list"] == 1 and changed.ran["training"] == 1
        assert "Nothing to be done" in project.run().output
