"""`olmo certificate make`: write and sign the certificate of a run."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from olmo.certificate.bom import state_bom
from olmo.certificate.crate import state_crate
from olmo.certificate.croissant import state_dataset
from olmo.certificate.documents import format_readme, state_provenance
from olmo.certificate.history import History, check_licence, read_history, times_of
from olmo.certificate.names import BOM, BUNDLE, CRATE, CROISSANT, PROVENANCE, README, ROOT
from olmo.certificate.settings import CertificateConfig
from olmo.certificate.signature import (
    KEY_ENV,
    MAKE_KEY,
    UNSIGNED,
    key_digest,
    load_private_key,
    sign,
    state_folder,
)
from olmo.checkpoint.layout import publish_folder
from olmo.config import read_project_config
from olmo.config.conversion import Mistakes, each_mistake
from olmo.io.untrusted import check_part
from olmo.report.card import SOURCES
from olmo.runtime.log import format_number
from olmo.runtime.numbers import to_json
from olmo.store.naming import check_not_in_store
from olmo.store.stage import current_store


def make(run: str, /, folder: Path | None = None) -> None:
    """Write the certificate of a finished run: what it was made from, signed.

    SLSA provenance, an ML-BOM, an RO-Crate, Croissant metadata of each data set, and signatures, in
    certificate/RUN. The private key is named by $OLMO_SIGNING_KEY or by certificate.key of
    config/config.yaml.

    Args:
        run: name of a finished run
        folder: where it is written, certificate/RUN by default

    Example:
        olmo certificate make olmo-tiny
    """
    check_part(run, "the name of a run")
    folder = folder or Path("certificate", run)
    check_place(folder)
    settings = read_settings()
    key = load_private_key(find_key(settings))
    history = read_history(run, settings, current_store())
    texts = write_documents(history)
    texts[BUNDLE] = sign(texts[PROVENANCE].encode(), key)
    for release in history.releases:
        texts[release.signature] = sign(state_folder(run, release.digests, UNSIGNED), key)
    digests = {name: hash_text(text) for name, text in texts.items()}
    texts[ROOT] = sign(state_folder(run, digests, (ROOT, *UNSIGNED)), key)
    write_folder(folder, texts)
    signed = sum(len(release.digests) for release in history.releases)
    print(
        f"{folder}: {len(texts)} files about {format_number(signed, 'file')} of {run}, content "
        f"{history.content[:12]}…, and {format_number(len(history.sources), 'source')}"
    )


def write_documents(history: History) -> dict[str, str]:
    """The texts of all documents by their names, without the signatures."""
    sources = [one for one in history.records if one["action"]["stage"] in SOURCES]
    published = times_of(sources)[1] or times_of([history.record])[1]
    publisher = history.settings.publisher
    made: dict[str, Any] = {
        f"{CROISSANT}{check_part(name, 'a data set')}.json": state_dataset(
            name, files, published, publisher
        )
        for name, files in history.datasets.items()
    }
    purposes = {
        README: "what the certificate says, and how to check it",
        PROVENANCE: "SLSA provenance, an in-toto statement",
        BUNDLE: "the same, signed, in a DSSE envelope",
        BOM: "the bill of materials, CycloneDX",
        **{name: "a data set, in Croissant" for name in made},
        **{one.signature: f"model-signing's signature of {one.folder}" for one in history.releases},
        ROOT: "model-signing's signature of all files here",
    }
    made[BOM] = state_bom(history)
    made[CRATE] = state_crate(history, purposes)
    texts = {name: to_json(document, indent=1) + "\n" for name, document in made.items()}
    texts[README] = format_readme(history)
    digests = {name: hash_text(text) for name, text in texts.items()}
    texts[PROVENANCE] = to_json(state_provenance(history, digests), indent=1) + "\n"
    return texts


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_place(folder: Path) -> None:
    """Raises ValueError for a folder of something else, which would be replaced."""
    check_not_in_store(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "link" if folder.is_symlink() else "file"
        raise ValueError(f"expected a folder to write to, found the {what} {folder}; name another")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(name for name in names if not is_document(name))
    if others or (names and ROOT not in names):
        raise ValueError(
            f"expected no folder {folder}, or one with a certificate alone, found one with "
            f"{(others or sorted(names))[0]}; name another one: --folder"
        )


def is_document(name: str) -> bool:
    """Whether a file of a certificate has this name, or one that may stand beside them."""
    known = (PROVENANCE, BUNDLE, BOM, CRATE, README, ROOT, "model.sig", "hf.sig", *UNSIGNED)
    return name in known or (name.startswith(CROISSANT) and name.endswith(".json"))


def write_folder(folder: Path, texts: dict[str, str]) -> None:
    """Write a folder whole, or not at all; replaces the one that is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        publish_folder(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_settings(settings: CertificateConfig) -> str:
    """The sha256 of the public key. Raises ValueError for a wrong key, or no licence."""
    check_licence(settings)
    return key_digest(load_private_key(find_key(settings)).public_key())


def read_settings() -> CertificateConfig:
    """The section of config/config.yaml."""
    try:
        return CertificateConfig.new(**(read_project_config().get("certificate") or {}))
    except ValueError as error:
        place = "config/config.yaml: certificate"
        raise Mistakes([f"{place}.{mistake}" for mistake in each_mistake(error)]) from error


def find_key(settings: CertificateConfig) -> Path:
    """The file of the private key. Raises ValueError if none is named."""
    place = os.environ.get(KEY_ENV) or settings.key
    if not place:
        raise ValueError(
            f"expected a key to sign with, found none in ${KEY_ENV} and no certificate.key in "
            f"config/config.yaml; name one, or {MAKE_KEY}"
        )
    return Path(place).expanduser()
