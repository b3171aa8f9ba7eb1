"""A second store: what goes there comes back, and nothing that was damaged on the way."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import s3_server, web_server

from olmo.store import naming
from olmo.store.action import Action
from olmo.store.remote import Remote, pull_names, push_names
from olmo.store.store import NondeterministicStage, Store


class Place:
    """A project folder with a store of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        self.store = Store(root / "store")
        root.mkdir()

    def here(self) -> "Place":
        self.patch.chdir(self.root)
        return self

    def make(self, name: str, text: str, **inputs: str) -> str:
        """An action with one output at `name`; the output's digest."""

        def build(work: Path) -> dict:
            (work / "outputs" / "out").write_text(text)
            return {}

        record = self.store.run(Action("demo", 1, {"name": name}, inputs), build)
        naming.link_output(self.store, record, "out", self.root / name)
        return record["outputs"]["out"]["sha256"]


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path / "ours", monkeypatch)
    source = place.make("data/source.gz", "the source")
    shard = place.make("data/shards/a b.npy", "the shard", source=source)
    place.make("checkpoints/run/final", "the weights", shard=shard)
    return place.here()


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path / "theirs", monkeypatch)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "second")


def object_at(url: str, digest: str) -> Path:
    return Path(url, "objects", digest[:2], digest)


def test_a_name_goes_with_its_records_and_only_its_own_contents(ours, theirs, url):
    moved = push_names(ours.store, Remote(url), [Path("checkpoints")])
    assert (moved.objects, moved.existing) == (1, 0)
    assert push_names(ours.store, Remote(url)).existing == 1  # the other two go now
    theirs.here()
    names, moved = pull_names(theirs.store, Remote(url), ["checkpoints/run/final"])
    assert names == ["checkpoints/run/final"] and moved.objects == 1
    assert Path("checkpoints/run/final").read_text() == "the weights"
    assert len(list(theirs.store.records())) == 3, "the way back to the sources comes along"
    assert pull_names(theirs.store, Remote(url), ["checkpoints/run/final"])[1].objects == 0


def test_with_inputs_nothing_is_left_to_do(ours, theirs, url):
    push_names(ours.store, Remote(url), [Path("checkpoints/run/final")], inputs=True)
    theirs.here()
    assert pull_names(theirs.store, Remote(url), inputs=True)[1].objects == 3
    for record in ours.store.records():
        assert theirs.store.lookup(record["key"]) == record


def test_patterns_take_some(ours, theirs, url):
    push_names(ours.store, Remote(url))
    theirs.here()
    assert pull_names(theirs.store, Remote(url), ["data/shards/*.npy"])[0] == [
        "data/shards/a b.npy"
    ]
    assert Path("data/shards/a b.npy").read_text() == "the shard"
    with pytest.raises(ValueError, match="none of its 3 names matches"):
        pull_names(theirs.store, Remote(url), ["data/*.txt"])
    with pytest.raises(ValueError, match="expected the name data/none"):
        pull_names(theirs.store, Remote(url), ["data/none"])


def test_damage_on_the_way_is_fetched_again(ours, theirs, url, monkeypatch, capsys):
    push_names(ours.store, Remote(url))
    theirs.here()
    get, downloaded = Remote.get, []

    def first_one_flipped(self, name, path, max_bytes=None):
        get(self, name, path, max_bytes)
        if name.startswith("objects"):
            downloaded.append(name)
            if len(downloaded) == 1:
                path.write_bytes(b"T" + path.read_bytes()[1:])

    monkeypatch.setattr(Remote, "get", first_one_flipped)
    pull_names(theirs.store, Remote(url), ["data/source.gz"])
    assert Path("data/source.gz").read_text() == "the source" and len(downloaded) == 2
    assert "arrived damaged" in capsys.readouterr().err


def test_damage_there_is_found_and_mended_by_a_push_that_verifies(ours, theirs, url):
    push_names(ours.store, Remote(url))
    digest = ours.store.digest(Path("data/source.gz"))
    object_at(url, digest).write_text("THE SOURCE")
    theirs.here()
    with pytest.raises(ValueError, match=r"its bytes do not match its name.*--verify"):
        pull_names(theirs.store, Remote(url))
    assert not os.path.lexists("data") and not theirs.store.object_path(digest).exists()
    ours.here()
    assert push_names(ours.store, Remote(url)).objects == 0, "of the same size: not looked into"
    assert push_names(ours.store, Remote(url), verify=True).objects == 1
    theirs.here()
    pull_names(theirs.store, Remote(url))
    assert Path("data/source.gz").read_text() == "the source"


def test_damage_here_is_not_sent_and_is_fetched_back(ours, theirs, url):
    push_names(ours.store, Remote(url))
    damaged = Path("data/source.gz").resolve()
    damaged.chmod(0o644)
    damaged.write_text("THE SOURCE")
    with pytest.raises(ValueError, match="damaged or missing in"):
        push_names(ours.store, Remote(url + "-other"))
    assert not Path(url + "-other", "names").exists(), "no name there whose content is not"
    moved = pull_names(ours.store, Remote(url), ["data/source.gz"])[1]
    assert moved.objects == 1 and Path("data/source.gz").read_text() == "the source"


def test_what_must_not_be_written_over_or_outside(ours, theirs, url):
    push_names(ours.store, Remote(url))
    theirs.here()
    Path("data").mkdir()
    Path("data/source.gz").write_text("mine")
    with pytest.raises(ValueError, match="was not made by"):
        pull_names(theirs.store, Remote(url), ["data/*"])
    assert Path("data/source.gz").read_text() == "mine"
    Path(url, "names.txt").write_text("../escaped\n")
    with pytest.raises(ValueError, match=r"inside its folder, found .*escaped"):
        pull_names(theirs.store, Remote(url))


def test_a_changed_record_and_another_content_are_refused(ours, theirs, url):
    push_names(ours.store, Remote(url))
    theirs.here()
    theirs.make("data/source.gz", "another source")
    with pytest.raises(NondeterministicStage, match="two contents for one action"):
        pull_names(theirs.store, Remote(url), ["data/source.gz"])
    [path] = [
        p
        for p in Path(url, "actions").glob("*/*")
        if json.loads(p.read_text())["action"]["inputs"] and "weights" not in p.read_text()
    ][:1]
    record = json.loads(path.read_text())
    record["outputs"]["another"] = record["outputs"].pop("out")
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="changed after it was written"):
        pull_names(theirs.store, Remote(url), ["checkpoints/run/final"])


def test_from_a_web_server(ours, theirs, url):
    push_names(ours.store, Remote(url), inputs=True)
    theirs.here()
    with web_server(Path(url)) as web:
        with pytest.raises(ValueError, match="expected the name nothing"):
            pull_names(theirs.store, Remote(web), ["nothing"])
        assert len(pull_names(theirs.store, Remote(web))[0]) == 3
        with pytest.raises(ValueError, match="http can be pulled from"):
            push_names(ours.store, Remote(web))
    assert Path("data/shards/a b.npy").read_text() == "the shard"


@pytest.fixture
def s3() -> Iterator[str]:
    with s3_server("lab"):
        yield "s3://lab/store"


@pytest.mark.slow
def test_to_and_from_a_bucket(ours, theirs, s3):
    assert push_names(ours.store, Remote(s3), inputs=True).objects == 3
    assert push_names(ours.store, Remote(s3)).existing == 3
    theirs.here()
    names, moved = pull_names(theirs.store, Remote(s3))
    assert len(names) == 3 and moved.objects == 3
    assert Path("checkpoints/run/final").read_text() == "the weights"
    with pytest.raises(ValueError, match="s3://nowhere"):
        push_names(theirs.store, Remote("s3://nowhere/store"))


@pytest.mark.slow
def test_to_a_bucket_that_speaks_s3(ours, theirs, s3, monkeypatch):
    monkeypatch.setenv("R2_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    assert push_names(ours.store, Remote("r2://lab/store")).objects == 3
    theirs.here()
    assert len(pull_names(theirs.store, Remote(s3))[0]) == 3


def test_a_bucket_of_which_nobody_said_where_it_is(monkeypatch):
    monkeypatch.delenv("R2_ENDPOINT_URL", raising=False)
    with pytest.raises(ValueError, match=r"r2://lab/store: R2_ENDPOINT_URL is not set"):
        Remote("r2://lab/store")


def test_what_another_push_has_not_finished_is_no_name(ours, url):
    push_names(ours.store, Remote(url))
    Path(url, "names", "data", ".1a2b3c4d").write_text("{")
    assert len(Remote(url).names()) == 3
