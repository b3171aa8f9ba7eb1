"""The table of a data set's sources, and the names that its files get."""

from pathlib import Path

import pytest

from olmo.corpus.source_table import (
    Source,
    assign_names,
    complete_table,
    read_stashing_secrets,
    safe_name,
)


def test_names_of_files_alike_in_many_folders():
    deep = "1/2/3/4/5/6/7/x.gz"
    found = assign_names([Source("", f"{top}/{deep}") for top in "ab"])
    assert [source.name for source in found] == ["a-1-2-3-4-5-6-7-x", "b-1-2-3-4-5-6-7-x"]
    assert assign_names([]) == [] and assign_names([Source("", "https://host")])[0].name == "_"


def test_names_are_safe_and_unlike():
    assert safe_name("-rf.json.gz") == "rf" and safe_name("a b\n.jsonl.gz") == "a_b_"
    assert safe_name("part-0-00000.npy") == "part-0-00000"

    def names(*places: str) -> list[str]:
        return [source.name for source in assign_names([Source("", place) for place in places])]

    assert names("x/part-0.gz", "y/part-0.gz") == ["x-part-0", "y-part-0"]
    assert names("x/part-0.gz", "x/part-0.gz") == ["part-0", "part-0"]  # to be seen twice
    with pytest.raises(ValueError, match=r"the name x-a_b.gz: x/a b.gz and x/a_b.gz"):
        names("x/a b.gz", "x/a_b.gz")


TABLE = "url\tbytes\tsha256\tlicence\nhttps://x/a.json.gz\t12\t\todc-by\n"


def test_a_table_is_completed_by_what_arrived(tmp_path: Path):
    path = tmp_path / "table.tsv"
    path.write_text(TABLE + f"https://x/b.json.gz\t\t{'b' * 64}\t\n")
    complete_table(
        path, {"https://x/a.json.gz": (12, "a" * 64), "https://x/b.json.gz": (9, "c" * 64)}
    )
    a, b = read_stashing_secrets(path)
    assert (a.bytes, a.sha256, a.licence) == (12, "a" * 64, "odc-by")
    assert (b.bytes, b.sha256) == (9, "b" * 64), "what was known stays"
    for wrong in ("https://x/a\t12\tabc\n", "https://x/a\tmany\n", "\t12\n", "u\t1\t\t\tmore\n"):
        path.write_text(TABLE + wrong)
        with pytest.raises(ValueError, match="line 3: expected url, bytes"):
            read_stashing_secrets(path)
