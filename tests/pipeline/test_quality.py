"""A recipe with taggers and conditions, by the real Snakefile: what fails goes, and is counted."""

import base64
import gzip
import html
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import polars
import pytest
from project import Project, read_source, write_source

from olmo.corpus.documents import is_held_out
from olmo.corpus.tokenizer import trained_tokenizer

pytestmark = pytest.mark.slow
HELDOUT_SHARE = 0.1
WORDS, BRACE = "gopher_v1__gopher_v1__word_count", "c4_v2__c4_v2__has_curly_brace"
KEEP = [f"{WORDS} >= 12", f"count({BRACE}) == 0"]
MARKUP = "{ <script>alert(1)</script> & /home/me/private/file https://me:pw@host.org/a </pre>"
SHARED = "This line is in a document that goes and, later on, in one that stays."


def name(prefix: str, held: bool = False) -> str:
    """An id that is held out, or one that is not."""
    return next(
        one for n in range(1000) if is_held_out(one := f"{prefix}-{n}", HELDOUT_SHARE) == held
    )


def good(number: int) -> str:
    words = " ".join(f"w{number}x{n}" for n in range(14))
    return f"A text with the number {number}, of {words}.\nAnd line {number} is its own."


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two files; the reasons that are planted, and the texts that are to be left."""
    project = Project(tmp_path_factory.mktemp("quality") / "project")
    files: list[dict[str, str]] = [
        {name(f"{p}-{n}"): good(100 * p + n) for n in range(20)} for p in (0, 1)
    ]
    left = files[0] | files[1]
    short, code, copy = name("short"), name("code"), name("copy")
    files[0] |= {short: "Too short.", code: f"{SHARED}\n{MARKUP}", name("held", True): "Short."}
    files[1] |= {copy: good(3), name("later"): f"{SHARED}\n{good(500)}"}
    left[name("later")] = files[1][name("later")]
    reasons = {short: f"quality: {KEEP[0]}", code: f"quality: {KEEP[1]}", copy: "duplicate"}
    for path in (project.root / "sources").iterdir():
        path.unlink()
    for part, texts in enumerate(files):
        lines = [{"id": one, "text": text, "source": None} for one, text in texts.items()]
        write_source(project.root / f"sources/part-{part}.json.gz", lines)
    tokenizer = project.root.parent / "tokenizer.json"
    sources = sorted((project.root / "sources").iterdir())
    trained_tokenizer.build(documents=sources, tokenizer=tokenizer, vocab_size=300)
    project.use_given_tokenizer(tokenizer)
    project.change(
        "config/data/small.yaml",
        documents={"heldout_share": HELDOUT_SHARE},
        quality={"taggers": ["gopher_v1", "c4_v2"], "keep": KEEP},
        dedupe={"exact": True, "paragraphs": True},
    )
    project.change("config/config.yaml", shards_per_job=1)
    project.run("data/small/statistics.txt", "data/small/quality.html")
    return project, left, reasons


def data(project: Project) -> Path:
    return project.root / "data/small"


def test_what_fails_goes_with_its_condition(project):
    project, left, reasons = project
    kept = [d for p in (0, 1) for d in read_source(data(project) / f"mixed/part-{p}.json.gz")]
    assert {document["id"]: document["text"] for document in kept} == left
    tables = polars.concat(map(polars.read_parquet, sorted(data(project).glob("mixed/*.parquet"))))
    dropped = tables.filter(split="dropped")
    assert dict(dropped.select("id", "reason").rows()) == reasons
    assert tables.height == len(left) + len(reasons) + 1, "lines in = documents out + drops"
    summary = polars.read_parquet(data(project) / "statistics.parquet").filter(file="in all")
    counted = dict(summary.filter(split="dropped").select("reason", "documents").rows())
    assert counted == Counter(reasons.values())
    assert f"quality: {KEEP[1]}" in (data(project) / "statistics.txt").read_text()


def read_page(project: Project) -> tuple[str, dict[str, Any]]:
    """The page's markup before its data, and its data."""
    page = (data(project) / "quality.html").read_text()
    markup, rest = page.split('id="data">')
    content = base64.b64decode(rest.split("</script>")[0])
    return markup, json.loads(gzip.decompress(content))


def test_the_page_counts_each_document(project):
    markup, found = read_page(project[0])
    rows = re.findall(r"<code>([^<]*)</code></th><td>(\d+)</td><td>(\d+)</td>", markup)
    assert rows == [(html.escape(KEEP[0]), "1", "1"), (KEEP[1], "1", "1")]
    assert re.findall(r"<dd>(\d+)</dd>", markup) == ["44", "42", "2"]
    charts = {chart["title"]: chart for chart in found["charts"]}
    assert list(charts)[:2] == [WORDS, f"count({BRACE})"]
    for name in (WORDS, f"count({BRACE})", "c4_v2__c4_v2__line_count"):
        counted: Counter[str] = Counter()
        for point in charts[name]["points"]:
            counted[point["what"]] += point["documents"]
        assert counted == {"kept": 42, "dropped": 2}
    assert list(charts[WORDS]["spec"]["datasets"].values()) == [[{"limit": 12.0}]]


def test_the_page_shows_documents_on_either_side_as_text(project):
    markup, _ = read_page(project[0])
    first, second = re.findall(r"<details>(.*?)</details>", markup, re.S)
    dropped, kept = first.split("It keeps")
    assert "Too short." in dropped and dropped.count("<pre>") == 1
    assert kept.count("<pre>") == 3 and "Too short." not in kept
    dropped, kept = second.split("It keeps")
    assert "{ &lt;script&gt;alert(1)&lt;/script&gt; &amp; " in dropped and SHARED in dropped
    for secret in ("<script>alert", "me:pw", "/home/me", str(project[0].root)):
        assert secret not in markup
    assert "…/file" in dropped and "host.org/a" in dropped


def test_a_threshold_tags_nothing_again(project, tmp_path):
    project = project[0].copy(tmp_path / "again")
    targets = ("data/small/statistics.txt", "data/small/quality.html")
    assert not project.run(*targets).ran
    project.change("config/data/small.yaml", quality__keep=[f"{WORDS} >= 13", KEEP[1]])
    ran = project.run(*targets).ran
    # No document changes sides: marks are equal. The reason of a drop in one file is another.
    assert ran == {"quality": 2, "mixed": 2, "tokens": 2, "statistics": 1}
    assert ">= 13" in (data(project) / "statistics.txt").read_text()


def test_conditions_alone_need_no_digests(project, tmp_path):
    project = project[0].copy(tmp_path / "alone")
    project.change("config/data/small.yaml", dedupe=None)
    shutil.rmtree(data(project) / "digests")
    ran = project.run("data/small/statistics.txt").ran
    assert not {"tags", "quality", "digests", "duplicates"} & set(ran)
    assert not (data(project) / "digests").exists()
    table = polars.read_parquet(data(project) / "mixed/part-1.parquet")
    assert table.filter(split="dropped").is_empty(), "the copy stays"


def test_without_conditions_documents_are_only_tagged(project, tmp_path):
    project = project[0].copy(tmp_path / "tagged")
    project.change("config/data/small.yaml", dedupe=None, quality={"taggers": ["char_length_v1"]})
    said = project.olmo("plan", "data/small/statistics.txt", "data/small/quality.html").output
    assert "data/small/tags" in said and "data/small/mixed" not in said
    ran = project.run("data/small/statistics.txt", "data/small/quality.html").ran
    assert ran == {"tags": 2, "quality": 2, "tokens": 4, "statistics": 1}
    assert (data(project) / "quality.html").read_text().count("<figure>") == 1


def test_an_unknown_tag_is_an_error_before_any_job(project, tmp_path):
    project = project[0].copy(tmp_path / "wrong")
    project.change("config/data/small.yaml", quality__keep=["word_count >= 12"])
    done = project.run("data/small/statistics.txt", ok=False)
    assert done.status and not done.ran
    assert f"known are {WORDS.replace('word_count', '')}" in done.output
