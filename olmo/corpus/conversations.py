"""Conversations: instruction data in Tulu v2's format, and how they arrive.

A line is {"id": …, "messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}. The
id may be missing: what is said then stands for it. Files come as JSON lines, gz or plain, or as
the hub's parquet, and travel as the other sources do: gz files of JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from olmo.corpus.sources import check_known, fetched
from olmo.io import downloads, file_kinds, gz
from olmo.store.stage import Facts, Free, Input, Output, Work, stage

ROLES = ("system", "user", "assistant")
Message = tuple[str, str]  # role, content

# Why a line cannot become a conversation. These are the names that a recipe allows.
REASONS = {
    "long-line": "a line of more bytes than the recipe's documents.max_line_bytes",
    "not-utf8": "bytes that are not UTF-8",
    "bad-json": "not one JSON value",
    "not-object": "JSON, but not an object",
    "no-messages": "no messages, or null",
    "bad-messages": "messages that are no list of objects with a role and a content, both strings",
    "empty-conversation": "a conversation without a message",
    "unknown-role": f"a role that is none of {', '.join(ROLES)}",
    "surrogate": "half a surrogate pair, which is no character",
}
PARQUET_MAGIC = b"PAR1"


def parse(line: bytes) -> tuple[str | None, str | None, str | None]:
    """(id, all that is said, reason) of one line. The reason is None if it is a conversation."""
    identity, messages, reason = read(line)
    said = "\n".join(content for _, content in messages)
    if reason is None and identity is None:
        spoken = json.dumps(messages, ensure_ascii=False).encode()
        identity = f"sha256:{hashlib.sha256(spoken).hexdigest()[:32]}"
    return identity, None if reason else said, reason


def read(line: bytes) -> tuple[str | None, list[Message], str | None]:
    """(id, messages, reason) of one line; no messages where there is a reason against it."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        return None, [], "not-utf8"
    except (ValueError, RecursionError):
        return None, [], "bad-json"
    if not isinstance(found, dict):
        return None, [], "not-object"
    identity = found.get("id") if isinstance(found.get("id"), str) else None
    broken = identity is not None and is_broken(identity)
    messages = found.get("messages")
    reason, pairs = None, []
    if messages is None:
        reason = "no-messages"
    elif not isinstance(messages, list) or not all(map(is_message, messages)):
        reason = "bad-messages"
    elif not messages:
        reason = "empty-conversation"
    else:
        pairs = [(message["role"], message["content"]) for message in messages]
        if any(role not in ROLES for role, _ in pairs):
            reason = "unknown-role"
        elif broken or any(is_broken(content) for _, content in pairs):
            reason = "surrogate"
    return None if broken else identity, [] if reason else pairs, reason


def is_broken(text: str) -> bool:
    """Whether half a surrogate pair is in a text: no encoding has it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def is_message(found: object) -> bool:
    """Whether a value has a role and a content; more keys change nothing."""
    return isinstance(found, dict) and all(
        isinstance(found.get(name), str) for name in ("role", "content")
    )


def said(line: bytes) -> Iterator[Message]:
    """The messages of a line that is a conversation.

    Raises:
        ValueError: it is none.
    """
    _, messages, reason = read(line)
    if reason is not None:
        raise ValueError(f"expected a conversation, found {reason}: {REASONS[reason]}")
    yield from messages


@stage(version=1, conditions=gz.conditions)
def local_conversations(file: Input, source: Output, sha256: str | None = None) -> Facts:
    """Take a file of this machine: JSON lines, gz or plain, or parquet."""
    check_known(file, str(file), None, sha256)
    return {"text_bytes": as_lines(file, source, str(file))}


@stage(version=1, conditions=gz.conditions)
def download_conversations(
    url: str,
    source: Output,
    part: Work,
    sha256: str | None = None,
    bytes: Free[int | None] = None,
    mirrors: Free[tuple[str, ...]] = (),
    progress: Free[downloads.Progress] = downloads.unseen,
) -> Facts:
    """Fetch such a file, as `olmo.corpus.sources.download`; `sha256` is that of what is sent."""
    arrived = source.with_name("arrived")

    def whole(place: str) -> int:
        check_known(arrived, place, bytes, sha256)
        return as_lines(arrived, source, place)

    found = fetched(url, mirrors, arrived, part, whole, progress, bytes)
    arrived.unlink()
    return {"url": url, **found, "text_bytes": found.pop("checked")}


def as_lines(file: Path, source: Path, name: str) -> int:
    """Write a file of conversations as gz JSON lines; bytes of its text.

    Raises:
        ValueError: it is broken, empty or something else, a web page for one.
    """
    with open(file, "rb") as start:
        beginning = start.read(512)
    if beginning.startswith(gz.MAGIC):
        shutil.copyfile(file, source)
    elif beginning.startswith(PARQUET_MAGIC):
        with gz.writing(source) as lines:
            lines.writelines(rows_of(file, name))
    elif beginning.lstrip().startswith(b"{"):
        with open(file, "rb") as text, gz.writing(source) as lines:
            shutil.copyfileobj(text, lines)
    else:
        found, command = file_kinds.kind_of(beginning)
        made = f"Make gz of it by `{file_kinds.into_gz(name, command)}`" if command else ""
        raise ValueError(
            f"{name}: expected conversations (JSON lines, gz or plain, or parquet), found {found}. "
            + (made or "Check its place and fetch it again")
        )
    size = gz.check(source, name)
    if size == 0:
        raise ValueError(f"{name}: expected conversations, found none. Take it from the list")
    return size


def rows_of(file: Path, name: str) -> Iterator[bytes]:
    """The rows of a parquet file as JSON lines."""
    import polars

    try:
        frame = polars.read_parquet(file)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"{name}: expected parquet, found: {error}") from error
    for row in frame.iter_rows(named=True):
        yield json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
