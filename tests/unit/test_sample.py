"""Samples: what a data set will have, by the beginnings of some sources, and what that costs."""

import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from servers import ScriptedServer, s3_server, scripted_server

from olmo.corpus.beginnings import MAX_BYTES, beginning
from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.estimates import estimate, open_tokenizer
from olmo.corpus.formats import converted
from olmo.corpus.sample import batch, choose, group_names
from olmo.corpus.source_table import Source
from olmo.corpus.sources import SourcesSection, Transfer
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.io import gz
from olmo.store.stage import current_store

LETTERS = "etaoinshrdlucmfwypvbgkjqxzéü"
CONFIG = DocumentsSection(keep_one_in=2, heldout_share=0.05)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with scripted_server(b"") as server:
        yield server


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a store of our own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))


def texts(seed: int, count: int, length: int) -> list[str]:
    """Texts of about 5 times `length` letters; the seed decides how many letters there are."""
    draw = random.Random(seed)
    letters = LETTERS[: draw.randrange(12, 28)] + 2 * " "
    return [
        "".join(draw.choices(letters, k=1 + int(draw.expovariate(1 / length / 5)))) + "."
        for _ in range(count)
    ]


def lines(name: str, given: list[str]) -> bytes:
    rows = [{"id": f"{name}-{n}", "text": text} for n, text in enumerate(given)]
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def dolma(name: str, given: list[str]) -> bytes:
    return gzip.compress(lines(name, given), mtime=0)


def corpus(per_group: int = 8) -> dict[str, bytes]:
    """Files of three groups, whose documents are of other lengths and words."""
    made = {}
    for group, length in (("web", 60), ("books", 150), ("code", 20)):
        for n in range(per_group):
            seed = per_group * length + n
            count = random.Random(seed).randrange(300, 900) * 60 // length
            name = f"{group}-{n:02d}"
            made[f"{name}.json.gz"] = dolma(name, texts(seed, count, length * (8 + n % 3) // 8))
    return made


def answer_ranges(content: bytes) -> Any:
    """A server that knows byte ranges with an end."""

    def behave(handler: Any, number: int) -> None:
        first, _, last = (
            handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        )
        if "Range" not in handler.headers:
            return handler.answer(200, content)
        if not content:
            return handler.answer(416, Content_Range="bytes */0")
        body = content[int(first) : int(last) + 1]
        span = f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}"
        return handler.answer(206, body, Content_Range=span)

    return behave


def serve(server: ScriptedServer, files: dict[str, bytes], with_sizes: bool = True) -> None:
    """Serve files, and write table.tsv, which names them."""
    rows = ["url\tbytes\tsha256"]
    for name, content in files.items():
        url = server(name, answer_ranges(content))
        rows.append(f"{url}\t{len(content) if with_sizes else ''}\t")
    Path("table.tsv").write_text("\n".join(rows) + "\n")


def sample(max_bytes: int = MAX_BYTES, config: DocumentsSection = CONFIG, **options: Any) -> Any:
    """The estimates of the sources in table.tsv, or of the recipe given."""
    recipe = options.pop("recipe", SourcesSection(table="table.tsv"))
    out = {"estimates": Path("data/mine/sample.json"), "text": Path("data/mine/sample.txt")}
    table = Path("table.tsv") if recipe.table else None
    batch(recipe, table=table, config=config, max_bytes=max_bytes, **out, **options)
    return json.loads(out["estimates"].read_text())


def truth(
    files: dict[str, bytes], tokenizer: Path | None = None, config: DocumentsSection = CONFIG
) -> dict[str, int]:
    """What the pipeline's own stages make of whole files."""
    found = {"documents": 0, "text_bytes": 0, "documents_bytes": 0, "source_bytes": 0, "tokens": 0}
    for name, content in files.items():
        Path("whole").write_bytes(content)
        kept = Path("kept")
        rest = {"heldout": Path("heldout"), "table": Path("rows")}
        made = documents.build(
            source=Path("whole"), documents=kept, name=name, config=config, **rest
        )
        found["documents"] += made["documents"]
        with gz.reading(kept) as rows:
            kept_texts = [json.loads(line)["text"] for line in rows]
        found["text_bytes"] += sum(len(text.encode()) for text in kept_texts)
        found["documents_bytes"] += kept.stat().st_size
        found["source_bytes"] += len(content)
        if tokenizer:
            found["tokens"] += open_tokenizer(tokenizer)(kept_texts) + len(kept_texts)
    return found


def make_tokenizer() -> Path:
    Path("some.gz").write_bytes(dolma("some", texts(1, 300, 50)))
    path = Path("tokenizer.json")
    trained_tokenizer.build(documents=[Path("some.gz")], tokenizer=path, vocab_size=300)
    return path


@pytest.mark.slow
def test_the_truth_is_in_the_range_and_little_is_read(server):
    files, tokenizer = corpus(), make_tokenizer()
    serve(server, files)
    bound, most = 12_000, 12
    found = sample(bound, max_sources=most, tokenizer=tokenizer)
    assert server.sent <= bound * most < sum(map(len, files.values())) / 5
    assert found["total"]["read"] == server.sent and found["total"]["sampled"] == most
    expected = truth(files, tokenizer)
    for amount, exact in expected.items():
        told = found["total"][amount]
        assert told["low"] <= exact <= told["high"], (amount, told, exact)
        assert told["expected"] == pytest.approx(exact, rel=0.15), amount
        assert told["high"] < 2 * told["low"], amount
    assert [row["group"] for row in found["groups"]] == ["books", "code", "web"]
    assert all(row["sampled"] == 4 for row in found["groups"])
    text = Path("data/mine/sample.txt").read_text()
    assert "t intervals" in text and "12 of 24" in text


def test_files_that_are_read_whole_are_exact(server):
    files, tokenizer = corpus(2), make_tokenizer()
    serve(server, files, with_sizes=False)
    found = sample(tokenizer=tokenizer)["total"]
    for amount, exact in truth(files, tokenizer).items():
        told = found[amount]
        assert told["low"] == told["expected"] == told["high"]
        assert told["expected"] == pytest.approx(exact, rel=0.001), amount


def test_nothing_is_read_or_fetched_twice(server):
    serve(server, corpus(2))
    first = sample(6000)
    asked = len(server.requests)
    assert sample(6000) == first and len(server.requests) == asked
    sample(6000, DocumentsSection(keep_one_in=3))  # the same beginnings, another recipe
    assert len(server.requests) == asked


def test_a_server_without_ranges_is_left_after_the_bound(server):
    draw = random.Random(1)
    given = lines("big", [draw.randbytes(2000).hex() for _ in range(10_000)])
    content = gzip.compress(given, 1, mtime=0)
    assert len(content) > 20 << 20
    received = []

    def behave(handler: Any, number: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for at in range(0, len(content), 1 << 16):
            handler.wfile.write(content[at : at + (1 << 16)])
            received.append(1 << 16)

    Path("table.tsv").write_text(f"url\tbytes\tsha256\n{server('big-0.json.gz', behave)}\t\t\n")
    found = sample(100_000)
    assert found["total"]["read"] == 100_000 and found["total"]["bytes"] == len(content)
    assert sum(received) < 8 << 20  # what sockets buffer


def test_the_server_s_size_must_be_that_of_the_table(server):
    files = corpus(2)
    serve(server, files)
    table = Path("table.tsv").read_text()
    Path("table.tsv").write_text(table.replace("\t" + str(len(files["web-00.json.gz"])), "\t7"))
    with pytest.raises(ValueError, match=r"web-00.json.gz: expected 7 bytes by the source table"):
        sample(6000)


@pytest.mark.parametrize(("status", "length"), [(200, 100_000), (206, 100_000), (206, None)])
def test_a_server_that_announces_more_than_it_sends_is_told(server, status, length):
    content = corpus(1)["web-00.json.gz"]

    def behave(handler: Any, number: int) -> None:
        span = {"Content_Range": "bytes 0-99999/99999999"} if status == 206 else {}
        handler.answer(status, content[:500], length=length, **span)

    url = server("lies.json.gz", behave)
    with pytest.raises(ValueError, match=r"lies\.json\.gz: .*gave up after 6 attempts"):
        beginning(url=url, head=Path("head"), max_bytes=100_000)
    assert len(server.requests) == 6


def test_a_failing_source_is_named_and_the_others_are_kept(server):
    files = corpus(2)
    serve(server, files)
    server("web-01.json.gz", lambda handler, number: handler.answer(404))
    with pytest.raises(ValueError, match=r"1 of 6 sources: .*web-01.json.gz: .* answered 404"):
        sample(6000)
    asked = len(server.requests)
    recipe = SourcesSection(table="table.tsv", allow_missing=True)
    found = sample(6000, recipe=recipe)
    assert len(server.requests) == asked + 1  # the others are in the store
    assert found["total"]["sources"] == 5
    assert found["total"]["bytes"] == sum(map(len, files.values())) - len(files["web-01.json.gz"])


def test_a_server_that_recovers_is_asked_again_and_a_mirror_helps(server):
    content = corpus(1)["web-00.json.gz"]
    good = answer_ranges(content)
    once = server(
        "once.json.gz", lambda h, number: good(h, number) if number > 2 else h.answer(503)
    )
    assert beginning(url=once, head=Path("a"), max_bytes=900)["facts"]["received"] == 900
    bad = server("bad.json.gz", lambda handler, number: handler.answer(403))
    transfer = Transfer(mirrors=(once,))
    facts = beginning(url=bad, head=Path("b"), max_bytes=900, transfer=transfer)["facts"]
    assert facts["from"] == once and facts["size"] == len(content)


BROKEN = {
    "no-gzip": (b'{"id": "1", "text": "plain"}\n', "expected gzip, found"),
    "page": (b"<!doctype html><html>", "expected data, found a web page"),
    "empty": (b"", "expected data, found an empty file"),
    "short": (dolma("a", texts(1, 90, 50))[:-300], "truncated"),
    "corrupt": (
        dolma("a", texts(1, 900, 50))[:700] + random.Random(0).randbytes(30_000),
        "corrupt",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_source_is_told_and_not_kept(server, name):
    content, message = BROKEN[name]
    url = server("web-0.json.gz", answer_ranges(content))
    with pytest.raises(ValueError, match=message):
        beginning(url=url, head=Path("head"), max_bytes=20_000)
    good = corpus(1)["web-00.json.gz"]
    server("web-0.json.gz", answer_ranges(good))
    assert beginning(url=url, head=Path("head"), max_bytes=20_000)["facts"]["size"] == len(good)


def test_one_source_has_an_assumed_range(server):
    serve(server, {"web-0.json.gz": corpus(1)["books-00.json.gz"]})
    told = sample(1500)["total"]["documents"]
    assert told["low"] * 2 == told["expected"] == told["high"] / 2


def test_without_a_tokenizer_it_says_so(server):
    serve(server, corpus(2))
    assert sample(6000)["total"]["tokens"] is None
    assert "no tokenizer is here yet" in Path("data/mine/sample.txt").read_text()


def test_the_range_holds_the_truth_as_often_as_it_says():
    """2,000 populations of 40 sources, of each of which 8 are drawn."""
    draw, hits = random.Random(1), 0
    for _ in range(2000):
        sizes = [draw.uniform(50, 150) for _ in range(40)]
        rates = [draw.gauss(3, 0.6) for _ in sizes]
        drawn = draw.sample(range(40), 8)
        pairs = [(rates[i] * sizes[i], sizes[i]) for i in drawn]
        told = estimate(pairs, sum(sizes), sum(sizes[i] for i in drawn) / sum(sizes))
        exact = sum(rate * size for rate, size in zip(rates, sizes, strict=True))
        hits += told.low <= exact <= told.high
    assert 0.935 < hits / 2000 < 0.975


def names(groups: dict[str, list[Source]]) -> dict[str, int]:
    return {group: len(members) for group, members in groups.items()}


def test_sources_are_chosen_evenly_from_each_group():
    many = [Source(f"c4-{n:04d}", "") for n in range(170)]
    few = [Source(f"wiki_{n}", "") for n in range(3)]
    groups = group_names(many + few, 13)
    assert names(groups) == {"c4": 170, "wiki": 3}
    chosen = list(choose(groups, 13))
    assert chosen[:3] == ["wiki_0", "wiki_1", "wiki_2"]
    assert chosen[3:] == [f"c4-{n:04d}" for n in (8, 25, 42, 59, 76, 93, 110, 127, 144, 161)]
    assert len(choose({"c4": many}, 500)) == 170
    unlike = [Source(name, "") for name in ("alice", "bob", "carol")]
    assert names(group_names(unlike, 10)) == {"all": 3}


def as_zst(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def csv_rows(given: list[str]) -> bytes:
    rows = [f'{n},"{text.replace("e t", chr(10))}"' for n, text in enumerate(given)]
    return "\n".join(["id,text", *rows, ""]).encode()


FORMATS = {
    "jsonl": lambda given: lines("a", given),
    "jsonl.zst": lambda given: as_zst(lines("a", given)),
    "csv": csv_rows,
    "csv.gz": lambda given: gzip.compress(csv_rows(given), mtime=0),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.slow
def test_other_formats_are_sampled_too(server, suffix):
    """Of local files and of remote ones alike, as the stages convert them."""
    count = 20_000 if suffix.endswith("zst") else 3000  # its blocks are large
    files = {f"part-{n}.{suffix}": FORMATS[suffix](texts(n, count, 50 + 4 * n)) for n in range(3)}
    Path("here").mkdir()
    whole: dict[str, bytes] = {}
    for name, content in files.items():
        Path("here", name).write_bytes(content)
        converted.build(files=[Path("here", name)], source=Path("made"), names=[name])
        whole[name] = Path("made").read_bytes()
    serve(server, files)
    bound = min(map(len, files.values())) // 2
    remote = sample(bound)["total"]
    local = sample(bound, recipe=SourcesSection(files=[f"here/*.{suffix}"]))["total"]
    for amount, exact in truth(whole).items():
        if amount != "tokens":
            assert remote[amount]["expected"] == pytest.approx(exact, rel=0.05), amount
            assert remote[amount] == pytest.approx(local[amount], rel=0.01)
    assert remote["read"] == 3 * bound


def test_a_text_file_is_one_document():
    Path("here").mkdir()
    for n in range(40):
        Path("here", f"{n}.txt").write_text(" ".join(texts(n, 50, 40)))
    size = sum(path.stat().st_size for path in Path("here").iterdir())
    recipe = SourcesSection(files=["here/*.txt"])
    told = sample(50_000, recipe=recipe, config=DocumentsSection())["total"]
    assert told["documents"]["expected"] == pytest.approx(40)
    assert told["text_bytes"]["expected"] == pytest.approx(size, rel=0.02)
    one = SourcesSection(files=["here/*.txt"], one_document_per="line")
    told = sample(50_000, recipe=one, config=DocumentsSection())["total"]
    assert told["documents"]["expected"] == pytest.approx(40)


def test_weights_and_drops_are_counted(server):
    given = texts(3, 9000, 60)
    given[1] = " "
    files = {f"web-{n}.json.gz": dolma(f"{n}", given) for n in range(2)}
    serve(server, files)
    config = DocumentsSection(weights=["web-1=3"], heldout_share=0.5, allow=["empty-text"])
    told = sample(100_000, config=config)["total"]
    assert told["documents"]["expected"] == pytest.approx(9000 * 4 / 2, rel=0.06)


def test_parquet_and_a_first_line_without_end_are_refused(server):
    serve(server, {"a.parquet": b"PAR1" + struct.pack("<q", 1) * 100})
    with pytest.raises(ValueError, match=r"a\.parquet: .* parquet cannot be sampled"):
        sample()
    assert not server.requests
    serve(server, {"a.jsonl": lines("a", ["x" * 5000])})
    with pytest.raises(ValueError, match=r"a\.jsonl: expected a complete row in its first 900"):
        sample(900)


def test_an_unknown_size_is_told(server):
    content = corpus(1)["web-00.json.gz"]
    serve(server, {"web-0.json.gz": content, "web-1.json.gz": content})

    def silent(handler: Any, number: int) -> None:
        handler.send_response(200 if handler.command == "GET" else 405)
        handler.end_headers()
        handler.close_connection = True
        if handler.command == "GET":
            handler.wfile.write(content)

    url = server("web-1.json.gz", silent)
    Path("table.tsv").write_text(f"url\tbytes\tsha256\n{url}\t\t\n")
    with pytest.raises(ValueError, match="expected the file's size from the server, found none"):
        sample(900)
    assert sample(900_000)["total"]["bytes"] == len(content)  # it came to its end


@pytest.mark.slow
def test_a_bucket_is_read_by_ranges():
    content = dolma("a", texts(1, 3000, 50))
    with s3_server("corpus"):
        import boto3

        client = boto3.session.Session().client("s3")
        client.put_object(Bucket="corpus", Key="v1/web-0.json.gz", Body=content)
        record = beginning(url="s3://corpus/v1/web-0.json.gz", head=Path("head"), max_bytes=4000)
        assert record["facts"]["size"] == len(content)
        assert Path("head").read_bytes() == content[:4000]
        with pytest.raises(ValueError, match=r"s3://corpus/v1/none\.json\.gz"):
            beginning(url="s3://corpus/v1/none.json.gz", head=Path("none"), max_bytes=4000)
    assert current_store().root.exists()


def test_what_was_read_is_not_uncertain():
    """The width is that of what was not read: half, where three quarters were read."""
    pairs = [(10.0, 5.0), (30.0, 10.0), (14.0, 8.0)]
    none, most, all_ = (estimate(pairs, 100.0, share) for share in (0.0, 0.75, 1.0))
    assert most.high - most.expected == pytest.approx((none.high - none.expected) / 2)
    assert all_.low == all_.expected == all_.high == most.expected
