"""Duplicates, paragraphs and overlaps by the real toolkit: the planted ones, and no others."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest

from olmo.corpus import bloom, dedupe, overlaps
from olmo.corpus.dedupe import DUPLICATE, NEAR, PARAGRAPH, NearSection, read_marks
from olmo.corpus.digests import (
    Rows,
    copies,
    digests,
    heldout_digests,
    is_blank,
    signature_options,
    sort_rows,
)
from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.duplicates import OUTPUTS, clusters, duplicates, pair_with_first, places
from olmo.corpus.marks import marks
from olmo.corpus.mixed import mixed
from olmo.corpus.overlaps import find_unreadable, overlap_filter

DIGESTS = ("document_digests", "line_digests", "near_digests", "line_starts")
WORDS = [f"word{number}" for number in range(200)]
QUESTION = " ".join(WORDS[:20])  # of an evaluation set
LONG = " ".join(WORDS[100:160])

# In the recipe's order: two files; what is said of each document.
FIRST = {
    "a": "A text.\nA line of its own.\nA line that many have.",
    "b": "Größer als 字.\nA line that many have.\n字 and an end",
    "a again": "A text.\nA line of its own.\nA line that many have.",
    "asks": f"Before it\nsaid {' '.join(WORDS[5:18])} and more\nOnly asks and later have this.",
    "twelve": f"{' '.join(WORDS[5:17])}\n{' '.join(WORDS[3:15])}",
    "long": LONG,
}
SECOND = {
    "held copy": "What is held out.",
    "later": "Only asks and later have this.\n\n\nGrößer als 字.",
    "nothing new": "A text.\n字 and an end\n",
    "a once more": "A text.\nA line of its own.\nA line that many have.",
    "asks again": FIRST["asks"],
    "own": "x\nx\ny\n",
    "long again": LONG,
}


def make(folder: Path, name: str, texts: dict[str, str], **more: object) -> dict[str, Path]:
    """A source and what the documents' stage makes of it."""
    folder = folder / name
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": t, "id": i, **more}, ensure_ascii=False) for i, t in texts.items()]
    (folder / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: folder / kind for kind in ("documents", "heldout", "table")}
    documents.build(source=folder / "source.gz", name=name, **made)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of documents, one held out, an evaluation set; with what a source also has."""
    folder = tmp_path_factory.mktemp("dedupe")
    other = {"attributes": {"x": [[0, 1, 1.0]]}, "metadata": None, "number": 2.50}
    made = [make(folder, "first", FIRST, **other), make(folder, "second", SECOND)]
    held = make(folder, "held", {"h": "What is held out.", "i": "A line that many have."})
    against = make(folder, "against", {"q": QUESTION, "short": "A text."})
    return {"pairs": made, "heldout": held["documents"], "against": against["documents"]}


def find(files, folder, dolma, exact=False, paragraphs=False, ngram=0, overlap=0.0, **options):
    """Run the stages: the sum of the marks' facts, and the marks of every document by its id."""
    folder.mkdir(exist_ok=True)
    made = find_marks(files, folder, dolma, exact, paragraphs, ngram, overlap, **options)
    found = {}
    for (facts, path), texts in zip(made, (FIRST, SECOND), strict=True):
        assert facts["documents"] == len(texts)
        found |= dict(zip(texts, read_marks(path), strict=True))
    return {name: sum(facts[name] for facts, _ in made) for name in made[0][0]}, found


def find_marks(
    files: Any,
    folder: Path,
    dolma: Any = None,
    exact: bool = False,
    paragraphs: bool = False,
    ngram: int = 0,
    overlap: float = 0.0,
    parts: int = 1,
    memory_bytes: int = 1 << 30,
    near: NearSection | None = None,
) -> list[tuple[Any, Path]]:
    """For each file: the facts of its marks, and the marks."""
    pairs, tools = files["pairs"], {"dolma": dolma, "toolkit": dolma and dolma.toolkit}
    held, of_overlaps = [], [[] for _ in pairs]
    if exact:
        held = [folder / "held"]
        heldout_digests.build(heldout=[files["heldout"]], heldout_digests=held[0])
    if ngram:
        given = {"against": [files["against"]], "ngram": ngram, **tools}
        overlap_filter.build(overlap_filter=folder / "filter", **given)
    for n, pair in enumerate(pairs):
        if ngram:
            of_overlaps[n] = [folder / f"{n}.overlaps"]
            overlaps.overlaps.build(
                documents=pair["documents"],
                table=pair["table"],
                overlap_filter=folder / "filter",
                overlaps=of_overlaps[n][0],
                ngram=ngram,
                overlap=overlap,
                **tools,
            )
        if not (exact or paragraphs or near):
            continue
        digests.build(
            documents=pair["documents"],
            overlaps=of_overlaps[n],
            exact=exact,
            paragraphs=paragraphs,
            **signature_options(near),
            **{name: folder / f"{n}.{name}" for name in DIGESTS},
        )
        found = folder / f"{n}.document_digests"
        copies.build(document_digests=found, heldout=held, copies=folder / f"{n}.copies")
    parts = parts if exact or paragraphs or near else 0
    for part in range(parts):
        given = {name: [folder / f"{n}.{name}" for n in range(len(pairs))] for name in DIGESTS}
        duplicates.build(
            **given,
            copies=[folder / f"{n}.copies" for n in range(len(pairs))],
            **{name: folder / f"{part}.{name}" for name in OUTPUTS},
            names=[f"shard {n}" for n in range(len(pairs))],
            part=part,
            parts=parts,
            memory_bytes=memory_bytes,
        )
    if near:
        files = [folder / f"{part}.near_pairs" for part in range(parts)]
        clusters.build(near_pairs=files, near=folder / "near")
    made = []
    for n, pair in enumerate(pairs):
        if parts:
            names = ("shards", "document_repeats", "line_repeats")
            places.build(
                near=[folder / "near"] if near else [],
                places=folder / f"{n}.places",
                shard=f"shard {n}",
                **{name: [folder / f"{part}.{name}" for part in range(parts)] for name in names},
            )
        facts = marks.build(
            documents=pair["documents"],
            table=pair["table"],
            overlaps=of_overlaps[n],
            copies=[folder / f"{n}.copies"] if parts else [],
            places=[folder / f"{n}.places"] if parts else [],
            marks=folder / f"{n}.marks",
        )
        made.append((facts, folder / f"{n}.marks"))
    return made


def marked_pieces(found, kind):
    """The pieces of text with a mark of this kind, by document."""
    texts = FIRST | SECOND
    return {
        name: [texts[name][int(start) : int(end)] for start, end, _ in spans[kind]]
        for name, spans in found.items()
        if kind in spans
    }


def test_a_filter_file_is_the_smallest_for_its_rate(tmp_path):
    words, hashes = bloom.filter_dimensions(1_000_000, 1e-6)
    assert (words * 4, hashes) == (3_594_400, 20)
    share = (1 - (1 - 1 / (32 * words)) ** (hashes * 1_000_000)) ** hashes
    assert 0.9e-6 < share < 1.1e-6
    for name in ("one", "two"):
        bloom.write_filter(tmp_path / name, 1000, 1e-6)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert bloom.filter_dimensions(0, 1e-6) == (1, 20)


def test_exact_duplicates_and_copies_of_heldout_documents(files, tmp_path, dolma):
    facts, found = find(files, tmp_path, dolma, exact=True)
    assert set(marked_pieces(found, dedupe.DUPLICATE)) == {
        "a again",
        "held copy",
        "a once more",
        "asks again",
        "long again",
    }
    assert not any(set(spans) - {dedupe.DUPLICATE} for spans in found.values())
    assert facts["documents"] == 13 and facts["duplicate"] == 5


def test_paragraphs_are_lines_and_blank_ones_stay(files, tmp_path, dolma):
    _, found = find(files, tmp_path, dolma, paragraphs=True)
    assert marked_pieces(found, dedupe.PARAGRAPH) == {
        "b": ["A line that many have.\n"],
        "a again": ["A text.\n", "A line of its own.\n", "A line that many have."],
        "later": ["Only asks and later have this.\n", "Größer als 字."],
        "nothing new": ["A text.\n", "字 and an end\n"],
        "a once more": ["A text.\n", "A line of its own.\n", "A line that many have."],
        "asks again": FIRST["asks"].splitlines(keepends=True),
        "own": ["x\n"],
        "long again": [LONG],
    }


def test_overlap_is_an_n_gram_of_one_line(files, tmp_path, dolma):
    (tmp_path / "any").mkdir()
    (tmp_path / "half").mkdir()
    _, found = find(files, tmp_path / "any", dolma, ngram=13)
    assert set(marked_pieces(found, dedupe.OVERLAP)) == {"asks", "asks again"}
    [(_, _, share)] = found["asks"][dedupe.OVERLAP]
    assert share == pytest.approx(1 / 4)
    _, found = find(files, tmp_path / "half", dolma, ngram=13, overlap=0.5)
    assert not marked_pieces(found, dedupe.OVERLAP)


ALL = {"exact": True, "paragraphs": True, "ngram": 13}


@pytest.fixture(scope="module")
def marked(files, tmp_path_factory, dolma):
    folder = tmp_path_factory.mktemp("marked")
    return find(files, folder, dolma, **ALL), folder


def test_lines_of_dropped_documents_do_not_count(marked):
    (_, found), _ = marked
    assert "asks" in marked_pieces(found, dedupe.OVERLAP)
    assert marked_pieces(found, dedupe.PARAGRAPH)["later"] == ["Größer als 字."]


def test_kept_documents_and_removed_lines(files, marked, tmp_path, dolma):
    _, folder = marked
    kept, rows = {}, []
    for number, pair in enumerate(files["pairs"]):
        out = {"mixed": tmp_path / f"{number}", "mixed_table": tmp_path / f"{number}.parquet"}
        facts = mixed.build(
            documents=pair["documents"],
            table=pair["table"],
            attributes=folder / f"{number}.marks",
            toolkit=dolma.toolkit,
            dolma=dolma,
            **out,
        )
        lines = gzip.decompress(out["mixed"].read_bytes()).splitlines()
        given = gzip.decompress(pair["documents"].read_bytes()).splitlines()
        table = polars.read_parquet(out["mixed_table"])
        train = table.filter(split="train").sort("row")
        assert train["row"].to_list() == list(range(1, len(lines) + 1))
        assert [json.loads(line)["id"] for line in lines] == train["id"].to_list()
        sizes = [len(json.loads(line)["text"].encode()) for line in lines]
        assert train["bytes"].to_list() == sizes and facts["text_bytes"] == sum(sizes)
        before = polars.read_parquet(pair["table"])
        assert table.select("file", "line", "id").equals(before.select("file", "line", "id"))
        left = before["bytes"].sum() - sum(sizes)
        assert left == table.filter(split="dropped")["bytes"].sum() + train["removed_bytes"].sum()
        uncut = train.filter(removed_paragraphs=0)["row"].to_list()
        assert {lines[row - 1] for row in uncut} == set(given) & set(lines)
        kept |= {document["id"]: document["text"] for document in map(json.loads, lines)}
        rows.append(table)
    assert kept == {
        "a": FIRST["a"],
        "b": "Größer als 字.\n字 and an end",
        "twelve": FIRST["twelve"],
        "long": LONG,
        "later": "Only asks and later have this.\n\n\n",
        "own": "x\ny\n",
    }
    drops = polars.concat(rows).filter(split="dropped").select("id", "reason").rows()
    assert dict(drops) == {
        "a again": "duplicate",
        "asks": "overlap",
        "held copy": "duplicate",
        "nothing new": "duplicate-paragraph",
        "a once more": "duplicate",
        "asks again": "overlap",
        "long again": "duplicate",
    }


def test_documents_without_marks_are_copied(files, tmp_path):
    pair = files["pairs"][0]
    with gzip.open(tmp_path / "none.gz", "wt") as lines:
        lines.writelines(json.dumps({"id": name, "attributes": {}}) + "\n" for name in FIRST)
    mixed.build(
        documents=pair["documents"],
        table=pair["table"],
        attributes=tmp_path / "none.gz",
        mixed=tmp_path / "mixed",
        mixed_table=tmp_path / "table",
        toolkit="",
        dolma=Dolma(Path("never started"), ""),
    )
    assert (tmp_path / "mixed").read_bytes() == pair["documents"].read_bytes()
    before, after = polars.read_parquet(pair["table"]), polars.read_parquet(tmp_path / "table")
    assert after.drop("removed_paragraphs", "removed_bytes").equals(before)


@pytest.mark.parametrize("options", [{"parts": 8}, {"parts": 3, "memory_bytes": 100}])
def test_parts_and_steps_change_nothing(files, marked, tmp_path, dolma, options):
    _, folder = marked
    find(files, tmp_path / "again", dolma, **ALL, **options)
    for name in ("0.marks", "1.marks"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda lines: [lines[0], b"not JSON", *lines[2:]],
            "^first:2: expected a document that dolma dedupe can read, found no JSON",
        ),
        (lambda lines: [lines[0], b'{"id": "x", "text": null}', *lines[2:]], "found 0"),
        (lambda lines: lines[:-1], "first:6: expected attributes of 6 documents .*found 5"),
        (
            lambda lines: [lines[1], lines[0], *lines[2:]],
            "^first:1: expected attributes .*in their order, found 6",
        ),
    ],
    ids=["broken", "no text", "missing", "swapped"],
)
def test_a_document_without_attributes_fails_the_stage(files, tmp_path, dolma, damage, message):
    first, second = files["pairs"]
    lines = gzip.decompress(first["documents"].read_bytes()).splitlines()
    other = tmp_path / "other.gz"
    other.write_bytes(gzip.compress(b"\n".join(damage(lines)) + b"\n"))
    pairs = [{**first, "documents": other}, second]
    with pytest.raises(ValueError, match=message):
        find({**files, "pairs": pairs}, tmp_path, dolma, ngram=13)


NESTED = "[" * 127 + "]" * 127
ONLY_FOR_TOKENS = {  # what `dolma tokens` reads and `dolma dedupe` does not
    "more": ('{"id": "a", "text": "b", "more": 1e400}', "a number that does not fit"),
    "whole": (
        f'{{"id": "a", "text": "b", "more": -{"9" * 400}}}',
        "a number that does not fit into a float",
    ),
    "deep": (f'{{"id": "a", "text": "b [[", "more": {NESTED}}}', "more than 127 lists and objects"),
}


@pytest.mark.parametrize("case", ONLY_FOR_TOKENS)
def test_a_line_that_dedupe_cannot_read_is_an_error_with_its_place(files, tmp_path, dolma, case):
    line, message = ONLY_FOR_TOKENS[case]
    lines = ['{"id": "g", "text": "c"}', "broken", line, '{"id": "h", "text": "d"}']
    (tmp_path / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: tmp_path / kind for kind in ("documents", "heldout", "table")}
    documents.build(
        source=tmp_path / "source.gz",
        name="s.gz",
        config=DocumentsSection(allow=["bad-json"]),
        **made,
    )
    said = f"^s.gz:3: expected a document that dolma dedupe can read, found {message}"
    with pytest.raises(ValueError, match=said):
        find({**files, "pairs": [made, files["pairs"][1]]}, tmp_path / "one", dolma, ngram=13)
    against = {**files, "against": made["documents"]}
    with pytest.raises(ValueError, match=f"documents:2: expected a document .* found {message}"):
        find(against, tmp_path / "two", dolma, ngram=13)


def test_lines_that_dedupe_can_read_are_accepted():
    for line in (
        b'{"a": 1e308, "b": [-1, 2.5e-400]}',
        b'{"a": "[[[{ 1e999 \\" [["}',
        NESTED[1:-1].encode(),
    ):
        assert find_unreadable(line) is None
    assert find_unreadable(f'{{"a": {NESTED[1:-1]}}}'.encode()) is None
    assert find_unreadable(f'{{"a": {NESTED}}}'.encode())


def test_attributes_of_other_documents_are_refused(files, marked, tmp_path, dolma):
    _, folder = marked
    with gzip.open(folder / "0.marks", "rt") as file:
        lines = [json.loads(line) for line in file]
    for wrong, message in (
        (lines[:-1], "expected attributes of 6 documents, found 5"),
        ([*lines[:3], {**lines[3], "id": "x"}, *lines[4:]], "Mismatched ids"),
    ):
        with gzip.open(tmp_path / "wrong.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in wrong)
        with pytest.raises(ValueError, match=message):
            mixed.build(
                documents=files["pairs"][0]["documents"],
                table=files["pairs"][0]["table"],
                attributes=tmp_path / "wrong.gz",
                mixed=tmp_path / "mixed",
                mixed_table=tmp_path / "table",
                toolkit=dolma.toolkit,
                dolma=dolma,
            )


def test_too_little_memory_is_an_error_before_the_start(files, tmp_path, monkeypatch):
    monkeypatch.setattr(overlaps, "available_memory", lambda: 20)
    not_started = Dolma(Path("never started"), "")
    message = r"the filter for up to 136 n-grams needs 736 bytes of memory, but 20 are free"
    with pytest.raises(ValueError, match=message):
        find(files, tmp_path, not_started, ngram=13)


def test_an_evaluation_set_without_documents_is_a_warning(files, tmp_path, dolma, capsys):
    empty = tmp_path / "empty.gz"
    empty.write_bytes(gzip.compress(b""))
    facts, _ = find({**files, "against": empty}, tmp_path, dolma, ngram=13)
    assert facts["overlap"] == 0
    assert "expected text in 1 files to decontaminate against" in capsys.readouterr().err


def test_an_evaluation_set_must_hold_documents(files, tmp_path):
    bad = tmp_path / "bad.gz"
    bad.write_bytes(gzip.compress(b'{"id": "a", "text": "b"}\n{"question": "?"}\n'))
    with pytest.raises(ValueError, match=r"bad.gz:2: expected a document .*no-id"):
        find({**files, "against": bad}, tmp_path, Dolma(Path("never started"), ""), ngram=13)


# --- beside the toolkit, and beside a set ---------------------------------------------------------


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
