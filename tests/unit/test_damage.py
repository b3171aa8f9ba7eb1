"""What was made here and is no longer whole: found, written down once, and left to be made anew."""

from pathlib import Path

import pytest
import yaml

from olmo.corpus.source_table import complete_table
from olmo.io.sealed import dump_table
from olmo.pipeline.damage import DamageScanner
from olmo.pipeline.plan import Plan

HEADER = ["shard", "output", "path", "sha256", "bytes"]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/data").mkdir(parents=True)
    (tmp_path / "mine.json.gz").touch()


def damage(dry: bool = False, **sources) -> DamageScanner:
    recipe = {
        "sources": sources or {"files": ["mine.json.gz"]},
        "tokenizer": {"train_vocab_size": 512},
    }
    Path("config/data/mine.yaml").write_text(yaml.safe_dump(recipe))
    runs = {name: {"train": "t.yaml", "dataset": "mine"} for name in ("one", "two")}
    plan = Plan({"runs": runs, "soups": {"soup": ["one", "two"]}})
    return DamageScanner(plan, dry_run=lambda: dry)


def made(name: str, text: str = "") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_what_is_missing_is_written_down_once_a_plan():
    listing = made(
        "data/mine/tokens/000.tsv", dump_table([HEADER, ["p", "tokens", "tokens/p.npy", "ab", "2"]])
    )
    shard = made("data/mine/tokens/p.npy")
    [journal] = map(Path, damage().update_journal("mine"))
    assert journal.read_text() == "" and journal.stat().st_mtime == 0 and listing.exists()
    shard.unlink()
    shard.symlink_to("gone")
    [draft] = map(Path, damage(dry=True).update_journal("mine"))
    assert draft != journal and listing.exists() and not journal.read_text()
    again = damage()
    assert again.update_journal("mine") == again.update_journal("mine") == [str(journal)]
    assert journal.read_text().count("missing: data/mine/tokens/p.npy") == 1
    assert not listing.exists()


def test_a_checkpoint_needs_its_files_its_order_and_its_data():
    for name in ("one", "soup"):
        made(f"checkpoints/{name}/final/model.safetensors")
    needed = {
        "checkpoints/one/global_indices.npy",  # a soup has no order of its own
        "data/mine/tokenizer.json",
        "data/mine/tokens/000.tsv",
    }
    assert damage().find_missing_files("mine") == needed
    for name in needed:
        made(name, dump_table([HEADER]))
    assert damage().find_missing_files("mine") == set()
    weights = Path("checkpoints/soup/final/model.safetensors")
    weights.unlink()
    weights.symlink_to("gone")
    assert damage().find_missing_files("mine") == {str(weights)}


def test_a_table_that_says_something_else_now_is_damage():
    table = made("table.tsv", "url\tbytes\tsha256\tlicence\nhttps://x/a.json.gz\t12\t\todc-by\n")
    row = ["a", "source", "sources/a.json.gz", "a" * 64, "12"]
    listing = made("data/mine/sources/000.tsv", dump_table([HEADER, row]))
    made("data/mine/sources/a.json.gz")
    assert damage(table="table.tsv").find_missing_files("mine") == set()
    complete_table(table, {"https://x/a.json.gz": (12, "a" * 64)})
    assert damage(table="table.tsv").find_missing_files("mine") == set()
    table.write_text(table.read_text().replace("a" * 64, "b" * 64))
    assert damage(table="table.tsv").find_missing_files("mine") == {
        "https://x/a.json.gz: its size or sha256 in table.tsv has changed"
    }
    assert not listing.exists()


def test_a_table_that_is_an_artifact_is_no_listing():
    """The standard library's own manifest lies beside the listings, and names no file of ours."""
    manifest = made("data/mine/stdlib/manifest.tsv", "module\tbytes\tsha256\nast\t17\tabc\n")
    assert not damage().find_missing_files("mine") and manifest.exists()


@pytest.mark.parametrize("dry", [False, True])
def test_a_damaged_listing_is_made_again(dry: bool):
    made("table.tsv", "url\tbytes\tsha256\tlicence\nhttps://x/a.json.gz\t12\t\todc-by\n")
    row = ["a", "source", "sources/a.json.gz", "a" * 64, "12"]
    made("data/mine/sources/a.json.gz")
    listing = made("data/mine/sources/000.tsv", dump_table([HEADER, row])[:-2])
    assert damage(dry, table="table.tsv").find_missing_files("mine") == {f"{listing}/damaged"}
    assert listing.exists() is dry
