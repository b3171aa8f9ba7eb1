"""Strings from elsewhere that would become paths: a hostile second store, mirror, checkpoint."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import web_server
from test_remote import Place

from olmo.checkpoint import huggingface, layout, mirror
from olmo.corpus import listing as listings
from olmo.corpus import source_table
from olmo.io import sealed, untrusted
from olmo.store.record import content
from olmo.store.remote import Remote, pull_names, push_names

OUTSIDE = [
    "",
    ".",
    "..",
    "../a",
    "a/../../b",
    "/etc/passwd",
    "a//b",
    "a/",
    "a/./b",
    "a\\..\\b",
    "a\0b",
]
OUTSIDE += ["a\nb", "a\ud800", "x" * 201, None, 7, ["a"], {"a": 1}]
NO_NAMES = [
    *OUTSIDE,
    "torch.py",
    "olmo/io/downloads.py",
    "config/config.yaml",
    "data",
    "data/../torch.py",
]
NO_DIGESTS = [*OUTSIDE, "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" + "0" * 61, "0" * 64 + "\n"]


@pytest.mark.parametrize(
    ("judge", "bad"),
    [
        *((untrusted.check_relative, bad) for bad in OUTSIDE),
        *((untrusted.check_part, bad) for bad in [*OUTSIDE, "a/b"]),
        *((untrusted.check_name, bad) for bad in NO_NAMES),
        *((untrusted.check_digest, bad) for bad in NO_DIGESTS),
        *((untrusted.check_byte_count, bad) for bad in (-1, 1.5, True, None, "7", 10**30)),
    ],
)
def test_what_names_a_file_here_is_what_it_must_be(judge: Callable[..., Any], bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^http://evil/store: expected .*, found ") as refused:
        judge(bad, "http://evil/store")
    assert "\n" not in str(refused.value) and type(refused.value) is ValueError


def test_what_is_well_passes() -> None:
    assert untrusted.check_relative("model_and_optim/.metadata", "x") == "model_and_optim/.metadata"
    assert untrusted.check_name("data/shards/a b.npy", "x") == "data/shards/a b.npy"
    assert untrusted.check_digest("0a" * 32, "x") == "0a" * 32


def test_the_folders_are_those_of_the_rules() -> None:
    made = set()
    for rules in Path(__file__).parents[2].joinpath("rules").glob("*.smk"):
        for block in re.findall(r"\n    output:\n((?:        .*\n)+)", rules.read_text()):
            made |= set(re.findall(r'(?<!caption=)"([\w-]+)/', block))
    pages = {"environments", "report", "certificate", "ladder"}
    assert made - pages == set(untrusted.OUTPUT_FOLDERS), "what else rules make is not of the store"
    ignored = Path(__file__).parents[2].joinpath(".gitignore").read_text().splitlines()
    assert {f"/{folder}/" for folder in made} <= set(ignored), "a run leaves git status clean"


# --- a second store -----------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path / "ours", monkeypatch)
    source = place.make("data/source.gz", "the source")
    place.make("checkpoints/run/final", "the weights", source=source)
    return place.here()


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path / "theirs", monkeypatch)


class Evil:
    """A second store, pushed to, whose files are then changed so that they are of one piece."""

    def __init__(self, root: Path, ours: Place) -> None:
        self.root = root
        push_names(ours.store, Remote(str(root)), inputs=True)

    def name(self) -> dict[str, Any]:
        return sealed.load_file(self.root / "names/checkpoints/run/final.json")

    def rename(self, name: str, **changes: Any) -> None:
        path = self.root / "names" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sealed.dumps(self.name() | changes))
        (self.root / "names.txt").write_text(f"{name}\n")

    def change(self, alter: Callable[[dict[str, Any]], None], key: str | None = None) -> Any:
        key = key or self.name()["key"]
        path = self.root / "actions" / key[:2] / f"{key}.json"
        record, before = (sealed.load_file(path) for _ in range(2))
        alter(record)
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # not even that
            record["content"] = content(record["outputs"])
        path.chmod(0o644)
        path.write_text(sealed.dumps(record))  # an enemy can seal
        return before


@pytest.fixture
def evil(ours: Place, tmp_path: Path) -> Evil:
    return Evil(tmp_path / "evil", ours)


def all_files(folder: Path) -> dict[str, bytes]:
    """Every file and link of a folder, but for leases, which come and go."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode()
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and "leases" not in path.parts
    }


def refused(theirs: Place, place: str, *patterns: str) -> str:
    """The sentence of a pull that is refused, after which all is as it was."""
    mine = theirs.here().root / "mine.txt"
    mine.write_text("mine")
    before = all_files(theirs.root.parent)
    with pytest.raises(ValueError, match=r"expected|says that|no output|is within") as error:
        pull_names(theirs.store, Remote(place), patterns)
    assert all_files(theirs.root.parent) == before
    assert "\n" not in str(error.value) and place in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("bad", ["../../mine.txt", "../../../mine.txt", "/etc/passwd", "a" * 63, 7])
@pytest.mark.parametrize("where", ["output", "member", "input", "ancestor", "key"])
def test_a_digest_that_is_a_path(theirs: Place, evil: Evil, where: str, bad: Any) -> None:
    def alter(record: dict[str, Any]) -> None:
        file = record["outputs"]["out"]
        if where == "output":
            file["sha256"] = bad
        elif where == "member":
            record["outputs"]["out"] = {"files": {"a": file | {"sha256": bad}}, "aside": {}}
        elif where == "input":
            record["action"]["inputs"]["source"] = [bad]

    if where == "ancestor":
        evil.rename("checkpoints/run/final", ancestors=[bad])
    elif where == "key":
        evil.rename("checkpoints/run/final", key=bad)
    else:
        evil.change(alter)
    refused(theirs, str(evil.root), "checkpoints/run/final")


def test_a_record_whose_parts_are_something_else(theirs: Place, evil: Evil) -> None:
    key = evil.name()["key"]
    theirs.here()
    for path in ("outputs", "outputs out", "action", "action inputs", "facts", "run", ""):
        for bad in (None, [], "x", 7, {"files": []}, {"files": {}, "aside": 3}):
            if path in ("facts", "run") and isinstance(bad, dict):
                continue  # of any kind

            def alter(record: dict[str, Any], path: str = path, bad: Any = bad) -> None:
                *words, last = path.split() or ["key"]
                for word in words:
                    record = record[word]
                record[last] = bad

            before = evil.change(alter)
            with pytest.raises(ValueError, match=r"expected|changed after|another action's"):
                pull_names(theirs.store, Remote(str(evil.root)), ["checkpoints/run/final"])
            evil.change(lambda record, before=before: record.update(before), key)


@pytest.mark.parametrize(
    "bad", ["torch.py", "data/../torch.py", "../torch.py", "config/config.yaml"]
)
@pytest.mark.parametrize("web", [False, True])
def test_a_name_elsewhere_is_not_planted(theirs: Place, evil: Evil, bad: str, web: bool) -> None:
    evil.rename(bad)
    if web:
        with web_server(evil.root) as address:
            assert ascii(bad) in refused(theirs, address)
    else:
        assert ascii(bad) in refused(theirs, str(evil.root))
    if ".." not in bad:  # asked for by name
        assert ascii(bad) in refused(theirs, str(evil.root), bad)
    assert not (theirs.root / "torch.py").exists()


@pytest.mark.parametrize(
    "bad", ["../../torch.py", "/tmp/torch.py", "a\\b", "a/../../b", "", "a//b"]
)
def test_a_member_of_a_folder_stays_in_it(theirs: Place, evil: Evil, bad: str) -> None:
    def alter(record: dict[str, Any]) -> None:
        record["outputs"]["out"] = {"files": {"a": record["outputs"]["out"]}, "aside": {}}
        record["outputs"]["out"]["aside"][bad] = record["outputs"]["out"]["files"]["a"]

    evil.change(alter)
    assert ascii(bad) in refused(theirs, str(evil.root), "checkpoints/run/final")


def test_members_that_are_file_and_folder_at_once(theirs: Place, evil: Evil) -> None:
    def alter(record: dict[str, Any]) -> None:
        file = record["outputs"]["out"]
        record["outputs"]["out"] = {"files": {"a": file, "a/b": file}, "aside": {}}

    evil.change(alter)
    theirs.here()
    with pytest.raises(ValueError, match="expected each path once, found 'a' twice"):
        pull_names(theirs.store, Remote(str(evil.root)), ["checkpoints/run/final"])


def test_a_false_size_moves_no_object(theirs: Place, evil: Evil) -> None:
    digest = theirs.make("data/own.txt", "the source")  # the same bytes, sound and in use
    key = evil.name()["ancestors"][0]
    evil.change(lambda record: record["outputs"]["out"].update(size=3), key)
    refused(theirs, str(evil.root), "checkpoints/run/final")
    assert theirs.store.object_path(digest).exists()
    assert theirs.store.is_intact(digest, 3) is False and theirs.store.is_intact(digest, 10)
    assert not (theirs.store.root / "quarantine").exists()


def test_a_name_lies_in_no_other_and_in_no_store(theirs: Place, evil: Evil) -> None:
    theirs.make("checkpoints/run", "a file of theirs")
    refused(theirs, str(evil.root), "checkpoints/run/final")
    (theirs.root / "checkpoints/run").unlink()
    work = theirs.store.root / "work/abc"
    work.mkdir(parents=True)
    (theirs.root / "checkpoints/other").symlink_to(work)
    evil.rename("checkpoints/other/step9-unsharded")
    refused(theirs, str(evil.root))
    names = ["checkpoints/other", "checkpoints/other/a"]
    for name in names:
        evil.rename(name)
    (evil.root / "names.txt").write_text("\n".join(names))
    (theirs.root / "checkpoints/other").unlink()
    refused(theirs, str(evil.root))


@pytest.mark.parametrize("web", [False, True])
def test_an_object_longer_than_its_record_says(theirs: Place, evil: Evil, web: bool) -> None:
    objects = [path for path in (evil.root / "objects").rglob("*") if path.is_file()]
    [path] = [path for path in objects if path.read_text() == "the weights"]
    path.chmod(0o644)
    path.write_bytes(bytes(5_000_000))
    place = str(evil.root)
    if web:
        with web_server(evil.root) as place:
            said = refused(theirs, place, "checkpoints/run/final")
    else:
        said = refused(theirs, place, "checkpoints/run/final")
    assert "expected 11 bytes at most, found 5,000,000" in said


def test_only_names_that_others_would_take_are_sent(ours: Place, tmp_path: Path, capsys) -> None:
    ours.make("mine.txt", "elsewhere")
    assert push_names(ours.store, Remote(str(tmp_path / "second"))).objects == 2
    assert "mine.txt is not sent" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a name below data, checkpoints"):
        push_names(ours.store, Remote(str(tmp_path / "second")), [Path("mine.txt")])


# --- a mirror, a checkpoint ---------------------------------------------------------------------


@pytest.fixture
def mirrored(tmp_path: Path) -> Iterator[Path]:
    """A mirror with a checkpoint that is whole."""
    own = tmp_path / "own"
    own.mkdir()
    with layout.atomic_checkpoint(own / "step5-unsharded") as folder:
        (folder / "model.pt").write_bytes(b"weights")
        (folder / "train").mkdir()
        (folder / "train/rank0.pt").write_bytes(b"state")
    place = tmp_path / "mirror"
    mirror.mirror_checkpoints(own, str(place))
    yield place


def renamed(place: Path, old: str, new: Any, **facts: Any) -> None:
    """Call a file of a mirrored checkpoint something else in its manifest."""
    manifest = place / "step5-unsharded" / layout.MANIFEST
    files = sealed.load_file(manifest)["files"]
    files[new] = files.pop(old) | facts
    manifest.write_text(sealed.dumps({"files": files}))


@pytest.mark.parametrize(
    "bad", ["../../evil", "/tmp/evil-abs", "a\\..\\evil", ".", "..", "", "a\0b", "a//b"]
)
def test_a_mirrors_manifest_writes_nothing_outside(
    mirrored: Path, tmp_path: Path, bad: str, capsys
) -> None:
    renamed(mirrored, "model.pt", bad)
    here = tmp_path / "here/run"
    here.mkdir(parents=True)
    before = all_files(tmp_path)
    assert mirror.find_newest_or_download(None, here, str(mirrored)) is None
    said = capsys.readouterr().err
    assert f"{mirrored}/step5-unsharded/manifest.json: expected the name" in said
    assert ascii(bad) in said and all_files(tmp_path) == before


def test_a_mirrors_file_goes_through_no_link(mirrored: Path, tmp_path: Path, capsys) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    partial = tmp_path / "here/step5-unsharded.partial"
    partial.mkdir(parents=True)
    (partial / "train").symlink_to(outside)
    assert mirror.find_newest_or_download(None, tmp_path / "here", str(mirrored)) is None
    assert "would be written through the link" in capsys.readouterr().err
    assert not list(outside.iterdir())


def test_a_mirrors_file_has_the_size_that_its_manifest_tells(
    mirrored: Path, tmp_path: Path, capsys
) -> None:
    (mirrored / "step5-unsharded/model.pt").write_bytes(bytes(10_000_000))
    assert mirror.find_newest_or_download(None, tmp_path / "here", str(mirrored)) is None
    assert "expected 7 bytes at most, found 10,000,000" in capsys.readouterr().err
    assert not list((tmp_path / "here").rglob("model.pt"))


def test_checkpoints_elsewhere_in_a_mirror_are_none(mirrored: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(mirrored / "step5-unsharded", mirrored / "deeper/step9-unsharded")
    (tmp_path / "here").mkdir()
    found = mirror.find_newest_or_download(None, tmp_path / "here", str(mirrored))
    assert found == tmp_path / "here/step5-unsharded"
    assert not capsys.readouterr().err, "nothing was passed over"


def test_a_manifest_sends_nothing_from_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "run/step5"
    folder.mkdir(parents=True)
    facts = {"bytes": 4, "sha256": sealed.hash_file(tmp_path / "secret")}
    (folder / layout.MANIFEST).write_text(sealed.dumps({"files": {"../../secret": facts}}))
    with pytest.raises(ValueError, match=r"found '\.\./\.\./secret'"):
        mirror.mirror_checkpoints(tmp_path / "run", str(tmp_path / "mirror"))
    with pytest.raises(ValueError, match=r"unreadable manifest.*found '\.\./\.\./secret'"):
        layout.verify_checkpoint(folder)
    assert not (tmp_path / "mirror/secret").exists()


@pytest.mark.parametrize(
    "bad", ["{}", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 3}}', "[" * 99999]
)
def test_a_manifest_that_is_none(tmp_path: Path, bad: str) -> None:
    (tmp_path / layout.MANIFEST).write_text(bad)
    with pytest.raises(ValueError, match="unreadable manifest"):
        layout.verify_checkpoint(tmp_path)


def test_shards_of_an_export_lie_in_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected the name of a file inside its folder"):
        huggingface._weights(tmp_path)


# --- listings -----------------------------------------------------------------------------------


def test_a_listing_names_what_it_must(tmp_path: Path) -> None:
    row = {"shard": "a", "output": "source", "path": "b", "sha256": "0" * 64, "bytes": "1"}
    for column, bad in (("shard", "../a"), ("sha256", "../../mine"), ("shard", "/a")):
        listing = tmp_path / "000.tsv"
        values = row | {column: bad}
        listing.write_text(sealed.dump_table([values, values.values()]))
        with pytest.raises(ValueError, match=f"000.tsv: expected .*, found '{bad}'"):
            listings.read_listing([listing])


def test_a_source_has_a_name_that_a_file_can_have(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    table.write_text(f"url\tbytes\tsha256\nhttp://h/{'x' * 300}.gz\t\t\n")
    with pytest.raises(ValueError, match="expected the name of a file"):
        source_table.read_stashing_secrets(table)
    table.write_text(f"url\tbytes\tsha256\nhttp://h/a.gz\t{'9' * 5000}\t\n")
    with pytest.raises(ValueError, match="line 2: expected url, bytes"):
        source_table.read_stashing_secrets(table)


@pytest.mark.parametrize("bad", ["record.json", "record.json/x"])
def test_the_stores_own_name_is_no_member(theirs: Place, evil: Evil, bad: str) -> None:
    def alter(record: dict[str, Any]) -> None:
        file = record["outputs"]["out"]
        record["outputs"]["out"] = {"files": {bad: file}, "aside": {}}

    evil.change(alter)
    assert "record.json" in refused(theirs, str(evil.root), "checkpoints/run/final")


@pytest.mark.parametrize(
    "bad",
    [
        "data/small/damage.log",
        "data/small/tokens/000.tsv",
        "data/small/attributes/all.tsv",
        "checkpoints/small/run",
        "checkpoints/small/run/step5/model.pt",
        "checkpoints/.git/hooks",
        "data/.hidden",
    ],
)
def test_what_the_pipeline_writes_itself_is_no_name(theirs: Place, evil: Evil, bad: str) -> None:
    evil.rename(bad)
    assert ascii(bad) in refused(theirs, str(evil.root))


@pytest.mark.parametrize("files", [{}, {"x": 1, "x/y": 1}])
def test_a_mirrors_manifest_of_another_shape_is_passed_over(
    tmp_path: Path, mirrored: Path, files: dict[str, Any]
) -> None:
    facts = {"bytes": 7, "sha256": "0" * 64}
    manifest = mirrored / "step5-unsharded" / layout.MANIFEST
    manifest.write_text(sealed.dumps({"files": {name: facts for name in files}}))
    (tmp_path / "here").mkdir()
    assert mirror.find_newest_or_download(None, tmp_path / "here", str(mirrored)) is None


def test_a_step_has_a_number_that_a_run_can_reach() -> None:
    assert layout.is_checkpoint_name(Path("step999999999999-unsharded"))
    for number in ("9" * 30, "٣"):
        assert not layout.is_checkpoint_name(Path(f"step{number}-unsharded"))
