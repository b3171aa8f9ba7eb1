"""`olmo seen --text` finds what grep finds, and the steps whose batches have these tokens."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars
import pytest
from project import documents as make_documents
from project import write_source
from small_run import run as train
from tokenizers import Tokenizer

from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.fast import Fast
from olmo.corpus.text_index import BLOCK_BYTES, find_lines, text_index
from olmo.corpus.tokenizer import local_tokenizer
from olmo.corpus.tokens import tokens
from olmo.inspect.commands import seen
from olmo.inspect.passages import Passage, find_passages, find_uses, list_saved
from olmo.inspect.run import TrainedRun

LENGTH, EOS = 64, 0
PLANTED = "Zwölf Boxkämpfer jagen 字字 Viktor 🙂 quer über den großen Sylter Deich"


@dataclass
class Searched:
    """A trained run, and its data as grep sees it."""

    folder: Path
    texts: dict[str, str]  # id → text, of all documents that became tokens
    heldout: set[str]
    spans: dict[str, list[tuple[int, int]]]  # id → the bytes of each of its tokens in its text
    starts: dict[str, tuple[int, int]]  # id → its first token in its shard, the shard's number

    def run(self) -> TrainedRun:
        return TrainedRun(str(self.folder / "run"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory, tokenizer: Path):
    """Two shards with a long document; 12 steps, over two epochs and two batch sizes."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OLMO_STORE", str(folder / "store"))
        local_tokenizer(source=tokenizer, tokenizer=folder / "tokenizer.json")
        yield make_run(folder, folder / "tokenizer.json")


def make_run(folder: Path, tokenizer: Path) -> Searched:
    found = Searched(folder, {}, set(), {}, {})
    engine, paths = Fast(Dolma(Path("never started"), ""), audit_share=0), []
    for shard in (0, 1):
        lines = make_documents(shard, 60)
        for number, line in enumerate(lines):
            line["text"] = (
                f" \n{line['text']}\n" if number % 3 else line["text"].replace("e", "é字")
            )
        lines[7]["text"] += PLANTED
        if shard:
            long = "\n\n".join(line["text"] for line in lines) * 9
            lines.append({"id": "long", "text": long[: BLOCK_BYTES + 10_000]})
        write_source(folder / f"{shard}.gz", lines)
        made = {name: folder / f"{shard}.{name}" for name in ("documents", "heldout", "table")}
        config = DocumentsSection(heldout_share=0.1)
        documents(source=folder / f"{shard}.gz", name=f"{shard}.gz", config=config, **made)
        for split, kind in (("train", "documents"), ("heldout", "heldout")):
            outputs = {name: folder / f"{shard}.{kind}.{name}" for name in ("tokens", "index")}
            tokens(
                documents=made[kind],
                table=made["table"],
                tokenizer=tokenizer,
                eos_token_id=EOS,
                pad_token_id=1,
                toolkit=engine.toolkit,
                engine=engine,
                split=split,
                **outputs,
            )
            texts = read_texts(made[kind])
            found.texts |= texts
            if split == "heldout":
                found.heldout |= texts.keys()
                continue
            paths.append(str(outputs["tokens"].resolve()))
            add_spans(found, texts, outputs, tokenizer, shard)
    common = {
        "model": {"vocab_size": 300, "embedding_size": 384, "max_sequence_length": LENGTH},
        "data": {"paths": paths, "drop_last": False},
        "evaluators": [],
        "device_train_microbatch_size": 64,
        "save_interval_unsharded": 4,
        "max_duration": 12,
        "try_load_latest_save": True,
    }
    assert train(folder, global_train_batch_size=256, stop_after=3, **common) == 75
    assert train(folder, global_train_batch_size=192, **common) == 0
    return found


def read_texts(path: Path) -> dict[str, str]:
    with gzip.open(path) as file:
        return {line["id"]: line["text"] for line in map(json.loads, file)}


def add_spans(found: Searched, texts: dict, outputs: dict, tokenizer: Path, shard: int) -> None:
    """The bytes of each token: what the ids stand for, one after the other."""
    size = {i: len(t) for t, i in Tokenizer.from_file(str(tokenizer)).get_vocab().items()}
    ids = np.fromfile(outputs["tokens"], np.uint16)
    for row in polars.read_parquet(outputs["index"]).iter_rows(named=True):
        text = texts[row["id"]]
        at, spans = len(text[: len(text) - len(text.lstrip())].encode()), []
        for token in ids[row["start"] : row["end"] - 1].tolist():
            spans.append((at, at + size[token]))
            at += size[token]
        assert at == len(text.rstrip().encode())
        found.spans[row["id"]] = spans
        found.starts[row["id"]] = (row["start"], shard)


def grep(searched: Searched, text: str) -> set[tuple[str, int]]:
    places = set()
    for id, whole in searched.texts.items():
        start = whole.find(text)
        while start >= 0:
            places.add((id, start))
            start = whole.find(text, start + 1)
    return places


def expected_instances(searched: Searched, run: TrainedRun, one: Passage) -> list[int | None]:
    """Those that have a token with a byte of a passage."""
    whole = searched.texts[one.document.id]
    start, end = (len(whole[:place].encode()) for place in (one.start, one.end))
    first, shard = searched.starts[one.document.id]
    (offset, limit), rows = run.dataset.offsets[shard], []
    for number, (begin, stop) in enumerate(searched.spans[one.document.id]):
        row = offset + (first + number) // LENGTH
        if begin < end and stop > start and (row if row < limit else None) not in rows:
            rows.append(row if row < limit else None)
    return rows


def fragments(searched: Searched, count: int) -> list[str]:
    """Random ones of 1 to 200 bytes, some changed; some over the end of a document."""
    rng, found, wholes = random.Random(0), [], list(searched.texts.values())
    for number in range(count):
        at = rng.randrange(len(wholes) - 1)
        whole = wholes[at] if number % 8 else wholes[at] + wholes[at + 1]
        size = rng.choice((1, 5, 6, 7, 7, 12, 12, 40, 40, 200, 200))
        start = rng.randrange(max(len(whole) - size, 1))
        if not number % 8:
            start = max(len(wholes[at]) - size // 2, 0)
        text = whole[start : start + size].encode()[:200].decode(errors="ignore")
        found.append(text[::-1] if number % 8 == 1 else text)
    return found


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.slow
def test_it_finds_what_grep_finds_where_it_was_trained(searched: Searched, indexed: bool):
    if indexed:
        for name in ("0.documents", "0.heldout", "1.documents", "1.heldout"):
            made = {kind: searched.folder / f"{name}.{kind}" for kind in ("grams", "blocks")}
            text_index(documents=searched.folder / name, **made)
    run = searched.run()
    batches = {step: run.batch(step)[0].tolist() for step in range(1, 13)}
    assert {len(batch) for batch in batches.values()} == {256, 192}
    assert run.step_ranges[-1].seen.locate(12)[0] > 0, "so that there is a second epoch"
    several = missing = heldout = 0
    long = searched.texts["long"]
    texts = [long[BLOCK_BYTES - 9 : BLOCK_BYTES + 9], long[1000:60_000], PLANTED]
    for text in [*texts, *fragments(searched, 30)]:
        passages = list(find_passages(run, text))
        places = [(one.document.id, one.start) for one in passages]
        assert len(places) == len(set(places)) and set(places) == grep(searched, text)
        missing += not places
        passages = random.Random(1).sample(passages, min(len(passages), 8))
        uses = find_uses(run, passages)
        for one in passages:
            assert one.is_heldout == (one.document.id in searched.heldout)
            heldout += one.is_heldout
            if one.is_heldout:
                continue
            assert list(one.instances) == expected_instances(searched, run, one)
            several += len(one.instances) > 1
        for instance in {i for one in passages for i in one.instances if i is not None}:
            times = [
                (step, position, instance)
                for step, batch in batches.items()
                for position, index in enumerate(batch)
                if index == instance
            ]
            assert uses.get(instance, []) == times
    assert several and missing and heldout


def test_a_planted_text_is_told_with_its_steps_and_the_checkpoint(searched: Searched, capsys):
    run = searched.run()
    words = Tokenizer.from_file(str(searched.folder / "tokenizer.json"))
    seen(str(searched.folder / "run"), text=PLANTED)
    said = capsys.readouterr().out
    one = next(find_passages(run, PLANTED))
    assert said.startswith(f"{one.document.id} (0.gz:8), characters {one.start:,} to ")
    joined: dict[str, str] = {}
    parts = [line for line in said.splitlines() if line.startswith("  its ")][: len(one.instances)]
    for line in said.splitlines()[1:]:
        if not line.startswith("  "):
            break  # the next occurrence
        part, _, rest = line.strip().partition(": step ")
        step, position = int(rest.split(",")[0]), int(rest.split("position ")[1].split()[0])
        ids = list(run.instances(step))[position].tokens.tolist()
        joined.setdefault(part, words.decode(ids, skip_special_tokens=False))
        saved = next(path for at, path in list_saved(run) if at >= step)
        assert rest.endswith(f"; saved then: {saved}")
    assert (
        len(parts) >= 2
        and PLANTED in joined["its beginning"] + joined.get("its middle", "") + joined["its end"]
    )
    (searched.folder / "text.txt").write_text(PLANTED)
    seen(str(searched.folder / "run"), file=searched.folder / "text.txt")
    assert capsys.readouterr().out == said


def test_what_cannot_be_found_or_searched_is_told(searched: Searched, capsys):
    folder = str(searched.folder / "run")
    with pytest.raises(ValueError, match=r"no document of .*'s data has the text nowhere at all"):
        seen(folder, text="nowhere at all")
    with pytest.raises(ValueError, match="a text of at least one character"):
        seen(folder, text="")
    with pytest.raises(ValueError, match="a text in UTF-8"):
        seen(folder, text="\udcff")
    (searched.folder / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad\.txt: expected text in UTF-8"):
        seen(folder, file=searched.folder / "bad.txt")
    held = max((searched.texts[id] for id in searched.heldout), key=len)
    seen(folder, text=held)
    assert "not seen: held out, so evaluated and not trained on" in capsys.readouterr().out


def test_a_frequent_text_is_printed_to_the_limit(searched: Searched, capsys):
    """And what is printed does not depend on the limit."""
    folder = str(searched.folder / "run")
    told = {}
    for limit in (0, 1, 30):
        seen(folder, text="n ", limit=limit)
        told[limit] = capsys.readouterr().out.splitlines()
    places = [line for line in told[0] if not line.startswith("  ")]
    assert len(places) == len(grep(searched, "n ")) > 100
    for limit in (1, 30):
        *lines, last = told[limit]
        assert lines == told[0][: len(lines)] and told[0][len(lines)] == places[limit]
        assert last.startswith(f"the first {limit} occurrences")
    seen(folder, text=PLANTED, limit=len(grep(searched, PLANTED)))
    assert "occurrences" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--limit of 0 or more, found -1"):
        seen(folder, text=PLANTED, limit=-1)


def test_an_index_reads_few_blocks(searched: Searched, tmp_path: Path):
    """And a text that is cut by the end of a block of a long document is in one of them."""
    made = {name: tmp_path / name for name in ("grams", "blocks")}
    facts = text_index.build(documents=searched.folder / "1.documents", **made)
    assert facts["blocks"] >= 3 and made["grams"].stat().st_size < 66_000
    lines = read_texts(searched.folder / "1.documents")
    assert facts["documents"] == len(lines)
    own = list(lines).index("long")
    cut = lines["long"].encode()[BLOCK_BYTES - 8 : BLOCK_BYTES + 8].decode(errors="ignore")
    assert own in find_lines(cut, **made).tolist()
    assert find_lines("short", **made) is None and not len(find_lines("qwxz" * 4, **made))
    empty = tmp_path / "empty.gz"
    write_source(empty, [])
    assert text_index.build(documents=empty, **made)["blocks"] == 0
    assert not len(find_lines("longer", **made))


def test_a_text_over_the_end_of_a_block_is_found(tmp_path: Path):
    """In a long document without repeats, where no other place of a block has its sequences."""
    whole = random.Random(3).randbytes(3 * BLOCK_BYTES).hex()
    write_source(tmp_path / "long.gz", [{"id": "long", "text": whole}])
    made = {name: tmp_path / name for name in ("grams", "blocks")}
    assert text_index.build(documents=tmp_path / "long.gz", **made)["blocks"] == 6
    for end in range(BLOCK_BYTES, len(whole), BLOCK_BYTES):
        assert find_lines(whole[end - 8 : end + 8], **made).tolist() == [0]
