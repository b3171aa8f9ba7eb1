"""Duplicates and near duplicates beside the toolkit, and beside a set."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dedupe_stages import DIGESTS, find_marks, make

from olmo.corpus import bloom
from olmo.corpus.dedupe import DUPLICATE, NEAR, PARAGRAPH, NearSection, read_marks
from olmo.corpus.digests import (
    Rows,
    is_blank,
    sort_rows,
)
from olmo.corpus.dolma import Dolma
from olmo.corpus.duplicates import OUTPUTS, clusters, duplicates, pair_with_first, places


def by_the_toolkit(pairs: Any, folder: Path, dolma: Dolma, by: str, drop: Any = ()) -> list[Any]:
    """What `dolma dedupe` alone marks, with a filter that is too large to err."""
    kind = DUPLICATE if by == "text" else PARAGRAPH
    (folder / "in/documents").mkdir(parents=True)
    names = []
    for n, pair in enumerate(pairs):
        names.append(f"in/documents/{n}.gz")
        lines = gzip.decompress(pair["documents"].read_bytes()).splitlines(keepends=True)
        kept = [line for row, line in enumerate(lines) if (n, row) not in drop]
        (folder / names[-1]).write_bytes(gzip.compress(b"".join(kept)))
    bloom.write_filter(folder / kind, 100_000, 1e-12)
    request = {"by": by, "documents": names, "name": kind, "bloom_filter": kind}
    dolma.request("dedupe", 300, folder=str(folder), read_only=False, **request)
    found = []
    for n, name in enumerate(names):
        marked = read_marks(folder / name.replace("/documents/", f"/attributes/{kind}/"))
        rows = [row for row in range(len(list_texts(pairs[n]))) if (n, row) not in drop]
        found.append(dict(zip(rows, (one.get(kind, []) for one in marked), strict=True)))
    return found


def list_texts(pair: Any) -> list[str]:
    lines = gzip.decompress(pair["documents"].read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


SPACES = ["", " ", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u200b", "\u2003"]
SPACES += ["\u2028", "\u3000", "\ufeff", " \u1680 ", "\u180e"]


def random_text(chance: random.Random) -> str:
    """A few lines of few: words, other scripts, and every kind of blank line."""
    words = ["a", "b b", "größer", "字", "𝒳 y", "e\u0301", "é", *SPACES]
    lines = [chance.choice(words) * chance.randint(1, 2) for _ in range(chance.randint(1, 5))]
    return "\n".join(lines) + chance.choice(["", "\n", "\n\n"])


def test_marks_are_those_of_the_toolkit(tmp_path, dolma):
    chance = random.Random(1201)
    texts = [text for _ in range(3000) if (text := random_text(chance)).strip()]
    texts += texts[:200]
    pairs = [
        make(tmp_path, f"source{n}", {f"{n}-{i}": text for i, text in enumerate(texts[n::3])})
        for n in range(3)
    ]
    held = make(tmp_path, "held", {"h": texts[7]})
    files = {"pairs": pairs, "heldout": held["documents"]}
    (tmp_path / "ours").mkdir()
    ours = [
        list(read_marks(path))
        for _, path in find_marks(files, tmp_path / "ours", exact=True, paragraphs=True, parts=2)
    ]
    of_documents = by_the_toolkit([held, *pairs], tmp_path / "theirs", dolma, "text")[1:]
    drop = {(n, row) for n, rows in enumerate(of_documents) for row, spans in rows.items() if spans}
    assert len(drop) > 300
    of_lines = by_the_toolkit(pairs, tmp_path / "lines", dolma, "paragraphs", drop)
    for n, rows in enumerate(ours):
        for row, spans in enumerate(rows):
            expected = {DUPLICATE: of_documents[n][row]} if (n, row) in drop else {}
            if lines := of_lines[n].get(row):
                expected[PARAGRAPH] = lines
            assert spans == expected, (list_texts(pairs[n])[row], spans, expected)


def naive(files: list[dict[str, str]], held: str) -> list[list[bool]]:
    """Whether each document stays, by a set."""
    seen, found = {held}, []
    for texts in files:
        found.append([not (text in seen or seen.add(text)) for text in texts.values()])
    return found


@pytest.mark.slow
def test_200_000_documents_beside_a_set(tmp_path):
    chance = random.Random(2)
    held = "a document that is held out"
    own = [f"document {n} says {chance.random()}" for n in range(150_000)]
    texts = [*own, *chance.choices(own, k=49_990), *[held] * 10]
    chance.shuffle(texts)
    names = [f"source{n}" for n in range(8)]
    contents = {
        name: {f"{name}-{i}": text for i, text in enumerate(texts[n::8])}
        for n, name in enumerate(names)
    }
    pairs = {name: make(tmp_path, name, contents[name]) for name in names}
    heldout = make(tmp_path, "held", {"h": held})["documents"]
    marked: dict[tuple[str, ...], list[bytes]] = {}
    for parts, memory in ((1, 1 << 30), (2, 1 << 30), (8, 1 << 16)):
        for order in (names, names[::-1], sorted(names, key=lambda name: hash(name[-1]))):
            folder = tmp_path / "found"
            folder.mkdir()
            given = {"pairs": [pairs[name] for name in order], "heldout": heldout}
            made = find_marks(given, folder, exact=True, parts=parts, memory_bytes=memory)
            kept = [[not spans for spans in read_marks(path)] for _, path in made]
            assert kept == naive([contents[name] for name in order], held), (parts, order)
            content = [path.read_bytes() for _, path in made]
            assert marked.setdefault(tuple(order), content) == content
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def test_digests_with_equal_upper_halves_are_told_apart():
    def rows(*digests: tuple[int, int]) -> Rows:
        raw = np.array(digests, np.uint64).reshape(-1, 2)
        return sort_rows(raw, range(len(digests)))

    one, other = rows((7, 1), (7, 2), (5, 5)), rows((7, 2), (9, 1), (7, 3), (7, 1), (5, 4))
    found = sorted(pair_with_first([one, other])[:, 1].tolist())
    assert found == [1 << 32 | 0, 1 << 32 | 3]
    assert other.place[other.find(one)].tolist() == [3, 0]
    assert one.between(6, 2**64 - 1).place.tolist() == [0, 1]


@pytest.mark.parametrize("text", SPACES)
def test_what_is_blank(text):
    """As Rust's `trim`: separators of information and zero-width characters are no white space."""
    expected = text not in ("\x1c", "\x1f", "\u200b", "\ufeff", "\u180e")
    assert is_blank(text.encode()) is expected


def test_a_part_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="expected a part from 0 to 1, found 2"):
        duplicates.build(
            **{name: [] for name in (*DIGESTS, "copies")},
            **{name: tmp_path / name for name in OUTPUTS},
            names=[],
            part=2,
            parts=2,
        )
    (tmp_path / "cut").write_bytes(bytes(21))
    with pytest.raises(ValueError, match="expected rows of 20 bytes, found 21 bytes"):
        Rows.read(tmp_path / "cut")


def edited(text: str, share: float, chance: random.Random) -> str:
    """A text in which a share of the words are others."""
    words = text.split()
    for at in chance.sample(range(len(words)), int(share * len(words))):
        words[at] = f"other{chance.random()}"
    return " ".join(words)


@pytest.mark.parametrize("parts", [1, 5])
def test_near_duplicates_of_which_the_first_stays(tmp_path, parts):
    chance = random.Random(20)
    own = [" ".join(f"w{chance.randrange(3000)}" for _ in range(300)) for _ in range(200)]
    second = {f"near {n}": edited(own[n], 0.01, chance) for n in range(50)}  # J = 0.9
    second |= {f"half {n}": edited(own[n], 0.15, chance) for n in range(50, 100)}  # J = 0.3
    second |= {f"case {n}": own[n].upper().replace(" ", ", ") for n in range(100, 110)}
    second |= {"held": own[199], "same": own[150], "short": "Two words", "short too": "two words!"}
    pairs = [
        make(tmp_path, "first", {f"own {n}": text for n, text in enumerate(own[:190])}),
        make(tmp_path, "second", second),
    ]
    files = {"pairs": pairs, "heldout": make(tmp_path, "held", {"h": own[199]})["documents"]}
    (tmp_path / "found").mkdir()
    made = find_marks(files, tmp_path / "found", exact=True, parts=parts, near=NearSection())
    ours = [list(read_marks(path)) for _, path in made]
    assert not any(ours[0])
    found = dict(zip(second, ours[1], strict=True))
    near = {name for name, spans in found.items() if NEAR in spans}
    assert {name for name, spans in found.items() if DUPLICATE in spans} == {"held", "same"}
    assert {f"case {n}" for n in range(100, 110)} | {"short too"} <= near
    assert not any(name.startswith("half") for name in near) and "short" not in near
    assert sum(name.startswith("near") for name in near) == 50
    assert all(found[name] == {NEAR: [[0, len(second[name]), 1]]} for name in near)


def test_clusters_are_connected_across_parts(tmp_path):
    """a-b in one part, b-c in another: a stays. c-d through a later one."""

    def place(shard: int, row: int) -> int:
        return shard << 32 | row

    pairs = [[place(0, 5), place(1, 0), place(2, 1), place(2, 3)], [place(1, 0), place(2, 1)]]
    for part, found in enumerate(pairs):
        np.array(found, np.uint64).tofile(tmp_path / f"{part}")
    facts = clusters.build(near_pairs=[tmp_path / "0", tmp_path / "1"], near=tmp_path / "near")
    later = [place(1, 0), place(2, 1), place(2, 3)]
    assert np.fromfile(tmp_path / "near", np.uint64).tolist() == later
    assert dict(facts) == {"clusters": 1, "near": 3}
    (tmp_path / "0").write_bytes(b"")
    assert clusters.build(near_pairs=[tmp_path / "0"], near=tmp_path / "near")["near"] == 0


def test_parts_of_other_files_are_refused(tmp_path):
    for part, names in enumerate((["a", "b"], ["a", "c"])):
        (tmp_path / f"{part}").write_text(json.dumps(names))
    given = {"document_repeats": [], "line_repeats": [], "near": [], "places": tmp_path / "out"}
    for shards, shard in ((["0", "1"], "a"), (["0"], "c")):
        with pytest.raises(ValueError, match=f"expected parts of the same files, with {shard}"):
            places.build(shards=[tmp_path / name for name in shards], shard=shard, **given)
