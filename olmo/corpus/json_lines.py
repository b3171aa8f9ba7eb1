"""Lines of JSON, as documents and conversations have them, and why a line is not a JSON object."""

import json
from typing import Any

# Reasons for dropping a line of any kind; the recipe's `documents.allow` takes these names.
REASONS = {
    "long-line": "a line of more bytes than the recipe's documents.max_line_bytes",
    "not-utf8": "bytes that are not UTF-8",
    "bad-json": "not one JSON value",
    "not-object": "JSON, but not an object",
    "bad-row": "a row of a csv file with more or fewer fields than its header",
}
BAD_ROW = "bad-row: "
SURROGATE = {"surrogate": "half a surrogate pair, which is not a character"}
Parsed = tuple[str | None, str | None, str | None]  # id, text, reason to drop the line


def load_object(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(object, None) of a line; ({}, reason) of one that is not a JSON object."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        return {}, "not-utf8"
    except (ValueError, RecursionError):
        return {}, "bad-json"
    if isinstance(found, str) and found.startswith(BAD_ROW):
        return {}, "bad-row"
    return (found, None) if isinstance(found, dict) else ({}, "not-object")


def bad_row(expected: str, found: str) -> bytes:
    """The line in the place of a row that has no fields to read."""
    return dump_line(f"{BAD_ROW}expected {expected}, found {found}")


def dump_line(row: dict | str, **options: Any) -> bytes:
    """A line of UTF-8; `options` of json.dumps."""
    return json.dumps(row, ensure_ascii=False, **options).encode() + b"\n"
