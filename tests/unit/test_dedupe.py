"""Duplicates, paragraphs and overlaps by the real toolkit: the planted ones, and no others."""

import gzip
import json
from pathlib import Path

import polars
import pytest
from dedupe_stages import find_marks, make

from olmo.corpus import bloom, dedupe, overlaps
from olmo.corpus.dedupe import read_marks
from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.mixed import mixed
from olmo.corpus.overlaps import find_unreadable

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
