"""A certificate of a real run: it holds elsewhere, names what is wrong, and tells no secret."""

import base64
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from certified import RUNS, SIGNATURE, WORD, carry_away, make_certified, write_key
from project import REPOSITORY, Project
from servers import guarded_web_server

from olmo.certificate.names import BOM, BUNDLE, CRATE, PROVENANCE, ROOT
from olmo.certificate.signature import UNSIGNED, load_private_key, sign, state_folder
from olmo.certificate.verify import verify
from olmo.io.sealed import hash_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_certified(tmp_path_factory.mktemp("certified"))


def public_key(made: Project) -> Path:
    return made.root.parent / "key.pub"


def refused(certificate: Path, **given: Path) -> str:
    """Why `verify` refuses, in one line."""
    with pytest.raises(ValueError) as error:
        verify(certificate, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_holds_on_another_machine(made: Project, tmp_path: Path) -> None:
    certificate, checkpoint = carry_away(made, tmp_path)
    (checkpoint / "record.json").unlink()  # it names the machine, and need not be there
    (certificate / ".snakemake_timestamp").unlink()
    words = ["verify", "certificate", "--public-key", str(public_key(made))]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("OLMO_")}
    done = subprocess.run(
        [sys.executable, "-m", "olmo.cli", "certificate", *words, "--checkpoint", "final"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "final: 6 files, as certificate/model.sig says",
        f"certificate: of run small, content {made.content()}; 7 files",
    ]


def test_what_it_says_is_what_the_records_say(made: Project) -> None:
    folder = made.root / "certificate/small"
    statement = json.loads((folder / "provenance.json").read_text())
    build = statement["predicate"]["buildDefinition"]
    found = {
        one["name"]: (one["uri"], one["digest"]["sha256"], one["annotations"]["licence"])
        for one in build["resolvedDependencies"]
        if "gitCommit" not in one["digest"]
    }
    rows = [row.split("\t") for row in (made.root / "table.tsv").read_text().splitlines()[1:]]
    plain = [re.sub(r"me:.*@|\?.*", "", row[0]) for row in rows]
    licences = ("ODC-By-1.0", "odc by, by mail", "PSF-2.0 OR MIT")
    assert found == {
        f"data/small/sources/part-{i}.json.gz": (plain[i], rows[i][2], licences[i])
        for i in range(3)
    }
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    files = json.loads((made.final / "record.json").read_text())["outputs"]["final"]
    assert subjects == {
        f"checkpoints/small/final/{name}": file["sha256"]
        for name, file in (files["files"] | files["aside"]).items()
    }
    bom = json.loads((folder / "bom.cdx.json").read_text())
    [data] = [one for one in bom["components"] if one["type"] == "data"]
    assert [part["licenses"][0] for part in data["components"]] == [
        {"license": {"id": "ODC-By-1.0"}},
        {"license": {"name": "odc by, by mail"}},
        {"expression": "PSF-2.0 OR MIT"},
    ]
    crate = json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
    stages = {one["name"] for one in crate if one["@type"] == "CreateAction"}
    assert {"download", "documents", "tokens", "training: small"} <= stages


def test_it_has_no_secret_and_nothing_of_the_machine(made: Project) -> None:
    private = (made.root.parent / "key.pem").read_text().splitlines()[1]
    words = [WORD, SIGNATURE, "X-Amz", str(made.root.parent), str(REPOSITORY), sys.prefix, private]
    for folder in (made.root / "certificate").iterdir():
        for path in folder.iterdir():
            text = path.read_text()
            if path.suffix in (".sig", ".json") and '"payload"' in text:
                payload = json.loads(text)["dsseEnvelope"]["payload"]
                text = base64.b64decode(payload).decode()
            for word in words:
                assert word not in text, path
            assert not re.search(rf'"{re.escape(platform.node())}"|/home/|/tmp/', text), path
    places = [made.root / ".snakemake", made.root / "store", made.root / "logs"]
    for path in (p for place in places for p in place.rglob("*") if p.is_file()):
        assert private.encode() not in path.read_bytes(), path


def test_the_same_run_and_key_give_the_same_bytes(made: Project, tmp_path: Path) -> None:
    assert "Nothing to be done" in made.run("certificate/small").output
    done = made.olmo("certificate", "make", "small", "--folder", str(tmp_path / "again"))
    assert done.status == 0, done.output
    first = made.root / "certificate/small"
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (first / path.name).read_bytes(), path


def test_a_flipped_byte_of_any_file_is_named(made: Project, tmp_path: Path) -> None:
    certificate, checkpoint = carry_away(made, tmp_path)
    given = {"public_key": public_key(made), "checkpoint": checkpoint}
    files = [p for p in (*certificate.iterdir(), *checkpoint.iterdir()) if p.stat().st_size]
    assert len(files) == 8 + 7
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            assert str(path) in refused(certificate, **given), (path, place)
        path.write_bytes(content)
    verify(certificate, **given)


def test_a_certificate_of_another_run(made: Project, tmp_path: Path) -> None:
    other = made.root / "checkpoints/other/final"
    folder = made.root / "certificate/small"
    said = refused(folder, public_key=public_key(made), checkpoint=other)
    assert f"{folder} is of run small, content {made.content()[:12]}…" in said
    assert f"found that of another run in {other}" in said
    # Documents of the other run, each signed by the right key, do not make a certificate.
    certificate, checkpoint = carry_away(made, tmp_path)
    shutil.copy(made.root / "certificate/other/bom.cdx.json", certificate)
    said = refused(certificate, public_key=public_key(made), checkpoint=checkpoint)
    assert f"{certificate}/bom.cdx.json: expected sha256" in said


def sign_again(folder: Path, key: Path, name: str, old: str, new: str, told: bool) -> None:
    """Change a document and sign the certificate again; `told`: the provenance has it, too."""
    private = load_private_key(key)
    path, provenance = folder / name, folder / PROVENANCE
    before = hash_file(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    if told:
        provenance.write_text(provenance.read_text().replace(before, hash_file(path)))
        (folder / BUNDLE).write_text(sign(provenance.read_bytes(), private))
    digests = {one.name: hash_file(one) for one in folder.iterdir() if one.name != ROOT}
    digests.pop(".snakemake_timestamp", None)
    (folder / ROOT).write_text(sign(state_folder("small", digests, (ROOT, *UNSIGNED)), private))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (BOM, '"olmo:run",\n     "value": "small"', '"olmo:run",\n     "value": "x"', "the run"),
        (BOM, "CONTENT", "0" * 64, "the run"),
        (BOM, "WEIGHTS", "0" * 64, "the files"),
        (BOM, "SOURCE", "0" * 64, "the sources"),
        ("croissant-small.json", "SOURCE", "0" * 64, "the sources"),
        (CRATE, "CONTENT", "0" * 64, "the content"),
        (CRATE, '"sha256": "WEIGHTS"', '"sha256": "0"', "the files"),
        (CRATE, '"sha256": "SOURCE"', '"sha256": "0"', "the sources"),
    ],
)
def test_documents_that_do_not_agree(
    made: Project, tmp_path: Path, name: str, old: str, new: str, words: str
) -> None:
    """Signed by the right key: whoever signs by other means may have mixed up two runs."""
    certificate, checkpoint = carry_away(made, tmp_path)
    table = (made.root / "table.tsv").read_text().splitlines()
    facts = {
        "CONTENT": made.content(),
        "WEIGHTS": hash_file(checkpoint / "model.safetensors"),
        "SOURCE": table[1].split("\t")[2],
    }
    for word, digest in facts.items():
        old = old.replace(word, digest)
    sign_again(certificate, made.root.parent / "key.pem", name, old, new, told=True)
    said = refused(certificate, public_key=public_key(made), checkpoint=checkpoint)
    assert said.startswith(f"{certificate}/{name}: expected {words} of provenance.json, ")


def test_documents_that_the_provenance_does_not_know(made: Project, tmp_path: Path) -> None:
    certificate, checkpoint = carry_away(made, tmp_path)
    key, given = made.root.parent / "key.pem", {"checkpoint": checkpoint}
    given["public_key"] = public_key(made)
    sign_again(certificate, key, BOM, "ODC-By", "ODC-Yb", told=False)
    said = refused(certificate, **given)
    assert said.startswith(f"{certificate}/{ROOT}: expected the documents of provenance.json")
    sign_again(certificate, key, BOM, "ODC-Yb", "ODC-By", told=False)
    sign_again(certificate, key, PROVENANCE, "ODC-By", "ODC-Yb", told=False)
    assert refused(certificate, **given).startswith(f"{certificate}/{BUNDLE}: expected what")
    sign_again(certificate, key, PROVENANCE, "ODC-Yb", "ODC-By", told=False)
    ours, other = (made.root / f"certificate/{run}/model.sig" for run in RUNS)
    sign_again(certificate, key, "model.sig", ours.read_text(), other.read_text(), told=False)
    said = refused(certificate, **given)
    assert said.startswith(f"{certificate}/model.sig: expected the files of provenance.json")


def test_more_less_and_links(made: Project, tmp_path: Path) -> None:
    certificate, checkpoint = carry_away(made, tmp_path)
    given = {"public_key": public_key(made), "checkpoint": checkpoint}

    def check(path: Path, words: str) -> None:
        said = refused(certificate, **given)
        assert said.startswith(str(path)) and words in said

    for folder in (certificate, checkpoint):
        (folder / "more.txt").write_text("more")
        check(folder / "more.txt", "found one more")
        (folder / "more.txt").unlink()
    for path in (
        certificate / "bom.cdx.json",
        checkpoint / "train.json",
        certificate / "model.sig",
    ):
        path.rename(tmp_path / "away")
        check(path, "found none")
        shutil.move(tmp_path / "away", path)
    path = certificate / "README.md"
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    check(path, "found a link")
    path.unlink()
    shutil.move(tmp_path / "away", path)
    (checkpoint / "record.json").write_bytes(
        (made.root / "checkpoints/other/final/record.json").read_bytes()
    )
    check(checkpoint / "record.json", "expected the record of content")
    (checkpoint / "record.json").unlink()
    verify(certificate, **given)
    wrong = write_key(tmp_path / "wrong.pem").with_suffix(".pub")
    said = refused(certificate, public_key=wrong, checkpoint=checkpoint)
    assert "expected a signature by the public key given" in said
    said = refused(checkpoint, public_key=public_key(made), checkpoint=checkpoint)
    assert "certificate.sig: expected a file of a certificate, found none" in said


def test_what_cannot_be_certified_is_said_before_anything_runs(
    made: Project, tmp_path: Path
) -> None:
    project = made.copy(tmp_path / "project")
    project.store = project.root / "store"
    config = project.read("config/config.yaml")["certificate"]

    def said(**changes: object) -> str:
        project.change("config/config.yaml", certificate=config | changes)
        done = project.run("certificate/small", ok=False)
        assert done.status
        return done.output

    assert "expected a key to sign with, found none in $OLMO_SIGNING_KEY" in said(key=None)
    assert "expected a private key in /no/key.pem, found no file; make one" in said(
        key="/no/key.pem"
    )
    assert "expected a private key in PEM, found a public one" in said(key=str(public_key(made)))
    assert "expected the licence of what is released, found none" in said(licence=None)
    unknown = said(licences={})
    assert "small: expected a licence of each source, found none of http://" in unknown
    assert "part-2.json.gz; set certificate: {licences: {small: …}}" in unknown
    # The command alone, of a run that is not finished, or whose records have no licence.
    done = project.olmo("certificate", "make", "small")
    assert "small: expected a licence of each source, found none of http://" in done.output
    shutil.rmtree(project.final)
    project.change("config/config.yaml", certificate=config)
    done = project.olmo("certificate", "make", "small")
    assert "expected a run that is finished, found no checkpoints/small/final" in done.output
    assert done.output.count("\n") == 1


def test_who_else_has_the_same_files_is_not_in_it(made: Project, tmp_path: Path) -> None:
    project = made.copy(tmp_path / "project")
    project.store = project.root / "store"
    recipe = project.read("config/data/small.yaml")
    project.write("config/data/copy.yaml", recipe | {"sources": {"table": "copy.tsv"}})
    run = {"train": "config/train/small.yaml", "dataset": "copy"}
    project.change("config/config.yaml", runs__copy=run)
    with guarded_web_server(made.root.parent / "elsewhere", f"me:{WORD}", SIGNATURE) as place:
        rows = [f"http://me:{WORD}@{place}/part-{number}.json.gz\t\t\t" for number in range(3)]
        table = "\n".join(["url\tbytes\tsha256\tlicence", *rows, ""])
        (project.root / "copy.tsv").write_text(table)
        project.run("data/copy/statistics.txt")
    done = project.olmo("certificate", "make", "small", "--folder", str(tmp_path / "again"))
    assert done.status == 0, done.output
    for path in (tmp_path / "again").iterdir():
        first = made.root / "certificate/small" / path.name
        assert path.read_bytes() == first.read_bytes(), path


def test_a_plan_and_another_key(made: Project, tmp_path: Path) -> None:
    project = made.copy(tmp_path / "project")
    project.store = project.root / "store"
    key = write_key(tmp_path / "key.pem")
    project.change("config/config.yaml", certificate__key=str(key))
    done = project.olmo("plan", "certificate/small")
    assert done.status == 0 and re.search("certificate/small +1 .* new", done.output), done.output
    project.olmo("plan", "report/small.html")
    assert not (project.root / "report").exists(), "a plan makes no page"
    assert "1 jobs: certificate" in project.run("certificate/small").output
    folder = project.root / "certificate/small"
    verify(folder, public_key=key.with_suffix(".pub"), checkpoint=project.final)
