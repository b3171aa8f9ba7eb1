"""Bad input through the real Snakefile: one clear sentence, before hours are spent."""

import gzip
import os
import subprocess
from pathlib import Path

import pytest
from project import Project, documents, write_source

ORDER = "checkpoints/small/global_indices.npy"


def refused(project: Project, *expected: str, target: str = ORDER) -> str:
    """Run to a failure whose last words hold every expected phrase, and no traceback."""
    outcome = project.run(target, ok=False)
    assert outcome.status != 0, outcome.output[-3000:]
    last = outcome.output.rstrip().rpartition("\n\n")[2]
    for phrase in expected:
        assert phrase in last, outcome.output[-3000:]
    assert "Traceback" not in outcome.output
    assert project.half_written() == []
    return outcome.output


def test_an_unknown_key_names_the_nearest(project: Project):
    project.change("config/config.yaml", shards_per_jobs=3)
    refused(project, "shards_per_jobs", "the nearest is 'shards_per_job'")


def test_what_is_not_there_is_named(project: Project):
    refused(project, "expected one of the runs small", "found nobody", target="hf/nobody")
    refused(project, "no rule makes some/thing", "<run>/final", target="some/thing")
    config = project.root / "config/config.yaml"
    text = config.read_text()
    config.write_text(text + "  small: {train: config/train/other.yaml}\n")
    refused(project, "config/config.yaml", "found the key 'small' twice", "line 6")
    config.write_text(text)
    project.change("config/config.yaml", runs__small__train="config/train/none.yaml")
    refused(project, "runs.small.train names config/train/none.yaml", "does not exist")
    config.unlink()
    refused(project, "expected config/config.yaml in", "cd to the project's folder")


def test_an_unknown_recipe_key_names_the_nearest(project: Project):
    project.change("config/data/small.yaml", documents__keep_one=3)
    refused(project, "keep_one", "the nearest is 'keep_one_in'", "config/data/small.yaml")


def test_an_unknown_training_key_names_the_nearest(project: Project):
    project.change("config/train/small.yaml", optimizer__learning_rte=3)
    refused(project, "learning_rte", "the nearest is 'learning_rate'")


def test_a_missing_source(project: Project):
    project.change("config/data/small.yaml", sources={"files": ["sources/none.json.gz"]})
    refused(project, "sources/none.json.gz, which does not exist")


def test_ids_that_do_not_match_are_found_before_any_work(project: Project):
    project.change("config/train/small.yaml", model__eos_token_id=5)
    output = refused(project, "model.eos_token_id is 5", "has 0")
    assert "runs for the first time" not in output


def test_a_vocabulary_that_does_not_match(project: Project, tokenizer: Path):
    """Told before any work where the tokenizer is trained here; a given one is looked into."""
    project.change("config/train/small.yaml", model__vocab_size=500)
    output = refused(project, "model.vocab_size is 500", "train_vocab_size 512")
    assert "runs for the first time" not in output
    project.use_given_tokenizer(tokenizer)
    project.run(ORDER)
    refused(
        project,
        "model.vocab_size: expected the tokenizer's 512, found 500",
        target="checkpoints/small/final",
    )


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (lambda good: good[: len(good) // 2], "truncated"),
        (lambda good: good[:200] + bytes([good[200] ^ 255]) + good[201:], "corrupt"),
        (lambda good: b"<!DOCTYPE html><html>not found</html>", "web page"),
        (lambda good: b"", "empty"),
        (
            lambda good: gzip.compress(b'{"id": "a", "text": "x"}\n{"id": "b", "te', mtime=0),
            "bad-json",
        ),
        (lambda good: gzip.compress(b'{"id": "a"}\n', mtime=0), "no-text"),
        (lambda good: gzip.compress(b'{"text": "x"}\n', mtime=0), "no-id"),
        (lambda good: gzip.compress(b'{"id": "a", "text": "\xff"}\n', mtime=0), "not-utf8"),
    ],
    ids=["truncated", "corrupt", "html", "empty", "json", "text", "id", "utf8"],
)
def test_a_broken_source(project: Project, content, phrase: str):
    project.change("config/data/small.yaml", documents__keep_one_in=1)
    source = project.root / "sources/part-1.json.gz"
    source.write_bytes(content(source.read_bytes()))
    refused(project, phrase, "part-1.json.gz", target="data/small/documents/000.tsv")


def test_an_allowed_drop_is_counted_and_listed(project: Project):
    import polars

    project.change(
        "config/data/small.yaml",
        documents={"keep_one_in": 1, "heldout_share": 0.1, "allow": ["no-text"]},
    )
    lines = documents(1)
    del lines[3]["text"]
    write_source(project.root / "sources/part-1.json.gz", lines)
    project.run("data/small/tokens/000.tsv")
    table = polars.read_parquet(project.root / "data/small/documents/part-1.parquet")
    dropped = table.filter(polars.col("split") == "dropped")
    assert dropped.select("file", "line", "reason").rows() == [("part-1.json.gz", 4, "no-text")]
    assert table.height == len(lines)


def test_a_store_that_cannot_be_written(project: Project, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    project.store = tmp_path / "file"
    refused(project, "cannot be written", "OLMO_STORE")
    project.store = Path("/proc/nowhere")
    refused(project, "the store /proc/nowhere cannot be written", "OLMO_STORE")


def test_two_runs_in_one_folder(project: Project):
    from project import all_gone

    first = project.start(ORDER, mark="two-in-one")
    try:
        while not any((project.root / ".snakemake/leases").glob("running*")):
            assert first.poll() is None
        (project.root / "output.txt").rename(project.root / "first.txt")
        refused(project, "another snakemake (pid", "runs in")
        assert first.wait(120) == 0
    finally:
        first.kill()
        assert all_gone("two-in-one", 10) == {}


def test_a_wrong_sha256(project: Project):
    import hashlib

    right = hashlib.sha256((project.root / "sources/part-0.json.gz").read_bytes()).hexdigest()
    wrong = "0" * 64
    rows = [("sources/part-0.json.gz", right), ("sources/part-1.json.gz", wrong)]
    table = "url\tbytes\tsha256\tlicence\n" + "".join(f"{u}\t\t{s}\tPSF-2.0\n" for u, s in rows)
    (project.root / "sources.tsv").write_text(table)
    project.change("config/data/small.yaml", sources={"table": "sources.tsv"})
    refused(
        project, "part-1.json.gz", f"expected sha256 {wrong}", target="data/small/sources/000.tsv"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_and_then_room(project: Project, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (disk / "ballast").write_bytes(bytes(4 * 2**20 - 60_000))
        project.store = disk / "store"
        refused(project, "the disk is full", "make room")
        assert project.olmo("store", "verify").status == 0
        (disk / "ballast").unlink()
        project.run(ORDER)
        assert project.olmo("store", "verify").status == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_names_that_a_shell_minds_are_only_names(project: Project, tmp_path: Path):
    good = (project.root / "sources/part-0.json.gz").read_bytes()
    names = ["a b", "-rf", "new\nline", "$(touch pwned)", "a;b'c\"d", "`touch pwned`"]
    for name in names:
        (project.root / f"sources/{name}.json.gz").write_bytes(good)
    outside = tmp_path / "outside"  # a link out of the folder, and a path that climbs out of it
    outside.mkdir()
    for name in ("link", "up"):
        (outside / f"{name}.json.gz").write_bytes(good)
    (project.root / "sources/link.json.gz").symlink_to(outside / "link.json.gz")
    files = ["sources/[!p]*.json.gz", "../outside/up.json.gz"]
    project.change("config/data/small.yaml", sources={"files": files})
    project.change("config/config.yaml", shards_per_job=8)
    project.run("data/small/documents/000.tsv")
    made = {path.name for path in (project.root / "data/small/documents").glob("*.json.gz")}
    expected = ["a_b", "rf", "new_line", "__touch_pwned_", "a_b_c_d", "_touch_pwned_", "link", "up"]
    assert made == {f"{name}.json.gz" for name in expected}
    assert not list(tmp_path.rglob("pwned"))
    assert not any(path.is_symlink() for path in outside.iterdir())
    assert (outside / "up.json.gz").read_bytes() == good


def test_a_name_that_snakemake_minds_is_refused(project: Project):
    (project.root / "sources/part-{0}.json.gz").write_bytes(b"")
    refused(project, "part-{0}.json.gz: snakemake reads braces as wildcards; rename the file")
