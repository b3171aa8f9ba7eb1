"""Signatures: in-toto statements in DSSE envelopes in sigstore bundles, by an elliptic-curve key.

The bundles are those of `model_signing sign key`, byte for byte the same kind of file, so that
`model_signing verify key` accepts them. They are written here, since model-signing brings 35
packages, most of them for keyless signing.

Sources: https://github.com/secure-systems-lab/dsse (the envelope, PAE),
https://github.com/in-toto/attestation (the statement), https://docs.sigstore.dev/about/bundle (the
bundle), https://github.com/sigstore/model-transparency (the statement about a folder).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.io.untrusted import check_digest, check_mapping, check_relative

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

KEY_ENV, PASSWORD_ENV = "OLMO_SIGNING_KEY", "OLMO_SIGNING_PASSWORD"
STATEMENT = "https://in-toto.io/Statement/v1"
FOLDER_PREDICATE = "https://model_signing/signature/v1.0"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
MAKE_KEY = (
    "make one: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem && "
    "openssl pkey -in key.pem -pubout -out key.pub"
)
# What a folder has that is not signed: it names the machine, or it is snakemake's.
UNSIGNED = ("record.json", ".snakemake_timestamp")


def import_cryptography() -> Any:
    """The package. Raises ValueError, with the command that installs it, if there is none."""
    try:
        import cryptography
        import cryptography.hazmat.primitives.asymmetric.ec
        import cryptography.hazmat.primitives.serialization
    except ImportError:
        raise ValueError(
            "expected the package cryptography, found none; pip install cryptography"
        ) from None
    return cryptography


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A key to sign with, in PEM; its password, if it has one, is $OLMO_SIGNING_PASSWORD.

    Raises:
        ValueError: there is no such file, or it is no such key.
    """
    text, crypto = read_key(path, "a private key"), import_cryptography()
    password = os.environ.get(PASSWORD_ENV)
    try:
        key = crypto.hazmat.primitives.serialization.load_pem_private_key(
            text, password.encode() if password else None
        )
    except TypeError:  # a password for a key without one, or none for one with one
        found = "one without" if password else "one with a password"
        wanted = "with the password of" if password else "without a password, or its password in"
        remedy = f"unset {PASSWORD_ENV}" if password else f"set {PASSWORD_ENV}"
        raise ValueError(
            f"{path}: expected a private key {wanted} ${PASSWORD_ENV}, found {found}; {remedy}"
        ) from None
    except (ValueError, crypto.exceptions.UnsupportedAlgorithm):
        found = "a public one" if b"PUBLIC KEY" in text else "another file, or a wrong password"
        raise ValueError(
            f"{path}: expected a private key in PEM, found {found}; {MAKE_KEY}"
        ) from None
    check_curve(key, path)
    return key


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A key to verify with, in PEM. Raises ValueError as `load_private_key`."""
    text, crypto = read_key(path, "a public key"), import_cryptography()
    try:
        key = crypto.hazmat.primitives.serialization.load_pem_public_key(text)
    except (ValueError, crypto.exceptions.UnsupportedAlgorithm):
        found = "a private one" if b"PRIVATE KEY" in text else "another file"
        raise ValueError(
            f"{path}: expected a public key in PEM, found {found}; whoever signed makes it: "
            "openssl pkey -in key.pem -pubout -out key.pub"
        ) from None
    check_curve(key, path)
    return key


def read_key(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        remedy = MAKE_KEY if what == "a private key" else "ask whoever signed for it"
        raise ValueError(f"expected {what} in {path}, found no file; {remedy}") from None
    except IsADirectoryError:
        raise ValueError(f"expected {what} in {path}, found a folder; name the file") from None


def check_curve(key: Any, path: Path) -> None:
    """Raises ValueError for a key that is not of one of the curves that model-signing takes."""
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__.lstrip("_"))
    if curve not in HASHES:
        raise ValueError(
            f"{path}: expected a key of one of the curves {', '.join(HASHES)}, found {curve}; "
            + MAKE_KEY
        )


def hash_algorithm(key: Any) -> Any:
    hashes = import_cryptography().hazmat.primitives.hashes
    return getattr(hashes, HASHES[key.curve.name])()


def key_digest(public: ec.EllipticCurvePublicKey) -> str:
    """The sha256 of a public key's PEM, by which a bundle says which key it needs."""
    serialization = import_cryptography().hazmat.primitives.serialization
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()


def encode_for_signature(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    head = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} "
    return head.encode() + payload


def sign(payload: bytes, key: ec.EllipticCurvePrivateKey) -> str:
    """A bundle, as text. RFC 6979: the same payload and key give the same bytes."""
    ec = import_cryptography().hazmat.primitives.asymmetric.ec
    algorithm = ec.ECDSA(hash_algorithm(key), deterministic_signing=True)
    signature = key.sign(encode_for_signature(payload), algorithm)
    return format_bundle(payload, signature, key_digest(key.public_key()))


def format_bundle(payload: bytes, signature: bytes, hint: str) -> str:
    def encode(value: bytes) -> str:
        return base64.b64encode(value).decode()

    envelope = {
        "payload": encode(payload),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": encode(signature), "keyid": ""}],
    }
    material = {"publicKey": {"hint": hint}, "tlogEntries": []}
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": material,
        "dsseEnvelope": envelope,
    }
    return json.dumps(bundle) + "\n"


def verify_bundle(text: bytes, key: ec.EllipticCurvePublicKey, whose: str) -> bytes:
    """The payload of a bundle that `sign` wrote with the other half of the key.

    Raises:
        ValueError: the bundle has another key's signature, or a byte of it was changed.
    """
    damaged = f"{whose}: expected a signature as it was written, found a changed file; get it again"
    crypto = import_cryptography()
    try:
        bundle = json.loads(text)
        envelope = bundle["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        is_same = format_bundle(payload, signature, hint).encode() == text
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ValueError(damaged) from None
    if hint != key_digest(key):
        raise ValueError(
            f"{whose}: expected a signature by the public key given, {key_digest(key)[:12]}…, "
            f"found one by {str(hint)[:12]}…; give the key of whoever signed it"
        )
    try:
        ecdsa = crypto.hazmat.primitives.asymmetric.ec.ECDSA(hash_algorithm(key))
        key.verify(signature, encode_for_signature(payload), ecdsa)
    except crypto.exceptions.InvalidSignature:
        raise ValueError(damaged) from None
    if not is_same:
        raise ValueError(damaged)
    return payload


def state_folder(name: str, digests: Mapping[str, str], unsigned: tuple[str, ...]) -> bytes:
    """model-signing's statement about the files of a folder: path → sha256."""
    names = sorted(digests)
    together = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in names))
    files = [{"name": n, "algorithm": "sha256", "digest": digests[n]} for n in names]
    how = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [*unsigned],
    }
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": together.hexdigest()}}],
        "predicateType": FOLDER_PREDICATE,
        "predicate": {"serialization": how, "resources": files},
    }
    return json.dumps(statement).encode()


def read_folder_statement(payload: bytes, whose: str) -> dict[str, str]:
    """path → sha256 of a statement by `state_folder`; its paths are checked."""
    statement = parse_json(payload, whose)
    if statement.get("predicateType") != FOLDER_PREDICATE:
        raise ValueError(
            f"{whose}: expected a statement about a folder, found "
            f"{str(statement.get('predicateType'))[:80]}"
        )
    predicate = check_mapping(statement.get("predicate"), whose)
    return read_digests(predicate.get("resources"), whose)


def read_digests(files: Any, whose: str) -> dict[str, str]:
    """path → sha256 of the resources, or the subjects, of a statement; each is checked."""
    if not isinstance(files, list):
        raise ValueError(f"{whose}: expected a list of files, found {str(files)[:80]!r}")
    found: dict[str, str] = {}
    for file in files:
        entry = check_mapping(file, whose)
        digest = entry.get("digest")
        digest = digest.get("sha256") if isinstance(digest, dict) else digest
        found[check_relative(entry.get("name"), whose)] = check_digest(digest, whose)
    if len(found) != len(files):
        raise ValueError(f"{whose}: expected each file once, found one twice")
    return found


def parse_json(text: bytes, whose: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{whose}: expected JSON, found a damaged file; get it again") from None
    return dict(check_mapping(found, whose))
