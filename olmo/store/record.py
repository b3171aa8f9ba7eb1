"""Records: what is known of an action that ended. They are read and checked in this module alone.

A record is a sealed JSON file (olmo.io.sealed), the last file that a stage writes: an action
without a record has not ended. In memory it stays the dict that the file holds, so writing it back
gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from olmo.io import sealed
from olmo.io.sealed import Damaged
from olmo.io.untrusted import (
    RECORD_FILE,
    check_byte_count,
    check_digest,
    check_mapping,
    check_no_overlap,
    check_part,
    check_relative,
    show,
)
from olmo.store.action import Action, canonical_json


class Record(TypedDict):
    """The fields of a record, as in its file."""

    key: str  # the sha256 of the action
    action: dict[str, Any]  # Action.as_dict()
    content: str  # the digest of the outputs, see `content`
    # Each output by its name: a file {"sha256", "size"}, or a folder {"files": {path: file},
    # "aside": {path: file}}. Files aside (plots, timings) are not part of the content.
    outputs: dict[str, Any]
    facts: dict[str, Any]  # what the stage returned: counts, losses
    conditions: dict[str, Any]  # what may change the bytes but not the key: world size, device
    run: NotRequired[dict[str, Any]]  # cost and environment, see olmo.store.stage.measure_run


def load_record(text: bytes, key: str) -> Record:
    """The record of the action `key`, from the bytes of its file in this store.

    Raises:
        Damaged: the bytes have changed, or they are another action's record.
    """
    record = parse_record(text, f"the record {key[:12]}…")
    if record["key"] != key:
        raise Damaged(f"expected the record of {key[:12]}…, found another action's")
    return record


def parse_record(text: bytes, name: str | Path) -> Record:
    """A record from the bytes of its file. Raises Damaged, which names the file by `name`."""
    try:
        return sealed.loads(text, name)  # type: ignore[return-value]
    except Damaged:
        if (record := _parse_unsealed(text)) is None:
            raise
        return record


def _parse_unsealed(text: bytes) -> Record | None:
    """A record from before records were sealed, if its key and content can be recomputed."""
    try:
        record: Record = json.loads(text)
        known_fields = set(record) <= set(Record.__annotations__)
        return record if known_fields and _is_consistent(record) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_consistent(record: Record) -> bool:
    """Whether key and content are those of the action and the outputs."""
    expected = Action(**record["action"]).key, content(record["outputs"])
    return expected == (record["key"], record.get("content"))


def check_record(found: Any, key: str, whose: str) -> Record:
    """Check another store's record of the action `key` before anything in it is used as a path.

    Raises:
        ValueError: it is malformed, another action's, or not consistent in itself.
    """
    outputs = check_mapping(check_mapping(found, whose).get("outputs"), f"{whose}, outputs")
    if found.get("key") != key:
        raise ValueError(f"{whose}: it is another action's record")
    action = check_mapping(found.get("action"), f"{whose}, action")
    if sorted(action) != ["inputs", "params", "stage", "version"]:
        raise ValueError(f"{whose}: expected an action, found {show(action)}")
    check_mapping(action["params"], f"{whose}, params")
    for digests in check_mapping(action["inputs"], f"{whose}, inputs").values():
        for digest in digests if isinstance(digests, list) else [digests]:
            check_digest(digest, f"{whose}, inputs")
    for name, output in outputs.items():
        check_part(name, f"{whose}, outputs")
        where = f"{whose}, output {name}"
        for file in _check_files(check_mapping(output, where), where):
            check_digest(check_mapping(file, where).get("sha256"), where)
            check_byte_count(file.get("size"), where)
    for field in ("facts", "conditions", "run"):
        check_mapping(found.get(field, {}), f"{whose}, {field}")
    if not _is_consistent(found):
        raise ValueError(f"{whose}: the record was changed after it was written")
    return found


def _check_files(output: Mapping[str, Any], where: str) -> list[Any]:
    """The files of an output; their paths are checked, they themselves are not."""
    if "files" not in output:
        return [output]
    inside = check_mapping(output["files"], where)
    aside = check_mapping(output.get("aside"), where)
    names = [check_relative(name, where) for name in (*inside, *aside)]
    check_no_overlap(names, where)
    if any(name.split("/")[0] == RECORD_FILE for name in names):
        raise ValueError(
            f"{where}: expected no file {RECORD_FILE}, which the store makes; found one"
        )
    return [*inside.values(), *aside.values()]


def list_files(output: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files of one output, those aside too: {"sha256", "size"}."""
    if "files" not in output:
        return [dict(output)]
    return [*output["files"].values(), *output["aside"].values()]


def output_files(record: Record) -> list[dict[str, Any]]:
    """The files of all outputs of an action, those aside too: {"sha256", "size"}."""
    return [file for output in record["outputs"].values() for file in list_files(output)]


def content(outputs: Mapping[str, Any]) -> str:
    """The sha256 of the paths and digests of outputs; files aside are not in it."""
    return hashlib.sha256(canonical_json(digests_by_path(outputs))).hexdigest()


def digests_by_path(outputs: Mapping[str, Any]) -> dict[str, str]:
    """ "output" or "output/path" → sha256, of the files that are part of the content."""
    digests: dict[str, str] = {}
    for name, output in outputs.items():
        if "files" in output:
            digests |= {f"{name}/{path}": f["sha256"] for path, f in output["files"].items()}
        else:
            digests[name] = output["sha256"]
    return digests
