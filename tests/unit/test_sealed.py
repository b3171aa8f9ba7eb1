"""Small files that are written whole, and read back only as they were written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.io import sealed

VALUE = {"b": 1.5, "a": [1, None], "text": 'é \u2028 "seal": "', "nested": {"seal": "x"}}
ROWS = [["shard", "sha256"], ["a", ""], ["seal", "b"]]
WRITTEN = {
    "an object": (sealed.dumps(VALUE), sealed.loads, VALUE),
    "an indented object": (sealed.dumps(VALUE, 1), sealed.loads, VALUE),
    "an empty object": (sealed.dumps({}), sealed.loads, {}),
    "lines": (sealed.dump_lines([VALUE, {"x": 1}]), sealed.load_lines, [VALUE, {"x": 1}]),
    "a table": (sealed.dump_table(ROWS), sealed.load_table, ROWS),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_was_written_is_read_and_nothing_else(kind: str):
    text, load, value = WRITTEN[kind]
    content = text.encode()
    assert load(content, "f") == value
    others = [content[:length] for length in range(len(content))]
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            others.append(bytes(changed))
    for other in others:
        with pytest.raises(sealed.Damaged, match="f is damaged"):
            load(other, "f")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)))
@pytest.mark.slow
def test_any_object_comes_back(value: dict):
    value.pop("seal", None)
    assert sealed.loads(sealed.dumps(value).encode(), "f") == value


def test_a_line_less_is_noticed():
    first, _, _ = sealed.dump_lines([{"a": 1}, {"a": 2}, {"a": 3}]).partition("\n")
    with pytest.raises(sealed.Damaged):
        sealed.load_lines(f"{first}\n".encode(), "f")


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path):
    path = tmp_path / "folder/f.json"
    sealed.write_atomic(path, "first")
    program = (
        "import os, sys; from pathlib import Path; from olmo.io import sealed\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "sealed.write_atomic(Path(sys.argv[1]), 'second')"
    )
    assert subprocess.run([sys.executable, "-c", program, path]).returncode == -9
    assert path.read_text() == "first" and len(sealed.find_drafts(path.parent)) == 1
    sealed.write_atomic(path, "third", read_only=True)
    assert path.read_text() == "third" and path.stat().st_mode & 0o777 == 0o444


def test_a_failed_write_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        sealed.write_atomic(tmp_path / "f.json", "text")
    assert list(tmp_path.iterdir()) == []


def test_who_writes_alone_takes_away_what_killed_writers_left(tmp_path: Path):
    for name in (".f.tsv.01234567", ".g.tsv.01234567", ".f.tsv.draft"):
        (tmp_path / name).touch()
    sealed.write_atomic(tmp_path / "f.tsv", "text", alone=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".f.tsv.draft",
        ".g.tsv.01234567",
        "f.tsv",
    ]
