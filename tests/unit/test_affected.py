"""`olmo store affected` and its index: what a search of all records finds, whatever was before."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olmo import cli
from olmo.inspect.affected import affected
from olmo.io import sealed
from olmo.store import naming, remote
from olmo.store.action import Action
from olmo.store.commands import collect_garbage, set_pin
from olmo.store.index import find_descendants, open_index
from olmo.store.lineage import input_digests
from olmo.store.record import Record, content, output_files
from olmo.store.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", "store")
    (tmp_path / "store/objects").mkdir(parents=True)
    return Store(tmp_path / "store")


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_record(store: Store, stage: str, inputs: list[str], outputs: list[str], **params) -> str:
    """Write a record that used and made these contents, without a sync; its key."""
    action = Action(stage, 1, params, {"files": inputs})
    made = {f"out-{i}": {"sha256": digest, "size": 10} for i, digest in enumerate(outputs)}
    fields: dict[str, Any] = {"key": action.key, "action": action.as_dict()}
    fields |= {"content": content(made), "outputs": made, "facts": {}, "conditions": {}}
    path = store.record_path(action.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sealed.dumps(fields))
    return action.key


def make(store: Store, name: str, text: str, *inputs: str, **extra) -> str:
    """Run an action of the stage `demo` and name its output; the output's sha256."""

    def build(work: Path) -> dict:
        (work / "outputs" / "out").write_text(text)
        return extra | {"run": {"started": "2026-12-01T10:00:00Z", "wall_s": 61.0, "cpu_s": 2.0}}

    action = Action(extra.pop("stage", "demo"), 1, {"name": name}, {"files": list(inputs)})
    record = store.run(action, build)
    naming.link_output(store, record, "out", Path(name))
    digest: str = record["outputs"]["out"]["sha256"]
    return digest


def search(records: list[Record], bad_keys: set[str], bad: set[str]) -> tuple[set[str], set[str]]:
    """What `find_descendants` finds, by going over all records until nothing changes."""
    made = {r["key"]: {f["sha256"] for f in output_files(r)} for r in records}
    used = {r["key"]: set(input_digests(r)) for r in records}
    reached, before = set(bad_keys), None
    while before != reached:
        before = set(reached)
        tainted = bad.union(*(made[key] for key in reached))
        reached |= {key for key in used if used[key] & tainted}
    good, known = set[str](), None
    while known != good:
        known = set(good)
        sound = set[str]().union(*(made[k] for k in made if k not in reached or k in good)) - bad
        good |= {k for k in reached - bad_keys if not (used[k] & tainted) - sound}
    return reached - good - bad_keys, good


def find(store: Store, keys: set[str], digests: set[str]) -> tuple[set[str], set[str]]:
    with open_index(store) as db:
        ids = {k.hex(): number for k, number in db.execute("SELECT key, id FROM records")}
        contents = {d.hex(): number for d, number in db.execute("SELECT digest, id FROM contents")}
        by_id = {number: key for key, number in ids.items()}
        found = find_descendants(db, {ids[k] for k in keys}, {contents[d] for d in digests})
        return {by_id[n] for n in found[0]}, {by_id[n] for n in found[1]}


def write_random_records(store: Store, random_: random.Random, count: int, contents: int) -> None:
    """Records over few contents: several makers of one, copies, circles."""
    pool = [digest_of(str(n)) for n in range(contents)]
    for number in range(count):
        used = random_.sample(pool, random_.randint(0, 3))
        made = random_.sample(pool, random_.randint(1, 2))
        write_record(store, f"stage{number % 3}", used, made, n=number)


def test_it_finds_what_a_search_of_all_records_finds(tmp_path: Path) -> None:
    apart = 0
    for seed in range(200):
        random_, store = random.Random(seed), Store(tmp_path / str(seed))
        write_random_records(store, random_, random_.randint(3, 25), random_.randint(5, 40))
        records = list(store.records())
        known = sorted({f["sha256"] for r in records for f in output_files(r)})
        keys = {r["key"] for r in random_.sample(records, random_.randint(0, 2))}
        bad = set(random_.sample(known, random_.randint(0, 1)))
        expected = search(records, keys, bad)
        assert find(store, keys, bad) == expected, seed
        apart += bool(expected[0]) and bool(expected[1])
    assert apart > 20, "graphs with both kinds"


def test_an_export_does_not_vouch_for_the_tokenizer_that_it_was_given(store: Store) -> None:
    tokenizer, tokens = digest_of("tokenizer"), digest_of("tokens")
    made = write_record(store, "trained_tokenizer", [], [tokenizer])
    used = write_record(store, "tokens", [tokenizer], [tokens])
    export = write_record(store, "huggingface_export", [tokenizer, tokens], [tokenizer])
    assert find(store, {made}, set()) == ({used, export}, set())
    again = write_record(store, "given_tokenizer", [], [tokenizer])
    assert find(store, {made}, set()) == (set(), {used, export})
    assert find(store, {made, again}, set()) == ({used, export}, set())
    assert find(store, set(), {tokenizer}) == ({used, export}, set())


# --- the index ------------------------------------------------------------------------------


def dump(store: Store) -> dict[str, set]:
    """All that an index says, without its own numbers."""
    queries = {
        "records": "SELECT hex(key), stage, version, bytes FROM records",
        "made": "SELECT hex(key), hex(digest) FROM made JOIN records ON record = records.id "
        "JOIN contents ON content = contents.id",
        "used": "SELECT hex(key), hex(digest) FROM used JOIN records ON record = records.id "
        "JOIN contents ON content = contents.id",
        "origins": "SELECT origin, short, hex(key) FROM origins JOIN records ON record = id",
        "names": "SELECT hex(name), path, project, hex(key), output FROM names",
    }
    with open_index(store) as db:
        return {name: set(db.execute(query)) for name, query in queries.items()}


def test_it_follows_the_records_and_names(store: Store) -> None:
    random_ = random.Random(6)
    sizes, made = set(), list[str]()
    for step in range(60):
        keys = [path.stem for path in (store.root / "actions").glob("??/*.json")]
        change = random_.choice(["add"] * 4 + ["remove", "damage", "lose", "replace", "unname"])
        if change == "add" or not keys:
            used = random_.sample(made, min(2, len(made)))
            url = {"url": f"http://host/{step}.gz"}
            made.append(make(store, f"data/{step}", str(step), *used, facts=url))
        elif change == "remove":
            store.record_path(random_.choice(keys)).unlink()
        elif change == "unname":
            next((store.root / "links").iterdir()).unlink()
        else:
            path = store.record_path(random_.choice(keys))
            if change == "replace":  # the same action gave another content
                record = sealed.load_file(path)
                record["outputs"]["out"]["sha256"] = digest_of(str(step))
                text = sealed.dumps(record)
            else:
                text = path.read_text().replace("demo", "mode")
            if change == "lose":
                path.with_suffix(".copy").unlink(missing_ok=True)
            path.unlink()
            path.write_text(text)
        followed = dump(store)
        (store.root / "index/lineage").unlink()
        assert followed == dump(store), f"{step}: {change}"
        sizes.add(len(followed["records"]))
    assert len(sizes) > 5
    assert list((store.root / "quarantine").iterdir())


def test_a_change_in_the_same_tick_is_seen(store: Store) -> None:
    make(store, "data/a", "a")
    folder = next((store.root / "actions").iterdir())
    before, now = dump(store), folder.stat().st_mtime_ns
    key = next(folder.glob("*.json")).stem
    store.record_path(key).unlink()
    os.utime(folder, ns=(now, now))  # as if the clock had not moved
    assert before["records"] and not dump(store)["records"]


def test_an_unchanged_store_is_not_read_again(store: Store, monkeypatch) -> None:
    make(store, "data/a", "a")
    for folder in (*(store.root / "actions").iterdir(), store.root / "links"):
        os.utime(folder, (1e9, 1e9))
    before, saved = dump(store), (store.root / "index/lineage").stat().st_mtime_ns
    monkeypatch.setattr("olmo.store.index._list_files", None)  # a call fails
    assert dump(store) == before
    assert (store.root / "index/lineage").stat().st_mtime_ns == saved


@pytest.mark.parametrize("place", [100, 5000, -1], ids=["header", "a page", "digest"])
def test_a_damaged_index_is_made_anew(store: Store, place: int) -> None:
    make(store, "data/a", "a")
    before, path = dump(store), store.root / "index/lineage"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert dump(store) == before
    path.write_bytes(path.read_bytes()[:3000])
    assert dump(store) == before
    assert not list(path.parent.glob(".*"))


def test_a_store_that_cannot_be_written_is_indexed_in_memory(store: Store) -> None:
    make(store, "data/a", "a")
    before = dump(store)
    (store.root / "index/lineage").unlink()
    (store.root / "index").rmdir()
    (store.root / "index").write_text("no folder can be made here")
    assert dump(store) == before


def test_processes_that_index_at_once_say_the_same(store: Store, tmp_path: Path) -> None:
    write_random_records(store, random.Random(1), 2000, 3000)
    command = [sys.executable, "-m", "olmo.cli", "store", "affected", "stage1"]
    started = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    said = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(said) == 1 and "667 actions" in said.pop()
    saved = dump(store)
    assert [path.name for path in (store.root / "index").iterdir()] == ["lineage"]
    (store.root / "index/lineage").unlink()
    assert saved == dump(store) and len(saved["records"]) == 2000


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def project(store: Store) -> Iterator[dict[str, str]]:
    """A source, documents of it, tokens of these, and a run; their digests."""
    url = {"url": "https://host/a/part-0.json.gz", "from": "https://mirror/x.gz"}
    found = {"source": make(store, "data/set/sources/part-0.json.gz", "source", facts=url)}
    found["documents"] = make(store, "data/set/documents/part-0.gz", "docs", found["source"])
    found["tokens"] = make(
        store, "data/set/tokens/part-0.npy", "ids", found["documents"], stage="tokens"
    )
    found["final"] = make(store, "checkpoints/run/final", "weights", found["tokens"])
    make(store, "data/other/sources/part-1.json.gz", "another")
    yield found


def rows_of(capsys: pytest.CaptureFixture, *subject: str) -> list[str]:
    """The names that the command says."""
    affected(*subject)
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[0] for line in lines if "  demo@1  " in line or "  tokens@1  " in line]


def test_each_kind_of_subject(store, project, capsys) -> None:
    source, documents, tokens, final = (
        "data/set/sources/part-0.json.gz",
        "data/set/documents/part-0.gz",
        "data/set/tokens/part-0.npy",
        "checkpoints/run/final",
    )
    all_of_it = [source, final, documents, tokens]
    for subject in (
        *(source, "part-0", "part-0.json.gz", project["source"], project["source"][:10]),
        *("https://host/a/part-0.json.gz", "https://me:word@host/a/part-0.json.gz", "data/set"),
        *("https://mirror/x.gz?X-Amz-Signature=abc", "data/set/sources"),
    ):
        assert sorted(rows_of(capsys, subject)) == sorted(all_of_it), subject
    key = naming.last_record(store, Path(documents))
    assert key is not None
    assert rows_of(capsys, key["key"]) == rows_of(capsys, documents) == [documents, final, tokens]
    assert rows_of(capsys, "tokens") == rows_of(capsys, "tokens@1") == [tokens, final]
    Path("copy.gz").write_text("docs")  # the same bytes, anywhere
    assert rows_of(capsys, "copy.gz") == [documents, final, tokens]
    Path(documents).unlink()  # a name is known when it is gone
    assert rows_of(capsys, documents) == [documents, final, tokens]


def test_what_it_says(store, project, capsys) -> None:
    set_pin(store, naming.find_name(store, Path("checkpoints/run/final"))["key"])
    Path("data/set/tokens/part-0.npy").unlink()
    collect_garbage(store)
    affected("https://me:word@host/a/part-0.json.gz?X-Amz-Signature=abc")
    said = capsys.readouterr().out
    assert "word" not in said and "abc" not in said
    final, tokens = (
        next(line for line in said.splitlines() if name in line) for name in ("final", "tokens@1")
    )
    assert "2026-12-01 10:00" in final and "1:01  0:02" in final and final.endswith("pinned")
    assert tokens.endswith("no objects")
    assert "\n4 actions" in said and "4:04" in said, "the sums"
    *_, remove, again = said.splitlines()
    assert remove.split()[:2] == ["rm", "-rf"] and "data/set/sources/part-0.json.gz" in remove
    assert again == "  uv run snakemake --cores 2 checkpoints/run/final"
    affected("part-1")
    assert "1 action " in capsys.readouterr().out


def test_what_a_good_action_made_too_is_apart(store, project, capsys) -> None:
    make(store, "data/set/again.gz", "docs")
    key = naming.find_name(store, Path("data/set/documents/part-0.gz"))["key"]
    affected(key)
    bad, good = capsys.readouterr().out.split("Not affected, since good actions made the same")
    assert "tokens@1" not in bad and "tokens@1" in good and "checkpoints/run/final" in good
    affected(project["documents"])  # these bytes are bad, whoever made them
    said = capsys.readouterr().out
    assert "tokens@1" in said and "Not affected" not in said and "made by 2 actions" in said


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        ("data/set/source", "the nearest is data/set/sources/part-0.json.gz"),
        (
            "tokens@2",
            "expected a stage and a version in the store, found tokens@2; it has tokens@1",
        ),
        ("tokens@x", "expected stage@version, as tokens@1, found tokens@x"),
        ("tokens@", "expected stage@version"),
        ("tokns@1", "it has tokens@1"),
        ("0123456789", "expected a path, a source's name or URL"),
        ("", "expected a path, a source's name or URL"),
        ("new.gz", "which none did"),
        ("twice", "twice is the name of 2 sources, such as data/a/sources/twice.gz and data/b/"),
        ("demo", "demo is a path (./…) and a stage (stage@version)"),
        ("https://me:word@host/other.gz", "found https://host/other.gz"),
    ],
)
def test_a_subject_that_is_wrong_is_one_sentence(project, store, subject, told, capsys) -> None:
    Path("new.gz").write_text("of nobody")
    make(store, "data/a/sources/twice.gz", "1")
    make(store, "data/b/sources/twice.gz", "2")
    Path("demo").symlink_to(Path("checkpoints/run/final").resolve())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["store", "affected", subject])
    assert told in str(stopped.value) and "word" not in str(stopped.value)
    assert "\n" not in str(stopped.value) and not capsys.readouterr().out


def test_digits_that_begin_two_digests(store, capsys) -> None:
    found: dict[str, str] = {}
    for number in range(100_000):
        digest = digest_of(str(number))
        if digest[:6] in found:
            break
        found[digest[:6]] = digest
    one, two = found[digest[:6]], digest
    write_record(store, "demo", [], [one, two])
    with pytest.raises(ValueError, match=f"begins 2 digests, such as {one[:12]}.*{two[:12]}|add"):
        affected(one[:6])
    affected(two)
    assert f"content {two[:12]}" in capsys.readouterr().out


def test_what_was_pulled_with_its_lineage(store, project, tmp_path, monkeypatch, capsys) -> None:
    url = str(tmp_path / "shared")
    remote.push_names(store, remote.Remote(url), [Path("checkpoints/run/final")])
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    pulled = Store(there / "store")
    remote.pull_names(pulled, remote.Remote(url), ["checkpoints/run/final"])
    affected("https://host/a/part-0.json.gz")
    lines = capsys.readouterr().out.splitlines()
    final = next(line for line in lines if line.startswith("checkpoints/run/final"))
    tokens = next(line for line in lines if "tokens@1" in line)
    assert not final.endswith("no objects")
    assert tokens.startswith("(no path)") and tokens.endswith("no objects")
    assert lines[-2:] == [
        "  uv run snakemake --cores 2 checkpoints/run/final",
        "  3 actions without a path: made elsewhere, or replaced",
    ]
