"""Sealed files: small files that are written atomically and contain a checksum of their content.

The seal is the sha256 of everything else: in JSON the last field "seal", in a table one more word
of the first row, "seal:…". A changed byte, a truncation and a mixture of two versions are detected
by the file alone. It does not authenticate: files from elsewhere are checked by their content.

Imports nothing of ours.
"""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FIELD, SEAL = '"seal": "', "seal:"


class Damaged(ValueError):
    """The bytes of a file do not match its seal."""


def write_atomic(path: Path, text: str, read_only: bool = False, alone: bool = False) -> None:
    """Write a small file atomically, also if the power fails.

    Args:
        alone: no other process writes this file now, so its drafts are of killed ones: remove them.

    Raises OSError if that fails; an existing file then stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in find_drafts(path.parent, path.name) if alone else ():
        left.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if read_only:
            draft.chmod(0o444)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    fsync_path(path.parent)


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Sync a file's bytes, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_drafts(folder: Path, name: str = "") -> list[Path]:
    """Drafts that killed writers, of one file or of any, left in a folder."""
    return sorted(folder.glob(f".{glob.escape(name) or '*'}.{'[0-9a-f]' * 8}"))


def dumps(value: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object with its seal as the last field."""
    text = json.dumps(dict(value), indent=indent, sort_keys=indent is not None)
    space, last = (" ", "}") if indent is None else ("\n" + " " * indent, "\n}\n")
    body = text.removesuffix("}").rstrip() + ("," + space if value else "")
    return body + _seal_line(body, last)


def loads(content: bytes, name: str | Path) -> dict[str, Any]:
    """The object that `dumps` wrote, without its seal. Raises Damaged, with the file's `name`."""
    value: dict[str, Any] = json.loads(_check_seal(content, name, "}", "\n}\n"))
    del value["seal"]
    return value


def dump_lines(values: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines; the last object contains the seal of all."""
    *before, last = [json.dumps(dict(value)) for value in values]
    body = "".join(line + "\n" for line in before) + last.removesuffix("}") + ", "
    return body + _seal_line(body, "}\n")


def load_lines(content: bytes, name: str | Path) -> list[dict[str, Any]]:
    """The objects that `dump_lines` wrote. Raises Damaged."""
    lines = _check_seal(content, name, "}\n").split("\n")[:-1]
    values: list[dict[str, Any]] = [json.loads(line) for line in lines]
    del values[-1]["seal"]
    return values


def load_file(path: Path) -> dict[str, Any]:
    """`loads` of a file. Raises FileNotFoundError, Damaged."""
    return loads(path.read_bytes(), path)


def dump_table(rows: Iterable[Iterable[str]]) -> str:
    """A tab-separated table; its first row has the seal as one more word."""
    body = "".join("\t".join(row) + "\n" for row in rows)
    first, end, rest = body.partition("\n")
    return f"{first}\t{SEAL}{_digest(body)}{end}{rest}"


def load_table(content: bytes, name: str | Path) -> list[list[str]]:
    """The rows that `dump_table` wrote. Raises Damaged."""
    text = _decode(content, name)
    first, end, rest = text.partition("\n")
    first, _, seal = first.rpartition(f"\t{SEAL}")
    body = f"{first}{end}{rest}"
    if seal != _digest(body):
        raise _damaged(name)
    return [line.split("\t") for line in body.split("\n")[:-1]]


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _seal_line(body: str, last: str) -> str:
    return f'{FIELD}{_digest(body)}"{last}'


def _check_seal(content: bytes, name: str | Path, *lasts: str) -> str:
    """The text of sealed JSON that ends in one of `lasts`. Raises Damaged."""
    text = _decode(content, name)
    body, _, end = text.rpartition(FIELD)
    if FIELD + end not in [_seal_line(body, last) for last in lasts]:
        raise _damaged(name)
    return text


def _decode(content: bytes, name: str | Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _damaged(name) from None


def _damaged(name: str | Path) -> Damaged:
    return Damaged(f"{name} is damaged: its bytes do not match its seal")
