"""`olmo certificate verify`: check a certificate and a checkpoint with the public key alone.

It needs the package cryptography, and nothing of a project. Nothing in a certificate is used before
its signature is checked, and no name in it as a path before the name is checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olmo.certificate.names import BOM, BUNDLE, CRATE, CROISSANT, PROVENANCE, ROOT, signature_of
from olmo.certificate.signature import (
    UNSIGNED,
    load_public_key,
    parse_json,
    read_digests,
    read_folder_statement,
    verify_bundle,
)
from olmo.io.sealed import hash_file
from olmo.io.untrusted import check_part
from olmo.runtime.log import format_number
from olmo.store.record import parse_record

AGAIN = "get it again from whoever signed it"


def verify(
    certificate: Path, /, public_key: Path, checkpoint: Path, export: Path | None = None
) -> None:
    """Check a certificate, and that a checkpoint is the one that it is about.

    It checks the signatures, every file of both folders, and that the documents agree. The first
    file that is wrong is named. Nothing but these files and the public key is needed.

    Args:
        certificate: folder of the certificate
        public_key: of whoever signed it, a file in PEM
        checkpoint: folder of the checkpoint
        export: folder of its export (hf/RUN), if the certificate is about one

    Example:
        olmo certificate verify certificate --public-key key.pub --checkpoint final
    """
    key = load_public_key(public_key)
    root = read_file(certificate, ROOT)
    where = f"{certificate}/{ROOT}"
    digests = read_folder_statement(verify_bundle(root, key, where), where)
    check_files(certificate, digests, (ROOT, *UNSIGNED))
    texts = {name: read_file(certificate, name) for name in digests}
    for name in (PROVENANCE, BUNDLE, BOM, CRATE):
        if name not in texts:
            raise ValueError(f"{certificate}: expected the document {name}, found none; {AGAIN}")
    if verify_bundle(texts[BUNDLE], key, f"{certificate}/{BUNDLE}") != texts[PROVENANCE]:
        raise ValueError(f"{certificate}/{BUNDLE}: expected what {PROVENANCE} says; {AGAIN}")
    documents = {
        name: parse_json(text, f"{certificate}/{name}")
        for name, text in texts.items()
        if name.endswith(".json") and name != BUNDLE
    }
    try:
        run, content, released = check_agreement(certificate, documents, digests)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{certificate}: expected documents of this version of olmo, found one without "
            f"{error}; use the version that made it"
        ) from None
    places = {signature_of(folder): folder for folder in released}
    given = {"model.sig": checkpoint, "hf.sig": export}
    for signature, folder in places.items():
        where = f"{certificate}/{signature}"
        if signature not in texts:
            raise ValueError(f"{where}: expected the signature of {folder}, found none; {AGAIN}")
        signed = read_folder_statement(verify_bundle(texts[signature], key, where), where)
        if signed != released[folder]:
            raise ValueError(f"{where}: expected the files of {PROVENANCE}, found others; {AGAIN}")
        if (place := given[signature]) is not None:
            about = f"{certificate} is of run {run}, content {content[:12]}…"
            check_files(place, signed, UNSIGNED, about)
            check_record(place, content if signature == "model.sig" else None)
            print(f"{place}: {format_number(len(signed), 'file')}, as {where} says")
        else:
            print(f"{folder} was not checked: name its folder, --export")
    if export is not None and "hf.sig" not in places:
        raise ValueError(f"{certificate}: expected one about an export, found none; omit --export")
    print(f"{certificate}: of run {run}, content {content}; {format_number(len(texts), 'file')}")


def read_file(folder: Path, name: str) -> bytes:
    """A file of a certificate. Raises ValueError if there is none, or a link."""
    path = folder / check_part(name, f"{folder}/{ROOT}")
    if path.is_symlink():
        raise ValueError(f"{path}: expected a file, found a link; {AGAIN}")
    if not path.is_file():  # nor a pipe, which would be waited for
        raise ValueError(f"{path}: expected a file of a certificate, found none; {AGAIN}")
    return path.read_bytes()


def check_files(
    folder: Path, digests: Mapping[str, str], unsigned: tuple[str, ...], about: str = ""
) -> None:
    """Raises ValueError unless a folder has these files, and no others but `unsigned` ones.

    Args:
        about: of a checkpoint, what the certificate is about; its files may be links, as those are
            that the pipeline made.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder, found none at {folder}; name the one with the files")
    actual = {
        name: hash_file(folder / name)
        for name in digests
        if (folder / name).is_file() and (about or not (folder / name).is_symlink())
    }
    wrong = [name for name in actual if actual[name] != digests[name]]
    weights = next((name for name in wrong if name.endswith(".safetensors")), "")
    others = [name for name in list_files(folder) if name not in (*digests, *unsigned)]
    if about and weights and (others or len(wrong) > 1 or len(actual) < len(digests)):
        raise ValueError(
            f"{about}, whose {weights} is {digests[weights][:12]}…; found that of another run in "
            f"{folder}, {actual[weights][:12]}…; name the checkpoint of that run, or the other's "
            "certificate"
        )
    for name, digest in digests.items():
        if name not in actual:
            what = "a link" if (folder / name).is_symlink() else "none"
            raise ValueError(f"{folder / name}: expected a signed file, found {what}; {AGAIN}")
        if name in wrong:
            raise ValueError(
                f"{folder / name}: expected sha256 {digest}, found {actual[name]}; {AGAIN}"
            )
    if others:
        raise ValueError(
            f"{folder / others[0]}: expected only files that were signed, found one more; remove it"
        )


def list_files(folder: Path) -> Iterator[str]:
    """The paths of all that is below a folder and no folder; links are not followed."""
    for place, folders, names in os.walk(folder):
        linked = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted([*names, *linked]):
            yield Path(place, name).relative_to(folder).as_posix()


def check_agreement(
    certificate: Path, documents: Mapping[str, dict[str, Any]], digests: Mapping[str, str]
) -> tuple[str, str, dict[str, dict[str, str]]]:
    """The run, its content, and its released folders with the digests of their files.

    Raises:
        ValueError: two documents differ in one of these, or in the sources.
    """

    def compare(name: str, what: str, expected: set[Any], found: set[Any]) -> None:
        if expected != found:
            wanted, got = sorted(map(str, expected - found)), sorted(map(str, found - expected))
            raise ValueError(
                f"{certificate}/{name}: expected {what} of {PROVENANCE}, "
                f"{', '.join(wanted[:1]) or 'none'}; found {', '.join(got[:1]) or 'none'}; {AGAIN}"
            )

    statement, bom, crate = (documents[name] for name in (PROVENANCE, BOM, CRATE))
    where = f"{certificate}/{PROVENANCE}"
    subjects = read_digests(statement["subject"], where)
    build, details = (statement["predicate"][n] for n in ("buildDefinition", "runDetails"))
    run = check_part(build["externalParameters"]["run"], where)
    content = str(build["internalParameters"]["content"])
    named = read_digests(details["byproducts"], where)
    compare(ROOT, "the documents", set(named.items()), set(named.items()) & set(digests.items()))
    sources: dict[str, set[str]] = {}
    for one in build["resolvedDependencies"]:
        if digest := one["digest"].get("sha256"):
            sources.setdefault(one["annotations"]["of"], set()).add(digest)
    together = set().union(*sources.values())

    model = bom["metadata"]["component"]
    known = {one["name"]: one["value"] for one in model["properties"]}
    compare(BOM, "the run", {run, content}, {known["olmo:run"], known["olmo:content"]})
    files = {(one["name"], one["hashes"][0]["content"]) for one in model["components"]}
    compare(BOM, "the files", set(subjects.items()), files)
    parts = [part for one in bom["components"] for part in one.get("components", ())]
    compare(BOM, "the sources", together, {part["hashes"][0]["content"] for part in parts})

    entities = {one["@id"]: one for one in crate["@graph"]}
    compare(CRATE, "the content", {content}, {entities["./"]["identifier"]})
    stated = {(name, entities.get(f"#{name}", {}).get("sha256", "none")) for name in subjects}
    compare(CRATE, "the files", set(subjects.items()), stated)
    hashed = {name: one["sha256"] for name, one in entities.items() if "sha256" in one}
    others = {digest for name, digest in hashed.items() if name[1:] not in subjects}
    compare(CRATE, "the sources", together, others)
    for name, document in documents.items():
        if name.startswith(CROISSANT):
            found = {file["sha256"] for file in document["distribution"]}
            compare(name, "the sources", sources.get(document["name"], set()), found)

    folders = (f"checkpoints/{run}/final", f"hf/{run}")
    released: dict[str, dict[str, str]] = {}
    for name, digest in subjects.items():
        folder = next((one for one in folders if name.startswith(f"{one}/")), None)
        if folder is None:
            raise ValueError(f"{where}: expected files of {run}, found {name}; {AGAIN}")
        released.setdefault(folder, {})[name.removeprefix(f"{folder}/")] = digest
    return run, content, released


def check_record(place: Path, content: str | None) -> None:
    """Check the record of a folder, if it is there. Raises Damaged, ValueError."""
    path = place / "record.json"
    if os.path.lexists(path):
        if not path.is_file():  # a pipe or a device has no end
            raise ValueError(f"{path}: expected a file, found none; delete it")
        record = parse_record(path.read_bytes(), path)
        if content is not None and record["content"] != content:
            raise ValueError(
                f"{path}: expected the record of content {content}, found that of "
                f"{record['content']}; delete it"
            )


def main() -> None:
    """`python -m olmo.certificate.verify`, where the packages of the command `olmo` are missing."""
    parser = argparse.ArgumentParser(prog="python -m olmo.certificate.verify")
    parser.add_argument("certificate", type=Path)
    parser.add_argument("--public-key", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--export", type=Path)
    given = parser.parse_args()
    try:
        verify(given.certificate, given.public_key, given.checkpoint, given.export)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
