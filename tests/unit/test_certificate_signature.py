"""Signatures of certificates: keys that are none, changed bundles, names that are no names."""

import builtins
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from certified import write_key

from olmo.certificate import signature
from olmo.certificate.history import check_licence, list_owners
from olmo.certificate.make import check_place, read_settings
from olmo.certificate.names import ROOT
from olmo.certificate.signature import (
    load_private_key,
    load_public_key,
    read_folder_statement,
    sign,
    state_folder,
    verify_bundle,
)
from olmo.certificate.verify import check_record, verify

ZERO = "0" * 64
STATEMENT = state_folder("small", {"b": ZERO, "a": "1" * 64}, ("record.json",))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key.pem")


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_each_changed_byte_of_a_bundle_is_found(curve: str, tmp_path: Path):
    key = write_key(tmp_path / "key.pem", curve)
    private, public = load_private_key(key), load_public_key(key.with_suffix(".pub"))
    text = sign(b"{}", private).encode()
    assert text == sign(b"{}", private).encode(), "RFC 6979"
    assert verify_bundle(text, public, "x.sig") == b"{}"
    for place in range(0, len(text), 1 if curve == "SECP256R1" else 50):
        for bit in (1, 32):
            changed = bytearray(text)
            changed[place] ^= bit
            with pytest.raises(ValueError, match=r"^x\.sig: expected a signature "):
                verify_bundle(bytes(changed), public, "x.sig")
    for changed in (text[:-1], text + b"\n", b"", b"[" * 9999, b"{}", b"null", b"\xff"):
        with pytest.raises(ValueError, match=r"^x\.sig: expected a signature "):
            verify_bundle(changed, public, "x.sig")


def test_another_key_is_named(key: Path, tmp_path: Path):
    other = load_public_key(write_key(tmp_path / "other.pem").with_suffix(".pub"))
    text = sign(STATEMENT, load_private_key(key)).encode()
    with pytest.raises(ValueError, match="by the public key given, "):
        verify_bundle(text, other, "x.sig")
    # Nor does it help to say that the signature is by that key.
    ours, theirs = (signature.key_digest(k) for k in (load_private_key(key).public_key(), other))
    with pytest.raises(ValueError, match="found a changed file"):
        verify_bundle(text.replace(ours.encode(), theirs.encode()), other, "x.sig")


def write_rsa(path: Path) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    secret = rsa.generate_private_key(65537, 2048)
    no = serialization.NoEncryption()
    path.write_bytes(
        secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no)
    )
    return path


def test_what_is_no_key_is_said(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def said(path: Path) -> str:
        load = load_public_key if path.suffix == ".pub" else load_private_key
        with pytest.raises(ValueError) as error:
            load(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    public = key.with_suffix(".pub")
    assert "found no file; make one: openssl genpkey" in said(tmp_path / "none.pem")
    assert "found no file; ask whoever signed for it" in said(tmp_path / "none.pub")
    assert "found a folder" in said(tmp_path)
    (tmp_path / "text.pem").write_text("hello")
    assert "found another file" in said(tmp_path / "text.pem")
    public.rename(tmp_path / "public.pem")
    assert "expected a private key in PEM, found a public one" in said(tmp_path / "public.pem")
    (tmp_path / "private.pub").write_bytes(key.read_bytes())
    assert "expected a public key in PEM, found a private one" in said(tmp_path / "private.pub")
    found = said(write_rsa(tmp_path / "rsa.pem"))
    assert "one of the curves secp256r1, secp384r1, secp521r1, found RSA" in found
    assert "found secp256k1" in said(write_key(tmp_path / "k1.pem", "SECP256K1"))
    locked = write_key(tmp_path / "locked.pem", password=b"word")
    assert "found one with a password; set OLMO_SIGNING_PASSWORD" in said(locked)
    monkeypatch.setenv("OLMO_SIGNING_PASSWORD", "word")
    load_private_key(locked)
    assert "found one without; unset OLMO_SIGNING_PASSWORD" in said(key)
    monkeypatch.setenv("OLMO_SIGNING_PASSWORD", "wrong")
    assert "or a wrong password" in said(locked)


def test_a_missing_package_names_the_command(key: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="found none; pip install cryptography"):
        load_private_key(key)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", ".", "a\\b", "a\nb", 7])
def test_a_signed_name_is_checked_before_it_is_a_path(name: Any, key: Path, tmp_path: Path):
    folder = tmp_path / "certificate"
    folder.mkdir()
    statement = json.loads(STATEMENT)
    statement["predicate"]["resources"] = [{"name": name, "algorithm": "sha256", "digest": ZERO}]
    (folder / ROOT).write_text(sign(json.dumps(statement).encode(), load_private_key(key)))
    with pytest.raises(ValueError, match="expected the name of a file inside its folder, found"):
        verify(folder, public_key=key.with_suffix(".pub"), checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("[", "expected JSON"),
        ("[]", "expected a mapping"),
        ('{"predicateType": "x"}', "expected a statement about a folder, found x"),
        (STATEMENT.decode().replace('"resources"', '"other"'), "expected a list of files"),
        (STATEMENT.decode().replace(ZERO, "zero"), "expected a sha256"),
        (STATEMENT.decode().replace('"b"', '"a"'), "expected each file once"),
    ],
)
def test_a_malformed_statement(statement: str, words: str):
    with pytest.raises(ValueError, match=f"^x.sig: {words}"):
        read_folder_statement(statement.encode(), "x.sig")


def test_documents_of_another_version_are_one_sentence(key: Path, tmp_path: Path):
    """Signed by the right key, and not what this version writes."""
    folder = tmp_path / "certificate"
    folder.mkdir()
    private = load_private_key(key)
    names = ("provenance.json", "bom.cdx.json", "ro-crate-metadata.json")
    texts = dict.fromkeys(names, '{"subject": []}')
    texts["provenance.sigstore.json"] = sign(texts["provenance.json"].encode(), private)
    digests = {name: hashlib.sha256(t.encode()).hexdigest() for name, t in texts.items()}
    texts[ROOT] = sign(state_folder("small", digests, (ROOT,)), private)
    for name, text in texts.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match="expected documents of this version of olmo, found one"):
        verify(folder, public_key=key.with_suffix(".pub"), checkpoint=tmp_path)


def test_a_pipe_is_not_waited_for(key: Path, tmp_path: Path):
    folder = tmp_path / "certificate"
    folder.mkdir()
    os.mkfifo(folder / ROOT)
    with pytest.raises(ValueError, match="expected a file of a certificate, found none"):
        verify(folder, public_key=key.with_suffix(".pub"), checkpoint=tmp_path)
    record = tmp_path / "record.json"
    for place in (lambda: os.mkfifo(record), lambda: record.symlink_to("/dev/zero")):
        place()
        with pytest.raises(ValueError, match=r"record\.json: expected a file, found none"):
            check_record(tmp_path, ZERO)
        record.unlink()


def test_what_would_be_replaced_is_a_certificate_alone(tmp_path: Path):
    folder = tmp_path / "release"
    check_place(folder)
    folder.mkdir()
    for name in (ROOT, "README.md", "croissant-small.json", "hf.sig", ".snakemake_timestamp"):
        (folder / name).write_text("")
    check_place(folder)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"one with a certificate alone, found one with thesis\.t"):
        check_place(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="expected a folder to write to, found the link"):
        check_place(tmp_path / "link")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"licence": " "}, "licence: expected an identifier of SPDX, or NOASSERTION "),
        ({"licence": "MIT\n# Free"}, "licence: expected an identifier"),
        ({"licence": "MIT", "licences": {"a": ""}}, r"licences\.a: expected an identifier"),
        ({"licence": "MIT", "licences": {"a": None}}, r"licences\.a: expected text, found None"),
        ({"licenses": {}}, "licenses: no such key"),
    ],
)
def test_licences_are_text(
    section: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    Path("config/config.yaml").write_text(json.dumps({"runs": {}, "certificate": section}))
    with pytest.raises(ValueError, match=rf"^config/config\.yaml: certificate\.{words}"):
        check_licence(read_settings())


def test_the_data_set_of_a_ladders_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its licence is that of the ladder's data set, if others have the same files, too."""
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    ladder = {"dataset": "novels", "sizes": {"s": [], "m": []}, "budgets": ["20x"]}
    config = {"runs": {}, "ladders": {"x": ladder}, "soups": {"mix": ["x-s-20x", "x-m-20x"]}}
    Path("config/config.yaml").write_text(json.dumps(config))
    assert list_owners("x-s-20x") == ["novels", "x-s-20x"]
    assert list_owners("mix") == ["mix", "novels", "x-s-20x", "x-m-20x"]


def test_verifying_needs_no_package_of_ours_but_one():
    """Whoever checks a release may have no torch, and nothing else of the pipeline's."""
    ours = "torch numpy omegaconf yaml polars snakemake jinja2 safetensors rich msgspec"
    code = (
        f"import sys\nfor name in {ours.split()}: sys.modules[name] = None\n"
        "import olmo.certificate.signature\n"
        "olmo.certificate.signature.import_cryptography()\n"
        "import runpy; runpy.run_module('olmo.certificate.verify', run_name='__main__')"
    )
    words = ["none", "--public-key", "none.pub", "--checkpoint", "none"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        "python -m olmo.certificate.verify: expected a public key in none.pub, found no file; ask "
        "whoever signed for it\n"
    )
