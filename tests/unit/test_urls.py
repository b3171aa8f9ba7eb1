"""URLs with secrets: they open what they are for, and nobody is told them."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_run
from servers import guarded_web_server
from test_remote import Place

from olmo import cli
from olmo.checkpoint import mirror as checkpoints
from olmo.config import TrainConfig
from olmo.corpus import ingest, source_table
from olmo.corpus.sources import download, source_list
from olmo.data.files import ArrayFile
from olmo.inspect.run import load_run_config
from olmo.io import downloads, http_client, sealed
from olmo.io.bucket import Bucket
from olmo.pipeline.plan import Plan
from olmo.runtime.log import log
from olmo.runtime.urls import redact, restore_secrets, stash_secrets
from olmo.store.remote import Remote, push_names
from olmo.store.stage import current_store

WORD, SIGNATURE = "hunter-two", "5ecre7519na7ure"
USER = f"me:{WORD}@"
AWS = f"X-Amz-Algorithm=A&X-Amz-Credential=c%2Fd&X-Amz-Date=1&X-Amz-Signature={SIGNATURE}"
ASKED: list[str] = []  # of the guarded server, by the test that runs now
AZURE = f"sv=2024&se=2026-01-01&sr=b&sp=r&sig={SIGNATURE}%3D"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test entrusts ends with it."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("http://h/a.gz?id=7&page=2", "http://h/a.gz?id=7&page=2"),
        ("hf://datasets/owner/name@main/a.gz", "hf://datasets/owner/name@main/a.gz"),
        ("hf://name@main/a.json", "hf://name@main/a.json"),
        ("http://h:8000/@me/a?mail=a@b.org", "http://h:8000/@me/a?mail=a@b.org"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://h/a?Expires=1&x=2", "http://h/a?Expires=1&x=2"),
        ("http://h/a?key=books/7", "http://h/a?key=books/7"),
        (f"https://{USER}h:80/a?id=7", "https://h:80/a?id=7"),
        (f"s3://{USER}bucket/a", "s3://bucket/a"),
        (f"http://me:{WORD}/x#y@h/a", "http://h/a"),
        (f"https://h/a?{AWS}", "https://h/a"),
        (f"https://h/a?{AZURE}", "https://h/a"),
        (f"https://h/a?id=7&{AZURE}&page=2", "https://h/a?id=7&page=2"),
        (f"https://h/a?AWSAccessKeyId=a&Signature={SIGNATURE}&Expires=9", "https://h/a"),
        (f"https://h/a?X-Goog-Signature={SIGNATURE}&X-Goog-Date=1", "https://h/a"),
        *((f"https://h/a?{name}={SIGNATURE}&n=1", "https://h/a?n=1") for name in (
            "token", "access_token", "auth_token", "api_key", "apikey", "api-key", "password",
            "passwd", "secret", "client_secret", "auth", "jwt", "Token", "credential",
        )),
        (f"https://h/a?key=AIza{SIGNATURE}{SIGNATURE}", "https://h/a"),
        (f"a=http://{USER}a/x#http://h:80/y#http://{USER}m/y", "a=http://a/x#http://h:80/y#http://m/y"),
        (f"gave up: http://{USER}h/a (see https://h/b?{AZURE}", "gave up: http://h/a (see https://h/b"),
        ("no URL at all: me:word@host?sig=1", "no URL at all: me:word@host?sig=1"),
    ],
)  # fmt: skip
def test_what_of_a_url_may_be_told(given: str, told: str) -> None:
    assert redact(given) == told == redact(told) == stash_secrets(given)
    if given.startswith("http") and " " not in given and "/x#" not in given:
        assert restore_secrets(told) == given, "who asks the server has it"


def test_secrets_are_found_again_for_their_host_and_their_url_alone() -> None:
    given = {"a": [f"http://{USER}h/a"], "b": (f"http://g/b?{AZURE}", Path("c"), 3)}
    assert stash_secrets(given) == {"a": ["http://h/a"], "b": ("http://g/b", Path("c"), 3)}
    assert restore_secrets("http://h/folder/file") == f"http://{USER}h/folder/file", (
        "as ~/.netrc does"
    )
    for other in ("http://g/a", "https://h/a", "http://h:81/a", "http://hh/a", "h/a"):
        assert restore_secrets(other) == other
    inherited = subprocess.run(
        [sys.executable, "-c", "from olmo.runtime.urls import restore_secrets; print(restore_secrets('http://g/b'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert inherited.stdout == f"http://g/b?{AZURE}\n"


def test_two_that_differ_in_their_secrets_alone_are_refused(tmp_path: Path) -> None:
    stash_secrets(["http://h/a?token=1", "http://h/a?token=1"])  # twice the same
    table = tmp_path / "table.tsv"
    table.write_text("url\tbytes\tsha256\nhttp://h/a?token=1\t\t\nhttp://h/a?token=2\t\t\n")
    with pytest.raises(ValueError, match="differ in their secrets only: http://h/a;"):
        source_table.read_stashing_secrets(table)


# --- over the net -------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """host:port of the files in the folder `there`."""
    (tmp_path / "there").mkdir()
    lines = b"".join(
        json.dumps({"id": str(n), "text": f"text {n}"}).encode() + b"\n" for n in range(9)
    )
    (tmp_path / "there/a.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "there/list.txt").write_text("http://h/a.gz\n")

    ASKED.clear()
    with guarded_web_server(tmp_path / "there", f"me:{WORD}", SIGNATURE, ASKED) as place:
        yield place


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OLMO_STORE", str(folder / "store"))
    monkeypatch.setattr(downloads, "MAX_FRUITLESS_ATTEMPTS", 1)
    return folder


def refuse_traces(folder: Path, *besides: str) -> None:
    """No file here, and no name of one, has a secret."""
    for path in folder.rglob("*"):
        assert not any(secret in str(path) for secret in (WORD, SIGNATURE))
        if path.is_file() and path.name not in besides:
            content = path.read_bytes()
            assert WORD.encode() not in content and SIGNATURE.encode() not in content, path


@pytest.mark.parametrize("secret", [USER, f"?{AWS}", f"?{AZURE}"])
def test_a_download_is_known_without_its_secret(guarded: str, project: Path, secret: str) -> None:
    user, query = (secret, "") if secret == USER else ("", secret)
    url = f"http://{user}{guarded}/a.json.gz{query}"
    record = download(url=url, source=Path("a.gz"))
    plain = f"http://{guarded}/a.json.gz"
    assert record["facts"]["url"] == record["facts"]["from"] == plain
    assert record["key"] == download.action(current_store(), url=plain, source=Path("a.gz")).key
    refuse_traces(project)
    # A signature that was rotated asks for the same file.
    came = len(ASKED)
    rotated = url.replace(SIGNATURE, SIGNATURE + "2").replace("Date=1", "Date=2")
    assert download(url=rotated, source=Path("b.gz"))["key"] == record["key"]
    assert len(ASKED) == came


def test_what_is_refused_is_told_without_it(guarded: str, project: Path, capfd) -> None:
    for url in (
        f"http://me:{WORD}2@{guarded}/a.json.gz",
        f"http://{guarded}/a.json.gz?sig=no{WORD}",
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["sources", "--listing", "data/a/sources/000.tsv", "--sources", f"a={url}"])
        assert f"http://{guarded}/a.json.gz: the server answered 403" in str(end.value)
        with pytest.raises(ValueError, match="answered 403") as error:
            downloads.fetch(url, project / "x", project / "part")
        assert WORD not in str(end.value) + str(error.value)
    for url in (
        f"http://me:{WORD}/x@h/a",
        f"http://me:{WORD}@127.0.0.1:1/a",
        f"s3://me:{WORD}@b/a",
    ):
        with pytest.raises(ValueError) as error:
            downloads.fetch(url, project / "x", project / "part")
        assert WORD not in str(error.value)
    with pytest.raises(ValueError) as error:
        Bucket(f"nope://me:{WORD}@b/a")
    assert WORD not in str(error.value)
    log.warning(f"http://me:{WORD}@h/a is slow")
    out, err = capfd.readouterr()
    assert "http://h/a is slow" in err and WORD not in out + err
    refuse_traces(project)


def test_credentials_come_from_netrc(guarded: str, project: Path, monkeypatch) -> None:
    netrc = project / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login me password {WORD}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert downloads.fetch(f"http://{guarded}/a.json.gz", project / "x", project / "part")["bytes"]


def test_every_way_to_ask_a_server_has_the_secret(
    guarded: str, project: Path, tmp_path: Path
) -> None:
    plain, signed = f"http://{USER}{guarded}/a.json.gz", f"http://{guarded}/a.json.gz?{AZURE}"
    size = (tmp_path / "there/a.json.gz").stat().st_size
    assert http_client.request_sizes([plain, signed]) == [size, size]
    (tmp_path / "there/config.yaml").write_text("run_name: theirs\n")
    assert load_run_config(f"http://{USER}{guarded}/config.yaml").run_name == "theirs"
    with pytest.raises(ValueError, match="expected a part of the file"):  # not 403
        ArrayFile(signed, "uint16").read(0, 4)
    assert AZURE in ASKED[-1]
    with pytest.raises(ValueError) as refused:
        checkpoints.download_checkpoint(f"http://{USER}{guarded}/step5", project)
    assert "404" in str(refused.value) and WORD not in str(refused.value)


# --- where URLs come in -------------------------------------------------------------------------


def test_the_trainer_starts_from_what_a_password_guards(
    guarded: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And its checkpoints, config, metrics and words tell where it came from, without it."""
    small_run.run(tmp_path / "there", max_duration=4)
    place = f"http://{USER}{guarded}/run/step4-unsharded"
    folder = tmp_path / "here"
    folder.mkdir()
    assert small_run.run(folder, max_duration=8, load_path=place) == 0
    saved = (folder / "run/step8-unsharded/config.yaml").read_text()
    assert f"load_path: http://{guarded}/run/step4-unsharded\n" in saved
    refuse_traces(folder)
    assert WORD not in "".join(capfd.readouterr())


def test_a_saved_config_holds_none(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"load_path: http://{USER}h/step5\nwandb: {{project: 'http://{USER}h'}}\n")
    cfg = TrainConfig.load(path, [f"--remote_save_folder=s3://{USER}b?{AZURE}"])
    cfg.save(tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text()
    assert "load_path: http://h/step5\n" in saved and "remote_save_folder: s3://b\n" in saved
    assert WORD not in saved and SIGNATURE not in saved
    assert restore_secrets(cfg.load_path) == f"http://{USER}h/step5"


def test_a_table_keeps_its_lines_and_the_shell_line_does_not(project: Path) -> None:
    for name in ("config/data", "config/train"):
        Path(name).mkdir(parents=True)
    rows = [f"http://{USER}h/a.json.gz\t\t\t", f"http://g/b.json.gz?{AZURE}\t\t\t"]
    Path("table.tsv").write_text("\n".join(["url\tbytes\tsha256\tlicence", *rows, ""]))
    Path("config/data/small.yaml").write_text(
        "tokenizer: {train_vocab_size: 512}\n"
        f"sources: {{table: table.tsv, mirrors: ['http://h/=https://{USER}m/']}}\n"
    )
    plan = Plan(
        {
            "runs": {
                "small": {"train": "x.yaml", "dataset": "small", "start_from": f"http://{USER}h/c"}
            }
        }
    )
    line = plan.source_flags("small", "000")
    words = shlex.split(line)[1:3]
    assert words == ["a=http://h/a.json.gz#https://m/a.json.gz", "b=http://g/b.json.gz"]
    assert WORD not in line and SIGNATURE not in line
    assert plan.external_start("small") == "http://h/c"
    first, second = ingest.parse_sources(words, Path("table.tsv"))
    assert restore_secrets(first.mirrors[0]) == f"https://{USER}m/a.json.gz"
    assert restore_secrets(second.place) == f"http://g/b.json.gz?{AZURE}"
    source_table.complete_table(Path("table.tsv"), {first.place: (3, "0" * 64)})
    assert Path("table.tsv").read_text().splitlines()[1:] == [
        f"http://{USER}h/a.json.gz\t3\t{'0' * 64}\t", rows[1],
    ]  # fmt: skip


def test_a_published_list_with_secrets_is_refused(
    guarded: str, project: Path, tmp_path: Path
) -> None:
    (tmp_path / "there/list.txt").write_text(f"http://h/a.gz\nhttp://{USER}h/b.gz\n")
    with pytest.raises(
        ValueError, match=r"line 2: expected a URL without user.* of http://h/b.gz;"
    ):
        source_list(url=f"http://{USER}{guarded}/list.txt", table=Path("sources.tsv"))
    refuse_traces(project)


# --- a second store -----------------------------------------------------------------------------


def test_a_store_is_pulled_with_a_password_that_is_not_told(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    ours = Place(tmp_path / "ours", monkeypatch).here()
    ours.make("data/a.txt", "hello")
    push_names(ours.store, Remote(str(tmp_path / "there/second")))
    theirs = Place(tmp_path / "theirs", monkeypatch).here()
    monkeypatch.setenv("OLMO_STORE", str(theirs.store.root))
    cli.main(["store", "pull", f"http://{USER}{guarded}/second"])
    assert Path("data/a.txt").read_text() == "hello"
    said = capsys.readouterr()
    assert f"http://{guarded}/second: 1 names" in said.out and WORD not in said.out + said.err
    refuse_traces(theirs.root)


def test_a_record_from_before_is_not_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Place(tmp_path / "ours", monkeypatch).here()
    source = ours.make("data/a.txt", "hello")
    ours.make("data/b.txt", "more", source=source)
    path = ours.store.record_path(next(ours.store.records())["key"])
    record = sealed.load_file(path)
    record["facts"]["from"] = f"http://{USER}h/a"
    sealed.write_atomic(path, sealed.dumps(record))
    with pytest.raises(ValueError, match="and would be sent; expected none: rm ") as refused:
        push_names(ours.store, Remote(str(tmp_path / "second")))
    assert WORD not in str(refused.value) and not (tmp_path / "second").exists()


def test_a_records_command_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo.store.stage import run_environment

    monkeypatch.setattr(sys, "argv", ["olmo", "start", f"--place=http://{USER}h/c?{AZURE}"])
    run_environment.cache_clear()
    assert run_environment()["command"] == ["olmo", "start", "--place=http://h/c"]
    run_environment.cache_clear()
