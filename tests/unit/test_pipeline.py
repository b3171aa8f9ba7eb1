"""The plan: names of files, from configs and recipes, without running anything."""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from olmo.pipeline import Plan, named, safe

RECIPE = {
    "sources": {"files": ["in/*.json.gz"]},
    "documents": {"keep_one_in": 10, "allow": ["no-id", "no-text"]},
    "tokenizer": {"train_vocab_size": 512},
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OLMO_STORE", raising=False)
    (tmp_path / "config/data").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / f"in/part-{number}.json.gz").touch()
    return tmp_path


def plan(dry: bool = False, **changes) -> Plan:
    Path("config/data/mine.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
    runs = {"r": {"train": "t.yaml", "dataset": "mine"}}
    return Plan({"runs": runs, "shards_per_job": 2}, dry_run=lambda: dry)


def test_batches():
    assert plan().batches("mine") == ["000", "001", "002"]
    assert [source.name for source in plan().batch("mine", "002")] == ["part-4"]
    assert plan().listings("mine", "tokens")[0] == "data/mine/tokens/000.tsv"


def test_flags_quote_what_a_shell_minds():
    assert plan().flags("mine", "documents").startswith("--keep-one-in 10 --offset 0")
    assert "--allow no-id no-text" in plan().flags("mine", "documents")
    Path("in/a b; $(touch x).json.gz").touch()
    words = shlex.split(plan(sources={"files": ["in/a*"]}).source_flags("mine", "000"))
    assert words == ["a_b____touch_x_=in/a b; $(touch x).json.gz"]


def test_names_are_safe_and_unlike():
    assert safe("-rf.json.gz") == "rf" and safe("a b\n.jsonl.gz") == "a_b_"
    both = named([("x/part-0.gz", None, None), ("y/part-0.gz", None, None)])
    assert [source.name for source in both] == ["x-part-0", "y-part-0"]
    with pytest.raises(ValueError, match="two sources would have the name"):
        named([("part.gz", None, None), ("part.gz", None, None)])


def test_exactly_one_kind_of_source():
    with pytest.raises(ValueError, match="found stdlib and files"):
        plan(sources={"stdlib": 2, "files": ["x"]}).recipe("mine")
    with pytest.raises(ValueError, match="found none"):
        plan(sources={}).recipe("mine")


def test_a_recipe_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"recipe config/data/yours.yaml.*there are mine"):
        plan().recipe("yours")


def test_a_list_that_is_not_at_hand_says_what_follows(capsys: pytest.CaptureFixture[str]):
    lists = plan(sources={"url_list": "https://somewhere/urls.txt"})
    assert lists.unlisted("mine") and lists.unlisted("mine")
    said = capsys.readouterr().err
    assert said.count("known after its list") == 1 and "sources → documents → tokens" in said
    Path("data/mine").mkdir(parents=True)
    table = "url\tbytes\tsha256\tlicence\nhttps://x/a.json.gz\t12\t\todc-by\n"
    Path("data/mine/sources.tsv").write_text(table)
    assert not lists.unlisted("mine")
    assert lists.source_flags("mine", "000") == "'a=https://x/a.json.gz#bytes=12'"


def test_what_is_missing_is_written_down_once_a_plan():
    listing = Path("data/mine/tokens/000.tsv")
    listing.parent.mkdir(parents=True)
    listing.write_text("shard\toutput\tpath\tsha256\tbytes\np\ttokens\ttokens/p.npy\tab\t2\n")
    shard = Path("data/mine/tokens/p.npy")
    shard.touch()
    [journal] = map(Path, plan().journal("mine"))
    assert journal.read_text() == "" and journal.stat().st_mtime == 0 and listing.exists()
    shard.unlink()
    shard.symlink_to("gone")
    looked = plan(dry=True)
    [draft] = map(Path, looked.journal("mine"))
    assert draft != journal and draft.exists() and listing.exists() and not journal.read_text()
    again = plan()
    assert again.journal("mine") == again.journal("mine") == [str(journal)]
    assert journal.read_text().count("missing: data/mine/tokens/p.npy") == 1
    assert not listing.exists()


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    assert plan().store == os.path.abspath("store")
    monkeypatch.setenv("OLMO_STORE", "/big/disk")
    assert plan().store == "/big/disk"
