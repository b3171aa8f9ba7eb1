"""Conversations: instruction data in Tulu v2's format, and their sources.

A line is {"id": …, "messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}. A
missing id is replaced by a hash of the messages. Source files are JSON lines, plain, gz or zst, or
the hub's parquet; all become gz files of JSON lines, as other sources are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from olmo.corpus import formats, json_lines
from olmo.corpus.sources import DIRECT, Transfer, check_against_table, fetch_any
from olmo.io import file_types, gz
from olmo.store.stage import Facts, Input, Output, Unhashed, Work, stage

ROLES = ("system", "user", "assistant")
LABELLED_ROLE = "assistant"  # whose messages are learned
Message = tuple[str, str]  # role, content

# Reasons for dropping a line; the recipe's `allow` takes these names.
REASONS = {
    **json_lines.REASONS,
    "no-messages": "no messages, or null",
    "bad-messages": "messages other than a list of objects with the strings role and content",
    "empty-conversation": "a conversation without a message",
    "unknown-role": f"a role other than {', '.join(ROLES)}",
    **json_lines.SURROGATE,
}
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, …]}'
PARQUET_MAGIC = b"PAR1"


def parse_conversation(line: bytes) -> json_lines.Parsed:
    """(id, text of all messages, reason) of one line. The reason is None if it is valid."""
    identity, messages, reason = decode_line(line)
    text = "\n".join(content for _, content in messages)
    if reason is None and identity is None:
        content = json.dumps(messages, ensure_ascii=False).encode()
        identity = f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"
    return identity, None if reason else text, reason


def decode_line(line: bytes) -> tuple[str | None, list[Message], str | None]:
    """(id, messages, reason) of one line; no messages if there is a reason to drop it."""
    found, reason = json_lines.load_object(line)
    if reason is not None:
        return None, [], reason
    identity = found.get("id") if isinstance(found.get("id"), str) else None
    bad_id = identity is not None and has_surrogate(identity)
    messages = found.get("messages")
    pairs: list[Message] = []
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
        elif bad_id or any(has_surrogate(content) for _, content in pairs):
            reason = "surrogate"
    return None if bad_id else identity, [] if reason else pairs, reason


def has_surrogate(text: str) -> bool:
    """Whether a text has half a surrogate pair, which no encoding can represent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def is_message(found: object) -> bool:
    """Whether a value has a role and a content; other keys are ignored."""
    return isinstance(found, dict) and all(
        isinstance(found.get(name), str) for name in ("role", "content")
    )


def parse_messages(line: bytes) -> list[Message]:
    """The messages of a line. Raises ValueError if it is not a valid conversation."""
    _, messages, reason = decode_line(line)
    if reason is not None:
        raise ValueError(f"expected a conversation, found {reason}: {REASONS[reason]}")
    return messages


@stage(version=1, conditions=gz.conditions)
def local_conversations(file: Input, source: Output, sha256: str | None = None) -> Facts:
    """Convert a local file: JSON lines, plain, gz or zst, or parquet."""
    check_against_table(file, str(file), None, sha256)
    return {"text_bytes": convert_to_json_lines(file, source, str(file))}


@stage(version=1, conditions=gz.conditions)
def download_conversations(
    url: str,
    source: Output,
    part: Work,
    sha256: str | None = None,
    transfer: Unhashed[Transfer] = DIRECT,
) -> Facts:
    """Download and convert such a file, as `olmo.corpus.sources.download`.

    `sha256` is that of the downloaded file, before the conversion.
    """
    downloaded = source.with_name("arrived")

    def convert(place: str) -> int:
        check_against_table(downloaded, place, transfer.bytes, sha256)
        return convert_to_json_lines(downloaded, source, place)

    found = fetch_any(url, transfer, downloaded, part, convert)
    downloaded.unlink()
    return {"url": url, **found, "text_bytes": found.pop("checked")}


def convert_to_json_lines(file: Path, source: Path, name: str) -> int:
    """Write a file of conversations as gz JSON lines; the bytes of its text.

    Raises:
        ValueError: it is damaged, empty or of another kind, such as a web page.
    """
    with open(file, "rb") as start:
        beginning = start.read(512)
    if beginning.startswith(gz.MAGIC):
        shutil.copyfile(file, source)
    elif beginning.startswith(PARQUET_MAGIC):
        with gz.writing(source) as lines:
            lines.writelines(read_parquet_rows(file, name))
    elif beginning.startswith(file_types.ZSTD) or (
        beginning.removeprefix(file_types.BOM).lstrip().startswith(b"{")
    ):
        with formats.open_decompressed(file, name) as text, gz.writing(source) as lines:
            shutil.copyfileobj(text, lines)
    else:
        found, command = file_types.detect_type(beginning)
        remedy = "Check its place and download it again"
        if command:
            remedy = f"Convert it to gz with `{file_types.format_gz_conversion(name, command)}`"
        elif found.startswith("plain text"):
            remedy = f"Make a line {EXAMPLE} of each conversation"
        raise ValueError(
            f"{name}: expected conversations (JSON lines, plain, gz or zst, or parquet), found "
            f"{found}. {remedy}"
        )
    size = gz.verify_checksum(source, name)
    if size == 0:
        raise ValueError(f"{name}: expected conversations, found none. Remove it from the list")
    return size


def read_parquet_rows(file: Path, name: str) -> Iterator[bytes]:
    """The rows of a parquet file as JSON lines."""
    import polars

    try:
        frame = polars.read_parquet(file)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"{name}: expected parquet, found: {error}") from error
    for row in frame.iter_rows(named=True):
        yield json_lines.dump_line(row, default=str)
