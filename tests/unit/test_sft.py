"""Conversations to instances: ids, labels and drops as OLMo's preparation has them."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pyarrow
import pytest
import torch
from servers import web_server

from olmo.config import ModelConfig
from olmo.corpus import instructions
from olmo.corpus.conversations import (
    download_conversations,
    local_conversations,
    parse_conversation,
)
from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.instructions import InstructionsSection, instances
from olmo.corpus.questions import make_conversations, stdlib_questions
from olmo.corpus.statistics import statistics
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.data.batches import get_labels
from olmo.model import OLMo

EOS, PAD, END = 0, 1, "<|endoftext|>"


def talk(*contents: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": first + turns, **more}


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"What is {i}? It is the number {i}, naïve café.\n" for i in range(200)]
    with gzip.open(folder / "documents.gz", "wt") as file:
        file.writelines(json.dumps({"id": text, "text": text}) + "\n" for text in texts)
    trained_tokenizer.build(
        documents=[folder / "documents.gz"], tokenizer=folder / "tokenizer.json", vocab_size=300
    )
    return folder / "tokenizer.json"


class Made:
    """What the two stages make of some conversations."""

    def __init__(self, folder: Path, tokenizer: Path, lines: list[Any], **options: Any) -> None:
        folder.mkdir()
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / "talks.jsonl").write_text("".join(line + "\n" for line in text))
        local_conversations.build(file=folder / "talks.jsonl", source=folder / "talks.gz")
        names = {name: folder / name for name in ("documents", "heldout", "table")}
        checked = {k: options.pop(k) for k in ("allow", "heldout_share") if k in options}
        self.length = options.get("sequence_length", 64)
        sectioned = {k: options.pop(k) for k in ("sequence_length", "packed") if k in options}
        self.kept = documents.build(
            source=folder / "talks.gz",
            name="talks.gz",
            kind="messages",
            **names,
            config=DocumentsSection(**checked),
        )
        out = {name: folder / name for name in ("tokens", "labels", "index")}
        self.facts = instances.build(
            documents=names["documents"], table=names["table"], tokenizer=tokenizer, **out,
            config=InstructionsSection(**{"sequence_length": 64} | sectioned),
            **{"eos_token_id": EOS, "pad_token_id": PAD} | options,
        )  # fmt: skip
        self.ids = np.fromfile(folder / "tokens", self.facts["dtype"]).reshape(-1, self.length)
        self.labels = np.fromfile(folder / "labels", np.bool_).reshape(-1, self.length)
        self.index = polars.read_parquet(folder / "index")
        self.folder = folder


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path):
    def make(*lines: Any, **options: Any) -> Made:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return Made(folder, tokenizer, list(lines), **options)

    return make


@pytest.fixture
def encode(tokenizer: Path):
    """The ids of a text, by the tokenizers library alone."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer))
    return lambda text: model.encode(text).ids


def expected(encode, *parts: tuple[str, bool], length: int = 64) -> tuple[list[int], list[bool]]:
    """Ids and labels of texts that are learned or not, the last token of each learned one apart."""
    ids, labels = [EOS], [False]
    for text, learned in parts:
        found = encode(text)
        ids += found
        labels += [learned] * len(found)
        if learned:
            labels[-1] = False
    short = max(length - len(ids), 0)
    return (ids + [PAD] * short)[:length], (labels + [False] * short)[:length]


CASES = {
    "one turn": (
        talk("What is 1?", "It is 1."),
        [("<|user|>\n", 0), ("What is 1?\n", 0), ("<|assistant|>\n", 0), (f"It is 1.{END}\n", 1)],
    ),
    "several turns, a system message": (
        talk("a", "b", "c", "d", system="s"),
        [("<|system|>\n", 0), ("s\n", 0), ("<|user|>\n", 0), ("a\n", 0), ("<|assistant|>\n", 0),
         (f"b{END}\n", 1), ("<|user|>\n", 0), ("c\n", 0), ("<|assistant|>\n", 0),
         (f"d{END}\n", 1)],
    ),
    "an empty answer is an end": (
        talk("a", ""),
        [("<|user|>\n", 0), ("a\n", 0), ("<|assistant|>\n", 0), (f"{END}\n", 1)],
    ),
    "white space around it goes, inside it stays": (
        talk(" \n a\n\nb\t", "\n  c  d \n"),
        [("<|user|>\n", 0), ("a\n\nb\n", 0), ("<|assistant|>\n", 0), (f"c  d{END}\n", 1)],
    ),
    "beyond ASCII, and characters that are composed": (
        talk("cafe\u0301 日本語", "naïve 🙂"),
        [("<|user|>\n", 0), ("cafe\u0301 日本語\n", 0), ("<|assistant|>\n", 0),
         (f"naïve 🙂{END}\n", 1)],
    ),
    "the end of text inside a text is that token": (
        talk(f"a {END} b", f"c{END}d"),
        [("<|user|>\n", 0), (f"a {END} b\n", 0), ("<|assistant|>\n", 0), (f"c{END}d{END}\n", 1)],
    ),
    "a question without an answer comes last": (
        talk("a", "b", "c"),
        [("<|user|>\n", 0), ("a\n", 0), ("<|assistant|>\n", 0), (f"b{END}\n", 1),
         ("<|user|>\n", 0), ("c\n", 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels_by_hand(make, encode, name: str):
    conversation, parts = CASES[name]
    made = make(conversation)
    ids, labels = expected(encode, *((text, bool(learned)) for text, learned in parts))
    assert made.ids.tolist() == [ids] and made.labels.tolist() == [labels]
    assert made.facts["labels"] == sum(labels) == made.index["labels"].sum()
    inside = sum(END in message["content"] for message in conversation["messages"])
    assert made.facts["special_tokens_in_text"] == ({END: inside} if inside else {})


def test_long_conversations_are_cut_and_dropped_without_a_label(make, encode):
    long = talk("What is 1?", "It is the number 1. " * 20, id="long")
    late = talk("What is 1? " * 20, "It is 1.", id="late")
    made = make(late, long, talk("only a question", id="question"), sequence_length=48)
    parts = [("<|user|>\n", 0), ("What is 1?\n", 0), ("<|assistant|>\n", 0)]
    parts.append((("It is the number 1. " * 20).strip() + END + "\n", 1))
    ids, labels = expected(encode, *((text, bool(n)) for text, n in parts), length=48)
    assert made.ids.tolist() == [ids] and made.labels.tolist() == [labels] and labels[-1]
    assert made.facts["conversations"] == 3 and made.facts["examples"] == 1
    assert made.facts["drops"] == {"no-label": 2} and made.facts["cut"] == 1
    assert made.index["id"].to_list() == ["late", "long", "question"]
    assert made.index["reason"].to_list() == ["no-label", None, "no-label"]
    ranges = made.index.select("start", "end").rows()
    assert ranges == [(0, 0), (0, 48), (48, 48)]


def test_no_instances_are_a_warning(make, capfd):
    made = make(talk("only a question"), talk("and another"))
    assert made.facts["examples"] == 0 and len(made.ids) == 0
    assert "all 2 conversations" in (said := capfd.readouterr().err) and "assistant" in said
    make(talk("only a question"), talk("What is 1?", "It is 1."))
    assert "left out" not in capfd.readouterr().err


def test_packed_holds_the_same_examples_one_after_the_other(make):
    talks = [talk(f"What is {i}?", "It is " * (i % 5) + "it.", id=str(i)) for i in range(30)]
    plain, packed = (make(*talks, sequence_length=192, packed=p) for p in (False, True))
    assert packed.facts["instances"] == len(packed.ids) < len(plain.ids) / 2
    flat = {made: (made.ids.ravel(), made.labels.ravel()) for made in (plain, packed)}
    for a, b in zip(plain.index.rows(named=True), packed.index.rows(named=True), strict=True):
        for before, after in zip(flat[plain], flat[packed], strict=True):
            one, other = before[a["start"] : a["end"]], after[b["start"] : b["end"]]
            assert one.tolist() == other.tolist() and len(one) == a["length"]
        assert b["start"] // 192 == (b["end"] - 1) // 192, "none lies across two instances"
    covered = np.zeros(packed.ids.size, bool)
    for row in packed.index.rows(named=True):
        covered[row["start"] : row["end"]] = True
    assert (packed.ids.ravel()[~covered] == PAD).all() and not packed.labels.ravel()[~covered].any()


def test_conversations_that_just_fit_are_not_cut_and_share_an_instance(make):
    talks = [talk("What is 1?", "It is 1."), talk("What is 20?", "It is the number 20.")]
    lengths = make(*talks).index["length"].to_list()
    whole = make(talks[1], sequence_length=lengths[1])
    assert whole.facts["cut"] == 0 and whole.labels[0, -2]
    for room, found in ((0, 1), (-1, 2)):
        packed = make(*talks, sequence_length=sum(lengths) + room, packed=True)
        assert packed.facts["instances"] == found


def test_many_token_ids_are_written_as_uint32(make, tokenizer: Path, tmp_path: Path):
    large = json.loads(tokenizer.read_text())
    large["model"]["vocab"] |= {f"word-{n}": n for n in range(400, 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(large))
    conversation = talk("What is 1?", "It is 1.")
    small, wide = (
        make(conversation),
        Made(tmp_path / "wide", tmp_path / "large.json", [conversation]),
    )
    assert (small.facts["dtype"], wide.facts["dtype"]) == ("uint16", "uint32")
    assert wide.ids.tolist() == small.ids.tolist()


def test_the_size_of_an_encoded_batch_changes_nothing(make, monkeypatch: pytest.MonkeyPatch):
    talks = [talk(f"What is {i}?", *["It is."] * (i % 3), id=str(i)) for i in range(20)]
    at_once = make(*talks)
    monkeypatch.setattr(instructions, "ENCODE_BATCH", 3)
    few = make(*talks)
    for name in ("tokens", "labels", "index"):
        assert (at_once.folder / name).read_bytes() == (few.folder / name).read_bytes()


def test_a_second_run_gives_the_same_bytes(make):
    talks = [talk(f"What is {i}?", f"It is {i}.") for i in range(40)]
    one, other = make(*talks, heldout_share=0.3), make(*talks, heldout_share=0.3)
    for name in ("tokens", "labels", "index", "table"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert 0 < one.kept["heldout"] < 40 == one.kept["heldout"] + one.facts["examples"]
    again = make(*reversed(talks), heldout_share=0.3)
    tables = [polars.read_parquet(made.folder / "table") for made in (one, again)]
    sides = [set(table.filter(split="heldout")["id"]) for table in tables]
    assert sides[0] == sides[1], "without ids, what is said decides"


BAD = {
    "bad-json": "{",
    "not-object": "[]",
    "no-messages": {"id": "x", "text": "no"},
    "bad-messages": {"messages": [{"role": "user", "content": None}]},
    "empty-conversation": {"messages": []},
    "unknown-role": {"messages": [{"role": "wizard", "content": "a"}]},
    "surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_malformed_conversation_is_named_and_dropped_where_allowed(make, reason: str):
    good = talk("What is 1?", "It is 1.")
    with pytest.raises(ValueError, match=rf"talks.gz:2: {reason}\nCorrect the source, or allow"):
        make(good, BAD[reason])
    made = make(good, BAD[reason], allow=(reason,))
    assert made.kept["drops"] == {reason: 1} and made.kept["lines"] == 2
    assert made.facts["examples"] == 1


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc00", "a\\ude00\\ud83d"])
@pytest.mark.parametrize("messages, reason", [(None, "no-messages"), ("talk", "surrogate")])
def test_half_a_surrogate_pair_in_an_id(make, half: str, messages: str | None, reason: str):
    good = talk("What is 1?", "It is 1.")
    said = "null" if messages is None else json.dumps(good["messages"])
    bad = f'{{"id": "{half}", "messages": {said}}}'
    with pytest.raises(ValueError, match=rf"talks.gz:2: {reason}\nCorrect the source, or allow"):
        make(good, bad)
    made = make(good, bad, allow=(reason,), heldout_share=0.5)
    assert made.kept["drops"] == {reason: 1}
    dropped = polars.read_parquet(made.folder / "table").filter(split="dropped")
    assert dropped["id"].to_list() == [None] and dropped["line"].to_list() == [2]
    whole = talk("What is 1?", "It is 1.", id="\U0001f600")
    assert make(whole).kept["documents"] == 1


@pytest.mark.parametrize(
    "messages",
    ["hello", [1], ["hello"], {"role": "user"}, [{"role": "user"}], [{"content": "a"}]],
)
def test_bad_messages(messages):
    assert parse_conversation(json.dumps({"messages": messages}).encode())[2] == "bad-messages"
    assert (
        parse_conversation(b'{"messages": [{"role": "user", "content": "\xff"}]}')[2] == "not-utf8"
    )


def test_conversations_are_examples_and_drops(make, tmp_path: Path):
    talks = [talk(f"What is {i}?", f"It is {i}.", id=str(i)) for i in range(20)]
    lines = [*talks, talk("no answer"), BAD["unknown-role"]]
    made = make(*lines, allow=("unknown-role",))
    empty = tmp_path / "none"
    polars.read_parquet(made.folder / "index").clear().write_parquet(empty)
    found = statistics.build(
        tables=[made.folder / "table"],
        tokens=[made.folder / "index"],
        heldout=[empty],
        summary=tmp_path / "summary",
        text=tmp_path / "text",
    )
    assert found["train"]["documents"] == 20
    rows = polars.read_parquet(tmp_path / "summary").filter(file="in all")
    assert rows["documents"].sum() == len(lines)
    assert dict(rows.filter(split="dropped").select("reason", "documents").iter_rows()) == {
        "no-label": 1,
        "unknown-role": 1,
    }


def test_a_tokenizer_that_does_not_end_an_answer_is_refused(make):
    with pytest.raises(ValueError, match="with this tokenizer, or this eos_token_id"):
        make(talk("a", "b"), eos_token_id=5)


def test_conversations_from_json_lines_compressed_or_not_or_parquet(tmp_path: Path):
    talks = [talk("a", "b", id="1"), talk("ü", "d", id="2")]
    text = "".join(json.dumps(talk) + "\n" for talk in talks)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    packed = pyarrow.compress(b"\xef\xbb\xbf" + text.encode(), "zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    polars.DataFrame(talks).write_parquet(tmp_path / "a.parquet")
    read = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        local_conversations.build(file=tmp_path / name, source=tmp_path / "source")
        read.append(lines_of(tmp_path / "source"))
    with web_server(tmp_path) as web:
        out = {"source": tmp_path / "arrived.gz", "part": tmp_path / "part"}
        facts = download_conversations.build(url=f"{web}/a.parquet", **out)
        assert facts["bytes"] == (tmp_path / "a.parquet").stat().st_size
        with pytest.raises(ValueError, match="expected sha256 00"):
            download_conversations.build(url=f"{web}/a.parquet", sha256="00", **out)
    read.append(lines_of(tmp_path / "arrived.gz"))
    assert read == [[{"messages": t["messages"], "id": t["id"]} for t in talks]] * 5
    for content, said in (
        (b"<!doctype html>", "web page"),
        (b"", "an empty file"),
        (b"PAR1 but cut", "expected parquet"),
        (packed[:-5], "damaged zstd"),
        (b"question,answer\na,b\n", "Make a line .*messages.* of each conversation"),
    ):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad: .*{said}"):
            local_conversations.build(file=tmp_path / "bad", source=tmp_path / "source")


MODULE = b'''"""A module."""
class Two:
    """Two things."""
    def _hidden(self): "no"
    def one(self):
        """The first."""
def f():
    """
    What f does.

        code
    """
def _g(): "hidden"
def h(): pass
'''


@pytest.mark.slow
def test_documentation_becomes_questions_and_answers(tmp_path: Path):
    found = list(make_conversations(Path("pack/mod.py"), MODULE))
    assert [talk["id"] for talk in found] == [
        "stdlib-questions/pack.mod",
        "stdlib-questions/pack.mod.Two",
        "stdlib-questions/pack.mod.f",
    ]
    answers = [[m["content"] for m in t["messages"] if m["role"] == "assistant"] for t in found]
    assert answers == [["A module."], ["Two things.", "The first."], ["What f does.\n\n    code"]]
    for talk in found:
        assert parse_conversation(json.dumps(talk).encode())[2] is None
        assert any("`pack.mod" in m["content"] for m in talk["messages"] if m["role"] == "user")
    facts = stdlib_questions.build(folder=tmp_path / "q", shards=2)
    assert facts["conversations"] > 1000
    for file in ("questions-00.json.gz", "questions-01.json.gz"):
        lines = [json.dumps(line).encode() for line in lines_of(tmp_path / "q" / file)]
        assert {parse_conversation(line)[2] for line in lines} == {None}


def test_the_prompt_s_labels_change_neither_loss_nor_gradients(make):
    talks = [talk(f"What is {i}?", f"It is the number {i}.") for i in range(8)]
    made = make(*talks)
    torch.manual_seed(0)
    model = OLMo(ModelConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=300, embedding_size=300,
                             max_sequence_length=64, rope=True, attention_dropout=0.0,
                             residual_dropout=0.0, embedding_dropout=0.0))  # fmt: skip
    ids, mask = torch.from_numpy(made.ids.astype(np.int64)), torch.from_numpy(made.labels)

    def step(labelled: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        labels = get_labels({"input_ids": labelled, "label_mask": mask})
        loss = model(ids, labels=labels).loss.total
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    def equal(labelled: torch.Tensor) -> bool:
        return all(torch.equal(a, b) for a, b in zip(step(ids), step(labelled), strict=True))

    assert 0 < mask.sum() < mask.numel()
    assert equal(torch.where(mask, ids, (ids + 7) % 300)), "every label that is not an answer's"
    changed = ids.clone()
    changed[tuple(mask.nonzero()[0].tolist())] += 1
    assert not equal(changed), "one label of an answer"
