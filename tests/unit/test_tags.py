"""Tags by the toolkit's own taggers, and what a recipe's conditions on them drop."""

import gzip
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest

from olmo.corpus.dedupe import read_marks
from olmo.corpus.digests import Rows, copies, digests
from olmo.corpus.documents import documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.duplicates import OUTPUTS, duplicates, places
from olmo.corpus.marks import marks
from olmo.corpus.mixed import mixed
from olmo.corpus.quality import (
    MODEL_TAGGERS,
    TAGGERS,
    QualitySection,
    list_measures,
    parse_conditions,
    quality,
    variable_name,
)
from olmo.corpus.tags import tags
from olmo.pipeline.recipe import Recipe

PROSE = "The words of this line have an end, and that is to be. It is with us.\n"
TEXTS = {
    "prose": PROSE * 3,
    "short": "Two { words",
    "code": PROSE + "function() { javascript } and lorem ipsum, boobs\n" + "a b\n" * 12,
    "private": PROSE + "Write to me@example.com or  213-555-1234 or 10.0.0.1 or you@example.org \n",
    "repeated": "ab ab ab ab ab ab\n\n" * 20 + "!!!\n- a list…\n",
    "字 and 𝒳": "Größer\r als 字 \u2028 und 𝒳.\n\n" + PROSE,
    "prose again": PROSE * 3,
}
KEEP = (
    "gopher_v1__gopher_v1__word_count >= 10",
    "count(c4_v2__c4_v2__has_curly_brace) == 0",
    "repetitions_v1__repetitions_v1__doc_frac_repetition < 0.5",
)
CONDITIONED = ("gopher_v1", "c4_v2", "repetitions_v1")


def make(folder: Path, texts: dict[str, str], **more: Any) -> dict[str, Path]:
    """A file of documents and its table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": i, "text": t, **more}, ensure_ascii=False) for i, t in texts.items()]
    (folder / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: folder / f"{kind}.gz" for kind in ("documents", "heldout", "table")}
    documents.build(source=folder / "source.gz", name="source", **made)
    return made


def tag(pair: dict[str, Path], path: Path, dolma: Dolma, taggers: Any, **models: Path) -> Path:
    tags.build(
        documents=pair["documents"],
        table=pair["table"],
        models=list(models.values()),
        with_model=tuple(models),
        tags=path,
        toolkit=dolma.toolkit,
        dolma=dolma,
        taggers=tuple(taggers),
    )
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tags"), TEXTS)


@pytest.fixture(scope="module")
def tagged(pair, tmp_path_factory, dolma):
    return tag(pair, tmp_path_factory.mktemp("tagged") / "tags.gz", dolma, TAGGERS)


def by_the_toolkit(python: Path, documents: Path, folder: Path, taggers: Any) -> list[Any]:
    """What the command `dolma tag` writes, for each document the tags of all taggers."""
    (folder / "in/documents").mkdir(parents=True)
    (folder / "nltk/tokenizers/punkt").mkdir(parents=True)
    (folder / "in/documents/file.gz").write_bytes(documents.read_bytes())
    command = [str(python.parent / "dolma"), "tag", "--processes", "1"]
    command += ["--documents", "in/documents/*.gz", "--taggers", *taggers]
    environment = {**os.environ, "NLTK_DATA": str(folder / "nltk"), "PYTHONUTF8": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    found: list[dict[str, Any]] = [{} for _ in TEXTS]
    for tagger in taggers:
        path = folder / "in/attributes" / variable_name(tagger) / "file.gz"
        lines = gzip.decompress(path.read_bytes()).splitlines()
        for one, line in zip(found, lines, strict=True):
            one |= json.loads(line)["attributes"]
    return found


@pytest.mark.slow
def test_tags_are_those_of_the_toolkit_s_command(pair, tagged, tmp_path, python):
    expected = by_the_toolkit(python, pair["documents"], tmp_path, TAGGERS)
    with gzip.open(tagged, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    assert [one["id"] for one in found] == list(TEXTS)
    assert [one["attributes"] for one in found] == expected
    counts = Counter(tag for one in expected for tag in one)
    assert Counter(tag for one in found for tag in one["attributes"]) == counts


def test_every_tag_of_the_toolkit_is_known_and_given(tagged):
    known = {measure.tag for measure in list_measures(list(TAGGERS))}
    given = {tag for spans in read_marks(tagged) for tag in spans}
    assert given == known


def test_a_tag_of_one_number_is_one_span(tagged):
    single = {m.tag for m in list_measures(list(TAGGERS)) if not m.aggregate}
    for spans in read_marks(tagged):
        assert {tag for tag in single if len(spans.get(tag, [0])) > 1} == set()


def test_two_runs_give_the_same_bytes(pair, tmp_path, dolma):
    one, two = (tag(pair, tmp_path / n, dolma, CONDITIONED) for n in ("one.gz", "two.gz"))
    assert one.read_bytes() == two.read_bytes()


def test_other_fields_of_a_document_do_not_matter(pair, tmp_path, dolma):
    """The toolkit alone fails on a source that is null."""
    other = make(tmp_path, TEXTS, source=None, created=5, metadata=None)
    one, two = (
        tag(p, tmp_path / n, dolma, CONDITIONED) for p, n in ((pair, "1.gz"), (other, "2.gz"))
    )
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("change", ["missing", "swapped", "more"])
def test_documents_of_another_table_are_refused(pair, tmp_path, dolma, change):
    lines = gzip.decompress(pair["documents"].read_bytes()).splitlines(keepends=True)
    wrong = {
        "missing": lines[:-1],
        "swapped": [lines[1], lines[0], *lines[2:]],
        "more": [*lines, lines[0]],
    }
    (tmp_path / "wrong.gz").write_bytes(gzip.compress(b"".join(wrong[change])))
    with pytest.raises(ValueError, match="expected tags of 7 documents from the toolkit"):
        tag({**pair, "documents": tmp_path / "wrong.gz"}, tmp_path / "tags", dolma, CONDITIONED)


def judge(tagged: Path, folder: Path, keep: Any = KEEP, taggers: Any = tuple(TAGGERS)) -> Any:
    """The facts, the marks and the table of values."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {"quality": folder / "quality.gz", "values": folder / "values.parquet"}
    facts = quality.build(tags=tagged, taggers=taggers, keep=keep, **outputs)
    return facts, list(read_marks(outputs["quality"])), polars.read_parquet(outputs["values"])


def test_the_first_condition_that_does_not_hold_drops(tagged, tmp_path):
    facts, found, values = judge(tagged, tmp_path)
    dropped = {"short": 0, "code": 1, "repeated": 2}
    assert {
        n: one["quality__dropped"][0][2] for n, one in zip(TEXTS, found, strict=True) if one
    } == (dropped)
    assert values["dropped"].to_list() == [dropped.get(name) for name in TEXTS]
    assert facts == {"documents": 7, "drops": dict.fromkeys(KEEP, 1)}
    words = [len(text.split()) for text in TEXTS.values()]
    assert values["gopher_v1__gopher_v1__word_count"].to_list() == words
    emails = values[
        "count(pii_regex_with_counts_fast_v2__pii_regex_with_counts_fast_v2__EMAIL_ADDRESS)"
    ]
    assert emails.to_list() == [0, 0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize(
    "condition, dropped",
    [
        ("TAG >= 2", {"one"}),  # the first value; a document without the tag stays
        ("max(TAG)>=2", {"one"}),
        ("min(TAG) < 2", {"two"}),
        (" sum( TAG ) <= 4.5 ", {"two"}),
        ("count(TAG) != 0", {"none", "empty"}),
        ("count(TAG) == 0", {"one", "two"}),
        ("TAG > -1e3", set()),
    ],
)
def test_conditions(tmp_path, condition, dropped):
    spans = {"one": [[0, 1, 1.0]], "two": [[0, 1, 3.0], [1, 2, 2.0]], "none": None, "empty": []}
    name = "c4_v1__c4_v1__line_count"
    with gzip.open(tmp_path / "tags.gz", "wt") as lines:
        for identity, given in spans.items():
            attributes = {} if given is None else {name: given}
            lines.write(json.dumps({"id": identity, "attributes": attributes}) + "\n")
    keep = [condition.replace("TAG", name)]
    _, found, _ = judge(tmp_path / "tags.gz", tmp_path / "out", keep, ("c4_v1",))
    assert {n for n, one in zip(spans, found, strict=True) if one} == dropped


@pytest.mark.parametrize(
    "section, message",
    [
        ({"taggers": []}, "expected names, each once, found .*known are bytes_length_v1"),
        ({"taggers": ["c4_v1", "c4_v1"]}, "each once"),
        ({"taggers": ["gofer_v1"]}, "gofer_v1, which is unknown; known are .*gopher_v1"),
        ({"taggers": ["cld2_doc_v2"]}, "needs packages that are not in envs/dolma.txt"),
        ({"taggers": ["jigsaw_nsfw_document_v1"]}, "needs a model that the toolkit downloads"),
        ({"taggers": ["oisd_big_abp_v1"]}, "needs lists of sites that the toolkit downloads"),
        ({"taggers": ["random_number_v1"]}, "says nothing of a text"),
        (
            {"taggers": ["ft_lang_id_en_doc_v2"]},
            "add quality: {models: {ft_lang_id_en_doc_v2: FILE",
        ),
        ({"taggers": ["c4_v1"], "models": {"c4_v1": "x"}}, "found c4_v1; those that need one are"),
        ({"keep": ["word_count 50"]}, "expected a tag, a comparison and a number.*'word_count 50'"),
        ({"keep": ["gopher_v1__gopher_v1__word_count >= many"]}, "a comparison and a number"),
        ({"keep": ["mean(gopher_v1__gopher_v1__word_count) >= 5"]}, "TAG, sum, min, max"),
        (
            {"keep": ["word_count >= 5"]},
            "found word_count .*known are .*gopher_v1__gopher_v1__word",
        ),
        ({"keep": ["c4_v2__c4_v2__line_count >= 5"]}, "expected a tag of quality.taggers"),
        ({"taggers": ["gopher_v1"], "drop": []}, "drop"),
    ],
)
def test_what_a_recipe_may_not_say(section, message):
    with pytest.raises(ValueError, match=message):
        QualitySection.new(**{"taggers": ["gopher_v1"], **section})


def test_every_tagger_of_the_toolkit_is_known_or_refused_with_a_reason(python):
    listed = "from dolma.core.registry import TaggerRegistry as r; import dolma.taggers"
    listed += "\nprint(*[name for name, _ in r.items()])"
    environment = {**os.environ, "NLTK_DATA": str(Path(__file__).parent)}
    output = subprocess.run(
        [python, "-P", "-c", listed], env=environment, check=True, capture_output=True, text=True
    )
    names = output.stdout.split()
    assert {*TAGGERS, *MODEL_TAGGERS} < set(names)
    for name in set(names) - {*TAGGERS, *MODEL_TAGGERS}:
        with pytest.raises(ValueError, match=f"found {name}, which (needs|reads|says)"):
            QualitySection.new(taggers=[name])


def test_the_recipe_of_ai2_s_filters_is_valid():
    """Its files have 21 filters of documents besides duplicates, and 100 repetitions."""
    recipe = Recipe.load(Path(__file__).parents[2] / "config/data/dolma-v1_7-recipe.yaml")
    assert recipe.quality and len(recipe.quality.conditions) == 21


# --- a dropped document counts as seen nowhere ----------------------------------------------------

LINE = "A line that the dropped document has, and that a later one has again."
CHAIN = {
    "low": f"short\n{LINE}",
    "later": f"{LINE}\n" + PROSE,
    "copy of low": f"short\n{LINE}",
    "again": f"{LINE}\nA last line of its own, " + "long enough to be kept " * 5,
}
LONG = "gopher_v1__gopher_v1__word_count >= 20"


def run_all(pair: dict[str, Path], folder: Path, dolma: Dolma, keep: Any) -> dict[str, Any]:
    """Through all stages, to the documents that are left and the reasons of the others."""
    tag(pair, folder / "tags.gz", dolma, CONDITIONED)
    judge(folder / "tags.gz", folder, keep, CONDITIONED)
    names = ("document_digests", "line_digests", "near_digests", "line_starts")
    made = {name: folder / name for name in names}
    given = {"documents": pair["documents"], "overlaps": [], "quality": folder / "quality.gz"}
    options = {"exact": True, "paragraphs": True, "ngram": 2, "bands": 2, "rows": 2}
    digests.build(**given, **made, **options)
    held = folder / "copies"
    copies.build(document_digests=made["document_digests"], heldout=[], copies=held)
    duplicates.build(
        **{name: [path] for name, path in made.items()},
        **{name: folder / name for name in OUTPUTS},
        copies=[held],
        names=["s"],
        part=0,
        parts=1,
    )
    found = {name: [folder / name] for name in ("shards", "document_repeats", "line_repeats")}
    places.build(**found, near=[], places=folder / "places", shard="s")
    path = folder / "marks.gz"
    more = {"copies": [held], "places": [folder / "places"]}
    marks.build(table=pair["table"], marks=path, **given, **more)
    out = {"mixed": folder / "mixed.gz", "mixed_table": folder / "mixed.parquet"}
    facts = mixed.build(
        documents=pair["documents"],
        table=pair["table"],
        attributes=path,
        toolkit=dolma.toolkit,
        dolma=dolma,
        keep=tuple(keep),
        **out,
    )
    kept = map(json.loads, gzip.decompress(out["mixed"].read_bytes()).splitlines())
    table = polars.read_parquet(out["mixed_table"])
    assert table.height == polars.read_parquet(pair["table"]).height
    assert facts["documents"] + sum(facts["drops"].values()) == table.height
    dropped = dict(table.filter(split="dropped").select("id", "reason").rows())
    assert Counter(dropped.values()) == facts["drops"]
    return {"kept": {one["id"]: one["text"] for one in kept}, "dropped": dropped, **made}


def test_lines_and_digests_of_a_dropped_document_count_nowhere(tmp_path, dolma):
    found = run_all(make(tmp_path, CHAIN), tmp_path, dolma, [LONG])
    assert found["dropped"] == dict.fromkeys(("low", "copy of low"), f"quality: {LONG}")
    assert found["kept"]["later"] == CHAIN["later"], "its line was first in one that is dropped"
    assert LINE not in found["kept"]["again"]
    whole = Rows.read(found["document_digests"])
    assert sorted(whole.place) == [1, 3]
    assert min(Rows.read(found["line_digests"]).place) == 2, "the first two lines are those of low"
    assert np.unique(Rows.read(found["near_digests"]).place).tolist() == [1, 3]


def test_without_a_dropped_document_the_lines_count(tmp_path, dolma):
    found = run_all(make(tmp_path, CHAIN), tmp_path, dolma, [])
    assert found["dropped"] == {"copy of low": "duplicate"}
    assert LINE not in found["kept"]["later"]


def test_drops_add_up_and_name_their_condition(pair, tmp_path, dolma):
    found = run_all(pair, tmp_path, dolma, KEEP)
    assert found["dropped"] == {
        "short": f"quality: {KEEP[0]}",
        "code": f"quality: {KEEP[1]}",
        "repeated": f"quality: {KEEP[2]}",
        "prose again": "duplicate",
    }


# --- models ---------------------------------------------------------------------------------------


def test_a_language_model_of_one_s_own(python, tmp_path, dolma):
    """A small fastText model, trained here: the tagger uses it, and downloads none."""
    lines = [f"__label__en the words of this line {n} have an end" for n in range(50)]
    lines += [f"__label__de die wörter dieser zeile {n} haben ein ende" for n in range(50)]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    train = "import fasttext; fasttext.train_supervised('train.txt', epoch=50, thread=1, bucket=10,"
    train += " dim=8, lr=0.5).save_model('model.bin')"
    subprocess.run([python, "-c", train], cwd=tmp_path, check=True, capture_output=True)
    texts = {"en": "The words of this line", "de": "Die Wörter dieser Zeile\nhaben ein Ende"}
    taggers = [tagger for tagger in MODEL_TAGGERS if tagger.startswith("ft_")]
    models = {tagger: tmp_path / "model.bin" for tagger in taggers}
    path = tag(make(tmp_path, texts), tmp_path / "tags.gz", dolma, taggers, **models)
    english, german = read_marks(path)
    for tagger in taggers:
        name = f"{tagger}__{tagger}__en"
        assert english[name][0][2] > 0.9 > 0.1 > german[name][0][2]
    assert {*english, *german} == {measure.tag for measure in list_measures(taggers)}


def test_a_tokenizer_of_one_s_own(tokenizer, tmp_path, dolma):
    texts = {"many": "No. " + "abc " * 50, "none": "No word is here again."}
    tagger = "tokenizer_repetitions_v2r2"
    pair = make(tmp_path, texts)
    taggers = [one for one in MODEL_TAGGERS if "tokenizer" in one]
    models = dict.fromkeys(taggers, tokenizer)
    path = tag(pair, tmp_path / "tags.gz", dolma, taggers, **models)
    many, none = read_marks(path)
    assert set(many) == {measure.tag for measure in list_measures(taggers)}
    assert many[f"{tagger}__{tagger}__doc_max_score_repetition"][0][2] >= 40
    assert not [name for name in none if name.startswith(tagger)]
    [condition] = parse_conditions([f"{tagger}__{tagger}__doc_max_score_repetition < 40"], [tagger])
    assert condition.holds(condition.measure.of([])) and not condition.holds(50)
